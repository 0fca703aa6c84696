"""The tools that people train with: PEFT, Trainer, Accelerate, torchao, torch.export, tokenizers."""

import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_tiny_model, plain_twin
from support.settings import RAGGED, assert_as_drawn, assert_close
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Trainer, TrainingArguments
from transformers.integrations.executorch import register_dynamic_cache_export_support

from gpt2_value import GPT2HeadWithValueModel, GPT2ValueConfig, GPT2ValueModel, rescore, rollout
from hub_tools import inspect_package, save_package
from hub_tools.errors import UnsavableModelError

peft = pytest.importorskip("peft")
ROOT = Path(__file__).parent.parent


# PEFT


def lora(model, targets=("c_attn",), **fields):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=[*targets], init_lora_weights=False, lora_dropout=0.3, **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on fan_in_fan_out, which it sets right
        return peft.get_peft_model(model, config)


def test_an_adapted_model_is_sampled_and_scored_and_its_copied_head_is_detached_and_attached_again():
    model = lora(make_tiny_model(), modules_to_save=["v_head"]).train()
    drawn = rollout(model, RAGGED, max_new_tokens=4)
    assert_as_drawn(rescore(model, drawn), drawn)

    def body_learns():
        model.zero_grad()
        rescore(model, drawn).values.sum().backward()
        return any("lora" in name and w.grad is not None and w.grad.any() for name, w in model.named_parameters())

    assert body_learns()
    model.base_model.model.detach_value_head()
    assert not body_learns()
    model.base_model.model.attach_value_head()
    assert body_learns()


@pytest.mark.parametrize("fields", [{}, {"modules_to_save": ["v_head"]}, {"targets": ["c_attn", "lm_head"]}], ids=str)
def test_the_base_of_an_adapter_is_its_reference_without_a_second_copy(fields):
    base = make_tiny_model(tie_word_embeddings=False)
    reference = plain_twin(base)
    model = lora(base, **fields).train()
    drawn = rollout(model, RAGGED, max_new_tokens=6, top_k=20)
    scored = rescore(model, drawn, reference="disable_adapter")
    assert scored.kl.mean() > 1e-3
    assert_close(scored.kl, rescore(model, drawn, reference=reference).kl)
    assert_as_drawn(scored, drawn)  # the adapter is on again
    scored.kl.mean().backward()
    assert model.base_model.model.transformer.h[0].attn.c_attn.lora_B["default"].weight.grad.abs().sum() > 0


def test_an_adapted_model_is_refused_as_its_own_reference():
    model = lora(make_tiny_model())
    inner = model.base_model.model
    drawn = rollout(model, RAGGED, max_new_tokens=4)
    own = 'pass reference="disable_adapter"'
    for scorer, reference, message in (
        (model, model, own),
        (model, inner, own),
        (inner, model, own),
        (model, "base", "expected a model, or"),
        (make_tiny_model(), "disable_adapter", "with a PeftModel"),
        (inner, "disable_adapter", "with a PeftModel"),  # it does not know of the PeftModel
    ):
        with pytest.raises(ValueError, match=message):
            rescore(scorer, drawn, reference=reference)


def test_virtual_tokens_are_refused_by_name():
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    with pytest.raises(TypeError, match="the virtual tokens of a PromptTuningConfig"):
        rollout(peft.get_peft_model(make_tiny_model(), config), RAGGED, max_new_tokens=4)


# Trainer


def trained(model, folder, **fields):
    fields = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "seed": 0, **fields}
    off = {"save_strategy": "no", "logging_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    rows = [(torch.arange(16) + 7 * row) % 90 for row in range(64)]  # each token is followed by the next number
    texts = [{"input_ids": row, "labels": row.clone()} for row in rows]
    trainer = Trainer(model, TrainingArguments(str(folder), **fields, **off), train_dataset=texts, eval_dataset=texts)
    return trainer, trainer.train().training_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trainer_learns_what_it_learns_with_gpt2(tmp_path, smoothing):
    """Where it smoothes, it shifts the labels itself, for the models that it takes for language models."""
    # The head's dropout draws random numbers too, which would change those of the body's.
    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), 0.0)
    ours = make_tiny_model(**no_dropout)
    seed, plain = GPT2HeadWithValueModel(ours.config), plain_twin(ours)
    seed.load_state_dict(ours.state_dict())
    plain.loss_type = "ForCausalLM"  # else Trainer divides by one token too many in each row
    adapted, base = lora(make_tiny_model(**no_dropout)), lora(plain_twin(ours))
    base.base_model.model.loss_type = "ForCausalLM"
    for models in ((ours, seed, plain), (adapted, base)):
        losses = [trained(model, tmp_path, label_smoothing_factor=smoothing)[1] for model in models]
        assert losses == pytest.approx([losses[-1]] * len(losses), abs=1e-6)
    for name, weight in plain.named_parameters():
        for each in (ours, seed):
            assert_close(each.state_dict()[name], weight, 1e-6)


def test_compute_metrics_gets_the_logits_alone(tmp_path):
    trainer, _ = trained(make_tiny_model(), tmp_path, max_steps=1)
    trainer.model.config.use_cache = True
    shapes = []
    trainer.compute_metrics = lambda prediction: shapes.append(prediction.predictions.shape) or {}
    trainer.evaluate()
    assert shapes == [(64, 16, 96)]


# Weights that are not simply in memory


ON_DISK = {"transformer.wte": "cpu", "transformer.wpe": "cpu", "lm_head": "cpu", "v_head": "cpu"}
ON_DISK |= dict.fromkeys(("transformer.h.0", "transformer.h.1", "transformer.ln_f"), "disk")


