"""Kill a run of examples/ppo.py at random moments, resume it, and compare it with a run that nobody killed.

    python tests/slow/kill_ppo.py --whole runs/ppo --out runs/killed

`--whole` is the folder of a run with the same options, made first if it is not there. Every kill is a SIGKILL to a real
process, at a moment drawn evenly from the time in which it starts (one kill in five) or from that of its next
iterations. Prints a line for each kill, and exits with 1 where any metric (`seconds` aside) or any weight differs.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def command(out, options):
    return [sys.executable, str(ROOT / "examples" / "ppo.py"), "--out", str(out), *options]


def lines_of(folder):
    file = folder / "metrics.jsonl"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def saved(folder):
    """Iterations in the last checkpoint."""
    file = folder / "checkpoint.pt"
    return torch.load(file, weights_only=True)["iteration"] if file.exists() else 0


def killed_once(out, options, dice, number, spread):
    """Start the run and kill it; returns when that was, in words, or None where it ended before."""
    started = time.perf_counter()
    process = subprocess.Popen(command(out, options), stderr=subprocess.DEVNULL)
    old = set(lines_of(out))  # a resumed run first drops those that are newer than its checkpoint
    in_start = number % 5 == 4
    while not in_start and process.poll() is None and set(lines_of(out)) <= old:
        time.sleep(0.02)
    waited = dice.uniform(0, spread)
    try:
        process.wait(waited)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        after = "its start" if in_start else "its first new line"
        seconds = time.perf_counter() - started
        return f"{seconds:5.1f} s after its start, {waited:4.1f} s after {after}"
    if process.returncode:
        raise SystemExit(f"the run failed by itself: exit status {process.returncode}")
    return None


def without_seconds(folder):
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines_of(folder)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--kill-seed", type=int, default=0, help="of the moments")
    arguments, options = parser.parse_known_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} is there: name a new folder")
    subprocess.run(command(arguments.whole, options), check=True, stderr=subprocess.DEVNULL)
    whole = without_seconds(arguments.whole)
    seconds = [json.loads(line)["seconds"] for line in lines_of(arguments.whole)]
    dice, kills, lost = random.Random(arguments.kill_seed), 0, 0
    while kills < arguments.kills:
        when = killed_once(arguments.out, options, dice, kills, 4 * sum(seconds) / len(seconds))
        if when is None:
            break
        kills += 1
        written, kept = len(lines_of(arguments.out)), saved(arguments.out)
        lost += written - kept
        print(f"kill {kills:2}: {when}; {written} lines, checkpoint of {kept}", flush=True)
    subprocess.run(command(arguments.out, options), check=True, stderr=subprocess.DEVNULL)
    found = without_seconds(arguments.out)
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (arguments.whole, arguments.out)]
    weights = [torch.equal(weight, states[1]["model"][name]) for name, weight in states[0]["model"].items()]
    same = sum(a == b for a, b in zip(whole, found, strict=False))
    print(f"{kills} kills, {lost} iterations done again")
    print(f"{same} of {len(whole)} lines equal, {len(found)} written; {sum(weights)} of {len(weights)} tensors equal")
    return int(found != whole or not all(weights))


if __name__ == "__main__":
    sys.exit(main())
