"""Saves a package over another, again and again, in processes that kill themselves at the n-th thing they do.

Run as `python saver_that_dies.py FOLDER {exchange,renames}`; prints a line of JSON for each n. The processes are
forked from this one, so that torch is imported once; each dies by SIGKILL, which nothing in it can catch.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
from functools import partial
from pathlib import Path

import torch

import hub_tools
import hub_tools.package.save  # before the forks, so that each of them does not import it again
from configuration_gpt2_value import GPT2ValueConfig
from hub_tools.package import replace as replace_folder
from modeling_gpt2_value import GPT2ValueModel

torch.set_num_threads(1)

# Every audited step that touches files, and the look-up of the system call that exchanges two folders. Where
# folders are renamed instead, what comes before the renames is the same.
STEPS = {
    "exchange": ("open", "os.mkdir", "os.chmod", "os.rename", "os.remove", "os.rmdir", "fcntl.", "ctypes.dlsym"),
    "renames": ("os.rename", "os.remove", "os.rmdir", "shutil.rmtree"),
}


def model(seed):
    torch.manual_seed(seed)
    return GPT2ValueModel(
        GPT2ValueConfig(vocab_size=20, n_positions=16, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
    )


STRIDE = {"exchange": 3, "renames": 1}  # every step of the replacement itself, every third of the writing


def contents(folder):
    if not folder.is_dir():
        return None
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def in_a_process(action):
    """Run `action` in a fork; return the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def save_and_die(folder, how, step):
    count = 0

    def die(event, arguments):
        nonlocal count
        if event.startswith(STEPS[how]):
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die)
    hub_tools.save_package(model(2), folder)


def save_and_be_killed(folder, seconds):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()
    hub_tools.save_package(model(2), folder)


def main():
    place, how = Path(sys.argv[1]), sys.argv[2]
    if how == "renames":
        replace_folder.exchange = lambda one, other: False  # a file system that cannot exchange two folders
    old, new, folder = place / "old", place / "new", place / "saved" / "package"
    hub_tools.save_package(model(1), old)
    hub_tools.save_package(model(2), new)
    print(json.dumps({"old": contents(old), "new": contents(new)}))

    def attempt(action, what):
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(old, folder)
        ended = in_a_process(action)
        left, beside = contents(folder), sorted(os.listdir(folder.parent))
        replace_folder.clean(folder)  # what every save does first
        recovered = contents(folder)
        cleaned = sorted(os.listdir(folder.parent))
        found = {"left": left, "beside": beside, "recovered": recovered, "cleaned": cleaned}
        if what == "timer":  # a whole save takes longer than its first step: these stand for all
            in_a_process(lambda: hub_tools.save_package(model(2), folder))
            found |= {"after_next": contents(folder), "beside_next": sorted(os.listdir(folder.parent))}
        print(json.dumps({"step": what, "killed": ended == signal.SIGKILL, **found}), flush=True)
        return ended

    step = 1
    while attempt(partial(save_and_die, folder, how, step), step):
        step += STRIDE[how]
    for tick in range(10):
        attempt(partial(save_and_be_killed, folder, 0.01 * tick), "timer")


main()
