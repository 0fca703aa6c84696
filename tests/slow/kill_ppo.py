"""Kill a run of PPO on the demo's task at random moments, resume it, and compare it with a run that nobody killed.

    python tests/slow/kill_ppo.py --out runs/kills

Every kill is a SIGKILL to a process of its own, at a moment drawn evenly: one in five from the time in which the run
starts, the others from that of its next iterations. Processes are forked from one that has imported everything, so that
they are killed in the run and not in its imports. Batches are small, since what is tested is not how well it learns;
`--default-sizes` takes those of `make ppo`. Prints a line for each kill, and exits with 1 where any metric (`seconds`
aside) or any weight differs.
"""

import argparse
import dataclasses
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import torch
from ppo_task import demo_settings

from gpt2_value import PPOSettings, train
from gpt2_value.ppo import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"batch_size": 16, "minibatch_size": 8, "epochs": 2, "max_new_tokens": 16, "save_every": 3}


def lines_of(folder):
    file = folder / "metrics.jsonl"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def saved(folder):
    """Iterations in the last checkpoint."""
    file = folder / "checkpoint.pt"
    return torch.load(file, weights_only=True)["iteration"] if file.exists() else 0


def killed_once(forks, settings, dice, number, spread):
    """Start the run and kill it; returns when that was, in words, or None where it ended before."""
    old = set(lines_of(settings.out))  # a resumed run first drops those that are newer than its checkpoint
    process, started = forks.Process(target=train, args=(settings,)), time.perf_counter()
    process.start()
    in_start = number % 5 == 4
    while not in_start and process.is_alive() and set(lines_of(settings.out)) <= old:
        time.sleep(0.005)
    waited = dice.uniform(0, spread)
    process.join(waited)
    was_alive = process.is_alive()
    process.kill()
    process.join()
    if not was_alive:
        if process.exitcode:
            raise SystemExit(f"the run failed by itself: exit status {process.exitcode}")
        return None
    after = "its start" if in_start else "its first new line"
    return f"{time.perf_counter() - started:5.1f} s after its start, {waited:4.2f} s after {after}"


def without_seconds(folder):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(folder)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the run and of the moments")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--default-sizes", action="store_true")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} is there: name a new folder")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT, ROOT / "examples")))  # of the process that forks
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["gpt2_value.ppo", "accelerate", "modeling_gpt2_value", "hub_tools"])
    whole = PPOSettings(
        **demo_settings(),
        out=arguments.out / "whole",
        seed=arguments.seed,
        iterations=arguments.iterations,
        kl_target=3.0,
        cpu=True,
        **({} if arguments.default_sizes else SMALL),
    )
    killed = dataclasses.replace(whole, out=arguments.out / "killed")
    train(whole)
    seconds = [line["seconds"] for line in read_metrics(whole.out)]
    dice, kills, lost = random.Random(arguments.seed), 0, 0
    while kills < arguments.kills:
        when = killed_once(forks, killed, dice, kills, 8 * sum(seconds) / len(seconds))
        if when is None:
            break
        kills += 1
        written, kept = len(lines_of(killed.out)), saved(killed.out)
        lost += written - kept
        print(f"kill {kills:2}: {when}; {written} lines, checkpoint of {kept}", flush=True)
    last = forks.Process(target=train, args=(killed,))
    last.start()
    last.join()
    expected, found = without_seconds(whole.out), without_seconds(killed.out)
    states = [torch.load(settings.out / "checkpoint.pt", weights_only=True) for settings in (whole, killed)]
    weights = [torch.equal(weight, states[1]["weights"][name]) for name, weight in states[0]["weights"].items()]
    same = sum(a == b for a, b in zip(expected, found, strict=False))
    print(f"{kills} kills, {lost} iterations done again")
    print(
        f"{same} of {len(expected)} lines equal, {len(found)} written; {sum(weights)} of {len(weights)} tensors equal"
    )
    return int(found != expected or not all(weights))


if __name__ == "__main__":
    sys.exit(main())
