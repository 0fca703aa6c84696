"""LoRA adapters become packages: with the numbers of the unmerged model, the adapter's own head, or refused by name."""

import json
import shutil
import sys

import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load_file
from test_convert import PROMPT, Original, package_numbers, write_safetensors

from hub_tools import convert_checkpoint, errors, save_package
from modeling_gpt2_value import GPT2ValueModel

peft = pytest.importorskip("peft")
MODULES = ["c_attn", "c_proj", "c_fc"]


class Adapted:
    """A base on the disk, and an adapter on top of it that is no longer at its initial value.

    The base is a plain GPT-2 with TRL's head beside the adapter, or (`package=True`) a package of ours.
    """

    def __init__(self, folder, *, package=False, head=True, **lora):
        self.base, self.folder = folder / "base", folder / "adapter"
        self.original = Original()
        if package:
            save_package(make_tiny_model(summary_activation="tanh"), self.base)
            model = GPT2ValueModel.from_pretrained(self.base)
        else:
            self.original.body.save_pretrained(self.base)
            model = self.original.body
        model.name_or_path = str(self.base)
        config = peft.LoraConfig(**{"r": 4, "target_modules": MODULES, "task_type": "CAUSAL_LM", **lora})
        torch.manual_seed(2)
        self.model = peft.get_peft_model(model, config).eval()
        with torch.no_grad():
            for weight in self.model.parameters():
                if weight.requires_grad:  # whatever the adapter trains
                    weight.add_(0.1 * torch.randn_like(weight))
        self.model.save_pretrained(self.folder)
        if not package:
            self.original.body = self.model
        if head and not package:  # as TRL writes it
            torch.save(self.original.head_state(), self.folder / "pytorch_model.bin")

    @torch.no_grad()
    def numbers(self):
        output = self.model(PROMPT)
        return output.logits, output.value if "value" in output else self.original.numbers()[1]

    def edit(self, **settings):
        file = self.folder / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))

    def rename_tensors(self, rename):
        file = self.folder / "adapter_model.safetensors"
        state = {rename(name): tensor.clone() for name, tensor in load_file(file).items()}
        write_safetensors({name: tensor for name, tensor in state.items() if name}, file)


