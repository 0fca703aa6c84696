"""The command line of the comparisons with TRL: `STEP FOLDER`, each step in the environment that it needs."""

import argparse
from pathlib import Path

import torch


def run_step(description, **steps):
    """Take the step that the command line names; the exit status: 1 where it returns that something is wrong."""
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("step", choices=list(steps))
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    return int(bool(steps[given.step](given.folder.resolve())))
