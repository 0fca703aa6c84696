"""`convert_checkpoint`: other libraries' checkpoints keep their numbers, and nothing of theirs is lost in silence."""

import hashlib
import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import TINY, make_tiny_model, write_published_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
)

from hub_tools import convert_checkpoint, errors, inspect_package, save_package, verify_package
from modeling_gpt2_value import GPT2ValueModel

PROMPT = torch.tensor([[5, 7, 11, 13, 17], [3, 1, 4, 1, 5]])
HEAD = ("v_head.summary.weight", "v_head.summary.bias")


class Original:
    """A GPT-2 and a value head in transformers' and torch's own classes: what each library ran, before we saw it."""

    def __init__(self, *, dtype=torch.float32, head_dropout=0.1, seed=0, **fields):
        torch.manual_seed(seed)
        quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        self.body = GPT2LMHeadModel(GPT2Config(**{**TINY, **quiet, **fields})).eval()
        with torch.no_grad():
            for weight in self.body.parameters():
                if weight.dim() == 2:
                    weight.mul_(5)
        self.body.to(dtype)
        self.head = nn.Linear(TINY["n_embd"], 1)
        self.dropout = nn.Dropout(head_dropout)

    @torch.no_grad()
    def numbers(self, *, bias=True):
        """Logits `[B, T, V]` and values `[B, T]`."""
        output = self.body(PROMPT, output_hidden_states=True)
        values = self.head(output.hidden_states[-1].float()).squeeze(-1)
        return output.logits, values if bias else values - self.head.bias

    @torch.no_grad()
    def training_values(self):
        hidden = self.body(PROMPT, output_hidden_states=True).hidden_states[-1]
        torch.manual_seed(1)
        return self.head(self.dropout.train()(hidden.float())).squeeze(-1)

    def head_state(self, names="v_head.summary.{}"):
        return {names.format(name): weight.detach().clone() for name, weight in self.head.state_dict().items()}

    def state(self, prefix="", *, tied=True):
        """The body's tensors; a state dict has the tied `lm_head` twice, a safetensors file once."""
        state = {f"{prefix}{name}": weight.clone() for name, weight in self.body.state_dict().items()}
        return state if tied else {name: weight for name, weight in state.items() if "lm_head" not in name}

    def masks(self):
        n = TINY["n_positions"]
        causal = torch.ones(n, n, dtype=torch.uint8).tril().view(1, 1, n, n)
        return {
            f"transformer.h.{layer}.attn.{name}": buffer
            for layer in range(TINY["n_layer"])
            for name, buffer in (("bias", causal), ("masked_bias", torch.tensor(-1e4)))
        }

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
                torch.save(state, folder / name.removeprefix("old "), _use_new_zipfile_serialization=name[:4] != "old ")
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
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@torch.no_grad()
def package_numbers(folder):
    output = GPT2ValueModel.from_pretrained(folder, dtype="auto").eval()(PROMPT)
    return output.logits, output.value


