"""A LoRA with TRL's separate head: merged, with the numbers of the unmerged model; refused where that cannot hold."""

import json

import peft
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file
from test_convert import Original, Payload, package_numbers, write_safetensors

from hub_tools import convert_checkpoint, errors

MODULES = ["c_attn", "c_proj", "c_fc"]
PEFT = Version(peft.__version__)
SAVES_BIASES = pytest.mark.skipif(Version("0.21") > PEFT, reason='before 0.21 PEFT loses biases of "lora_only"')


class Adapted:
    """A base on the disk, an adapter on top of it that is no longer at its initial value, and a value head."""

    def __init__(self, folder, *, dtype=torch.float32, head=True, **lora):
        self.original = Original(dtype=dtype)
        self.base, self.folder = folder / "base", folder / "adapter"
        self.original.body.save_pretrained(self.base)
        self.plain_logits = self.original.numbers()[0]
        self.original.body.name_or_path = str(self.base)
        config = peft.LoraConfig(**{"r": 4, "target_modules": MODULES, "task_type": "CAUSAL_LM", **lora})
        self.original.body = peft.get_peft_model(self.original.body, config).eval()
        with torch.no_grad():
            for weight in self.original.body.parameters():
                if weight.requires_grad:  # whatever the adapter trains
                    weight.add_(0.1 * torch.randn_like(weight))
        self.original.body.save_pretrained(self.folder)
        if head:  # as TRL writes it
            torch.save(self.original.head_state(), self.folder / "pytorch_model.bin")

    def edit(self, **settings):
        file = self.folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


@pytest.mark.shows("PEFT", "a LoRA folder becomes a package with the adapter's numbers")
@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True, "lora_alpha": 2},
        {"use_dora": True},
        {"target_modules": ["c_attn"], "layers_to_transform": [1], "rank_pattern": {"c_attn": 2}},
        {"target_modules": ["c_attn"], "modules_to_save": ["ln_f"]},
        {"target_modules": "all-linear", "exclude_modules": ["c_proj"]},
        {"target_modules": r".*\.h\.1\.(attn\.c_attn|mlp\.c_fc)"},
        {"alpha_pattern": {"attn.c_attn": 32, "^transformer.h.1.mlp.c_fc": 1}},
        {"rank_pattern": {r".*attn\.c_.*": 2}},
        {"bias": "all"},
        pytest.param({"bias": "lora_only"}, marks=SAVES_BIASES),
        {"lora_bias": True},
        {"target_modules": ["c_attn", "wte", "wpe"]},
        {"target_modules": ["c_attn", "lm_head"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["c_attn"], "modules_to_save": ["wte"]},
    ],
    ids=[
        "lora", "rslora", "dora", "one-layer", "modules-to-save", "all-linear", "expression", "alphas", "ranks",
        "biases", "biases-of-lora", "lora-bias", "embeddings", "lm-head", "whole-lm-head", "whole-embeddings",
    ],
)  # fmt: skip
def test_a_merged_adapter_gives_the_numbers_of_the_unmerged_one(lora, tmp_path):
    adapted = Adapted(tmp_path, **lora)
    record = convert_checkpoint(adapted.folder, tmp_path / "ours")
    logits, values = adapted.original.numbers()
    assert (logits - adapted.plain_logits).abs().max() > 0.1  # the adapter says something
    ours = package_numbers(tmp_path / "ours")
    torch.testing.assert_close(ours[0], logits, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ours[1], values, rtol=1e-5, atol=1e-4)
    assert record.adapter
    assert record.source_format == "trl"
    names = [file.name for file in record.files]
    assert names == ["model.safetensors", "adapter_model.safetensors", "pytorch_model.bin"]


@pytest.mark.shows("PEFT", "merged weights are those that PEFT merges")
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
def test_the_merged_weights_are_those_that_peft_merges(lora, tmp_path):
    adapted = Adapted(tmp_path, **lora)
    convert_checkpoint(adapted.folder, tmp_path / "ours")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    theirs = adapted.original.body.merge_and_unload(safe_merge=True).state_dict()
    for name in set(ours) - {"v_head.summary.weight", "v_head.summary.bias"}:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_trained_biases_that_an_adapter_lost_are_not_made_up(tmp_path):
    """PEFT before 0.21 trains them with `bias="lora_only"`, and does not save them."""
    adapted = Adapted(tmp_path, bias="lora_only")
    weights = adapted.folder / "adapter_model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if not name.endswith("base_layer.bias")}
    write_safetensors(kept, weights)
    with pytest.raises(errors.PackageError, match=r"lacks .*c_attn\.bias") as refusal:
        convert_checkpoint(adapted.folder, tmp_path / "ours")
    assert '"bias": "none"' in str(refusal.value)
    adapted.edit(bias="none")
    convert_checkpoint(adapted.folder, tmp_path / "ours")


def test_the_base_can_be_named_and_its_own_head_gives_way(tmp_path):
    adapted = Adapted(tmp_path)
    moved = tmp_path / "moved"
    adapted.base.rename(moved)
    with pytest.raises(errors.PackageError, match="base="):
        convert_checkpoint(adapted.folder, tmp_path / "ours")
    state = {**load_file(moved / "model.safetensors"), **Original(seed=9).head_state()}
    write_safetensors(state, moved / "model.safetensors")
    record = convert_checkpoint(adapted.folder, tmp_path / "ours", base=moved)
    torch.testing.assert_close(package_numbers(tmp_path / "ours")[1], adapted.original.numbers()[1], rtol=0, atol=1e-4)
    assert {f"moved/v_head.summary.{name}" for name in ("weight", "bias")} <= set(record.dropped)