def assert_numbers_of(adapted, folder):
    for ours, theirs in zip(package_numbers(folder), adapted.numbers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


LORAS = {
    "lora": {},
    "rslora, one layer": {"use_rslora": True, "lora_alpha": 2, "layers_to_transform": [1]},
    "dora": {"use_dora": True, "target_modules": ["c_attn"], "modules_to_save": ["ln_f"]},
    "expressions": {"target_modules": r".*\.(attn\.c_attn|mlp\.c_fc)", "rank_pattern": {r".*attn\.c_.*": 2}},
    "patterns": {"alpha_pattern": {"attn.c_attn": 32, "^transformer.h.1.mlp.c_fc": 1}, "rank_pattern": {"c_fc": 2}},
    "biases": {"bias": "all", "init_lora_weights": "orthogonal", "exclude_modules": ["c_proj"]},
    "lora-bias": {"lora_bias": True},
    "embeddings": {"target_modules": ["c_attn", "wte", "wpe"]},
    "lm-head": {"target_modules": ["c_attn", "lm_head"], "init_lora_weights": "gaussian"},
    "whole lm-head": {"target_modules": ["c_attn"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("lora", LORAS)
def test_a_merged_adapter_gives_the_numbers_of_the_unmerged_one(lora, tmp_path, ours):
    adapted = Adapted(tmp_path, **LORAS[lora])
    record = convert_checkpoint(adapted.folder, ours)
    assert_numbers_of(adapted, ours)
    assert record.source_format == "trl"
    names = [file.name for file in record.files]
    assert names == ["model.safetensors", "adapter_model.safetensors", "pytorch_model.bin"]


HEADS = {
    "whole": {"target_modules": ["c_attn"], "modules_to_save": ["v_head"]},
    "its layer": {"target_modules": ["c_attn"], "modules_to_save": ["summary"]},
    "frozen": {"target_modules": ["c_attn"]},
}


@pytest.mark.parametrize("head", HEADS)
def test_the_head_of_an_adapter_is_its_own_or_that_of_its_base(head, tmp_path, ours):
    adapted = Adapted(tmp_path, package=True, **HEADS[head])
    assert convert_checkpoint(adapted.folder, ours).source_format == "package"
    assert_numbers_of(adapted, ours)


def test_the_tensors_have_any_of_the_names_that_peft_gave_them(tmp_path, ours):
    adapted = Adapted(tmp_path, package=True, **HEADS["whole"])
    file = adapted.folder / "adapter_model.safetensors"
    adapted.rename_tensors(
        lambda name: "module." + name.replace("v_head.", "v_head.modules_to_save.").replace("_A.", "_A.default.")
    )
    torch.save(load_file(file), file.with_suffix(".bin"))  # pickled adapters are read, too
    file.unlink()
    convert_checkpoint(adapted.folder, ours)
    assert_numbers_of(adapted, ours)


def test_trained_biases_that_an_adapter_lost_are_not_made_up(tmp_path, ours):
    """PEFT before 0.21 trains them with `bias="lora_only"`, and does not save them."""
    adapted = Adapted(tmp_path, bias="lora_only")
    adapted.rename_tensors(lambda name: None if name.endswith("base_layer.bias") else name)
    with pytest.raises(errors.PackageError, match=r"only one of the two has .*c_attn\.bias"):
        convert_checkpoint(adapted.folder, ours)


def test_the_base_can_be_named_and_its_own_head_gives_way(tmp_path, ours):
    adapted = Adapted(tmp_path)
    moved = adapted.base.rename(tmp_path / "moved")
    with pytest.raises(errors.PackageError, match="base="):
        convert_checkpoint(adapted.folder, ours)
    state = {**load_file(moved / "model.safetensors"), **Original(seed=9).head_state()}
    write_safetensors(state, moved / "model.safetensors")
    record = convert_checkpoint(adapted.folder, ours, base=moved)
    assert_numbers_of(adapted, ours)
    assert {f"moved/v_head.summary.{name}" for name in ("weight", "bias")} <= set(record.dropped)


def test_an_adapter_without_a_head_needs_a_word(tmp_path, ours):
    adapted = Adapted(tmp_path, head=False)
    with pytest.raises(errors.MissingHeadError, match="init_value_head"):
        convert_checkpoint(adapted.folder, ours)
    convert_checkpoint(adapted.folder, ours, init_value_head=True)
    assert not package_numbers(ours)[1].any()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return Adapted(tmp_path_factory.mktemp("adapted"))


@pytest.fixture
def adapted(sound):
    """An adapter that is put right again after the test."""
    kept = sound.folder.with_name("kept")
    shutil.copytree(sound.folder, kept)
    yield sound
    shutil.rmtree(sound.folder)
    kept.rename(sound.folder)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"peft_type": "PREFIX_TUNING"}, errors.ConversionError),
        ({"task_type": "SEQ_CLS"}, errors.ConversionError),
        ({"init_lora_weights": "pissa_niter_4"}, errors.ConversionError),
        ({"lora_alpha": 1e308}, errors.PackageError),
        ({"alpha_pattern": dict.fromkeys(map(str, range(9999)), 1)}, errors.ConversionError),
        ({"alpha_pattern": {"(((.*)*)*)*c_attn": 3}}, errors.ConversionError),
        ({"use_dora": True}, errors.PackageError),
        ({"modules_to_save": ["ln_f"]}, errors.PackageError),
        ({"an option of 2030": "on"}, errors.ConversionError),
        ({"base_model_name_or_path": "x" * 5000}, errors.PackageError),
        ({"base_model_name_or_path": "nobody/nothing"}, errors.HubUnavailableError),
        ({"base_model_name_or_path": "nobody/nothing", "revision": {"a": 1}}, errors.PackageError),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, error, adapted, ours):
    adapted.edit(**settings)
    with pytest.raises(error):
        convert_checkpoint(adapted.folder, ours)


def test_an_adapter_of_another_base_or_that_lost_a_tensor_and_an_option_without_a_use_are_refused(
    adapted, ours, tmp_path
):
    Original(n_layer=1).body.save_pretrained(tmp_path / "shallow")
    with pytest.raises(errors.PackageError, match="base="):
        convert_checkpoint(adapted.folder, ours, base=tmp_path / "shallow")
    with pytest.raises(errors.OptionsError, match="config="):
        convert_checkpoint(adapted.folder, ours, config=adapted.base)
    lost = "transformer.h.0.attn.c_attn.lora_"
    adapted.rename_tensors(lambda name: None if name.endswith(f"{lost}A.weight") else name)
    with pytest.raises(errors.PackageError, match=lost):
        convert_checkpoint(adapted.folder, ours)


def test_expressions_that_do_not_end_are_not_evaluated(adapted, ours):
    endless = "((((((.*)*)*)*)*)*)x"
    adapted.edit(target_modules=endless, exclude_modules=endless, layers_pattern=endless, rank_pattern={endless: 3})
    adapted.edit(r=50_000_000)
    convert_checkpoint(adapted.folder, ours)
    assert_numbers_of(adapted, ours)


def test_an_adapter_config_imports_no_module_that_it_names(adapted, tmp_path, monkeypatch, ours):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    armed = tmp_path / "megatron"
    armed.mkdir()
    (armed / "payload.py").write_text("open('it-ran', 'w')")
    for name, content in (("adapter_config.json", "{}"), ("adapter_model.safetensors", "no adapter")):
        (adapted.base / name).write_text(content)  # an adapter in the base is not loaded either
    for name, content in (("adapter_config.json", "{}"), ("adapter_model.safetensors", "no adapter")):
        (adapted.base / name).write_text(content)  # one that lies in the base is not read either
    adapted.edit(megatron_config={"a": 1}, megatron_core="megatron.payload")
    with pytest.raises(errors.ConversionError, match="megatron_config"):
        convert_checkpoint(adapted.folder, ours)
    adapted.edit(megatron_config=None, auto_mapping={"base_model_class": "X", "parent_library": "megatron.payload"})
    convert_checkpoint(adapted.folder, ours)
    assert not (tmp_path / "it-ran").exists()


def test_without_peft_the_library_is_named(adapted, monkeypatch, ours):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(errors.MissingLibraryError, match="pip install peft"):
        convert_checkpoint(adapted.folder, ours)
