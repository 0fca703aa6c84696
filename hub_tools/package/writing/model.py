"""Prepare a model for saving: check it, and rebuild it as this version's class; or refuse it with advice.

Imports the standard library, torch, the remote code, and of hub_tools `allowed_fields`, `finite` and what these import.
"""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from torch import nn

from configuration_gpt2_value import GPT2ValueConfig
from modeling_gpt2_value import GPT2ValueModel

from ... import layout
from ...errors import (
    MissingHeadError,
    UnsavableModelError,
)
from ...library_errors import as_ours
from ..finite import not_finite
from ..reading import allowed_fields
from .sharded import State

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WRAPPED = "save the model inside the wrapper"
# Modules that PEFT puts into a model, or around it, by their last names.
PEFT_PARTS = {"base_model", "base_layer", "modules_to_save", "prompt_encoder", "token_adapter"}


def installed_shell(model: nn.Module, gathered: State | None = None) -> tuple[GPT2ValueModel, State]:
    """Return an empty model of this installed version's class, on the meta device, with the configs of `model`; and the
    weights of `model`, or those that were `gathered`, after checking that the empty model takes exactly these. (Whether
    they are finite is not checked.)

    Raises:
        UnsavableModelError, MissingHeadError: see `save_package`.
    """
    _check_class(model)
    with as_ours(_unsavable):
        given: Any = model.config
        config: Any = GPT2ValueConfig.from_dict(given.to_dict())
        generation_config = copy.deepcopy(getattr(model, "generation_config", None))
        # refuse now what could be written but not loaded again
        allowed_fields.reduce(layout.CONFIG, json.loads(config.to_json_string()))
        if generation_config is not None:
            generation_config.validate(strict=True)
            allowed_fields.reduce(layout.GENERATION_CONFIG, json.loads(generation_config.to_json_string()))
    state = model.state_dict() if gathered is None else gathered
    state = {name: tensor.detach() for name, tensor in state.items()}
    with torch.device("meta"), as_ours(_unsavable):
        installed = GPT2ValueModel(config)
        if hasattr(
            config, "validate"
        ):  # transformers 5 validates the config when it writes it, after the model has chosen its kernels
            config.validate()
    _check_state(state, installed)
    if generation_config is not None:
        installed.generation_config = generation_config
    return installed, state


def _unsavable(gist: str) -> UnsavableModelError:
    return UnsavableModelError(
        f"the model's config or generation_config is not valid: {gist}",
        next_step="correct the field in model.config or model.generation_config, and save again",
    )


