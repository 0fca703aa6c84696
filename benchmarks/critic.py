"""Which critic explains the returns best? Ways to start and to train the value head, on the task of examples/ppo.py.

    python benchmarks/critic.py --out runs/critic

Every way is a shortened run of the example for each seed. What is measured is the explained variance of the *Monte
Carlo* returns, 1 - Var[G - V] / Var[G] over the tokens of a rollout, before anything is learnt from it: the returns
that PPO itself aims at hold the values, and flatter them. A run that is there already is not made again. Prints the
table of docs/ppo.md, and draws its figure. `--small` takes the model of examples/exploits.py, which is much faster.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # before this folder, whose ppo.py is another

import ppo
import torch
from accelerate import Accelerator
from exploits import RECIPE
from matplotlib.figure import Figure
from ppo_task import make_task
from torch import nn
from train_small_gpt2 import small_gpt2
from transformers.utils import logging

from generation_gpt2_value import rescore, rollout

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"batch_size": 32, "minibatch_size": 16, "max_new_tokens": 32}
SHARED = "zero init, no dropout, attached, shared trunk (the defaults)"
WAYS = {
    SHARED: "#2a78b5",
    "init with a standard deviation of 0.02": "#52a447",
    "TRL's init: uniform in ±1/sqrt(n_embd)": "#d99a2b",
    "dropout of 0.1 before the head, as TRL has it": "#8a5fb0",
    "detached: the body does not learn from the value loss": "#c8452f",
    "a second model as critic": "#444444",
}
SHARED, STD, TRL_INIT, DROPOUT, DETACHED, SEPARATE = WAYS


class LearningDropout(nn.Module):
    """Dropout that is on whenever a gradient is wanted. `rescore` switches every nn.Dropout off, but not this."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states):
        return nn.functional.dropout(hidden_states, self.rate, training=torch.is_grad_enabled())


class Trainer(ppo.Trainer):
    """The example's trainer, with the explained variance of the Monte Carlo returns among its metrics."""

    def collect(self, iteration):
        batch, metrics = super().collect(iteration)
        mask, values = batch.drawn.response_mask, batch.drawn.values
        # An advantage is a discounted sum of errors; the errors alone, summed with lam=1, are return minus value.
        advantages = batch.returns - values * mask
        after = torch.cat([advantages[:, 1:], torch.zeros_like(advantages[:, :1])], 1)
        errors = torch.where(mask, advantages - self.settings.gamma * self.settings.lam * after, 0)
        returns = errors.flip(1).cumsum(1).flip(1) + values  # gamma is 1
        return batch, metrics | {"explained_variance_mc": ppo.explained_variance(values, returns, mask)}


class TwoModels(Trainer):
    """PPO whose values are those of a second model, a copy of the policy at the start, with its learning rate."""

    def __init__(self, settings, task, accelerator):
        self.critic = copy.deepcopy(task.reference).requires_grad_(True)
        super().__init__(settings, task, accelerator, self.sample_with_critic)
        self.optimizer.add_param_group({"params": list(self.critic.parameters())})

    def sample_with_critic(self, model, queries, **how):
        drawn = rollout(model, queries, **how)
        with torch.no_grad():
            return dataclasses.replace(drawn, values=rescore(self.critic, drawn).values)

    def score(self, drawn):
        return dataclasses.replace(super().score(drawn), values=rescore(self.critic, drawn).values)


def trainer_for(way, seed, iterations, is_small):
    chosen = {"base": str(small_gpt2(RECIPE).folder), "learning_rate": 1e-3} if is_small else {}
    changes = chosen | {STD: {"value_head_std": 0.02}, DETACHED: {"detach_value_head": True}}.get(way, {})
    settings = ppo.Settings(out=Path(), seed=seed, iterations=iterations, cpu=True, **SIZES, **changes)
    task, accelerator = make_task(settings, torch.device("cpu")), Accelerator(cpu=True)
    if way == TRL_INIT:
        task.model.v_head.summary.reset_parameters()  # TRL's head is an nn.Linear as torch makes it
    if way == DROPOUT:
        task.model.v_head.first_dropout = LearningDropout(0.1)
    return TwoModels(settings, task, accelerator) if way == SEPARATE else Trainer(settings, task, accelerator, rollout)


def run(way, seed, iterations, is_small, folder):
    """The metrics of one run."""
    file = folder / f"{'small-' if is_small else ''}{list(WAYS).index(way)}-{seed}-{iterations}.json"
    if not file.exists():
        trainer = trainer_for(way, seed, iterations, is_small)
        lines = [trainer.iterate(iteration) for iteration in range(iterations)]
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(lines), encoding="utf-8")
        print(f"{way}, seed {seed}: {lines[-1]['explained_variance_mc']:.2f}", file=sys.stderr, flush=True)
    return json.loads(file.read_text(encoding="utf-8"))


def curve(runs, name):
    """Mean over the runs, iteration by iteration."""
    return [statistics.fmean(line[name] for line in lines) for lines in zip(*runs, strict=True)]


def row(way, runs):
    cells = [way, len(runs)]
    middle = len(runs[0]) // 2
    for half in (slice(1, middle), slice(middle, None)):  # before the first, no head has learnt anything
        per_run = [statistics.fmean(line["explained_variance_mc"] for line in lines[half]) for lines in runs]
        spread = f" ± {statistics.stdev(per_run):.2f}" if len(per_run) > 1 else ""
        cells.append(f"{statistics.fmean(per_run):.2f}{spread}")
    for name in ("reward", "kl"):
        cells.append(f"{statistics.fmean(line[name] for lines in runs for line in lines[-3:]):.2f}")
    return f"| {' | '.join(map(str, cells))} |"


def draw(found, file):
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, name, title in zip(
        panels,
        ("explained_variance_mc", "reward"),
        ("explained variance of the Monte Carlo returns", "mean reward"),
        strict=True,
    ):
        for way, runs in found.items():
            axes.plot(curve(runs, name), color=WAYS[way], label=way, linewidth=2 if way == SHARED else 1.3)
        axes.set_title(f"{title}, mean of {min(map(len, found.values()))} seeds", fontsize=10)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/critic"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "ppo_critic.png")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    found = {way: [] for way in WAYS}
    for seed in range(arguments.seeds):  # seeds outside, so that a table that was interrupted is even
        for way in WAYS:
            found[way].append(run(way, seed, arguments.iterations, arguments.small, arguments.out))
    draw(found, arguments.figure)
    print("| critic | seeds | first half | second half | reward | KL |\n|---|---:|---:|---:|---:|---:|")
    print("\n".join(row(way, runs) for way, runs in found.items()))


if __name__ == "__main__":
    main()
