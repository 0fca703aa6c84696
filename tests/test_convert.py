"""`convert_checkpoint`: other libraries' checkpoints keep their numbers, and nothing of theirs is lost in silence."""

import json
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TINY, write_published_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
)

from hub_tools import convert_checkpoint, errors, inspect_package, verify_package
from hub_tools.convert.convert import load_checkpoint
from modeling_gpt2_value import GPT2ValueModel

PROMPT = torch.tensor([[5, 7, 11, 13, 17], [3, 1, 4, 1, 5]])
HEAD = ("v_head.summary.weight", "v_head.summary.bias")


class Original:
    """A GPT-2 and a value head in transformers' and torch's own classes: what each library ran, before we saw it."""

    def __init__(self, *, dtype=torch.float32, seed=0, **fields):
        torch.manual_seed(seed)
        self.body = GPT2LMHeadModel(GPT2Config(**{**TINY, **fields})).eval()
        with torch.no_grad():
            for weight in self.body.parameters():
                if weight.dim() == 2:
                    weight.mul_(5)
        self.body.to(dtype)
        self.head = nn.Linear(TINY["n_embd"], 1)

    @torch.no_grad()
    def numbers(self):
        """Logits `[B, T, V]` and values `[B, T]`."""
        output = self.body(PROMPT, output_hidden_states=True)
        return output.logits, self.head(output.hidden_states[-1].float()).squeeze(-1)

    def head_state(self, names="v_head.summary.{}"):
        return {names.format(name): weight.detach().clone() for name, weight in self.head.state_dict().items()}

    def state(self, prefix="", *, tied=True):
        """The body's tensors; a state dict has the tied `lm_head` twice, a safetensors file once."""
        state = {f"{prefix}{name}": weight.clone() for name, weight in self.body.state_dict().items()}
        return state if tied else {name: weight for name, weight in state.items() if "lm_head" not in name}

    def write(self, folder, files=None, **fields):
        """`config.json`, and each of `files`: its name and its tensors; by default one as TRL writes it."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.body.config.to_diff_dict(), "architectures": ["GPT2LMHeadModel"], **fields}
        (folder / "config.json").write_text(json.dumps(config))
        whole = {"model.safetensors": {**self.state(tied=False), **self.head_state()}}
        for name, state in (whole if files is None else files).items():
            if name.endswith(".safetensors"):
                write_safetensors(state, folder / name)
            else:
                torch.save(state, folder / name)
        return folder


def write_safetensors(state, file):
    save_file({name: weight.contiguous() for name, weight in state.items()}, file, metadata={"format": "pt"})


def write_trl(original, folder):
    original.write(folder)


def write_trl_pickle(original, folder):
    original.write(folder, {"pytorch_model.bin": {**original.state(), **original.head_state()}})


def write_trl_shards(original, folder):
    state = {**original.state(), **original.head_state()}
    weight_map = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(sorted(state))}
    shards = {shard: {n: state[n] for n in state if weight_map[n] == shard} for shard in set(weight_map.values())}
    original.write(folder, shards)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


@torch.no_grad()
def package_numbers(folder):
    output = GPT2ValueModel.from_pretrained(folder, dtype="auto").eval()(PROMPT)
    return output.logits, output.value


def assert_same_numbers(folder, expected):
    for ours, theirs in zip(package_numbers(folder), expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


# Numbers: layout -> the library, the files, fields of config.json


def seed(o):
    masks = {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64).tril(),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    }
    return {**o.state(), **masks, **o.head_state()}


def apart(o, names, file="value_head.safetensors", without=""):
    if without:
        o.head.bias.data.zero_()
    head = {name: weight for name, weight in o.head_state(names).items() if name != without}
    return {"model.safetensors": o.state(tied=False), file: head}


def prefixed(o, prefix, names="v_head.summary.{}"):
    state = {**o.state(), **o.head_state(names)}
    return {"model.safetensors": {f"{prefix}{name}": weight for name, weight in state.items()}}


WAS_SEED = {"architectures": ["GPT2HeadWithValueModel"]}
LAYOUTS = {
    "seed": ("seed", lambda o: {"pytorch_model.bin": seed(o)}, WAS_SEED),
    "TRL": ("trl", lambda o: None, {}),
    "DeepSpeed": ("trl", lambda o: prefixed(o, "module.pretrained_model."), {}),
    "torch.compile": ("trl", lambda o: prefixed(o, "_orig_mod.module."), {}),
    "LLaMA-Factory": ("trl", lambda o: apart(o, "v_head.summary.{}"), {}),
    "TRL's head": ("trl", lambda o: apart(o, "summary.{}", "value_head.bin"), {}),
    "a linear layer": ("linear", lambda o: apart(o, "{}"), {}),
    "OpenRLHF": ("linear", lambda o: prefixed(o, "model.", "value_head.{}"), {}),
    "without a bias": ("linear", lambda o: apart(o, "{}", without="bias"), {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_checkpoint_gives_the_numbers_that_its_own_library_gave(layout, theirs, ours):
    library, files, fields = LAYOUTS[layout]
    original = Original()
    original.write(theirs, files(original), **fields)
    record = convert_checkpoint(theirs, ours)
    assert record.source_format == library
    assert_same_numbers(ours, original.numbers())
    held = [load_file(file) if file.suffix == ".safetensors" else torch.load(file) for file in record.files]
    assert len(record.mapped) + len(record.dropped) == sum(map(len, held))
    assert set(load_file(ours / "model.safetensors")) - set(record.mapped.values()) <= {HEAD[1]}


def test_shards_in_pickles_are_read_and_the_package_verifies(theirs, ours):
    original = Original()
    write_trl_shards(original, theirs)
    convert_checkpoint(theirs, ours)
    assert_same_numbers(ours, original.numbers())
    assert inspect_package(ours).head.shape == (1, TINY["n_embd"])
    verify_package(ours)


@pytest.mark.parametrize("release", ["0.1.0", "0.2.0"])
def test_a_package_of_an_older_release_is_rewritten_with_this_versions_code(release, tmp_path):
    with zipfile.ZipFile(Path(__file__).parent / "released" / f"gpt2-value-{release}.zip") as archive:
        archive.extractall(tmp_path / "old")
    record = convert_checkpoint(tmp_path / "old", tmp_path / "new")
    assert record.source_format == "package"
    logits, values = package_numbers(tmp_path / "old")
    assert values.abs().max() > 0
    assert_same_numbers(tmp_path / "new", (logits, values))
    verify_package(tmp_path / "new")


def test_the_body_keeps_its_dtype_and_its_own_lm_head_and_the_head_is_float32(theirs, ours):
    original = Original(dtype=torch.bfloat16, tie_word_embeddings=False)
    original.write(theirs, {"model.safetensors": {**original.state(), **original.head_state()}})
    convert_checkpoint(theirs, ours)
    weights = load_file(ours / "model.safetensors")
    assert {name for name, weight in weights.items() if weight.dtype == torch.float32} == set(HEAD)
    assert_same_numbers(ours, original.numbers())
    convert_checkpoint(theirs, ours, dtype=torch.float32)
    assert GPT2ValueModel.from_pretrained(ours, dtype="auto").dtype == torch.float32


def test_a_weight_file_alone_takes_its_config_from_where_it_is_told(tmp_path, ours):
    original = Original()
    original.write(tmp_path / "trained-from", {})
    torch.save({**original.state(), **original.head_state()}, tmp_path / "step_100.pt")
    with pytest.raises(errors.PackageError, match="config="):
        convert_checkpoint(tmp_path / "step_100.pt", ours)
    convert_checkpoint(tmp_path / "step_100.pt", ours, config=tmp_path / "trained-from")
    assert_same_numbers(ours, original.numbers())


# What a head does


def test_gpt2s_summary_fields_are_obeyed_by_the_seeds_head_and_by_no_other(tmp_path, ours):
    original = Original()
    logits, values = original.numbers()
    fields = {"summary_activation": "tanh", "summary_first_dropout": 0.25, "summary_last_dropout": 0.5}
    original.write(tmp_path / "trl", **fields, summary_type="attn", summary_use_proj=False)
    original.write(tmp_path / "seed", **fields, **WAS_SEED)
    for library, expected in (("trl", values), ("seed", values.tanh())):
        convert_checkpoint(tmp_path / library, ours)
        assert_same_numbers(ours, (logits, expected))
    original.write(tmp_path / "either", **fields, architectures=None)
    convert_checkpoint(tmp_path / "either", ours, source_format="seed")
    assert_same_numbers(ours, (logits, values.tanh()))


@pytest.mark.parametrize(
    ("head", "fields", "options", "rate"),
    [
        ("v_head.summary.{}", {}, {}, 0.1),  # TRL's default, whatever GPT-2's own field says
        ("v_head.summary.{}", {"summary_first_dropout": 0.7, "summary_dropout_prob": 0.3}, {}, 0.3),
        ("v_head.summary.{}", {}, {"summary_first_dropout": 0.0}, 0.0),
        ("score.{}", {"summary_first_dropout": 0.7}, {}, 0.0),
        ("classifier.{}", {"classifier_dropout": 0.35}, {}, 0.35),
        ("classifier.{}", {}, {}, 0.1),
        ("value_head.{}", {}, {}, 0.0),
    ],
)
def test_the_dropout_of_each_librarys_head_carries_over(head, fields, options, rate, theirs, ours):
    original = Original()
    state = {**original.state(tied=False), **original.head_state(head)}
    original.write(theirs, {"model.safetensors": state}, **fields)
    convert_checkpoint(theirs, ours, **options)
    assert GPT2ValueModel.from_pretrained(ours).config.summary_first_dropout == rate


@pytest.mark.parametrize("model_class", [GPT2ForSequenceClassification, GPT2ForTokenClassification])
def test_a_classifier_of_transformers_becomes_the_value_head(model_class, tmp_path):
    torch.manual_seed(0)
    theirs = model_class(GPT2Config(**TINY, num_labels=1, pad_token_id=0)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    with torch.no_grad():
        expected = theirs(PROMPT).logits.reshape(2, -1)[:, -1]
    torch.testing.assert_close(package_numbers(tmp_path / "ours")[1][:, -1], expected, rtol=0, atol=1e-6)


def test_plain_gpt2_needs_a_word_before_it_gets_a_head(theirs, ours):
    plain = write_published_checkpoint(theirs)
    with pytest.raises(errors.MissingHeadError, match="init_value_head=True"):
        convert_checkpoint(theirs, ours)
    record = convert_checkpoint(theirs, ours, init_value_head=True)
    with torch.no_grad():
        assert_same_numbers(ours, (plain(PROMPT).logits, torch.zeros(PROMPT.shape)))
    assert record.source_format == "gpt2"


TRLX = {"v_head.0.weight": torch.ones(64, 32), "v_head.0.bias": torch.ones(64), "v_head.2.weight": torch.ones(1, 64)}


@pytest.mark.parametrize("head", [TRLX, {"score.weight": torch.ones(3, 32)}, {HEAD[0]: torch.ones(1, 32)}])
def test_a_head_that_cannot_be_kept_is_named_and_the_policy_can_be_kept_alone(head, theirs, ours):
    original = Original()
    original.write(theirs, {"model.safetensors": {**original.state("base_model."), **head}})
    with pytest.raises(errors.ConversionError, match="init_value_head=True") as refusal:
        convert_checkpoint(theirs, ours)
    assert all(f"{name} {list(weight.shape)}" in str(refusal.value) for name, weight in head.items())
    record = convert_checkpoint(theirs, ours, init_value_head=True)
    logits, values = original.numbers()
    assert_same_numbers(ours, (logits, torch.zeros_like(values)))
    assert set(head) <= set(record.dropped)


def test_several_heads_are_ambiguous_and_one_can_be_named_or_all_be_replaced(theirs, ours):
    original, other = Original(), Original(seed=1)
    both = {**original.state(tied=False), **original.head_state(), "score.weight": other.head.weight.detach()}
    original.write(theirs, {"model.safetensors": both})
    with pytest.raises(errors.ConversionError, match="several value heads"):
        convert_checkpoint(theirs, ours)
    record = convert_checkpoint(theirs, ours, source_format="trl")
    assert set(record.dropped) == {"score.weight"}
    assert_same_numbers(ours, original.numbers())
    convert_checkpoint(theirs, ours, init_value_head=True)
    assert not package_numbers(ours)[1].any()


# What is not understood is refused by name, and nothing is written


# what is done to the tensors, the error, and what it names
TENSORS = [
    (lambda state: state.update({"optimizer": torch.ones(1)}), errors.PackageError, "optimizer"),
    (lambda state: state.update({"v_head.extra.weight": torch.ones(1)}), errors.PackageError, "v_head.extra"),
    (lambda state: state.update({f"module.{HEAD[0]}": torch.ones(1)}), errors.ConversionError, "one tensor"),
    (lambda state: state.pop("transformer.wpe.weight"), errors.PackageError, r"transformer\.wpe"),
    (lambda state: state.pop(HEAD[1]), errors.ConversionError, r"v_head\.summary\.weight"),
    (lambda state: state[HEAD[0]].fill_(float("nan")), errors.UnsavableModelError, "v_head"),
    (lambda state: state.update({n: t.double() for n, t in state.items()}), errors.ConversionError, "float64"),
]
FIELDS = [
    {"n_layer": 10**9, "n_positions": 1},
    {"n_head": 5},
    {"summary_dropout_prob": "often"},
    {"hidden_size": 8},
    {"quantization_config": {"load_in_8bit": True}},
    {"model_type": "llama"},
]
OPTIONS = [
    ({"base": "elsewhere"}, errors.OptionsError, "base="),
    ({"source_format": "trlx"}, errors.OptionsError, "trlx"),
    ({"source_format": "linear"}, errors.ConversionError, "source_format"),
    ({"revision": "main"}, errors.OptionsError, "revision"),
]


@pytest.mark.parametrize(("edit", "error", "match"), TENSORS)
def test_tensors_that_are_not_understood_are_refused_by_name(edit, error, match, theirs, ours):
    original = Original()
    state = {**original.state(), **original.head_state()}
    edit(state)
    original.write(theirs, {"model.safetensors": state})
    with pytest.raises(error, match=match):
        convert_checkpoint(theirs, ours)
    assert not ours.exists()


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_a_field_that_cannot_be_is_refused_by_name(fields, theirs, ours):
    Original().write(theirs, **fields)
    name = next(iter(fields))
    with pytest.raises(errors.PackageError, match=f"{name}|num_heads"):  # as transformers 4 calls n_head
        convert_checkpoint(theirs, ours)


@pytest.mark.parametrize(("options", "error", "match"), OPTIONS)
def test_an_option_without_a_use_is_refused(options, error, match, theirs, ours):
    Original().write(theirs)
    with pytest.raises(error, match=match):
        convert_checkpoint(theirs, ours, **options)


def test_two_files_that_may_differ_are_ambiguous_and_either_can_be_named(theirs, ours):
    original, older = Original(), Original(seed=1)
    write_trl(original, theirs)
    write_trl_pickle(older, theirs)
    with pytest.raises(errors.ConversionError, match=r"model\.safetensors and pytorch_model\.bin"):
        convert_checkpoint(theirs, ours)
    for name, expected in (("model.safetensors", original), ("pytorch_model.bin", older)):
        convert_checkpoint(theirs / name, ours)
        assert_same_numbers(ours, expected.numbers())


def test_an_empty_folder_and_a_missing_one_are_named(tmp_path, ours):
    for source in (tmp_path, tmp_path / "nowhere", tmp_path / ("x" * 5000)):
        with pytest.raises(errors.PackageError, match=str(source)[:200]):
            convert_checkpoint(source, ours)


# Around it


def test_the_source_cannot_be_the_target_unless_it_is_a_package(theirs, ours):
    write_trl(Original(), theirs)
    convert_checkpoint(theirs, ours)
    for source in (theirs, theirs / "model.safetensors"):
        with pytest.raises(errors.FolderRefusedError, match="would be lost"):
            convert_checkpoint(source, theirs)
    convert_checkpoint(ours, ours)
    verify_package(ours)


def test_the_tokenizer_and_the_generation_config_travel(tiny_tokenizer, theirs, ours):
    write_trl(Original(), theirs)
    tiny_tokenizer.save_pretrained(theirs)
    (theirs / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7, "eos_token_id": 0}))
    convert_checkpoint(theirs, ours)
    assert inspect_package(ours).tokenizer is not None
    assert GPT2ValueModel.from_pretrained(ours).generation_config.max_new_tokens == 7
    convert_checkpoint(theirs, ours, tokenizer=False)
    assert inspect_package(ours).tokenizer is None


def test_a_checkpoint_in_memory_generates_by_its_generation_config(theirs):
    write_trl(Original(), theirs)
    fields = {"_from_model_config": True, "max_new_tokens": 7, "eos_token_id": None}
    (theirs / "generation_config.json").write_text(json.dumps(fields))
    model = load_checkpoint(theirs).model
    assert model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), pad_token_id=0).shape == (2, 5 + 7)


def test_a_tokenizer_that_cannot_be_loaded_is_refused_and_can_be_replaced(tiny_tokenizer, theirs, ours):
    write_trl(Original(), theirs)
    (theirs / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.TokenizerMismatchError, match="tokenizer="):
        convert_checkpoint(theirs, ours)
    convert_checkpoint(theirs, ours, tokenizer=tiny_tokenizer)
    assert inspect_package(ours).tokenizer is not None
