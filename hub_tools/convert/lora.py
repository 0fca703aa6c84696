"""Merge a LoRA adapter, as PEFT saves it, into its base model.

Imports torch, huggingface_hub, `formats`, `lora_settings` and the modules that read files; not peft, whose loader
imports modules that an adapter's config names. Method: LoRA (https://arxiv.org/abs/2106.09685), rsLoRA
(https://arxiv.org/abs/2312.03732), DoRA (https://arxiv.org/abs/2402.09353); the tests compare with peft.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from ..errors import ConversionError, PackageError, as_ours
from ..files import read_json
from ..layout import CONFIG, GENERATION_CONFIG, HEAD_PREFIX, MODEL_TYPE, TOKENIZER, WEIGHTS, WEIGHTS_INDEX
from ..package.stage import identities, refuse_changes
from .config_fields import most_bytes
from .formats import BODY_DTYPES, translate
from .lora_settings import MERGE_THERE, LoraSettings, read_settings
from .weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MODEL_WEIGHTS,
    PICKLED_WEIGHTS,
    listed,
    only_one,
    read_state_dict,
)

PEFT_PREFIX = "base_model.model."
# The tensors of one layer: two matrices (an embedding's are parameters of their own), and what DoRA and lora_bias add.
PART = re.compile(
    r"(?P<module>.+)\.(?:lora_(?:embedding_)?(?P<matrix>[AB])(?:\.weight)?|(?P<magnitude>lora_magnitude_vector)"
    r"(?:\.weight)?|lora_B\.(?P<bias>bias))"
)
EMBEDDINGS = ("transformer.wte", "transformer.wpe")
OTHER_BASE = "name the base model that the adapter was trained on: base="


@dataclass(frozen=True)
class Merged:
    """A base model with the adapter in its weights."""

    state: dict[str, torch.Tensor]  # GPT2LMHeadModel's; lm_head only where it is not tied
    fields: dict[str, Any]  # the base's config.json
    base: Path
    files: tuple[Path, ...]  # the weight files that were read
    dropped: dict[str, str]  # FOLDER/TENSOR of the base -> why it is not in `state`
    limit: int  # the most bytes that a weight file of this model may have
    notes: tuple[str, ...]


def merge_adapter(folder: Path, base: Path | None) -> Merged:
    """The adapter in `folder`, merged into its base model.

    Args:
        folder: `adapter_config.json`, and `adapter_model.safetensors` or `.bin`.
        base: the folder of the base model; None for the one that `adapter_config.json` names.

    Raises:
        PackageError: no adapter weights, or no base model at the place that is named.
        ConversionError: not a LoRA of a causal language model, or with an option that is not known here.
        PackageError: a setting of the wrong type, or out of range.
        PackageError: the adapter does not fit the base.
    """
    fields = read_json(folder, ADAPTER_CONFIG)
    settings = read_settings(str(folder), fields)
    file = only_one(folder, ADAPTER_WEIGHTS)
    if file is None:
        raise PackageError(
            f"{folder} has an {ADAPTER_CONFIG} and no adapter weights",
            expected=" or ".join(ADAPTER_WEIGHTS),
            next_step="save the adapter again with its library's save_pretrained",
        )
    base = base or _base_of(folder, fields)
    base_file = only_one(base, MODEL_WEIGHTS)
    if base_file is None:
        raise PackageError(
            f"{base}, the adapter's base model, has no weights",
            expected=" or ".join(MODEL_WEIGHTS),
            next_step="name the folder of the base model: base=",
        )
    before = identities(base, {CONFIG, base_file.name})
    base_fields = read_json(base, CONFIG)
    if base_fields.get("model_type") == MODEL_TYPE:
        base_fields = {**base_fields, "model_type": "gpt2"}  # only its body matters here
    limit = most_bytes(str(base), base_fields)
    adapter, base_state = read_state_dict(file, limit=limit), read_state_dict(base_file, limit=limit)
    refuse_changes(base, before)
    dropped = {
        f"{base.name}/{key}": "the base model's own value head: the adapter brings one"
        for key in base_state
        if key.startswith(HEAD_PREFIX)
    }
    body = {key: tensor for key, tensor in base_state.items() if not key.startswith(HEAD_PREFIX)}
    understood = translate(str(base_file), body, base_fields, source_format="gpt2", init_value_head=True)
    dropped |= {f"{base.name}/{key}": why for key, why in understood.dropped.items()}

    weights = {name: tensor for name, tensor in understood.state.items() if not name.startswith(HEAD_PREFIX)}
    state = merge(weights, adapter, settings, file=file)
    notes = []
    if "lm_head.weight" in state and "lm_head.weight" not in weights:
        notes.append("lm_head is not tied to transformer.wte any more: the adapter changes one of the two alone")
    if settings.targets is None:
        notes.append("which layers the adapter has is an expression in its settings, which was not evaluated")
    own = {"architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": "lm_head.weight" not in state}
    return Merged(state, {**base_fields, **own}, base, (base_file, file), dropped, limit, tuple(notes))


def merge(
    weights: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor], settings: LoraSettings, *, file: Path
) -> dict[str, torch.Tensor]:
    """The weights of the base model with the adapter in them, each in the dtype that it had.

    Args:
        weights: of a GPT-2 with a language model's head; `lm_head.weight` only where it is not tied.
        adapter: the tensors that PEFT saved.
        settings: how they are to be read.
        file: where `adapter` comes from, for messages.

    Raises:
        PackageError: the adapter has other tensors, or other shapes, than its settings and the base say.
        ConversionError: integers in it, or a DoRA of embeddings.
    """
    before = {"lm_head.weight": weights["transformer.wte.weight"], **weights}
    layers, whole, odd = _sorted_out(before, adapter, settings)
    expected = {name.removesuffix(".weight") for name, weight in before.items() if weight.dim() == 2}
    for module in sorted(expected):
        said = settings.is_target(module, embedding=module in (*EMBEDDINGS, "lm_head"))
        if said is not None and said != (module in layers):
            odd.append(f"{PEFT_PREFIX}{module}")
    if odd:
        raise PackageError(
            f"{file} does not fit its base model; only one of the two has {listed(sorted(odd))}",
            expected="the adapter's weights for each layer that adapter_config.json names",
            next_step=OTHER_BASE,
        )
    if settings.bias == "lora_only" and (lost := {f"{module}.bias" for module in layers} & set(before) - set(whole)):
        raise PackageError(
            f"{file} lacks biases that were trained: {listed(sorted(lost))}",
            expected='the biases of all adapted layers, as "bias": "lora_only" in adapter_config.json says',
            next_step="save the adapter again with PEFT 0.21 or newer, since older ones leave them out; or, to go on "
            'with the biases of the base model, write "bias": "none" into adapter_config.json',
        )
    merged = dict(before)
    for name, tensor in whole.items():
        _check_shape(file, name, tensor, tuple(before[name].shape))
        merged[name] = tensor.to(before[name].dtype)
    for module, parts in layers.items():
        merged |= _merged_layer(file, module, merged, parts, settings)
    tied = "lm_head.weight" not in weights and torch.equal(merged["lm_head.weight"], merged["transformer.wte.weight"])
    if tied:
        del merged["lm_head.weight"]
    return merged


def _sorted_out(
    before: Mapping[str, torch.Tensor], adapter: Mapping[str, torch.Tensor], settings: LoraSettings
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, torch.Tensor], list[str]]:
    """Sort an adapter's tensors.

    Returns:
        The LoRA parts of each layer, the tensors that replace one of the base, and the names that do not fit.
    """
    layers: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    odd = []
    for key, tensor in adapter.items():
        if tensor.dtype not in BODY_DTYPES:
            raise ConversionError(
                f"the adapter's {key} is {tensor.dtype}",
                expected="float32, float16 or bfloat16",
                next_step="save the adapter in one of these dtypes in its own library, and convert that",
            )
        part = PART.fullmatch(key.removeprefix(PEFT_PREFIX))
        if not key.startswith(PEFT_PREFIX):
            odd.append(key)
        elif part and f"{part['module']}.weight" in before:
            what = part["matrix"] or ("magnitude" if part["magnitude"] else "bias")
            layers.setdefault(part["module"], {})[what] = tensor
        elif part:
            odd.append(key)
        else:
            name = key.removeprefix(PEFT_PREFIX).replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if name not in before:
                odd.append(key)
            elif settings.is_saved(name.rpartition(".")[0]) or (settings.bias != "none" and name.endswith(".bias")):
                whole[name] = tensor
            elif not tensor.equal(before[name].to(tensor.dtype)):  # PEFT saves embeddings beside their adapter
                odd.append(key)
    for module, parts in layers.items():
        needed = {"A", "B"} | ({"magnitude"} if settings.dora else set()) | ({"bias"} if settings.lora_bias else set())
        odd += [f"{PEFT_PREFIX}{module}.lora_{part}" for part in sorted(needed ^ set(parts))]
    for name in before:
        due = settings.is_saved(name.rpartition(".")[0]) or (settings.bias == "all" and name.endswith(".bias"))
        if due and name not in whole:
            odd.append(f"{PEFT_PREFIX}{name}")
    return layers, whole, odd


def _merged_layer(
    file: Path,
    module: str,
    before: Mapping[str, torch.Tensor],
    parts: Mapping[str, torch.Tensor],
    settings: LoraSettings,
) -> dict[str, torch.Tensor]:
    """The merged weight of one layer, and its bias if that changes. Computed in float32, and rounded once."""
    weight, a, b = before[f"{module}.weight"], parts["A"].float(), parts["B"].float()
    embedding = module in EMBEDDINGS
    # Conv1D stores [in, out], and so does Embedding (one row for each token). lm_head, a Linear, stores [out, in].
    transposed = module != "lm_head"
    outputs, inputs = weight.shape[::-1] if transposed else weight.shape
    rank = a.shape[0] if a.dim() == 2 else 0
    _check_shape(file, f"{module}.lora_A", a, (rank, inputs))
    _check_shape(file, f"{module}.lora_B", b, (outputs, rank))
    if rank == 0:
        raise PackageError(f"{file}: {module}.lora_A has rank 0", next_step=OTHER_BASE)
    scaling = settings.scaling(module, rank)
    full = (weight.T if transposed else weight).float() + scaling * (b @ a)  # [out, in]
    if settings.dora:
        if embedding:
            raise ConversionError(
                f"{file} holds a DoRA of {module}",
                expected="DoRA for attention and feed-forward layers",
                next_step=MERGE_THERE,
            )
        magnitude = parts["magnitude"].float().reshape(-1)  # [out]
        _check_shape(file, f"{module}.lora_magnitude_vector", magnitude, (outputs,))
        full *= (magnitude / full.norm(dim=1)).unsqueeze(1)
    found = {f"{module}.weight": (full.T if transposed else full).contiguous().to(weight.dtype)}
    if settings.lora_bias:
        bias = before.get(f"{module}.bias")
        if bias is None:
            raise PackageError(f"{file}: {module} has no bias to add to", next_step=OTHER_BASE)
        _check_shape(file, f"{module}.lora_B.bias", parts["bias"], tuple(bias.shape))
        found[f"{module}.bias"] = (bias.float() + scaling * parts["bias"].float()).to(bias.dtype)
    return found


def _check_shape(file: Path, name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise PackageError(
            f"{file} does not fit its base model: {name} has shape {list(tensor.shape)}",
            expected=f"{list(expected)}",
            next_step=OTHER_BASE,
        )


def _base_of(folder: Path, settings: Mapping[str, Any]) -> Path:
    """The folder of the model that the adapter names: a path, or a repository on the Hub or in its cache."""
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise PackageError(
            f"{folder / ADAPTER_CONFIG} names no base model", next_step="name the base model's folder: base="
        )
    if os.path.isdir(name):
        return Path(name)
    revision = settings.get("revision")
    if not isinstance(revision, (str, type(None))):
        raise PackageError(
            f"{folder / ADAPTER_CONFIG} names the revision {str(revision)[:80]!r} of its base model",
            expected="a branch, tag or commit",
            next_step="name the base model's folder: base=",
        )
    beside = [CONFIG, GENERATION_CONFIG, *sorted(TOKENIZER)]
    safe = [WEIGHTS, WEIGHTS_INDEX, "model-*-of-*.safetensors"]
    with as_ours(lambda gist: _no_base(folder, name, gist)):
        home = Path(snapshot_download(name, revision=revision, allow_patterns=[*beside, *safe]))
        if not any((home / file).is_file() for file in (WEIGHTS, WEIGHTS_INDEX)):
            pickles = [PICKLED_WEIGHTS, f"{PICKLED_WEIGHTS}.index.json", "pytorch_model-*-of-*.bin"]
            home = Path(snapshot_download(name, revision=revision, allow_patterns=[*beside, *pickles]))
    return home


def _no_base(folder: Path, name: str, gist: str) -> PackageError:
    return PackageError(
        f"{folder / ADAPTER_CONFIG} names the base model {name[:300]!r}, which is no folder here, and was "
        f"not found on the Hub: {gist}",
        next_step="name the base model's folder: base=",
    )
