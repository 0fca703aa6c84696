"""Kill a run of PPO on the demo's task at random moments, resume it, and compare it with a run that nobody killed.

    python tests/slow/kill_ppo.py --out runs/kills

Every kill is a SIGKILL, at a moment drawn evenly: one in five from the time in which the run starts, the others from
that of its next iterations. Processes are forked from one that has imported everything, so that they are killed in the
run and not in its imports. Batches are small, since what is tested is not how well it learns. Prints a line for each
kill, and exits with 1 where any metric (`seconds` aside) or any weight differs.
"""

import argparse
import dataclasses
import multiprocessing
import os
import random
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import torch  # noqa: E402
from ppo_task import demo_settings  # noqa: E402

from gpt2_value import PPOSettings, train  # noqa: E402
from gpt2_value.ppo import read_metrics  # noqa: E402

KILLS = 10
SMALL = {"batch_size": 16, "minibatch_size": 8, "epochs": 2, "max_new_tokens": 16, "save_every": 3}


def written(out):
    """The lines of metrics; a resumed run first drops those that are newer than its checkpoint."""
    file = out / "metrics.jsonl"
    return set(file.read_text(encoding="utf-8").splitlines()) if file.exists() else set()


def results(out):
    """Metrics without what differs from run to run, and weights."""
    metrics = [{name: value for name, value in line.items() if name != "seconds"} for line in read_metrics(out)]
    return metrics, torch.load(out / "checkpoint.pt", weights_only=True)["weights"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--iterations", type=int, default=100)
    given = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])  # of the process that forks
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["gpt2_value.ppo", "accelerate", "modeling_gpt2_value", "hub_tools"])
    how = {**demo_settings(), **SMALL, "iterations": given.iterations, "kl_target": 3.0, "cpu": True}
    whole = PPOSettings(**how, out=given.out / "whole")
    killed = dataclasses.replace(whole, out=given.out / "killed")
    train(whole)
    spread = 8 * statistics.fmean(line["seconds"] for line in read_metrics(whole.out))
    dice = random.Random(0)
    for number in range(KILLS):
        old, process = written(killed.out), forks.Process(target=train, args=(killed,))
        process.start()
        while number % 5 < 4 and process.is_alive() and written(killed.out) <= old:
            time.sleep(0.005)
        process.join(dice.uniform(0, spread))
        process.kill()
        process.join()
        print(f"kill {number + 1}: exit status {process.exitcode}, {len(written(killed.out))} lines", flush=True)
    train(killed)
    (expected, weights), (found, others) = results(whole.out), results(killed.out)
    differ = [name for name, weight in weights.items() if not torch.equal(weight, others[name])]
    print(f"{len(found)} lines, {'equal' if found == expected else 'NOT equal'}; weights that differ: {differ}")
    return int(found != expected or bool(differ))


if __name__ == "__main__":
    sys.exit(main())
