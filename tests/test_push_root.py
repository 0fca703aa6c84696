"""What a push leaves is what loads: the repository's root is what the package is, whatever stood there before."""

import re
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import make_tiny_model, plain_twin, save_adapter, write_published_checkpoint
from slow.fault_sweep import REPO, push_verified
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from hub_tools import load_package, save_package
from hub_tools.publish.contents import read_by_a_loader

TOKENS = torch.tensor([[1, 2, 3, 4]])
# Files of a repository that no loader reads, and such that one does
STAYS = [
    "LICENSE",
    "notes.txt",
    "data.csv",
    "curve.png",
    "handler.py",
    "train.py",
    "training_args.bin",
    "optimizer.pt",
    "trainer_state.json",
    "all_results.json",
    "requirements.txt",
    "checkpoint-500/model.safetensors",
    "runs/config.json",
    "logs/tokenizer.json",
    "training_config.json",
]
GOES = [
    "model.safetensors",
    "model-00001-of-00002.safetensors",
    "model.safetensors.index.json",
    "model.fp16.safetensors",
    "pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin.index.json",
    "pytorch_model.fp16.bin",
    "tf_model.h5",
    "tf_model.h5.index.json",
    "flax_model.msgpack",
    "flax_model.msgpack.index.json",
    "model.ckpt.index",
    "model-Q4_K_M.gguf",
    "model.onnx",
    "value_head.safetensors",
    "value_head.bin",
    "consolidated.safetensors",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "adapter_config.json",
    "config.json",
    "config.4.0.0.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "tokenizer.4.0.0.json",
    "custom_generate/generate.py",
    "custom_generate/requirements.txt",
    "modeling_gpt2_value.py",
    "tekken.json",
    "qwen.tiktoken",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "verification.json",
]


def names_of_the_installed_loaders():
    """The file names that the installed transformers and peft look up: constants of theirs, and those of tokenizers."""
    found = set()
    for module in (transformers.utils, transformers.utils.hub, transformers.utils.peft_utils, peft.utils.constants):
        constants = [value for name, value in vars(module).items() if name.isupper() and isinstance(value, str)]
        found |= {value for value in constants if re.fullmatch(r"\w+(\.\w+)*\.[a-z]\w+", value)}
    for path in Path(transformers.__file__).parent.glob("models/*/tokenization_*.py"):
        for names in re.findall(r"VOCAB_FILES_NAMES = \{(.*?)\}", path.read_text(), re.DOTALL):
            found |= set(re.findall(r': "(.+?)"', names))
    return found


def test_every_name_that_the_installed_loaders_look_up_is_known():
    names = names_of_the_installed_loaders()
    assert {"model.safetensors", "adapter_config.json", "vocab.json", "processor_config.json"} <= names
    others = {name for name in names if not read_by_a_loader(name)}
    assert others <= {"modelcard.json", "README.md"}, "cards are words"


# The real loaders, after pushes over what people have in their repositories


def values(model):
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).value


def files_in(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def what_stood_there(kind, folder, tokenizer):
    """Write a repository of this kind, as the libraries write it."""
    other = make_tiny_model(seed=1)
    if kind == "a package with a tokenizer":
        save_package(other, folder, tokenizer)
    elif kind == "a package in shards":
        save_package(other, folder, max_shard_size=50_000)
    elif kind == "a tokenizer":  # tokenizer.push_to_hub
        tokenizer.chat_template = "{{ messages }}"
        tokenizer.save_pretrained(folder)
    elif kind == "an adapter":
        save_adapter(plain_twin(other), folder, base="alice/base")
    elif kind == "pickled weights":
        write_published_checkpoint(folder, safetensors=False)
    elif kind == "other code, templates and another way to generate":
        plain_twin(other).save_pretrained(folder)
        (folder / "custom_generate").mkdir()
        for name in ("modeling_mine.py", "custom_generate/generate.py", "chat_template.jinja"):
            (folder / name).write_text("raise RuntimeError")


KINDS = [
    "a package with a tokenizer",
    "a package in shards",
    "a tokenizer",
    "an adapter",
    "pickled weights",
    "other code, templates and another way to generate",
]


@pytest.mark.parametrize("kind", KINDS)
def test_after_a_push_every_loader_gives_the_pushed_values(server, saved, tmp_path, tiny_tokenizer, kind, monkeypatch):
    monkeypatch.setattr(transformers.utils.hub, "_is_offline_mode", False, raising=False)  # of transformers 4
    (tmp_path / "old").mkdir()
    what_stood_there(kind, tmp_path / "old", tiny_tokenizer)
    server.create(REPO, {**files_in(tmp_path / "old"), "notes.txt": b"mine"})
    report = push_verified(saved)
    assert "notes.txt" in report.kept
    expected = values(make_tiny_model())
    where = {"revision": report.commit, "cache_dir": tmp_path / "cache", "trust_remote_code": True}
    for loader in (AutoModel, AutoModelForCausalLM):
        torch.testing.assert_close(values(loader.from_pretrained(REPO, **where)), expected, atol=1e-6, rtol=0)
    loaded = load_package(REPO, revision=report.commit, cache_dir=tmp_path / "ours")
    torch.testing.assert_close(values(loaded.model), expected, atol=1e-6, rtol=0)
    assert loaded.tokenizer is None
    with pytest.raises((OSError, ValueError)):
        AutoTokenizer.from_pretrained(REPO, **where)


def test_a_folder_in_the_place_of_a_file_goes(server, saved):
    server.create(REPO, {"config.json/mine.txt": b"x", "images/config.json": b"x"})
    report = push_verified(saved)
    assert set(report.deleted) == {"config.json/mine.txt"}


def test_other_files_stay_as_they_are(server, saved, tmp_path):
    old = {name: name.encode() for name in STAYS}
    server.create(REPO, {**old, **dict.fromkeys(GOES, b"old")})
    report = push_verified(saved)
    files = server.files(REPO)
    assert {name: files[name] for name in old} == old
    assert set(files) == {*old, ".gitattributes", *(path.name for path in saved.iterdir())}
    assert len(server.history(REPO)) == 3, "one commit"
    assert set(report.deleted) | set(report.changed) == set(GOES)
    loaded = load_package(REPO, revision=report.commit, cache_dir=tmp_path / "cache")
    assert loaded.commit == report.commit