def assert_same_numbers(folder, expected):
    for ours, theirs in zip(package_numbers(folder), expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def edit_config(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


# Numbers: layout -> the library, the files, fields of config.json


def seed(o):
    return {**o.state(), **o.masks(), **o.head_state()}


def apart(o, names, file="value_head.safetensors"):
    return {"model.safetensors": o.state(tied=False), file: o.head_state(names)}


def prefixed(o, prefix, names="v_head.summary.{}"):
    state = {**o.state(), **o.head_state(names)}
    return {"model.safetensors": {f"{prefix}{name}": weight for name, weight in state.items()}}


WAS_SEED = {"architectures": ["GPT2HeadWithValueModel"]}
LAYOUTS = {
    "seed": ("seed", lambda o: {"pytorch_model.bin": seed(o)}, WAS_SEED),
    "torch before 1.6": ("seed", lambda o: {"old pytorch_model.bin": seed(o)}, WAS_SEED),
    "TRL": ("trl", lambda o: None, {}),
    "DeepSpeed": ("trl", lambda o: prefixed(o, "module.pretrained_model."), {}),
    "torch.compile": ("trl", lambda o: prefixed(o, "_orig_mod.module."), {}),
    "PEFT, merged": ("trl", lambda o: prefixed(o, "base_model.model."), {}),
    "LLaMA-Factory": ("trl", lambda o: apart(o, "v_head.summary.{}"), {}),
    "TRL's head": ("trl", lambda o: apart(o, "summary.{}", "value_head.bin"), {}),
    "a linear layer": ("linear", lambda o: apart(o, "{}"), {}),
    "OpenRLHF": ("linear", lambda o: prefixed(o, "model.", "value_head.{}"), {}),
    "transformers' SequenceSummary": (
        "seed",
        lambda o: prefixed(o, "", "multiple_choice_head.summary.{}"),
        {"architectures": ["GPT2DoubleHeadsModel"]},
    ),
}


@pytest.mark.shows("TRL", "converted checkpoints give their library's numbers")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_checkpoint_gives_the_numbers_that_its_own_library_gave(layout, tmp_path):
    library, files, fields = LAYOUTS[layout]
    original = Original()
    original.write(tmp_path / "theirs", files(original), **fields)
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert record.source_format == library
    assert_same_numbers(tmp_path / "ours", original.numbers())
    assert not set(record.mapped) & set(record.dropped)
    assert all(record.dropped.values())
    held = {
        key if len(record.files) == 1 or file.name.startswith("model") else f"{file.name}:{key}"
        for file in record.files
        for key in (load_file(file) if file.suffix == ".safetensors" else torch.load(file))
    }
    assert set(record.mapped) | set(record.dropped) == held
    assert set(record.mapped.values()) == set(load_file(tmp_path / "ours" / "model.safetensors"))


def test_a_head_without_a_bias_has_none(tmp_path):
    original = Original()
    state = {**original.state(tied=False), "value_head.weight": original.head.weight.detach()}
    original.write(tmp_path / "theirs", {"model.safetensors": state})
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert_same_numbers(tmp_path / "ours", original.numbers(bias=False))
    assert any("has no bias" in note for note in record.notes)


def test_shards_in_pickles_are_read_and_the_package_verifies(tmp_path):
    original = Original()
    write_trl_shards(original, tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert_same_numbers(tmp_path / "ours", original.numbers())
    assert inspect_package(tmp_path / "ours").head.shape == (1, TINY["n_embd"])
    verify_package(tmp_path / "ours")


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


def test_what_a_packages_head_does_is_kept(tmp_path):
    fields = {"summary_activation": "tanh", "summary_first_dropout": 0.25, "detach_value_head": True}
    save_package(make_tiny_model(**fields), tmp_path / "old")
    convert_checkpoint(tmp_path / "old", tmp_path / "new")
    assert_same_numbers(tmp_path / "new", package_numbers(tmp_path / "old"))
    config = GPT2ValueModel.from_pretrained(tmp_path / "new").config
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_body_keeps_its_dtype_and_the_head_is_float32(dtype, tmp_path):
    original = Original(dtype=dtype)
    original.write(tmp_path / "theirs")
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert record.dtype == dtype
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert {name for name, weight in weights.items() if weight.dtype == torch.float32} == set(HEAD)
    assert_same_numbers(tmp_path / "ours", original.numbers())
    assert convert_checkpoint(tmp_path / "theirs", tmp_path / "wide", dtype=torch.float32).dtype == torch.float32


def test_a_mixed_body_becomes_the_widest_dtype_and_an_untied_lm_head_is_kept(tmp_path):
    original = Original(dtype=torch.bfloat16, tie_word_embeddings=False)
    original.body.transformer.ln_f.float()
    original.write(tmp_path / "theirs", {"model.safetensors": {**original.state(), **original.head_state()}})
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert record.dtype == torch.float32
    assert any("mixes" in note for note in record.notes)
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert torch.equal(weights["lm_head.weight"], original.body.lm_head.weight.float())


def test_a_weight_file_alone_takes_its_config_from_where_it_is_told(tmp_path):
    original = Original()
    original.write(tmp_path / "trained-from", {})
    torch.save({**original.state(), **original.head_state()}, tmp_path / "step_100.pt")
    (tmp_path / "last.pt").symlink_to(tmp_path / "step_100.pt")
    with pytest.raises(errors.PackageError, match="config="):
        convert_checkpoint(tmp_path / "last.pt", tmp_path / "ours")
    convert_checkpoint(tmp_path / "last.pt", tmp_path / "ours", config=tmp_path / "trained-from")
    assert_same_numbers(tmp_path / "ours", original.numbers())


# What a head does


@pytest.mark.parametrize(
    ("fields", "options", "rate"),
    [
        ({}, {}, 0.1),  # TRL's default, whatever GPT-2's own field says
        ({"summary_first_dropout": 0.7, "summary_dropout_prob": 0.3}, {}, 0.3),
        ({}, {"summary_first_dropout": 0.4}, 0.4),
        ({}, {"summary_first_dropout": 0.0}, 0.0),
    ],
)
def test_trls_head_dropout_carries_over_to_training_mode(fields, options, rate, tmp_path):
    original = Original(head_dropout=rate)
    original.write(tmp_path / "theirs", **fields)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", **options)
    model = GPT2ValueModel.from_pretrained(tmp_path / "ours").train()
    torch.manual_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).value, original.training_values(), rtol=0, atol=1e-6)


def test_gpt2s_summary_fields_are_obeyed_by_the_seeds_head_and_by_no_other(tmp_path):
    original = Original()
    logits, values = original.numbers()
    fields = {"summary_activation": "tanh", "summary_first_dropout": 0.25, "summary_last_dropout": 0.5}
    original.write(tmp_path / "trl", **fields, summary_type="attn", summary_use_proj=False)
    original.write(tmp_path / "seed", **fields, **WAS_SEED)
    for library, expected in (("trl", values), ("seed", values.tanh())):
        convert_checkpoint(tmp_path / library, tmp_path / "ours")
        assert_same_numbers(tmp_path / "ours", (logits, expected))
    config = GPT2ValueModel.from_pretrained(tmp_path / "ours").config
    assert (config.summary_first_dropout, config.summary_last_dropout) == (0.25, 0.5)
    original.write(tmp_path / "either", **fields, architectures=None)
    with pytest.raises(errors.ConversionError, match="source_format"):  # only a person knows
        convert_checkpoint(tmp_path / "either", tmp_path / "ours")
    for library, expected in (("trl", values), ("seed", values.tanh())):
        convert_checkpoint(tmp_path / "either", tmp_path / "ours", source_format=library)
        assert_same_numbers(tmp_path / "ours", (logits, expected))


@pytest.mark.parametrize(
    ("model_class", "fields", "rate"),
    [
        (GPT2ForSequenceClassification, {}, 0.0),
        (GPT2ForTokenClassification, {"classifier_dropout": 0.35}, 0.35),
        (GPT2ForTokenClassification, {}, 0.1),
        (GPT2DoubleHeadsModel, {"summary_first_dropout": 0.2}, 0.2),
    ],
)
def test_a_classifier_of_transformers_becomes_the_value_head(model_class, fields, rate, tmp_path):
    torch.manual_seed(0)
    theirs = model_class(GPT2Config(**TINY, num_labels=1, pad_token_id=0, **fields)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    logits, values = package_numbers(tmp_path / "ours")
    with torch.no_grad():
        if model_class is GPT2DoubleHeadsModel:
            expected = theirs(PROMPT, mc_token_ids=torch.full((2,), 4)).mc_logits
        else:
            expected = theirs(PROMPT).logits.reshape(2, -1)[:, -1]
        hidden = theirs.transformer(PROMPT).last_hidden_state
    torch.testing.assert_close(values[:, -1], expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits, hidden @ theirs.transformer.wte.weight.T, rtol=0, atol=1e-5)
    assert GPT2ValueModel.from_pretrained(tmp_path / "ours").config.summary_first_dropout == rate


@pytest.mark.parametrize("safetensors", [True, False])
def test_plain_gpt2_needs_a_word_before_it_gets_a_head(safetensors, tmp_path):
    plain = write_published_checkpoint(tmp_path / "theirs", safetensors=safetensors)
    with pytest.raises(errors.MissingHeadError, match="init_value_head=True"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", init_value_head=True)
    with torch.no_grad():
        assert_same_numbers(tmp_path / "ours", (plain(PROMPT).logits, torch.zeros(PROMPT.shape)))
    assert record.source_format == "gpt2"


TRLX = {"v_head.0.weight": torch.ones(64, 32), "v_head.0.bias": torch.ones(64), "v_head.2.weight": torch.ones(1, 64)}


@pytest.mark.parametrize("head", [TRLX, {"score.weight": torch.ones(3, 32)}, {HEAD[0]: torch.ones(1, 32)}])
def test_a_head_that_cannot_be_kept_is_named_and_the_policy_can_be_kept_alone(head, tmp_path):
    original = Original()
    original.write(tmp_path / "theirs", {"model.safetensors": {**original.state("base_model."), **head}})
    with pytest.raises(errors.ConversionError, match="init_value_head=True") as refusal:
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert all(f"{name} {list(weight.shape)}" in str(refusal.value) for name, weight in head.items())
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", init_value_head=True)
    logits, values = original.numbers()
    assert_same_numbers(tmp_path / "ours", (logits, torch.zeros_like(values)))
    assert set(head) <= set(record.dropped)


def test_two_heads_that_differ_are_ambiguous_and_one_can_be_named(tmp_path):
    original, other = Original(), Original(seed=1)
    both = {**original.state(tied=False), **original.head_state(), "score.weight": other.head.weight.detach()}
    original.write(tmp_path / "theirs", {"model.safetensors": both})
    original.write(tmp_path / "beside", {**apart(original, "v_head.summary.{}"), "value_head.bin": other.head_state()})
    for name, match in (("theirs", "two value heads that differ: .*score"), ("beside", r"value_head\.bin")):
        with pytest.raises(errors.ConversionError, match=match):
            convert_checkpoint(tmp_path / name, tmp_path / "ours")
    for library, expected in (("trl", original.numbers()), ("sequence-classification", None)):
        record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", source_format=library)
        assert any("a second value head" in why for why in record.dropped.values())
        if expected:
            assert_same_numbers(tmp_path / "ours", expected)


# What is not understood is refused by name, and nothing is written


def without(name):
    return lambda state: state.pop(name)


def put(**tensors):
    return lambda state: state.update({name.replace("_", "."): tensor for name, tensor in tensors.items()})


def spoil(name, number):
    return lambda state: state[name].view(-1)[3:4].fill_(number)


def other_mask(state):
    state |= {name: mask.clone() for name, mask in Original().masks().items()}
    state["transformer.h.0.attn.bias"][0, 0, 0, 3] = 1  # the first token would see the fourth


def same(state):
    pass


# what is done to the tensors, fields of config.json, options, the error, and what it names
REFUSED = [
    (put(optimizer=torch.ones(1)), {}, {}, errors.PackageError, "unknown tensors: optimizer"),
    (put(critic_weight=torch.ones(1, 32)), {}, {}, errors.PackageError, r"unknown tensors: critic\.weight"),
    (lambda state: state.update({"v_head.extra.weight": torch.ones(1)}), {}, {}, errors.PackageError, "v_head.extra"),
    (without("transformer.wpe.weight"), {}, {}, errors.PackageError, r"missing tensors: transformer\.wpe"),
    (without("v_head.summary.bias"), {}, {}, errors.ConversionError, r"v_head\.summary\.bias"),
    (spoil("lm_head.weight", 9.0), {}, {}, errors.ConversionError, "tie_word_embeddings"),
    (spoil("transformer.h.0.mlp.c_fc.weight", float("nan")), {}, {}, errors.UnsavableModelError, "c_fc"),
    (spoil("v_head.summary.weight", float("inf")), {}, {}, errors.UnsavableModelError, "v_head"),
    (put(lm__head_weight=torch.ones(1)), {}, {}, errors.PackageError, "unknown"),
    (other_mask, {}, {}, errors.ConversionError, "causal"),
    (lambda state: state.update({n: t.double() for n, t in state.items()}), {}, {}, errors.ConversionError, "float64"),
    (same, {"n_embd": 64}, {}, errors.PackageError, "config"),
    (same, {"vocab_size": 97}, {}, errors.PackageError, "config"),
    (same, {"n_layer": 1}, {}, errors.PackageError, "config"),
    (same, {"n_layer": 10**9}, {}, errors.PackageError, "config"),
    (same, {"n_head": 5}, {}, errors.PackageError, r"config\.json"),
    (same, {"n_embd": "32"}, {}, errors.PackageError, "n_embd"),
    (same, {"summary_dropout_prob": 7}, {}, errors.PackageError, "summary_dropout_prob"),
    (same, {"activation_function": "os.system"}, {}, errors.PackageError, "activation_function"),
    (same, {"architectures": 5}, {}, errors.PackageError, "architectures"),
    (same, {"hidden_size": 8}, {}, errors.PackageError, "hidden_size"),
    (same, {"quantization_config": {"load_in_8bit": True}}, {}, errors.PackageError, "quantization_config"),
    (same, {"model_type": "llama"}, {}, errors.PackageError, "llama"),
    (same, {}, {"base": "elsewhere"}, errors.OptionsError, "base="),
    (same, {}, {"init_value_head": True}, errors.OptionsError, "init_value_head"),
    (same, {}, {"source_format": "trlx"}, errors.OptionsError, "trlx"),
    (same, {}, {"source_format": "linear"}, errors.ConversionError, "source_format"),
    (same, {}, {"revision": "main"}, errors.OptionsError, "revision"),
]


@pytest.mark.parametrize(("edit", "fields", "options", "error", "match"), REFUSED)
def test_what_is_not_understood_is_refused_by_name_and_nothing_is_written(
    edit, fields, options, error, match, tmp_path
):
    original = Original()
    state = {**original.state(), **original.head_state()}
    edit(state)
    original.write(tmp_path / "theirs", {"model.safetensors": state}, **fields)
    with pytest.raises(error, match=match):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", **options)
    assert not (tmp_path / "ours").exists()


def test_the_dump_of_an_unmerged_adapter_is_refused_and_the_way_out_is_named(tmp_path):
    original = Original()
    name = "pretrained_model.transformer.h.0.attn.c_attn"
    dump = {f"{name}.base_layer.weight": torch.ones(32, 96), f"{name}.lora_A.default.weight": torch.ones(4, 32)}
    original.write(tmp_path / "theirs", {"model.safetensors": {**original.head_state(), **dump}})
    with pytest.raises(errors.PackageError, match="merge_and_unload"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_two_files_that_may_differ_are_ambiguous_and_either_can_be_named(tmp_path):
    original, older = Original(), Original(seed=1)
    write_trl(original, tmp_path / "theirs")
    write_trl_pickle(older, tmp_path / "theirs")
    with pytest.raises(errors.ConversionError, match=r"model\.safetensors and pytorch_model\.bin"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    for name, expected in (("model.safetensors", original), ("pytorch_model.bin", older)):
        convert_checkpoint(tmp_path / "theirs" / name, tmp_path / "ours")
        assert_same_numbers(tmp_path / "ours", expected.numbers())


def test_an_empty_folder_and_a_missing_one_are_named(tmp_path):
    for source in (tmp_path, tmp_path / "nowhere", tmp_path / ("x" * 5000)):
        with pytest.raises(errors.PackageError, match=str(source)[:200]):
            convert_checkpoint(source, tmp_path / "ours")


def test_offline_a_repository_of_the_hub_is_refused_at_once(tmp_path):
    with pytest.raises(errors.HubUnavailableError, match="nobody/nothing"):
        convert_checkpoint("nobody/nothing", tmp_path / "ours", init_value_head=True)


# Around it


def test_the_source_is_left_as_it_is_and_cannot_be_the_target(tmp_path):
    write_trl(Original(), tmp_path / "theirs")

    def contents():
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "theirs").iterdir()}

    before = contents()
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    for source in (tmp_path / "theirs", tmp_path / "theirs" / "model.safetensors"):
        with pytest.raises(errors.FolderRefusedError, match="would be lost"):
            convert_checkpoint(source, tmp_path / "theirs")
    assert contents() == before
    convert_checkpoint(tmp_path / "ours", tmp_path / "ours")  # a package may be
    verify_package(tmp_path / "ours")


def test_the_tokenizer_and_the_generation_config_travel(tiny_tokenizer, tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    tiny_tokenizer.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7, "eos_token_id": 0}))
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert json.loads(json.dumps(record.to_json()))["tokenizer"] == record.tokenizer
    assert inspect_package(tmp_path / "ours").tokenizer is not None
    assert GPT2ValueModel.from_pretrained(tmp_path / "ours").generation_config.max_new_tokens == 7
    assert convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", tokenizer=False).tokenizer is None


def test_a_tokenizer_that_cannot_be_loaded_is_refused_and_can_be_replaced(tiny_tokenizer, tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.TokenizerMismatchError, match="tokenizer="):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", tokenizer=tiny_tokenizer)
    assert record.tokenizer == type(tiny_tokenizer).__name__


class Payload:
    """Unpickling it writes a file: what an attacker's would do is no different."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)
