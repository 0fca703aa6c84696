"""A training loop in a process of its own, which is killed, or fails. Run as `python trains_and_pushes.py REPO HOW`.

HOW is `forever` (until killed) or `fails` (an uncaught exception, and no `with` block).
"""

import sys
import time

import torch
from conftest import make_tiny_model

from hub_tools import CheckpointPusher

repo_id, how = sys.argv[1:]
model = make_tiny_model()
pusher = CheckpointPusher(repo_id, patience=20.0)
for step in range(1, 1_000_000):
    with torch.no_grad():
        model.v_head.summary.bias.fill_(step)
    if how == "forever":
        pusher.push(model, step=step)
        time.sleep(0.02)
    elif step == 3:
        pusher.push(model, step=step)
        raise RuntimeError("training failed")
