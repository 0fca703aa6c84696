"""Which critic explains the returns best, and how should it start? On the task of `make ppo`.

    python benchmarks/critic.py ways --out runs/critic      ways to initialise and to train the value head
    python benchmarks/critic.py starts --out runs/critic    a cold critic, a warm-up of it, and `fit_values` beforehand

Every way is a shortened run for each seed. What is measured is the explained variance of the *Monte Carlo* returns,
1 - Var[G - V] / Var[G] over the tokens of a rollout, before anything is learnt from it: the returns that PPO itself
aims at hold the values, and flatter them. A run that is there already is not made again. Prints a table of docs/ppo.md,
and draws its figure. `--small` takes the model of examples/exploits.py, which is much faster.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))  # before this folder, whose ppo.py is another

import torch
from accelerate import Accelerator
from exploits import RECIPE
from matplotlib.figure import Figure
from ppo_task import demo_settings
from torch import nn
from transformers.utils import logging

from gpt2_value import PPOSettings, advantages_and_returns, explained_variance, fit_values, rollout, token_rewards
from gpt2_value.ppo import Run, make_task

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"batch_size": 32, "minibatch_size": 16, "max_new_tokens": 32}
WAYS = {
    "zero init, no dropout, attached, shared trunk (the defaults)": "#2a78b5",
    "init with a standard deviation of 0.02": "#52a447",
    "TRL's init: uniform in ±1/sqrt(n_embd)": "#d99a2b",
    "dropout of 0.1 before the head, as TRL has it": "#8a5fb0",
    "detached: the body does not learn from the value loss": "#c8452f",
    "a second model as critic": "#444444",
}
SHARED, STD, TRL_INIT, DROPOUT, DETACHED, SEPARATE = WAYS
STARTS = {
    "cold": "#2a78b5",
    "cold, a learning rate of 1e-2 for the head": "#52a447",
    "a warm-up of three iterations, then the same": "#d99a2b",
    "fit_values on three rollouts, then the same": "#c8452f",
}
COLD, FAST, WARMED, FITTED = STARTS
BEFORE = 3  # rollouts that the critic learns from before the policy moves


class LearningDropout(nn.Module):
    """Dropout that is on whenever a gradient is wanted. `rescore` switches every nn.Dropout off, but not this."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, hidden_states):
        return nn.functional.dropout(hidden_states, self.rate, training=torch.is_grad_enabled())


class MeasuredRun(Run):
    """A run, with the explained variance of the Monte Carlo returns among its metrics."""

    def collect(self, iteration):
        batch = super().collect(iteration)
        mask, values = batch.drawn.response_mask, batch.drawn.values
        # An advantage is a discounted sum of errors; the errors alone, summed with lam=1, are return minus value.
        advantages = batch.returns - values * mask
        after = torch.cat([advantages[:, 1:], torch.zeros_like(advantages[:, :1])], 1)
        errors = torch.where(mask, advantages - self.settings.gamma * self.settings.lam * after, 0)
        returns = errors.flip(1).cumsum(1).flip(1) + values  # gamma is 1
        batch.metrics["explained_variance_mc"] = explained_variance(values, returns, mask)
        return batch


def start(way, seed, iterations, is_small):
    """A run that has not begun."""
    base = demo_settings(RECIPE if is_small else None)
    rates = {"learning_rate": 1e-3} if is_small else {}
    changes = {
        DETACHED: {"detach_value_head": True},
        SEPARATE: {"critic": base["base"]},
        FAST: {"value_learning_rate": 1e-2},
        WARMED: {"value_learning_rate": 1e-2, "critic_warmup": BEFORE},
        FITTED: {"value_learning_rate": 1e-2},
    }.get(way, {})
    iterations += BEFORE if way == WARMED else 0
    settings = PPOSettings(**base, **rates, **SIZES, **changes, seed=seed, iterations=iterations, cpu=True)
    task = make_task(settings, torch.device("cpu"))
    head = task.model.v_head
    if way == STD:
        nn.init.normal_(head.summary.weight, std=0.02)
    if way == TRL_INIT:
        head.summary.load_state_dict(torch.nn.Linear(head.summary.weight.shape[1], 1).state_dict())  # as TRL makes it
    if way == DROPOUT:
        head.first_dropout = LearningDropout(0.1)
    run = MeasuredRun(settings, task, Accelerator(cpu=True), rollout)
    if way == FITTED:
        parts = [run.draw(run.prompts(number)) for number in range(BEFORE)]
        returns = []
        for part in parts:  # the policy is still the reference, so the KL is 0
            mask = part.response_mask
            rewards = token_rewards(task.reward(part), part.logprobs, part.logprobs, mask, settings.kl_coef)
            returns.append(advantages_and_returns(rewards, part.values, mask, lam=1.0).returns)
        print(fit_values(task.model, parts, returns), file=sys.stderr)
    return run


def measured(way, number, seed, iterations, is_small, folder):
    """The metrics of one run, from where the policy begins to learn."""
    file = folder / f"{'small-' if is_small else ''}{number}-{seed}-{iterations}.json"
    if not file.exists():
        run = start(way, seed, iterations, is_small)
        lines = [run.learn(run.collect(iteration)) for iteration in range(run.settings.iterations)]
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(lines[-iterations:]), encoding="utf-8")
        print(f"{way}, seed {seed}: {lines[-1]['explained_variance_mc']:.2f}", file=sys.stderr, flush=True)
    return json.loads(file.read_text(encoding="utf-8"))


def curve(runs, name):
    """Mean over the runs, iteration by iteration."""
    return [statistics.fmean(line[name] for line in lines) for lines in zip(*runs, strict=True)]


def row(way, runs):
    cells = [way, len(runs)]
    middle = len(runs[0]) // 2
    for half in (slice(0, 1), slice(1, middle), slice(middle, None)):
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
            axes.plot(
                curve(runs, name), color=(WAYS | STARTS)[way], label=way, linewidth=2 if way in (SHARED, COLD) else 1.3
            )
        axes.set_title(f"{title}, mean of {min(map(len, found.values()))} seeds", fontsize=10)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("compared", choices=["ways", "starts"])
    parser.add_argument("--out", type=Path, default=Path("runs/critic"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--figure", type=Path, help="default: docs/ppo_critic.png or docs/ppo_warm_start.png")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    ways = WAYS if arguments.compared == "ways" else STARTS
    found = {way: [] for way in ways}
    for seed in range(arguments.seeds):  # seeds outside, so that a table that was interrupted is even
        for number, way in enumerate(ways):
            folder = arguments.out / arguments.compared
            found[way].append(measured(way, number, seed, arguments.iterations, arguments.small, folder))
    name = "ppo_critic.png" if arguments.compared == "ways" else "ppo_warm_start.png"
    draw(found, arguments.figure or ROOT / "docs" / name)
    print("| critic | seeds | at first | first half | second half | reward | KL |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    print("\n".join(row(way, runs) for way, runs in found.items()))


if __name__ == "__main__":
    main()
