"""`convert_checkpoint`: other libraries' checkpoints keep their numbers, and nothing of theirs is lost in silence."""

import hashlib
import json
import os
import pickle
from dataclasses import replace

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
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from hub_tools import convert_checkpoint, errors, inspect_package, verify_package
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
    def numbers(self):
        """Logits `[B, T, V]` and values `[B, T]`."""
        output = self.body(PROMPT, output_hidden_states=True)
        return output.logits, self.head(output.hidden_states[-1].float()).squeeze(-1)

    @torch.no_grad()
    def training_values(self):
        hidden = self.body(PROMPT, output_hidden_states=True).hidden_states[-1]
        torch.manual_seed(1)
        return self.head(self.dropout.train()(hidden.float())).squeeze(-1)

    def head_state(self):
        return {f"v_head.summary.{name}": weight.detach().clone() for name, weight in self.head.state_dict().items()}

    def state(self, prefix=""):
        """The body's tensors as a state dict has them: the tied `lm_head` is there twice."""
        return {f"{prefix}{name}": weight.clone() for name, weight in self.body.state_dict().items()}

    def masks(self):
        n = TINY["n_positions"]
        causal = torch.ones(n, n, dtype=torch.uint8).tril().view(1, 1, n, n)
        return {
            f"transformer.h.{layer}.attn.{name}": buffer
            for layer in range(TINY["n_layer"])
            for name, buffer in (("bias", causal), ("masked_bias", torch.tensor(-1e4)))
        }

    def write_config(self, folder, **fields):
        config = {**self.body.config.to_diff_dict(), "architectures": ["GPT2LMHeadModel"], **fields}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))


def write_safetensors(state, file):
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: weight.contiguous() for name, weight in state.items()}, file, metadata={"format": "pt"})


def write_seed(original, folder):
    """`torch.save(model.state_dict())` of the notebook's class, under the transformers of its time."""
    original.write_config(folder, architectures=["GPT2HeadWithValueModel"])
    torch.save({**original.state(), **original.masks(), **original.head_state()}, folder / "pytorch_model.bin")


def write_seed_legacy_pickle(original, folder):
    """The file format of torch before 1.6."""
    write_seed(original, folder)
    state = torch.load(folder / "pytorch_model.bin", weights_only=True)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def write_trl(original, folder):
    """TRL's `save_pretrained`: the tied lm_head is left out."""
    original.write_config(folder)
    state = {**original.state(), **original.head_state()}
    del state["lm_head.weight"]
    write_safetensors(state, folder / "model.safetensors")


def write_trl_pickle(original, folder):
    """TRL before 2024, and `torch.save(model.state_dict())`."""
    original.write_config(folder)
    torch.save({**original.state(), **original.head_state()}, folder / "pytorch_model.bin")