def installed_copy(model: nn.Module, gathered: State | None) -> GPT2ValueModel:
    """Return a model of this installed version's class, in eval mode on the CPU, that holds the same weights (shared
    where they are on the CPU, else copied), after checking that they are complete and finite."""
    installed, state = installed_shell(model, gathered)
    body = {name: tensor.cpu() for name, tensor in state.items() if name != "lm_head.weight"}
    tied = installed.config.tie_word_embeddings
    body["lm_head.weight"] = body["transformer.wte.weight"] if tied else state["lm_head.weight"].cpu()
    for name, count in not_finite(body).items():
        raise UnsavableModelError(
            f"{name} has {count:,} NaN or infinite values of {body[name].numel():,}",
            expected="finite weights",
            next_step="go back to a checkpoint from before the run diverged; the folder is untouched",
        )
    installed.load_state_dict(body, assign=True)
    if tied:
        installed.tie_weights()
    # causal masks and the like, which are in no state dict
    found = dict(model.named_buffers())
    for name, _ in list(installed.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        setattr(installed.get_submodule(owner), attribute, found[name].cpu())
    return installed.eval()


def _check_class(model: nn.Module) -> None:
    """Refuse wrappers, and other models, each with the way out."""

    def refuse(found: str, next_step: str) -> UnsavableModelError:
        return UnsavableModelError(found, expected="a GPT2ValueModel", next_step=next_step)

    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise refuse(f"a {name}", "pass the model itself")
    # Not by `peft_config` alone: PEFT 0.17 leaves that on a model in which it has merged everything.
    if (hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)) and any(
        name.rpartition(".")[2] in PEFT_PARTS for name, _ in model.named_modules()
    ):
        way_out = "merge them into a copy: save_package(copy.deepcopy(peft_model).merge_and_unload(), ...)"
        if not hasattr(model, "merge_and_unload"):  # transformers' own add_adapter, which cannot merge
            way_out = (
                'merge them with PEFT: model.save_pretrained("adapter"); save_package(PeftModel.from_pretrained('
                'GPT2ValueModel.from_pretrained(BASE), "adapter").merge_and_unload(), ...)'
            )
        raise refuse(f"a {name} with PEFT adapters, which are not part of GPT-2's weights", way_out)
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise refuse(f"a compiled model ({name})", f"{WRAPPED}: save_package(model._orig_mod, ...)")
    if isinstance(getattr(model, "module", None), nn.Module):
        raise refuse(
            f"a wrapper ({name})",
            f"{WRAPPED}, in one process: save_package(model.module, ...) or accelerator.unwrap_model(model)",
        )
    if hasattr(model, "pretrained_model") and hasattr(model, "v_head"):
        raise refuse(f"TRL's {name}", "save it with its own save_pretrained, then: gpt2-value convert FOLDER OUT")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type == "gpt2":
        raise MissingHeadError(
            f"a {name}, which has no value head",
            expected="a GPT2ValueModel",
            next_step="model.save_pretrained(FOLDER); GPT2ValueModel.from_pretrained(FOLDER) gives it a head",
        )
    if model_type != layout.MODEL_TYPE:
        raise refuse(f"a {name} of model type {model_type!r}", "pass a GPT2ValueModel")


def _check_state(state: State, installed: GPT2ValueModel) -> None:
    """Refuse weights that are not exactly the model's, or that are not here."""
    expected = {name: tuple(tensor.shape) for name, tensor in installed.state_dict().items()}
    missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if any(name.startswith(layout.HEAD_PREFIX) for name in missing):
        raise MissingHeadError(
            f"the model has no {', '.join(missing[:2])}",
            expected="the value head that its config calls for",
            next_step="build it as GPT2ValueModel, which brings one, or load it with init_value_head=True",
        )

    def refuse(found: str, expected: str, next_step: str) -> UnsavableModelError:
        return UnsavableModelError(found, expected=expected, next_step=next_step)

    if missing or unknown:
        raise refuse(
            f"missing weights: {missing[:3]}; unknown weights: {unknown[:3]}",
            "exactly the weights of GPT2ValueModel, whose code travels with them",
            "remove what was added to the model (adapters, extra heads), and save again",
        )
    for name, tensor in state.items():
        if tensor.is_meta:
            raise refuse(
                f"{name} is on the meta device, without data",
                "weights in memory",
                "load the model without device_map='auto' or offloading, and save again",
            )
        if tuple(tensor.shape) != expected[name]:
            raise refuse(
                f"{name} has shape {list(tensor.shape)}",
                f"shape {list(expected[name])}, as model.config says",
                "resize with model.resize_token_embeddings, which keeps the config in step; "
                "if the weights are sharded (ZeRO-3, FSDP), gather them first",
            )
        if tensor.dtype not in FLOATS:
            raise refuse(
                f"{name} is {tensor.dtype}",
                f"one of {', '.join(map(str, FLOATS))}",
                "convert it: model.float(); a quantised model must be dequantised first",
            )
    head, embeddings = state["lm_head.weight"], state["transformer.wte.weight"]
    if installed.config.tie_word_embeddings and head.data_ptr() != embeddings.data_ptr() and not head.equal(embeddings):
        raise refuse(
            "lm_head.weight and transformer.wte.weight differ, and config.tie_word_embeddings is True",
            "equal weights, since loading would tie them",
            "set model.config.tie_word_embeddings = False to keep both, or model.tie_weights() to tie them",
        )
