"""Small real models and checkpoints that the tests share. Nothing here needs a network."""

import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from safetensors.torch import save_file
from support import forks
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from configuration_gpt2_value import GPT2ValueConfig
from hub_tools import save_package
from modeling_gpt2_value import GPT2ValueModel

torch.set_num_threads(1)  # small models run faster so, and results repeat

TINY = {
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 4,
    "vocab_size": 96,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def pytest_configure(config):
    forks.use_forks(in_this_process=hasattr(config, "workerinput") or not getattr(config.option, "tx", None))


# xdist gives out whole files in this order: with the slow ones first, two processes end together.
SLOW_FIRST = (
    "test_ppo",
    "test_two_processes",
    "test_docs",
    "test_scored_as_drawn",
    "test_rollout",
    "test_sampler_audit",
    "test_checkpoints",
    "test_push_faults",
    "test_demo",
    "test_undisturbed",
    "test_notebook",
    "test_self_check",
    "test_families",
    "test_kill_during_save",
    "test_corrupt_packages",
    "test_cli",
)


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(SLOW_FIRST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(autouse=True)
def own_interpreters(request, monkeypatch):
    """For tests that are marked `own_interpreter`; see support/forks.py."""
    if request.node.get_closest_marker("own_interpreter"):
        monkeypatch.setattr(subprocess, "Popen", forks.REAL)


@pytest.fixture(autouse=True)
def own_code_cache(tmp_path_factory, monkeypatch):
    """Remote code of each test is imported from a cache of its own, so that no test sees another's modules."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    monkeypatch.setattr(sys, "path", list(sys.path))  # transformers appends the cache
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def tiny_config():
    return GPT2ValueConfig(**TINY)


def make_tiny_model(seed=0, **fields):
    """A `GPT2ValueModel` with weights large enough that its logits and values differ visibly from token to token."""
    torch.manual_seed(seed)
    model = GPT2ValueModel(GPT2ValueConfig(**{**TINY, "value_head_initializer_range": 0.5, **fields}))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.startswith("transformer.") and weight.dim() == 2:
                weight.mul_(5)
    return model.eval()


@pytest.fixture
def tiny_model():
    return make_tiny_model()


@pytest.fixture
def theirs(tmp_path):
    """Where a test writes another library's checkpoint."""
    return tmp_path / "theirs"


@pytest.fixture
def ours(tmp_path):
    """Where a test lets a package be written."""
    return tmp_path / "ours"


@pytest.fixture
def tiny_tokenizer():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:95]
    vocabulary = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


@pytest.fixture
def server(tmp_path_factory, monkeypatch):
    """A Hub on loopback, without Xet, which huggingface_hub addresses meanwhile, with a cache of its own."""
    from slow.fault_sweep import serving

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """The folder of a package of `make_tiny_model`, to be read; `package` is a copy of it, to be spoiled."""
    folder = tmp_path_factory.mktemp("saved") / "package"
    save_package(make_tiny_model(), folder)
    return folder


@pytest.fixture
def package(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "package"))


def plain_twin(model):
    """A `GPT2LMHeadModel` with the same body and the same weights."""
    fields = {**model.config.to_dict(), "model_type": "gpt2"}
    for name in ("auto_map", "architectures", "id2label", "label2id"):
        fields.pop(name)
    config = GPT2Config(**fields)
    config._attn_implementation = model.config._attn_implementation
    twin = GPT2LMHeadModel(config)
    twin.load_state_dict(model.state_dict(), strict=False)
    return twin.train(model.training)


def save_adapter(model, folder, *, base):
    """A LoRA for a plain GPT-2, which names its base."""
    import peft

    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    adapted = peft.get_peft_model(model, config)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(folder, save_embedding_layers=False)


def write_published_checkpoint(folder, *, safetensors=True, **fields):
    """A plain GPT-2 laid out like the one that OpenAI's weights were published as; returns its `GPT2LMHeadModel`."""
    model = plain_twin(make_tiny_model(**fields))
    weights = {name.removeprefix("transformer."): w for name, w in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied: the published files hold it once
    positions = model.config.n_positions
    for layer in range(model.config.n_layer):
        causal = torch.tril(torch.ones(positions, positions)).view(1, 1, positions, positions)
        weights[f"h.{layer}.attn.bias"] = causal
        weights[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    folder.mkdir(parents=True, exist_ok=True)
    if safetensors:
        contiguous = {name: w.contiguous() for name, w in weights.items()}
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    of_2019 = {"n_ctx": positions, "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}}
    config = {**json.loads(model.config.to_json_string()), **of_2019, "architectures": ["GPT2LMHeadModel"]}
    del config["transformers_version"]
    (folder / "config.json").write_text(json.dumps(config))
    return model.eval()


@pytest.fixture
def transformers_log(caplog, monkeypatch):
    """`caplog` that hears what transformers warns about."""
    from transformers.utils import logging as transformers_logging

    root = logging.getLogger("transformers")
    monkeypatch.setattr(root, "propagate", True)
    transformers_logging.set_verbosity_warning()
    return caplog


@pytest.fixture
def gpt2_value(capsys):
    """Run the `gpt2-value` command in this process; returns (exit status, stdout, stderr)."""
    from hub_tools import cli

    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return ended.value.code or 0, captured.out, captured.err

    return run