@pytest.mark.parametrize("offload", ["parts on the disk", "cpu_offload", "disk_offload"])
def test_offloaded_weights_give_logits_and_are_refused_by_name(saved, tmp_path, offload):
    accelerate, model = pytest.importorskip("accelerate"), make_tiny_model()
    if offload == "parts on the disk":
        placed = GPT2ValueModel.from_pretrained(saved, device_map=ON_DISK, offload_folder=tmp_path / "disk")
    else:
        placed = GPT2ValueModel.from_pretrained(saved)
        more = (tmp_path / "disk",) if offload == "disk_offload" else ()
        getattr(accelerate, offload)(placed, *more, execution_device=torch.device("cpu"))
    assert placed.transformer.h[1].mlp.c_fc.weight.is_meta
    assert torch.equal(placed(RAGGED[0][None]).logits, model(RAGGED[0][None]).logits)
    drawn = rollout(model, RAGGED, max_new_tokens=2)
    for use in (
        lambda: rollout(placed, RAGGED),
        lambda: rescore(placed, drawn),
        lambda: rescore(model, drawn, reference=placed),
    ):
        with pytest.raises(TypeError, match="weights of this GPT2ValueModel have no data"):
            use()
    with pytest.raises(UnsavableModelError, match="on the device meta"):
        save_package(placed, tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_a_model_without_weights_is_refused_by_name(saved):
    with torch.device("meta"):
        empty = GPT2ValueModel(GPT2ValueConfig.from_pretrained(saved)).eval()
    with pytest.raises(TypeError, match="weights of this GPT2ValueModel have no data"):
        rollout(empty, RAGGED)


# torchao, which is installed in a folder of its own: wherever transformers finds it, each process prints four lines


def test_models_with_quantised_weights_are_sampled_and_scored_as_they_are():
    folder = Path(sys.prefix) / "torchao"
    assert folder.is_dir(), "torchao is not installed: run make .venv/.done, or make .oldest/.done"
    command = [sys.executable, "-m", "pytest", "-q", "tests/slow/quantised.py"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


# torch.export


def test_an_exported_model_gives_the_same_logits_and_values_for_other_sizes(tiny_model):
    register_dynamic_cache_export_support()  # transformers' own: torch.export does not know its DynamicCache
    ids, mask = torch.tensor([[5, 17, 3, 9], [41, 9, 7, 2]]), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    longer = torch.randint(1, 96, (3, 7))
    seen = torch.ones_like(longer).index_fill(1, torch.arange(3), 0)
    sizes = {0: torch.export.Dim("rows", max=64), 1: torch.export.Dim("tokens", max=64)}
    for more in ({}, {"use_cache": False}):
        shapes = {"input_ids": sizes, "attention_mask": sizes, **dict.fromkeys(more)}
        arguments = {"input_ids": ids, "attention_mask": mask, **more}
        with torch.no_grad():
            program = torch.export.export(tiny_model, (), arguments, dynamic_shapes=shapes, strict=False)
        found, expected = (
            call(input_ids=longer, attention_mask=seen, **more) for call in (program.module(), tiny_model)
        )
        for name in ("logits", "value"):
            assert_close(found[name][seen.bool()], expected[name][seen.bool()], 1e-6)
        assert ("past_key_values" in found) == ("use_cache" not in more)


# The tokenizer of a package


def test_a_tokenizer_is_loaded_without_running_code(tiny_model, tiny_tokenizer, tmp_path, monkeypatch):
    """transformers 4 stops at `tokenizer_class`, which we write. 5 reads the model's config first, and asks."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "n")
    save_package(tiny_model, tmp_path / "package", tiny_tokenizer)
    loaded = [
        AutoTokenizer.from_pretrained(tmp_path / "package", trust_remote_code=False),
        PreTrainedTokenizerFast.from_pretrained(tmp_path / "package"),
    ]
    assert asked == []
    loaded.append(AutoTokenizer.from_pretrained(tmp_path / "package"))
    assert len(asked) == (0 if transformers.__version__.startswith("4.") else 1)
    assert all(each("abc").input_ids == tiny_tokenizer("abc").input_ids for each in loaded)
    assert not any(name.startswith("transformers_modules.package") for name in sys.modules)


# The configurations in examples/accelerate; tests/test_two_processes.py shards by them


CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
KINDS = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "two-machines": "MULTI_GPU"}
LINES = re.findall(r"^accelerate launch .*", (ROOT / "docs" / "many-gpus.md").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_each_configuration(path):
    import yaml
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    assert config.distributed_type == KINDS[path.stem]
    assert config.num_processes == 8 * config.num_machines
    options = vars(launch_command_parser().parse_args(["script.py"]))
    fields = yaml.safe_load(path.read_text(encoding="utf-8")).get("fsdp_config", {})
    assert set(fields) <= set(options)  # accelerate hands unknown ones on without a word
    assert any(f"accelerate/{path.name}" in line for line in LINES)
    launch_command_parser().parse_args(shlex.split(LINES[0])[2:])


def test_the_script_of_the_page_saves_a_package(tmp_path):
    """As one process; `make launches` starts every line of the page with two, on one machine and as two."""
    command = [sys.executable, "examples/many_gpus.py", "--out", tmp_path / "package", "--steps", "1", "--rows", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = inspect_package(tmp_path / "package")
    assert report.versions
    assert not report.missing + report.changed + report.foreign