def write_trl_shards(original, folder):
    original.write_config(folder)
    state = {**original.state(), **original.head_state()}
    names = sorted(state)
    weight_map = {name: f"pytorch_model-0000{1 + i % 2}-of-00002.bin" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        torch.save({name: state[name] for name in names if weight_map[name] == shard}, folder / shard)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def write_trl_wrapper(original, folder):
    """The wrapper's own names, as DeepSpeed and FSDP gather them."""
    original.write_config(folder)
    torch.save({**original.state("pretrained_model."), **original.head_state()}, folder / "pytorch_model.bin")


def write_trl_separate_head(original, folder):
    original.body.save_pretrained(folder)
    write_safetensors(original.head_state(), folder / "value_head.safetensors")


LAYOUTS = {
    "seed": write_seed,
    "seed-legacy-pickle": write_seed_legacy_pickle,
    "trl": write_trl,
    "trl-pickle": write_trl_pickle,
    "trl-shards": write_trl_shards,
    "trl-wrapper": write_trl_wrapper,
    "trl-separate-head": write_trl_separate_head,
}


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


# Numbers


@pytest.mark.shows("TRL", "converted checkpoints give their library's numbers")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_converted_checkpoint_gives_the_numbers_that_its_own_library_gave(layout, tmp_path):
    original = Original()
    LAYOUTS[layout](original, tmp_path / "theirs")
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert record.source_format == layout.partition("-")[0]
    assert_same_numbers(tmp_path / "ours", original.numbers())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_is_either_mapped_or_dropped_with_a_reason(layout, tmp_path):
    LAYOUTS[layout](Original(), tmp_path / "theirs")
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    held = set()
    for file in record.files:
        shards = set(json.loads(file.read_text())["weight_map"].values()) if file.suffix == ".json" else {file.name}
        for name in shards:
            beside = file.parent / name
            read = load_file if beside.suffix == ".safetensors" else torch.load
            held |= {f"{name}:{key}" if name.startswith("value_head") else key for key in read(beside)}
    assert set(record.mapped) | set(record.dropped) == held
    assert not set(record.mapped) & set(record.dropped)
    assert all(record.dropped.values())
    assert set(record.mapped.values()) == set(load_file(tmp_path / "ours" / "model.safetensors"))


def test_a_converted_checkpoint_is_a_package_that_verifies(tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert inspect_package(tmp_path / "ours").head.shape == (1, TINY["n_embd"])
    verify_package(tmp_path / "ours")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_body_keeps_its_dtype_and_the_head_is_float32(dtype, tmp_path):
    original = Original(dtype=dtype)
    write_trl(original, tmp_path / "theirs")
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert record.dtype == dtype
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    assert {name for name, weight in weights.items() if weight.dtype == torch.float32} == set(HEAD)
    assert_same_numbers(tmp_path / "ours", original.numbers())


def test_a_mixed_body_becomes_the_widest_dtype_and_the_record_says_so(tmp_path):
    original = Original(dtype=torch.bfloat16)
    original.body.transformer.ln_f.float()
    write_trl_pickle(original, tmp_path / "theirs")
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert record.dtype == torch.float32
    assert any("mixes" in note for note in record.notes)


def test_an_untied_lm_head_is_kept(tmp_path):
    original = Original(tie_word_embeddings=False)
    assert not torch.equal(original.body.lm_head.weight, original.body.transformer.wte.weight)
    write_trl_pickle(original, tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert_same_numbers(tmp_path / "ours", original.numbers())


def test_a_weight_file_alone_takes_its_config_from_where_it_is_told(tmp_path):
    original = Original()
    original.write_config(tmp_path / "trained-from")
    torch.save({**original.state(), **original.head_state()}, tmp_path / "step_100.pt")
    with pytest.raises(errors.PackageError, match="config="):
        convert_checkpoint(tmp_path / "step_100.pt", tmp_path / "ours")
    convert_checkpoint(tmp_path / "step_100.pt", tmp_path / "ours", config=tmp_path / "trained-from")
    assert_same_numbers(tmp_path / "ours", original.numbers())


# The head


@pytest.mark.parametrize(
    ("fields", "options", "rate"),
    [
        ({}, {}, 0.1),  # TRL's default, whatever GPT-2's own field says
        ({"summary_first_dropout": 0.7}, {}, 0.1),
        ({"summary_dropout_prob": 0.3}, {}, 0.3),
        ({}, {"summary_first_dropout": 0.4}, 0.4),
        ({}, {"summary_first_dropout": 0.0}, 0.0),
    ],
)
def test_trls_head_dropout_carries_over_to_training_mode(fields, options, rate, tmp_path):
    original = Original(head_dropout=rate)
    write_trl(original, tmp_path / "theirs")
    edit_config(tmp_path / "theirs", **fields)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", **options)
    model = GPT2ValueModel.from_pretrained(tmp_path / "ours").train()
    torch.manual_seed(1)
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).value, original.training_values(), rtol=0, atol=1e-6)


def test_trls_head_ignores_gpt2s_summary_fields(tmp_path):
    original = Original()
    write_trl(original, tmp_path / "theirs")
    edit_config(tmp_path / "theirs", summary_activation="tanh", summary_type="attn", summary_use_proj=False)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert_same_numbers(tmp_path / "ours", original.numbers())


def test_the_seeds_head_obeys_gpt2s_summary_fields(tmp_path):
    original = Original()
    write_seed(original, tmp_path / "theirs")
    edit_config(tmp_path / "theirs", summary_activation="tanh", summary_first_dropout=0.25, summary_last_dropout=0.5)
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    logits, values = original.numbers()
    assert_same_numbers(tmp_path / "ours", (logits, values.tanh()))
    config = GPT2ValueModel.from_pretrained(tmp_path / "ours").config
    assert (config.summary_first_dropout, config.summary_last_dropout) == (0.25, 0.5)


def test_where_only_a_person_knows_the_library_a_person_is_asked(tmp_path):
    original = Original()
    write_trl(original, tmp_path / "theirs")
    edit_config(tmp_path / "theirs", architectures=None, summary_activation="tanh")
    with pytest.raises(errors.ConversionError, match="source_format"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    logits, values = original.numbers()
    for source_format, expected in (("trl", values), ("seed", values.tanh())):
        record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", source_format=source_format)
        assert record.source_format == source_format
        assert_same_numbers(tmp_path / "ours", (logits, expected))


def test_a_reward_model_for_sequences_becomes_the_value_head(tmp_path):
    torch.manual_seed(0)
    reward_model = GPT2ForSequenceClassification(GPT2Config(**TINY, num_labels=1, pad_token_id=0)).eval()
    reward_model.save_pretrained(tmp_path / "theirs")
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    logits, values = package_numbers(tmp_path / "ours")
    with torch.no_grad():
        hidden = reward_model.transformer(PROMPT).last_hidden_state
        torch.testing.assert_close(values, reward_model.score(hidden).squeeze(-1), rtol=0, atol=1e-6)
        torch.testing.assert_close(values[:, -1:], reward_model(PROMPT).logits, rtol=0, atol=1e-6)  # its reward
        torch.testing.assert_close(logits, hidden @ reward_model.transformer.wte.weight.T, rtol=0, atol=1e-5)
    assert record.mapped["score.weight"] == "v_head.summary.weight"
    assert any("v_head.summary.bias is 0" in note for note in record.notes)
    assert GPT2ValueModel.from_pretrained(tmp_path / "ours").config.summary_first_dropout == 0.0


@pytest.mark.parametrize(("field", "rate"), [({"classifier_dropout": 0.35}, 0.35), ({}, 0.1)])
def test_a_reward_model_for_tokens_becomes_the_value_head(field, rate, tmp_path):
    torch.manual_seed(0)
    reward_model = GPT2ForTokenClassification(GPT2Config(**TINY, num_labels=1, **field)).eval()
    nn.init.constant_(reward_model.classifier.bias, 0.5)
    reward_model.save_pretrained(tmp_path / "theirs")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    _, values = package_numbers(tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(values, reward_model(PROMPT).logits.squeeze(-1), rtol=0, atol=1e-6)
    assert reward_model.dropout.p == rate
    assert GPT2ValueModel.from_pretrained(tmp_path / "ours").config.summary_first_dropout == rate


@pytest.mark.parametrize("model_class", [GPT2ForSequenceClassification, GPT2ForTokenClassification])
def test_a_classifier_of_several_labels_is_refused(model_class, tmp_path):
    model_class(GPT2Config(**TINY, num_labels=3)).save_pretrained(tmp_path / "theirs")
    with pytest.raises(errors.ConversionError, match=r"cannot be kept: .*\[3, 32\]"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", init_value_head=True)
    assert any(key in record.dropped for key in ("score.weight", "classifier.weight"))


@pytest.mark.parametrize("safetensors", [True, False])
def test_plain_gpt2_needs_a_word_before_it_gets_a_head(safetensors, tmp_path):
    plain = write_published_checkpoint(tmp_path / "theirs", safetensors=safetensors)
    with pytest.raises(errors.MissingHeadError, match="init_value_head=True"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", init_value_head=True)
    with torch.no_grad():
        assert_same_numbers(tmp_path / "ours", (plain(PROMPT).logits, torch.zeros(PROMPT.shape)))
    assert record.source_format == "gpt2"


# What is not understood is refused, and says its name


def test_unknown_tensors_are_listed_and_nothing_is_written(tmp_path):
    original = Original()
    original.write_config(tmp_path / "theirs")
    odd = {
        "v_head.extra.weight": torch.ones(1),
        "transformer.h.0.attn.lora_A": torch.ones(1),
        "optimizer": torch.ones(1),
    }
    torch.save({**original.state(), **original.head_state(), **odd}, tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(errors.PackageError) as refusal:
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert all(name in str(refusal.value) for name in odd)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_fc.bias", "transformer.wpe.weight"])
def test_a_missing_tensor_is_named(name, tmp_path):
    original = Original()
    original.write_config(tmp_path / "theirs")
    state = {**original.state(), **original.head_state()}
    del state[name]
    torch.save(state, tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(errors.PackageError, match=name):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("fields", [{"n_embd": 64}, {"vocab_size": 97}, {"n_layer": 1}, {"n_layer": 10**9}])
def test_a_config_for_other_weights_is_refused(fields, tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    edit_config(tmp_path / "theirs", **fields)
    with pytest.raises(errors.PackageError, match="config"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("fields", [{"n_head": 5}, {"n_embd": "32"}, {"summary_dropout_prob": 7}, {"n_layer": None}])
def test_a_config_that_cannot_be_is_refused(fields, tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    edit_config(tmp_path / "theirs", **fields)
    with pytest.raises(errors.PackageError, match=r"config\.json"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        (LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50), LlamaForCausalLM),
        (OPTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=50), OPTForCausalLM),
    ],
    ids=["llama", "opt"],
)
def test_another_body_is_refused_by_name(config, model_class, tmp_path):
    config.intermediate_size = config.ffn_dim = 32
    model = model_class(config)
    model.save_pretrained(tmp_path / "theirs")
    write_safetensors(Original().head_state(), tmp_path / "theirs" / "value_head.safetensors")
    with pytest.raises(errors.NotAPackageError, match=config.model_type):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_quantised_weights_are_refused(tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    edit_config(tmp_path / "theirs", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(errors.PackageError, match="quantization_config"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_a_tied_lm_head_with_other_numbers_is_refused(tmp_path):
    original = Original()
    original.write_config(tmp_path / "theirs")
    state = {**original.state(), **original.head_state()}
    state["lm_head.weight"][0, 0] += 1
    torch.save(state, tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(errors.ConversionError, match="tie_word_embeddings"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_a_mask_that_is_not_causal_is_refused(tmp_path):
    original = Original()
    original.write_config(tmp_path / "theirs")
    masks = original.masks()
    masks["transformer.h.0.attn.bias"][0, 0, 0, 3] = 1  # the first token would see the fourth
    torch.save({**original.state(), **masks, **original.head_state()}, tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(errors.ConversionError, match="causal"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("name", ["transformer.h.0.mlp.c_fc.weight", "v_head.summary.weight"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(name, number, tmp_path):
    original = Original()
    original.write_config(tmp_path / "theirs")
    state = {**original.state(), **original.head_state()}
    state[name].view(-1)[3] = number
    torch.save(state, tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises(errors.UnsavableModelError, match=name):
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


@pytest.mark.parametrize(
    "options",
    [{"base": "elsewhere"}, {"init_value_head": True}, {"source_format": "trlx"}, {"source_format": "linear"}],
)
def test_an_option_without_a_use_is_refused(options, tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    with pytest.raises((errors.OptionsError, errors.ConversionError), match=next(iter(options))):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", **options)


def test_an_empty_folder_and_a_missing_one_are_named(tmp_path):
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(errors.PackageError, match=str(source)):
            convert_checkpoint(source, tmp_path / "ours")


# Files that would do harm


class Payload:
    """Unpickling it writes a file: what an attacker's would do is no different."""

    def __init__(self, proof):
        self.proof = str(proof)

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def poison(file, proof, *, legacy=False):
    torch.save({"transformer.wte.weight": Payload(proof)}, file, _use_new_zipfile_serialization=not legacy)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["pytorch_model.bin", "shard", "value_head.bin", "step_100.pt", "raw"])
def test_a_pickle_that_would_run_code_runs_nothing(name, legacy, tmp_path, monkeypatch):
    # the switch with which torch's users turn its safety off must not reach us
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    proof, folder = tmp_path / "it-ran", tmp_path / "theirs"
    original = Original()
    source = folder
    if name == "shard":
        write_trl_shards(original, folder)
        poison(folder / "pytorch_model-00002-of-00002.bin", proof, legacy=legacy)
    elif name == "value_head.bin":
        original.body.save_pretrained(folder)
        poison(folder / name, proof, legacy=legacy)
    else:
        original.write_config(folder)
        source = folder / name if name != "pytorch_model.bin" else folder
        poison(folder / name, proof, legacy=legacy)
        if name == "raw":
            (folder / name).write_bytes(pickle.dumps({"transformer.wte.weight": Payload(proof)}))
    with pytest.raises(errors.PackageError, match="Nothing of it was run"):
        convert_checkpoint(source, tmp_path / "ours")
    assert not proof.exists()
    assert not (tmp_path / "ours").exists()


def test_the_payload_of_these_tests_does_run_where_pickles_are_trusted(tmp_path):
    poison(tmp_path / "pytorch_model.bin", tmp_path / "it-ran")
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "it-ran").exists()


def truncated(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def emptied(file):
    file.write_bytes(b"")


def replaced_by_text(file):
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def replaced_by_a_list(file):
    torch.save([torch.ones(1)], file)


def wrapped_in_a_trainer_state(file):
    torch.save({"model": torch.load(file, weights_only=True), "step": 3}, file)


def made_sparse(file):
    state = torch.load(file, weights_only=True)
    state["transformer.wte.weight"] = state["transformer.wte.weight"].to_sparse()
    torch.save(state, file)


@pytest.mark.parametrize(
    "damage",
    [truncated, emptied, replaced_by_text, replaced_by_a_list, wrapped_in_a_trainer_state, made_sparse],
)
def test_a_damaged_pickle_is_refused(damage, tmp_path):
    write_trl_pickle(Original(), tmp_path / "theirs")
    damage(tmp_path / "theirs" / "pytorch_model.bin")
    with pytest.raises((errors.PackageError, errors.PackageError), match=r"pytorch_model\.bin"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("damage", [truncated, emptied, replaced_by_text])
def test_a_damaged_safetensors_file_is_refused(damage, tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    damage(tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(errors.PackageError, match=r"model\.safetensors"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


@pytest.mark.parametrize("target", ["../outside.bin", "/etc/hostname", "missing.bin", "pytorch_model.bin.index.json"])
def test_an_index_that_points_elsewhere_is_refused(target, tmp_path):
    write_trl_shards(Original(), tmp_path / "theirs")
    torch.save(Original().state(), tmp_path / "outside.bin")
    index = tmp_path / "theirs" / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["transformer.wte.weight"] = target
    index.write_text(json.dumps(content))
    with pytest.raises((errors.PackageError, errors.PackageError, errors.PackageError)):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


def test_an_index_that_lies_about_a_shard_is_refused(tmp_path):
    write_trl_shards(Original(), tmp_path / "theirs")
    index = tmp_path / "theirs" / "pytorch_model.bin.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"]["transformer.wte.weight"]
    index.write_text(json.dumps(content))
    with pytest.raises(errors.PackageError, match=r"transformer\.wte\.weight"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")


# Around it


def test_the_source_is_left_as_it_is_and_cannot_be_the_target(tmp_path):
    write_trl(Original(), tmp_path / "theirs")

    def contents():
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "theirs").iterdir()}

    before = contents()
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    for source in (tmp_path / "theirs", tmp_path / "theirs" / "model.safetensors"):
        with pytest.raises(errors.FolderRefusedError, match="to be converted"):
            convert_checkpoint(source, tmp_path / "theirs")
    assert contents() == before


def test_the_tokenizer_and_the_generation_config_travel(tiny_tokenizer, tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    tiny_tokenizer.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps({"max_new_tokens": 7, "eos_token_id": 0}))
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert record.tokenizer is not None
    assert inspect_package(tmp_path / "ours").tokenizer is not None
    assert GPT2ValueModel.from_pretrained(tmp_path / "ours").generation_config.max_new_tokens == 7


def test_a_tokenizer_that_cannot_be_loaded_is_refused_and_can_be_replaced(tiny_tokenizer, tmp_path):
    write_trl(Original(), tmp_path / "theirs")
    (tmp_path / "theirs" / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.TokenizerMismatchError, match="tokenizer="):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", tokenizer=tiny_tokenizer)
    assert record.tokenizer == type(tiny_tokenizer).__name__
    assert replace(record, tokenizer=None).tokenizer is None  # the record is a plain dataclass


# Names


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.pretrained_model.", "base_model.model."])
def test_wrappers_names_are_stripped_in_any_order(prefix, tmp_path):
    original = Original()
    original.write_config(tmp_path / "theirs")
    state = {**original.state(), **original.head_state()}
    write_safetensors({prefix + name: weight for name, weight in state.items()}, tmp_path / "theirs/model.safetensors")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert_same_numbers(tmp_path / "ours", original.numbers())


@pytest.mark.parametrize("names", ["summary.{}", "{}", "v_head.summary.{}", "value_head.{}", "module.score.{}"])
def test_a_head_in_a_file_of_its_own_has_any_of_the_known_names(names, tmp_path):
    original = Original()
    original.body.save_pretrained(tmp_path / "theirs")
    head = {names.format(name): weight for name, weight in original.head.state_dict().items()}
    write_safetensors(head, tmp_path / "theirs" / "value_head.safetensors")
    convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    assert_same_numbers(tmp_path / "ours", original.numbers())


def test_two_heads_that_differ_are_ambiguous_and_one_can_be_named(tmp_path):
    original, other = Original(), Original(seed=1)
    original.write_config(tmp_path / "theirs")
    state = {**original.state(), **original.head_state(), "score.weight": other.head.weight.detach()}
    del state["lm_head.weight"]
    write_safetensors(state, tmp_path / "theirs" / "model.safetensors")
    with pytest.raises(errors.ConversionError, match=r"two value heads that differ: .*score"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "ours")
    record = convert_checkpoint(tmp_path / "theirs", tmp_path / "ours", source_format="trl")
    assert "score.weight" in record.dropped
    assert_same_numbers(tmp_path / "ours", original.numbers())


def test_a_package_is_rewritten_with_this_versions_code(package, tmp_path):
    (package / "modeling_gpt2_value.py").write_text("raise SystemExit")
    record = convert_checkpoint(package, tmp_path / "ours")
    assert record.source_format == "package"
    assert_same_numbers(tmp_path / "ours", package_numbers(package))
    verify_package(tmp_path / "ours")
