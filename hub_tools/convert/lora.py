"""Merge a PEFT LoRA adapter into its base model, reading every file with our own readers.

Imports torch, transformers, huggingface_hub, `foreign` and the rooms that read files; and peft, when it is
needed: merging is its business (https://huggingface.co/docs/peft/developer_guides/lora, "Merge LoRA weights").
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import GPT2Config, GPT2LMHeadModel

from ..errors import MissingDependencyError, MissingFileError, UnsupportedModelError, WeightsMismatchError
from ..files import read_json
from ..layout import CONFIG, GENERATION_CONFIG, HEAD_PREFIX, MODEL_TYPE, TOKENIZER, WEIGHTS, WEIGHTS_INDEX
from .formats import translate
from .weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_WEIGHTS,
    PICKLED_WEIGHTS,
    listed,
    only_one,
    read_state_dict,
)


@dataclass(frozen=True)
class Merged:
    """A base model with the adapter in its weights."""

    state: dict[str, torch.Tensor]  # GPT2LMHeadModel's
    fields: dict[str, Any]  # the base's config.json
    base: Path
    files: tuple[Path, ...]  # the weight files that were read
    dropped: dict[str, str]  # the base's tensor, its folder's name before it -> why it is not there


def merge_adapter(folder: Path, base: Path | None) -> Merged:
    """The adapter in `folder`, merged into its base model.

    Args:
        folder: `adapter_config.json`, and `adapter_model.safetensors` or `.bin`.
        base: the folder of the base model; None for the one that `adapter_config.json` names.

    Raises:
        MissingDependencyError: peft is not installed.
        MissingFileError: no adapter weights, or no base model at the place that is named.
        UnsupportedModelError: not a LoRA of a causal language model.
        WeightsMismatchError: the adapter does not fit the base.
    """
    settings = read_json(folder, ADAPTER_CONFIG)
    _refuse_other_adapters(folder, settings)
    peft = _peft()
    file = only_one(folder, ADAPTER_WEIGHTS)
    if file is None:
        raise MissingFileError(
            f"{folder} has an {ADAPTER_CONFIG} and no adapter weights",
            expected=" or ".join(ADAPTER_WEIGHTS),
            next_step="save the adapter again with its library's save_pretrained",
        )
    adapter = read_state_dict(file)

    base = base or _base_of(folder, settings)
    base_file = only_one(base, MODEL_WEIGHTS)
    if base_file is None:
        raise MissingFileError(
            f"{base}, the adapter's base model, has no weights",
            expected=" or ".join(MODEL_WEIGHTS),
            next_step="name the folder of the base model: base=",
        )
    fields = read_json(base, CONFIG)
    if fields.get("model_type") == MODEL_TYPE:
        fields = {**fields, "model_type": "gpt2"}  # only its body matters here
    base_state = read_state_dict(base_file)
    dropped = {
        f"{base.name}/{key}": "the base model's own value head: the adapter brings one"
        for key in base_state
        if key.startswith(HEAD_PREFIX)
    }
    body = {key: tensor for key, tensor in base_state.items() if not key.startswith(HEAD_PREFIX)}
    understood = translate(str(base_file), body, fields, source_format="gpt2", init_value_head=True)
    dropped |= {f"{base.name}/{key}": why for key, why in understood.dropped.items()}
    model = GPT2LMHeadModel(GPT2Config.from_dict(fields))
    model.to(understood.dtype)
    weights = {name: tensor for name, tensor in understood.state.items() if not name.startswith(HEAD_PREFIX)}
    model.load_state_dict({"lm_head.weight": weights["transformer.wte.weight"], **weights})

    config = peft.PeftConfig.from_pretrained(str(folder))
    config.inference_mode = True
    model.name_or_path = config.base_model_name_or_path  # or peft warns that it is another model
    wrapped = peft.get_peft_model(model, config)
    _fill(peft, wrapped, adapter, file)
    merged = wrapped.merge_and_unload(safe_merge=True)
    state = {key: tensor.detach() for key, tensor in merged.state_dict().items()}
    return Merged(state, {**fields, "architectures": [type(model).__name__]}, base, (base_file, file), dropped)


def _refuse_other_adapters(folder: Path, settings: Mapping[str, Any]) -> None:
    kind, task = settings.get("peft_type"), settings.get("task_type")
    if kind != "LORA" or task not in (None, "CAUSAL_LM"):
        raise UnsupportedModelError(
            f"{folder} holds an adapter of type {str(kind)[:40]!r} for {str(task)[:40]!r}",
            expected="'LORA' for 'CAUSAL_LM'",
            next_step="merge it with peft (merge_and_unload), save the result, and convert that",
        )
    if settings.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise UnsupportedModelError(
            f"{folder} holds a LoRA that began with {str(settings['init_lora_weights'])[:40]!r}, which alters its base",
            expected="one that leaves its base model as it is",
            next_step="convert it with peft's path_initial_model_for_weight_conversion, and convert the result",
        )


def _peft() -> Any:
    try:
        import peft
    except ImportError as err:
        raise MissingDependencyError(
            f"merging an adapter needs peft, which cannot be imported: {err}", next_step="pip install peft"
        ) from err
    return peft


def _fill(peft: Any, wrapped: Any, adapter: Mapping[str, torch.Tensor], file: Path) -> None:
    """Put the adapter's numbers into the wrapped model, so that nothing in it keeps its initial value."""
    # False: "auto" would ask the Hub whether the vocabulary grew
    held = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    odd = sorted(held ^ set(adapter))
    if odd:
        raise WeightsMismatchError(
            f"{file} does not fit its base model; only one of the two has {listed(odd)}",
            expected="the adapter's weights for each layer that adapter_config.json names",
            next_step="name the base model that the adapter was trained on: base=",
        )
    try:
        peft.set_peft_model_state_dict(wrapped, dict(adapter))
    except RuntimeError as err:  # torch's word for other shapes
        raise WeightsMismatchError(
            f"{file} does not fit its base model: {str(err).splitlines()[-1].strip()}",
            next_step="name the base model that the adapter was trained on: base=",
        ) from err


def _base_of(folder: Path, settings: Mapping[str, Any]) -> Path:
    """The folder of the model that the adapter names: a path, or a repository on the Hub or in its cache."""
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise MissingFileError(
            f"{folder / ADAPTER_CONFIG} names no base model", next_step="name the base model's folder: base="
        )
    if os.path.isdir(name):
        return Path(name)
    beside = [CONFIG, GENERATION_CONFIG, *sorted(TOKENIZER)]
    safe = [WEIGHTS, WEIGHTS_INDEX, "model-*-of-*.safetensors"]
    try:
        home = Path(snapshot_download(name, revision=settings.get("revision"), allow_patterns=[*beside, *safe]))
        if not any((home / file).is_file() for file in (WEIGHTS, WEIGHTS_INDEX)):
            pickles = [PICKLED_WEIGHTS, f"{PICKLED_WEIGHTS}.index.json", "pytorch_model-*-of-*.bin"]
            home = Path(snapshot_download(name, revision=settings.get("revision"), allow_patterns=[*beside, *pickles]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as err:
        raise MissingFileError(
            f"{folder / ADAPTER_CONFIG} names the base model {name!r}, which is no folder here, and was "
            f"not found on the Hub: {str(err).splitlines()[0]}",
            next_step="name the base model's folder: base=",
        ) from err
    return home
