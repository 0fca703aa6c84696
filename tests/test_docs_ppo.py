"""The pages about PPO: their code runs, and the options and metrics that they name exist."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from train_small_gpt2 import Recipe, small_gpt2

from gpt2_value import PPOSettings, inspect_package
from gpt2_value.ppo import Reward

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("ppo.md", "coming-from-trl.md")


def run_page(page, tmp_path, monkeypatch):
    """Run the Python of a page, with a `base`; returns its names."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    recipe = Recipe(vocab_size=400, n_embd=32, n_layer=1, n_head=2, steps=12, batch_size=8)
    names = {"base": str(small_gpt2(recipe).folder), "__name__": page}
    for block in re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE):
        exec(compile(block, page, "exec"), names)
    return names


def test_the_code_of_the_ppo_page_runs(tmp_path, monkeypatch):
    names = run_page("ppo.md", tmp_path, monkeypatch)
    reward = Reward(names["shorter_sentences"], names["tokenizer"])
    drawn = names["rollouts"][0]
    assert reward(drawn).shape == drawn.responses.shape
    assert inspect_package(tmp_path / "warm").n_embd == 32
    torch.testing.assert_close(names["scored"].values, names["drawn"].values, atol=1e-5, rtol=0)
    assert names["scored"].values.requires_grad


def test_the_code_of_the_trl_page_runs_and_learns(tmp_path, monkeypatch):
    names = run_page("coming-from-trl.md", tmp_path, monkeypatch)
    assert names["stats"]["kl"] == pytest.approx(0, abs=1e-4)  # the first step: the policy is still the reference
    again = names["step"](names["rollout"], names["scores"])
    assert again["kl"] == names["stats"]["kl"]  # of the same rollout, whatever was learnt since
    learnt = names["model"].rescore(names["rollout"]).logprobs
    assert not torch.allclose(learnt, names["rollout"].logprobs, atol=1e-6)


@pytest.mark.parametrize("page", PAGES)
def test_every_option_on_a_page_exists(page):
    fields = {field.name for field in dataclasses.fields(PPOSettings)}
    of_others = r"--nproc_per_node|--multi_gpu|--num_processes|python (?:benchmarks|tests/slow)/[^`]*`"
    text = re.sub(of_others, "", (DOCS / page).read_text())
    named = re.findall(r"--(?:no-(?=detach))?([a-z][a-z-]*)", text)
    assert named
    assert {name.replace("-", "_") for name in named} - {"help"} <= fields
