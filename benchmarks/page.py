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
        "Tokens, log-probabilities and values for PPO. `generate(output_scores=True)`, `generate()` alone and "
        "CTranslate2 (`pip install ctranslate2`) give no values; the seed's loop ran once.",
    ),
    ("Rollouts, other shapes", "rollout.py --rounds 3 --shapes 1x16x48 64x16x48 16x16x128", ""),
    ("Scoring with gradients", "rescore.py --rounds 3", "Memory of processes of their own; time interleaved in one."),
    (
        "Rollouts, bfloat16",
        "rollout.py --rounds 3 --dtype bfloat16 --shapes 16x1x4",
        "A CPU without bfloat16 instructions of its own: torch multiplies slowly there, so few tokens are used. The "
        "decode step then multiplies in float32 and rounds each layer's result; its cache and attention are in "
        "float32 on every CPU.",
    ),
    (
        "Rollouts of torch.compile(model)",
        "rollout.py --rounds 3 --compile --layers 2 --shapes 16x16x12",
        "Two layers only, since compiling takes long. A rollout decodes the model inside the wrapper, compiled or not.",
    ),
    (
        "Training with a CheckpointPusher: whole runs",
        "checkpoint_pusher.py --ways whole --rounds 3",
        "A Hub on loopback that takes ten seconds for each upload. On Linux the worker process runs only while a core "
        "is idle; where training leaves none, fewer checkpoints are pushed in the same time.",
    ),
    (
        "Training with a CheckpointPusher: within one run",
        "checkpoint_pusher.py --ways segments --rounds 3",
        "The worker process is stopped for every other half second of training. `control`: the same without a pusher.",
    ),
)
INTRODUCTION = """# Benchmarks

GPT-2 124M with random weights, where nothing else is said. Every table was made by one run in one process (memory: one
process each), the methods in turns; compare the ratios, since the seconds depend on the machine. Reproduce with
`make bench`, or with the command under each heading. On a GPU: `python benchmarks/rollout.py --device cuda --dtype
bfloat16 --shapes 16x64x128 64x64x128 256x64x128`, which also measures the copy bandwidth and gives the floor that it
sets.
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
            done.stdout,
        ]
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
