"""What a model computes on a probe, and the weights of one that FSDP2 spreads over processes, gathered for the first.

A gathering that one process does not join would make the others wait for many minutes, so the processes first see in
torch's own store that all of them are there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..errors import GPT2ValueHubError, SaveFailedError, UnsavableModelError, as_ours
from .record import probe

Tensors = dict[str, torch.Tensor]
Saver = TypeVar("Saver", bound=Callable[..., Any])

WAIT = 30.0  # seconds by which a process may be later than another
_gathered = 0  # how often the processes have met


@dataclass(frozen=True)
class Gathered:
    """A sharded model in the process that saves it."""

    model: nn.Module
    weights: Tensors  # all of them, in main memory
    numbers: Tensors  # see `computed`


def computed(model: Any) -> Tensors:
    """Return what a model computes on the probe: `logits [N, vocab]` and `value [N]`, in float32 on the CPU.

    Its own forward runs, with its hooks, where its weights are and in their dtype, in evaluation mode. The probe runs
    forwards and, padded on its left, backwards; N counts the tokens of both rows. Modes stay as they are.

    Raises:
        UnsavableModelError: its forward cannot be called like GPT2ValueModel's, or does not return what that does.
    """
    token_ids, _ = probe(model.config)
    device = next(model.parameters()).device
    batch = torch.tensor([token_ids, token_ids[::-1]], device=device)  # [2, T]
    mask = torch.ones_like(batch)
    mask[1, : len(token_ids) // 4] = 0
    modes = {module: module.training for module in model.modules()}
    with (
        as_ours(
            lambda gist: UnsavableModelError(
                f"the model does not compute logits and values on a batch of tokens: {gist}",
                expected="forward(input_ids=, attention_mask=, use_cache=, return_dict=) as GPT2ValueModel's",
                next_step="save a plain model with its weights: GPT2ValueModel(model.config), then load_state_dict",
            )
        ),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),
    ):
        try:
            output = model.eval()(input_ids=batch, attention_mask=mask, use_cache=False, return_dict=True)
        finally:
            for module, training in modes.items():
                module.training = training
        tokens = mask.bool().cpu()
        return {"logits": output.logits[tokens].float().cpu(), "value": output.value[tokens].float().cpu()}


def is_sharded(model: object) -> bool:
    """Whether this process holds parts of the weights only: FSDP2's modules can `unshard`, its weights have a mesh."""
    parts = [*model.parameters(), *model.modules()] if isinstance(model, nn.Module) else []
    return any(hasattr(part, "device_mesh") or hasattr(part, "unshard") for part in parts)


def in_first_process(function: Saver) -> Saver:
    """Make a function whose first argument is a model run in the first process only where the model is sharded.

    All processes call it for such a model. It gets the model as `Gathered`, and all return what it returned, or raise
    what it raised, once it is done. Any other model is passed on as it is, in the process that calls.

    Raises:
        UnsavableModelError: another process did not call this within `WAIT` seconds.
        SaveFailedError: the first process failed with an error that is not ours, which it raises itself.
    """

    @functools.wraps(function)
    def call(model: Any, *args: Any, **options: Any) -> Any:
        if not is_sharded(model):
            return function(model, *args, **options)
        _meet()
        numbers = computed(model)
        whole = Gathered(model, _gather(model), numbers)
        failure = {"found": "process 0 failed while it saved the model", "next_step": "read the error that it raised"}
        outcome: list[Any] = [SaveFailedError, failure]
        try:
            if dist.get_rank() == 0:
                outcome = [None, function(whole, *args, **options)]
        except GPT2ValueHubError as error:
            outcome = [type(error), vars(error)]
            raise
        finally:
            dist.broadcast_object_list(outcome)
        kind, value = outcome
        if kind is not None:
            raise kind(**value)
        return value

    return call  # type: ignore[return-value]


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
        store.delete_key(own)  # the next attempt is another one
        raise UnsavableModelError(
            f"the weights are sharded over {len(keys)} processes, and not all of them came within {WAIT:g} s",
            expected="the same call in all processes; only the first one writes",
            next_step="call it outside of `if is_main_process`; where one is late, torch.distributed.barrier() first",
        ) from error
    _gathered += 1


def _gather(model: nn.Module) -> Tensors:
    """All weights in main memory; in the other processes than the first, nothing."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    found: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    # Parts of unequal sizes are padded to be gathered, and on a CPU the padding stays in the weight's storage.
    return {
        name: tensor.clone() if tensor.untyped_storage().nbytes() > tensor.nbytes else tensor
        for name, tensor in found.items()
    }
