"""Two processes that talk by gloo, and models that FSDP2 shards over them."""

import copy
import multiprocessing
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

LAYOUTS = ["blocks", "accelerate", "whole after forward"]
# Imported once, by the process from which the others are forked: this takes much longer than what most tests do.
PRELOADED = ["accelerate", "conftest", "hub_tools.package.verify", "hub_tools.package.save", __name__]


def start_two(worker, *arguments):
    """Run `worker(rank, *arguments)` twice, and wait; whatever one of them raises is raised here.

    Both are forked from a process that has imported torch and this project, and have the environment that it was
    started with.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    torch.multiprocessing.start_processes(worker, arguments, nprocs=2, daemon=True, start_method="forkserver")


def in_two_processes(worker, folder, *arguments, meet=None):
    """Run `worker(rank, folder, *arguments)` twice, as a process group, and see that both come to its end.

    They meet in a file of the folder, or at the address `meet`, such as `tcp://127.0.0.1:PORT`.
    """
    meet = meet or f"file://{folder}/rendezvous"
    start_two(_run, worker, folder, meet, *arguments)
    assert {"done-0", "done-1"} <= set(os.listdir(folder))


def _run(rank, worker, folder, meet, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    worker(rank, folder, *arguments)
    Path(folder, f"done-{rank}").touch()
    dist.barrier()
    os._exit(0)  # gloo's destructors wait for a peer that may be gone


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def sharded(model, layout="blocks", **policies):
    """A copy, sharded by blocks; in the groups that accelerate makes; or so that it stays whole after a forward."""
    model, mesh = copy.deepcopy(model), init_device_mesh("cpu", (2,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, reshard_after_forward=layout != "whole after forward", **policies)
    if layout == "accelerate":
        tied = [model.transformer.ln_f, model.transformer.wte, model.lm_head]
        fully_shard(tied, mesh=mesh, reshard_after_forward=False, **policies)
    return fully_shard(model, mesh=mesh, **policies)
