"""The pages about PPO: their code runs, and the options and metrics that they name exist."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from train_small_gpt2 import Recipe, small_gpt2

from gpt2_value import PPOSettings

DOCS = Path(__file__).parent.parent / "docs"
PAGES = ("ppo.md", "coming-from-trl.md")


def test_the_code_of_the_trl_page_runs_and_learns(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    recipe = Recipe(vocab_size=400, n_embd=32, n_layer=1, n_head=2, steps=12, batch_size=8)
    names = {"base": str(small_gpt2(recipe).folder)}
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "coming-from-trl.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "coming-from-trl.md", "exec"), names)
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
    named = re.findall(r"--([a-z][a-z-]*)", text)
    assert named
    assert {name.replace("-", "_") for name in named} - {"help"} <= fields
