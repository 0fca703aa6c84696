"""A training loop in a process of its own. Run as `python trains_and_pushes.py REPO HOW`.

HOW is `killed` (it goes on until it is), `idle` (the same, with nothing on its way) or `fails`: a checkpoint with a
NaN, a whole one, and an uncaught exception, without a `with` block, while a data loader's worker is there.
"""

import math
import os
import sys
import time

import torch
from conftest import make_tiny_model

from hub_tools import CheckpointPusher
from hub_tools.publish.checkpoints import worker_process

worker_process.give_way = lambda pid: None  # other tests run at the same time
worker_process.SHARE = 1e9  # nor does it rest
repo_id, how = sys.argv[1:]
model = make_tiny_model()
pusher = CheckpointPusher(repo_id, patience=20.0)
for step in range(1, 1_000_000):
    with torch.no_grad():
        model.v_head.summary.bias.fill_(math.nan if how == "fails" and step == 2 else step)
    if how != "fails" or step > 1:
        pusher.push(model, step=step)
    if how == "idle":
        pusher.flush()
        print("idle", flush=True)
        time.sleep(1000)
    if how == "fails" and step == 3:
        trainer = os.getpid()
        if os.fork() == 0:  # what a fork inherits it holds open: pipes, too
            os.close(2)
            while os.getppid() == trainer:
                time.sleep(0.1)
            os._exit(0)
        raise RuntimeError("training failed")
    time.sleep(0.5)  # also time for the first checkpoint to be on its way
