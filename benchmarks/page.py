"""`make bench`: run every benchmark in turn and write docs/benchmarks.md, the page with the tables."""

import datetime
import platform
import subprocess
import sys
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "benchmarks.md"
SECTIONS = (
    (
        "Rollouts, float32",
        "rollout.py --rounds 3 --seed-loop --shapes 16x16x48",
        "Time to get what PPO needs: tokens, log-probabilities and values. `generate(output_scores=True)`, "
        "`generate()` alone and CTranslate2 (`pip install ctranslate2`) give no values. The seed's loop is the "
        "sampling loop of the notebook with which TRL began; it ran once.",
    ),
    ("Rollouts, other shapes", "rollout.py --rounds 3 --shapes 1x16x48 64x16x48 16x16x128", ""),
    (
        "Scoring with gradients",
        "rescore.py --rounds 3",
        "Forward and backward pass. Each method's memory was measured in its own process, the times of all in one.",
    ),
    (
        "Rollouts, bfloat16",
        "rollout.py --rounds 3 --dtype bfloat16 --shapes 16x1x4",
        "torch multiplies bfloat16 slowly on a CPU without instructions for it, so the shape is small. A rollout "
        "multiplies in float32 and rounds the result of each layer.",
    ),
    (
        "Rollouts of torch.compile(model)",
        "rollout.py --rounds 3 --compile --layers 2 --shapes 16x16x12",
        "The model has only two layers, because compiling takes long. `rollout` decodes with the model inside the "
        "wrapper, as without `torch.compile`.",
    ),
    (
        "Training with a CheckpointPusher",
        "checkpoint_pusher.py --rounds 2 --seconds 120 --every 40",
        "Whole runs with and without a pusher, in turns, on a local Hub that takes ten seconds for each upload. Both "
        "cores train. `slowest / fastest run without` says how far two equal runs differ on this machine.",
    ),
)
INTRODUCTION = """# Benchmarks

The model is GPT-2 124M with random weights, unless a section says otherwise. Each table comes from one run in one
process, which alternates between the methods. (Peak memory is measured in one process for each method.) Seconds depend
on the machine, so compare the ratios. Shapes are B prompts x P prompt tokens x T response tokens. "Floor" is the time
of the matrix products alone.

Reproduce everything with `make bench`, or one section with the command under its heading. Nothing has been measured on
a GPU. The command there is `python benchmarks/rollout.py --device cuda --dtype bfloat16 --shapes 16x64x128 64x64x128
256x64x128`; it also measures the copy bandwidth, and computes the floor from it.
"""


def processor():
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor()
    return next(line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name"))


def main():
    lines = [
        INTRODUCTION,
        f"Measured on {datetime.date.today()}: {processor()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}.",
        "",
    ]
    for title, command, remark in SECTIONS:
        print(f"{title}: python benchmarks/{command}", file=sys.stderr)
        script, *arguments = command.split()
        done = subprocess.run(
            [sys.executable, HERE / script, *arguments], check=True, stdout=subprocess.PIPE, text=True
        )
        lines += [
            f"## {title}",
            "",
            f"`python benchmarks/{command}`",
            "",
            *([remark, ""] if remark else []),
            done.stdout.strip(),
            "",
        ]
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
