"""A model whose weights are spread over the processes of a run (FSDP2): gathered for the first, which alone saves it.

Imports the standard library, torch, and of hub_tools `errors`. A gathering that one process does not join would make
the others wait for many minutes, so the processes first see in torch's own store that all of them are there.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..errors import GPT2ValueHubError, SaveFailedError, UnsavableModelError

State = dict[str, torch.Tensor]
Result = TypeVar("Result")

WAIT = 30.0  # seconds by which a process may be later than another
_gathered = 0  # how often the processes have met


def is_sharded(model: object) -> bool:
    """Whether this process holds parts of the weights only: FSDP2's modules can `unshard`, its weights have a mesh."""
    if not isinstance(model, nn.Module):
        return False
    has_mesh = any(hasattr(weight, "device_mesh") for weight in model.parameters())
    return has_mesh or any(hasattr(module, "unshard") for module in model.modules())


def in_first_process(model: Any, save: Callable[[State | None], Result]) -> Result:
    """Call `save`: for a sharded model in the first process only, with all its weights in main memory; for any other
    with None, here.

    All processes call this for a sharded model, and all return what `save` returned, or raise what it raised, once it
    is done.

    Raises:
        UnsavableModelError: another process did not call this within `WAIT` seconds.
        SaveFailedError: the first process failed with an error that is not ours, which it raises itself.
    """
    if not is_sharded(model):
        return save(None)
    _meet()
    state = _gather(model)
    told: list[Any] = ["failed", None]
    if dist.get_rank() > 0:
        dist.broadcast_object_list(told)
    else:
        try:
            told = ["saved", save(state)]
        except GPT2ValueHubError as error:
            told = ["refused", (type(error), vars(error))]
            raise
        finally:
            dist.broadcast_object_list(told)
    if told[0] == "failed":
        raise SaveFailedError("process 0 failed while it saved the model", next_step="read the error that it raised")
    if told[0] == "refused":
        kind, fields = told[1]
        raise kind(**fields)
    return told[1]


def _meet() -> None:
    """Return when all processes are here."""
    global _gathered
    store = dist.distributed_c10d._get_default_store()
    keys = [f"gpt2-value/{_gathered}/{rank}" for rank in range(dist.get_world_size())]
    own = keys[dist.get_rank()]
    store.set(own, "here")
    try:
        store.wait(keys, timedelta(seconds=WAIT))
    except RuntimeError as error:  # FileStore's own; TCPStore's is DistStoreError, which is one
        missing = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
        store.delete_key(own)  # the next attempt is another one
        raise UnsavableModelError(
            f"the weights are sharded over {len(keys)} processes, and process {', '.join(missing)} did not come to "
            f"save them within {WAIT:g} s of process {dist.get_rank()}",
            expected="the same call in all processes; only the first one writes",
            next_step="call it outside of `if is_main_process`; where one is late, torch.distributed.barrier() first",
        ) from error
    _gathered += 1


def _gather(model: nn.Module) -> State:
    """All weights in main memory, tied ones still tied; in the other processes than the first, nothing."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # Parts of unequal sizes are padded to be gathered, and on a CPU the padding stays in the weight's storage.
    state = {name: tensor.clone() if _is_padded(tensor) else tensor for name, tensor in found.items()}
    names: dict[int, str] = {}  # of each weight, the first
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name in state:
            state[name] = state[names.setdefault(id(weight), name)]
    return state


def _is_padded(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > tensor.nbytes
