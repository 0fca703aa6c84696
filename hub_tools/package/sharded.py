"""What a model computes on a probe, and the weights of one that FSDP2 spreads over processes, gathered for the first.

A gathering that one process does not join would make the others wait for many minutes, so the processes first see in
torch's own store that all of them are there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..errors import GPT2ValueHubError, SaveFailedError, UnsavableModelError, as_ours
from .record import probe

Weights = dict[str, torch.Tensor]
Numbers = dict[str, torch.Tensor]
Result = TypeVar("Result")

WAIT = 30.0  # seconds by which a process may be later than another
_gathered = 0  # how often the processes have met


@dataclass(frozen=True)
class State:
    """Of a sharded model: all its weights, in main memory, and what it computes (see `computed`)."""

    weights: Weights
    numbers: Numbers


def computed(model: Any) -> Numbers:
    """Return what a model computes on the probe: `logits [2, T, vocab]` and `value [2, T]`, in float32 on the CPU.

    Its own forward runs, with its hooks, where its weights are and in their dtype, in evaluation mode. The second row
    is padded on its left, with zeros in the place of the padding's numbers. Modes and random state stay as they are.

    Raises:
        UnsavableModelError: its forward cannot be called like GPT2ValueModel's, or does not return what that does.
    """
    token_ids, _ = probe(vocab_size=model.config.vocab_size, n_positions=model.config.n_positions)
    device = next(model.parameters()).device
    batch = torch.tensor([token_ids, token_ids[::-1]], device=device)  # [2, T]
    mask = torch.ones_like(batch)
    mask[1, : len(token_ids) // 4] = 0
    modes = [(module, module.training) for module in model.modules()]
    eager = torch.compiler.set_stance("force_eager") if hasattr(torch.compiler, "set_stance") else nullcontext()
    cuda = [device.index or 0] if device.type == "cuda" else []
    with (
        as_ours(_no_forward),
        torch.no_grad(),
        torch.random.fork_rng(cuda),
        torch.autocast(device.type, enabled=False),
        eager,
    ):
        try:
            model.eval()
            output = model(input_ids=batch, attention_mask=mask, use_cache=False, return_dict=True)
        finally:
            for module, training in modes:
                module.training = training
        found = {"logits": output.logits, "value": output.value}
        # a head that does not project gives a row of numbers for each token
        return {
            name: (tensor * mask.reshape(*mask.shape, *[1] * (tensor.dim() - 2)).to(tensor.device)).float().cpu()
            for name, tensor in found.items()
        }


def _no_forward(gist: str) -> UnsavableModelError:
    return UnsavableModelError(
        f"the model does not compute logits and values on a batch of tokens: {gist}",
        expected="forward(input_ids=, attention_mask=, use_cache=, return_dict=) as GPT2ValueModel's",
        next_step="save a plain GPT2ValueModel with these weights: GPT2ValueModel(model.config), then load_state_dict",
    )


def is_sharded(model: object) -> bool:
    """Whether this process holds parts of the weights only: FSDP2's modules can `unshard`, its weights have a mesh."""
    if not isinstance(model, nn.Module):
        return False
    has_mesh = any(hasattr(weight, "device_mesh") for weight in model.parameters())
    return has_mesh or any(hasattr(module, "unshard") for module in model.modules())


def in_first_process(model: Any, save: Callable[[State | None], Result]) -> Result:
    """Call `save`: for a sharded model in the first process only, with its `State`; for any other with None, here.

    All processes call this for a sharded model, and all return what `save` returned, or raise what it raised, once it
    is done.

    Raises:
        UnsavableModelError: another process did not call this within `WAIT` seconds.
        SaveFailedError: the first process failed with an error that is not ours, which it raises itself.
    """
    if not is_sharded(model):
        return save(None)
    _meet()
    numbers = computed(model)
    weights = _gather(model)
    told: list[Any] = ["failed", None]
    if dist.get_rank() > 0:
        dist.broadcast_object_list(told)
    else:
        try:
            told = ["saved", save(State(weights, numbers))]
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


def _gather(model: nn.Module) -> Weights:
    """All weights in main memory, tied ones still tied; in the other processes than the first, nothing."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # Parts of unequal sizes are padded to be gathered, and on a CPU the padding stays in the weight's storage.
    weights = {name: tensor.clone() if _is_padded(tensor) else tensor for name, tensor in found.items()}
    names: dict[int, str] = {}  # of each weight, the first
    for name, weight in model.named_parameters(remove_duplicate=False):
        if name in weights:
            weights[name] = weights[names.setdefault(id(weight), name)]
    return weights


def _is_padded(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > tensor.nbytes
