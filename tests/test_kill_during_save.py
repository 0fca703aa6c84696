"""A process killed at any moment of a save leaves the old package or the new one, never a mixture."""

import hashlib
import itertools
import os
import shutil
import signal
import sys

import pytest
from conftest import make_tiny_model
from support.forks import in_fork

from hub_tools import save_package
from hub_tools.package import replace

# The audited steps that touch files, and the look-up of the system call that exchanges two folders; of which, for each
# way to replace a folder, every step of the replacement and every third of the writing.
SWEEPS = {
    "exchange": (("open", "os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir", "fcntl.", "ctypes.dlsym"), 3),
    "renames": (("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"), 1),
}
SEEDS = {1: "old", 2: "new"}
SMALL = {"n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 20, "n_positions": 16}


def contents(folder):
    files = folder.iterdir() if folder.is_dir() else ()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def is_killed(folder, events, step):
    """Save in a fork that kills itself, by a signal that nothing can catch, at the n-th step; whether it came to it."""
    child = os.fork()
    if child == 0:
        steps = itertools.count(1)

        def die(event, _):
            if event.startswith(events) and next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        try:
            save_package(make_tiny_model(seed=2, **SMALL), folder)
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def sweep(place, how):
    """Kill a save at one step after the other, until it comes through; return what was left each time."""
    events, stride = SWEEPS[how]
    if how == "renames":
        replace.exchange = lambda one, other: False  # a file system that cannot exchange two folders
    folders = {name: save_package(make_tiny_model(seed, **SMALL), place / name).folder for seed, name in SEEDS.items()}
    packages = {name: contents(folder) for name, folder in folders.items()} | {"nothing": {}}

    def name_of(folder):
        found = contents(folder)
        return next((name for name, package in packages.items() if package == found), f"a mixture: {sorted(found)}")

    folder, seen = place / "saved" / "package", []
    for step in itertools.count(1, stride):
        shutil.copytree(folders["old"], folder)
        killed = is_killed(folder, events, step)
        left, litter = name_of(folder), len(os.listdir(folder.parent)) > 1
        replace.clean(folder)  # what every save does first
        seen.append((left, litter, name_of(folder), os.listdir(folder.parent)))
        if not killed:
            return seen
        shutil.rmtree(folder.parent)


@pytest.mark.parametrize("how", SWEEPS)
def test_a_killed_save_leaves_the_old_package_or_the_new_one_and_the_next_one_no_litter(how, tmp_path):
    seen = in_fork(sweep, tmp_path, how)
    assert len(seen) > 10
    # between two renames nothing has this name, and the old package lies beside it, whole: the next save puts it back
    states = {("old", "old"), ("new", "new"), *([("nothing", "old")] if how == "renames" else [])}
    assert {(left, recovered) for left, _, recovered, _ in seen} == states
    assert {True, False} == {litter for _, litter, _, _ in seen}  # killed saves do leave files behind
    assert all(beside == ["package"] for _, _, _, beside in seen)
