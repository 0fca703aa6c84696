"""What `make demo` runs, on real models: the training, the fit of the value head, and all at once."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import demo
import pytest
import torch
import typer
from conftest import make_tiny_model
from fit_value_head import Scored, fit_value_head
from support.settings import seeded
from torch.nn.functional import pad
from train_small_gpt2 import Recipe, small_gpt2
from transformers import AutoTokenizer, BertConfig, GPT2LMHeadModel

from hub_tools import inspect_package
from hub_tools.errors import SourceError
from modeling_gpt2_value import GPT2ValueModel

ROOT = Path(__file__).parent.parent
QUICK = Recipe(vocab_size=400, n_positions=256, n_embd=32, n_layer=1, n_head=2, steps=12, batch_size=8, threads=1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A checkpoint that was trained for a moment, in a cache of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return small_gpt2(QUICK)


@pytest.fixture
def model(small):
    return GPT2ValueModel.from_pretrained(small.folder).eval()


@pytest.fixture
def tokenizer(small):
    return AutoTokenizer.from_pretrained(small.folder)


# Training


def test_a_checkpoint_is_trained_once_and_another_time_with_the_same_weights(small, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(small.folder.parent.parent))
    assert dataclasses.replace(small_gpt2(QUICK), trained_now=True) == small
    assert [path.name for path in small.folder.parent.iterdir()] == [small.folder.name]  # no draft is left
    assert small.loss < torch.tensor(float(QUICK.vocab_size)).log()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))  # an empty home
    state = torch.get_rng_state()
    twin = small_gpt2(QUICK)
    assert twin.folder.is_relative_to(tmp_path / ".cache")
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (twin.folder / file).read_bytes() == (small.folder / file).read_bytes()
    assert torch.equal(torch.get_rng_state(), state)


def test_the_checkpoint_is_laid_out_like_the_published_gpt2(small, tokenizer):
    assert {"vocab.json", "merges.txt", "tokenizer.json"} <= set(os.listdir(small.folder))
    model, info = GPT2LMHeadModel.from_pretrained(small.folder, output_loading_info=True)
    assert not any(info.values())
    assert (model.config.activation_function, model.config.resid_pdrop) == ("gelu_new", 0.1)
    text = 'My least favourite movie is "Größe"!<|endoftext|>'
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


# The value head


def test_fitting_finds_a_linear_value_and_touches_the_head_alone(model):
    """One-token texts whose return is a linear function of what the head sees: the fit must find it."""
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tokens = torch.arange(QUICK.vocab_size)[:, None]
    with torch.no_grad():
        features = model.transformer(tokens).last_hidden_state[:, 0]  # [texts, n_embd]
    direction = torch.randn(QUICK.n_embd, generator=seeded())
    returns = features @ direction / (features @ direction).std() + 0.7
    columns = (tokens, torch.ones_like(tokens), torch.ones_like(tokens, dtype=torch.bool))
    fit = fit_value_head(model, Scored(*(pad(column, (0, 3)) for column in columns), returns))  # padding has no part
    with torch.no_grad():
        values = model(tokens).value[:, 0]
    assert fit.states == QUICK.vocab_size
    assert fit.explained_variance > 0.99
    assert (values - returns).abs().mean() < 0.05
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == {"v_head.summary.weight", "v_head.summary.bias"}
    assert model.config.detach_value_head


@pytest.mark.parametrize("fields", [{"summary_use_proj": False}, {"summary_activation": "tanh"}])
def test_a_head_that_is_not_linear_is_refused(fields, tokenizer):
    with pytest.raises(SourceError, match="not linear"):
        demo.fit(make_tiny_model(**fields, vocab_size=400, n_positions=256), tokenizer, on_policy=False, say=print)


# All of it


@pytest.mark.parametrize(
    ("base", "says"),
    [("nowhere", "is no folder"), ("bert", "'bert'"), ("mute", "tokenizer"), (None, "XDG_CACHE_HOME=")],
)
def test_a_base_that_will_not_do_is_refused_with_what_to_type(base, says, capsys, monkeypatch, small, tmp_path):
    BertConfig().save_pretrained(tmp_path / "bert")
    GPT2LMHeadModel.from_pretrained(small.folder).save_pretrained(tmp_path / "mute")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))  # which cannot be written
    with pytest.raises(typer.Exit):
        demo.main(base=base and str(tmp_path / base), folder=tmp_path / "out")
    said = capsys.readouterr().err
    assert says in said
    assert base is None or "make demo BASE=" in said
    assert not (tmp_path / "out").exists()


def test_the_demo_runs_from_a_checkpoint_to_the_page(small, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "demo.py", "--base", small.folder, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "COLUMNS": "200"},
    )
    assert done.returncode == 0, done.stderr
    package = inspect_package(tmp_path / "out" / "package")
    assert package.n_embd == QUICK.n_embd
    assert f'AutoModel.from_pretrained("{package.folder}", trust_remote_code=True)' in done.stdout
    assert all(f"{prompt} …" in done.stdout for prompt in demo.PROMPTS)
    assert f"gpt2-value app {package.folder.relative_to(tmp_path)}" in done.stdout  # the demo ends by naming it
    assert (tmp_path / "out" / "responses.html").read_text().count('class="gv-response"') == len(demo.PROMPTS)