def test_a_half_precision_base_keeps_its_dtype_and_the_record_says_that_merging_rounds(tmp_path):
    adapted = Adapted(tmp_path, dtype=torch.bfloat16)
    record = convert_checkpoint(adapted.folder, tmp_path / "ours")
    assert record.dtype == torch.bfloat16
    assert any("rounds" in note for note in record.notes)


@pytest.mark.parametrize("prefix", ["", "pretrained_model."])
def test_the_dump_of_an_unmerged_model_is_refused_and_the_way_out_is_named(prefix, tmp_path):
    """What `torch.save(ppo_model.state_dict())` writes while the adapter is on top of the base."""
    adapted = Adapted(tmp_path)
    dump = {prefix + name: weight for name, weight in adapted.original.body.state_dict().items()}
    folder = tmp_path / "dump"
    folder.mkdir()
    torch.save({**dump, **adapted.original.head_state()}, folder / "pytorch_model.bin")
    (folder / "config.json").write_bytes((adapted.base / "config.json").read_bytes())
    with pytest.raises(errors.PackageError, match="merge_and_unload") as refusal:
        convert_checkpoint(folder, tmp_path / "ours", source_format="trl")
    assert "base_layer" in str(refusal.value) or "lora_A" in str(refusal.value)
    assert not (tmp_path / "ours").exists()


def test_an_adapter_without_a_head_needs_a_word(tmp_path):
    adapted = Adapted(tmp_path, head=False)
    with pytest.raises(errors.MissingHeadError, match="init_value_head"):
        convert_checkpoint(adapted.folder, tmp_path / "ours")
    convert_checkpoint(adapted.folder, tmp_path / "ours", init_value_head=True)
    assert not package_numbers(tmp_path / "ours")[1].any()


def test_an_adapter_of_another_base_is_refused(tmp_path):
    adapted = Adapted(tmp_path)
    Original(n_layer=1).body.save_pretrained(tmp_path / "shallow")
    with pytest.raises(errors.PackageError, match="base="):
        convert_checkpoint(adapted.folder, tmp_path / "ours", base=tmp_path / "shallow")


def test_an_adapter_that_lost_a_layer_is_refused(tmp_path):
    adapted = Adapted(tmp_path)
    state = load_file(adapted.folder / "adapter_model.safetensors")
    lost = sorted(state)[0]
    del state[lost]
    write_safetensors(state, adapted.folder / "adapter_model.safetensors")
    with pytest.raises(errors.PackageError, match=lost.removeprefix("base_model.model.")):
        convert_checkpoint(adapted.folder, tmp_path / "ours")


def test_a_base_without_weights_and_an_adapter_without_weights_are_named(tmp_path):
    adapted = Adapted(tmp_path)
    (adapted.base / "model.safetensors").rename(tmp_path / "elsewhere")
    with pytest.raises(errors.PackageError, match="base model"):
        convert_checkpoint(adapted.folder, tmp_path / "ours")
    (adapted.folder / "adapter_model.safetensors").unlink()
    with pytest.raises(errors.PackageError, match="adapter weights"):
        convert_checkpoint(adapted.folder, tmp_path / "ours")


@pytest.mark.parametrize(
    "settings",
    [{"peft_type": "PREFIX_TUNING"}, {"task_type": "SEQ_CLS"}, {"init_lora_weights": "pissa"}],
    ids=["prefix-tuning", "classifier", "pissa"],
)
def test_an_adapter_that_cannot_be_merged_faithfully_is_refused(settings, tmp_path):
    adapted = Adapted(tmp_path)
    adapted.edit(**settings)
    with pytest.raises(errors.ConversionError, match=next(iter(settings.values()))):
        convert_checkpoint(adapted.folder, tmp_path / "ours")


def test_config_is_no_option_for_an_adapter(tmp_path):
    adapted = Adapted(tmp_path)
    with pytest.raises(errors.OptionsError, match="config="):
        convert_checkpoint(adapted.folder, tmp_path / "ours", config=adapted.base)


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model.bin", "base"])
def test_no_pickle_of_an_adapter_runs_code(name, tmp_path):
    adapted = Adapted(tmp_path)
    proof = tmp_path / "it-ran"
    file = adapted.base / "pytorch_model.bin" if name == "base" else adapted.folder / name
    for other in (adapted.base if name == "base" else adapted.folder).glob("*model.safetensors"):
        if name != "pytorch_model.bin":
            other.unlink()
    torch.save({"transformer.wte.weight": Payload(proof)}, file)
    with pytest.raises(errors.PackageError):
        convert_checkpoint(adapted.folder, tmp_path / "ours")
    assert not proof.exists()


def test_a_pickled_adapter_is_read(tmp_path):
    adapted = Adapted(tmp_path)
    state = load_file(adapted.folder / "adapter_model.safetensors")
    (adapted.folder / "adapter_model.safetensors").unlink()
    torch.save(state, adapted.folder / "adapter_model.bin")
    convert_checkpoint(adapted.folder, tmp_path / "ours")
    torch.testing.assert_close(package_numbers(tmp_path / "ours")[0], adapted.original.numbers()[0], rtol=0, atol=1e-3)
