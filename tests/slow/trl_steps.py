"""What the comparisons with TRL share: settings of its trainer, and the command line.

It is `write FOLDER` in one environment, and `compare FOLDER` in the other.

Imports the standard library and torch, which both environments have.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

# What the comparisons ask of `PPOConfig` alike: one minibatch, on the CPU, and nothing but training.
PPO_CONFIG = {
    "use_cpu": True,
    "bf16": False,
    "seed": 0,
    "gradient_accumulation_steps": 1,
    "num_mini_batches": 1,
    "stop_token": "eos",
    "num_sample_generations": 0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}


def write_or_compare(
    description: str, content: str, write: Callable[[Path], None], compare: Callable[[Path], int]
) -> int:
    """Read the command line and take the step that it names; the exit status: 1 where `compare` finds anything.

    Args:
        description: the script's docstring, whose first line `--help` shows.
        content: what lies in the folder, in words.
        write: fill the folder, which is new or empty.
        compare: read it, and return how much in it is wrong.
    """
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("step", choices=["write", "compare"])
    parser.add_argument("folder", type=Path, help=f"{content}; new or empty for `write`")
    given = parser.parse_args()
    if given.step == "compare":
        return min(compare(given.folder), 1)
    given.folder.mkdir(parents=True, exist_ok=True)
    if any(given.folder.iterdir()):
        parser.error(f"{given.folder} is not empty: name a new folder")
    write(given.folder.resolve())
    return 0
