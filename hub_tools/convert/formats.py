"""Translate the tensors and `config.json` of other libraries' GPT-2 checkpoints into those of a package.

Imports torch, the remote code's configuration, and modules of hub_tools that only check values; reads no file.
Sources: trl 0.0.3 to 1.12.0, the last with the head (`trl/experimental/ppo/modeling_value_head.py`), trlx
(`trlx/models/modeling_ppo.py`), transformers (`modeling_gpt2.py`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch

from configuration_gpt2_value import GPT2ValueConfig

from ..errors import (
    ConversionError,
    MissingHeadError,
    OptionsError,
    PackageError,
    UnsavableModelError,
)
from ..layout import HEAD_PREFIX
from ..package.config import checked_config, expected_shapes
from .config_fields import SourceFormat, known_fields, left_out, value_config
from .weight_files import listed

HEAD_WEIGHT, HEAD_BIAS = HEAD_PREFIX + "summary.weight", HEAD_PREFIX + "summary.bias"

# The attribute in which a wrapper keeps the model. The names of the head's tensors do not have this prefix.
PREFIXES: Mapping[SourceFormat, str] = {"trl": "pretrained_model.", "trlx": "base_model."}

# Each library's name for the head's weights, and ours.
HEAD_NAMES: Mapping[SourceFormat, Mapping[str, str]] = {
    "seed": {HEAD_WEIGHT: HEAD_WEIGHT, HEAD_BIAS: HEAD_BIAS},
    "trl": {HEAD_WEIGHT: HEAD_WEIGHT, HEAD_BIAS: HEAD_BIAS},
    "sequence-classification": {"score.weight": HEAD_WEIGHT},
    "token-classification": {"classifier.weight": HEAD_WEIGHT, "classifier.bias": HEAD_BIAS},
    "trlx": {},
    "gpt2": {},
}
# make_head(n_embd, 1): Linear, ReLU, Linear; with num_value_layers_unfrozen, whole GPT-2 blocks before them.
TRLX_HEAD = re.compile(r"v_head\.([02]\.(weight|bias)|(decoder_blocks|final_norm|lm_head)\..+)")
# The upper layers of trlx's reference model, for the KL term.
TRLX_REFERENCE = "frozen_head."

# PEFT inserts this into the names of a layer's tensors while an adapter is attached to it.
UNMERGED = ".base_layer."

# Causal masks, which GPT-2 checkpoints carried as buffers until 2023.
OLD_MASK = re.compile(r"transformer\.h\.\d+\.(attn|crossattention)\.(bias|masked_bias)")

BODY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Translation:
    """A foreign checkpoint in this package's terms."""

    source_format: SourceFormat
    prefix: str
    config: GPT2ValueConfig
    state: dict[str, torch.Tensor]  # a package's tensors; lm_head only where it is not tied
    mapped: dict[str, str]
    dropped: dict[str, str]
    notes: tuple[str, ...]
    dtype: torch.dtype  # of the body; the head is float32


def translate(
    where: str,
    state: Mapping[str, torch.Tensor],
    fields: Mapping[str, Any],
    *,
    source_format: SourceFormat | None = None,
    summary_first_dropout: float | None = None,
    init_value_head: bool = False,
) -> Translation:
    """The tensors and the configuration of a package that computes the same as the checkpoint in its own library.

    Args:
        where: the checkpoint's path, for messages.
        state: its tensors by name.
        fields: its `config.json`.
        source_format, summary_first_dropout, init_value_head: see `convert_checkpoint`.

    Raises:
        ConversionError, PackageError,
        MissingHeadError, PackageError, UnsavableModelError, OptionsError: see `convert_checkpoint`.
    """
    not_kept = left_out(fields)
    fields = known_fields(where, fields)
    format_, prefix = _recognise(where, state, fields, source_format)
    config, notes = _value_config(where, fields, format_, summary_first_dropout)
    notes += not_kept
    if config.n_layer > len(state):  # a bound for the list of expected tensors
        raise PackageError(
            f"{where}: its configuration says {config.n_layer} layers; the weights are {len(state)} tensors",
            next_step="pass the config.json that belongs to these weights: config=",
        )
    shapes = expected_shapes(config.to_dict())

    bare = format_ == "gpt2" and "wte.weight" in state  # GPT2Model's names, as in the first GPT-2 checkpoints
    mapped: dict[str, str] = {}
    dropped: dict[str, str] = {}
    unknown: list[str] = []
    for key in state:
        name = key.removeprefix(prefix) if not bare else f"transformer.{key}"
        if HEAD_NAMES[format_].get(key) in shapes:
            mapped[key] = HEAD_NAMES[format_][key]
        elif format_ == "trlx" and TRLX_HEAD.fullmatch(key):
            dropped[key] = "trlx's value head has several layers"
        elif format_ == "trlx" and key.startswith(TRLX_REFERENCE):
            dropped[key] = "a copy of the reference model's layers"
        elif prefix and not key.startswith(prefix):
            unknown.append(key)
        elif OLD_MASK.fullmatch(name):
            dropped[key] = "a causal mask, which GPT-2 no longer stores"
        elif name == "lm_head.weight" and name not in shapes:
            dropped[key] = "the same numbers as transformer.wte.weight, to which it is tied"
        elif name in shapes and not name.startswith(HEAD_PREFIX):
            mapped[key] = name
        else:
            unknown.append(key)
    _decide_head(where, state, format_, shapes, mapped, dropped, init_value_head=init_value_head)
    _refuse_mismatch(where, state, shapes, mapped, unknown, init_value_head=init_value_head)
    _refuse_other_tie(where, state, {**dropped, **mapped}, prefix)
    _refuse_other_masks(where, state, dropped)
    checked_config(config.to_dict(), where=where)

    translated = {name: state[key] for key, name in mapped.items()}
    dtype, dtype_notes = _body_dtype(where, translated)
    for name, tensor in translated.items():
        translated[name] = tensor.float() if name.startswith(HEAD_PREFIX) else tensor.to(dtype)
    for name in (name for name in shapes if name not in translated):  # of the head: all else was refused
        translated[name] = torch.zeros(shapes[name])
    if format_ == "sequence-classification" and not init_value_head:
        notes.append(f"{HEAD_BIAS} is 0: the classifier has no bias")
    if format_.endswith("classification"):
        notes.append("lm_head is tied to transformer.wte: the classifier has none")
    if init_value_head:
        notes.append("the value head is new: every value is 0")
    return Translation(format_, prefix, config, translated, mapped, dropped, (*notes, *dtype_notes), dtype)


def _recognise(
    where: str, state: Mapping[str, torch.Tensor], fields: Mapping[str, Any], told: SourceFormat | None
) -> tuple[SourceFormat, str]:
    """The library that wrote the checkpoint, and the prefix of the body's names."""
    if told is not None and told not in get_args(SourceFormat):
        raise OptionsError(
            f"source_format={told!r}",
            expected=f"one of {', '.join(get_args(SourceFormat))}",
            next_step="leave it out: mostly the files tell",
        )
    classes = fields.get("architectures") or ()
    format_: SourceFormat = "gpt2"
    if HEAD_WEIGHT in state or HEAD_BIAS in state:
        wrapped = any(key.startswith(PREFIXES["trl"]) for key in state)
        format_ = "trl" if wrapped or "GPT2LMHeadModel" in classes or "summary_dropout_prob" in fields else "seed"
        if told in ("seed", "trl") and not wrapped:
            format_ = told
        elif format_ == "seed" and "GPT2HeadWithValueModel" not in classes and _readings_differ(where, fields):
            raise ConversionError(
                f"{where} may be the seed's or TRL's: its config.json names no class, and sets summary_* "
                "fields, which the seed's head obeys and TRL's ignores",
                next_step='say which: source_format="seed" or source_format="trl"',
            )
    elif any(TRLX_HEAD.fullmatch(key) for key in state):
        format_ = "trlx"
    elif "score.weight" in state:
        format_ = "sequence-classification"
    elif "classifier.weight" in state:
        format_ = "token-classification"
    elif "GPT2HeadWithValueModel" in classes:  # whose head may have no weights
        format_ = "seed"
    if told not in (None, format_):
        raise ConversionError(
            f"{where} holds the tensors of {format_!r}; source_format says {told!r}",
            next_step=f'leave source_format out, or pass "{format_}"',
        )
    prefix = PREFIXES.get(format_, "")
    return format_, prefix if prefix and any(key.startswith(prefix) for key in state) else ""


def _readings_differ(where: str, fields: Mapping[str, Any]) -> bool:
    seed, trl = (_value_config(where, fields, format_, None)[0] for format_ in ("seed", "trl"))
    return seed.to_dict() != trl.to_dict()


def _value_config(
    where: str, fields: Mapping[str, Any], format_: SourceFormat, summary_first_dropout: float | None
) -> tuple[GPT2ValueConfig, list[str]]:
    return value_config(
        where,
        fields,
        format_,
        one_linear_layer=bool(HEAD_NAMES[format_]),
        summary_first_dropout=summary_first_dropout,
    )


def _decide_head(
    where: str,
    state: Mapping[str, torch.Tensor],
    format_: SourceFormat,
    shapes: Mapping[str, tuple[int, ...]],
    mapped: dict[str, str],
    dropped: dict[str, str],
    *,
    init_value_head: bool,
) -> None:
    """Refuse a missing head, and one that cannot be kept. With `init_value_head`, drop the latter instead."""
    head = [key for key, name in mapped.items() if name.startswith(HEAD_PREFIX)]
    lost = sorted(key for key in dropped if key.startswith(HEAD_PREFIX))
    outputs = {state[key].shape[0] for key in head if state[key].dim() > 0}
    wide = bool(head) and outputs != {shapes[HEAD_WEIGHT][0]}
    if lost or wide:
        what = (
            f"a value head of several layers ({listed(lost)})"
            if lost
            else f"a head with {' and '.join(map(str, sorted(outputs)))} outputs ({listed(head)})"
        )
        if not init_value_head:
            raise ConversionError(
                f"{where} has {what}",
                expected="one linear layer to one value: that is all that v_head.summary can express",
                next_step="keep the policy alone and train a new head: init_value_head=True",
            )
        for key in head:
            del mapped[key]
            dropped[key] = "a value head of another shape"
    elif HEAD_WEIGHT in shapes and not head and not init_value_head:
        raise MissingHeadError(
            f"{where} has no value head ({format_} checkpoint, {len(state)} tensors)",
            expected=f"{HEAD_WEIGHT} and {HEAD_BIAS}",
            next_step="where the head is in another file, put it beside the weights as "
            "value_head.safetensors; to start with a new one: init_value_head=True",
        )
    elif init_value_head and (head or HEAD_WEIGHT not in shapes):
        raise OptionsError(
            f"init_value_head=True, and {where} has a value head that can be kept: "
            f"{listed(head) or 'one without weights'}",
            next_step="leave init_value_head out",
        )


def _refuse_mismatch(
    where: str,
    state: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    mapped: Mapping[str, str],
    unknown: list[str],
    *,
    init_value_head: bool,
) -> None:
    optional = {HEAD_WEIGHT, HEAD_BIAS} if init_value_head else set()
    if "score.weight" in mapped:
        optional = {HEAD_BIAS}
    missing = sorted(set(shapes) - set(mapped.values()) - optional)
    if unknown or missing:
        what = [f"unknown tensors: {listed(sorted(unknown))}"] if unknown else []
        what += [f"missing tensors: {listed(missing)}"] if missing else []
        way_out = (
            "remove what does not belong to the model from the state dict, or save the model again in its own "
            "library; if layers do not fit, pass the config.json that belongs to them: config="
        )
        if any(UNMERGED in key for key in unknown):
            way_out = (
                "the adapter is not merged: load it in its own library, call merge_and_unload() on the PEFT model and "
                "save that, or convert the folder that the PEFT model's save_pretrained wrote"
            )
        raise PackageError(
            f"{where} has {'; '.join(what)}",
            expected="the tensors of a GPT-2 and of a value head that this package knows, and no others",
            next_step=way_out,
        )
    for key, name in mapped.items():
        if tuple(state[key].shape) != shapes[name]:
            raise PackageError(
                f"{where}: {key} has shape {list(state[key].shape)}",
                expected=f"{list(shapes[name])}, from its config.json",
                next_step="pass the config.json that belongs to these weights: config=",
            )


def _refuse_other_tie(where: str, state: Mapping[str, torch.Tensor], names: Mapping[str, str], prefix: str) -> None:
    """Refuse an lm_head that the configuration ties to the embeddings, and that has other numbers."""
    head, embeddings = f"{prefix}lm_head.weight", f"{prefix}transformer.wte.weight"
    tied = head in state and names[head] != "lm_head.weight"
    if tied and not torch.equal(state[head], state[embeddings]):
        raise ConversionError(
            f"{where}: {head} and {embeddings} differ, and config.json ties them",
            expected="the same numbers in both",
            next_step='to keep both, set "tie_word_embeddings": false in config.json; to keep the '
            f"embeddings, delete {head} from the state dict",
        )


def _refuse_other_masks(where: str, state: Mapping[str, torch.Tensor], dropped: Mapping[str, str]) -> None:
    """Refuse masks that are not causal. Causal masks are dropped, because GPT-2 computes the same ones itself."""
    for key in dropped:
        if not key.endswith((".attn.bias", ".crossattention.bias")):
            continue
        mask = state[key]
        side = mask.shape[-1] if mask.dim() == 4 else 0
        if mask.shape != (1, 1, side, side) or not _is_causal(mask[0, 0]):
            raise ConversionError(
                f"{where}: {key} is not a causal mask (shape {list(mask.shape)})",
                expected="ones on and below the diagonal: each token sees itself and those before it",
                next_step="use the library that wrote it; this attention has no conversion",
            )


def _is_causal(mask: torch.Tensor, rows: int = 1024) -> bool:
    """Whether `mask [T, T]` has ones on and below the diagonal, and zeros above it; a few rows at a time."""
    return all(
        torch.equal(part != 0, torch.ones_like(part, dtype=torch.bool).tril(number * rows))
        for number, part in enumerate(mask.split(rows))
    )


def _body_dtype(where: str, state: Mapping[str, torch.Tensor]) -> tuple[torch.dtype, list[str]]:
    """The dtype that holds every weight of the body exactly; refuses what is not a finite float."""
    for name, tensor in state.items():
        if tensor.dtype not in BODY_DTYPES:
            raise ConversionError(
                f"{where}: {name} is {tensor.dtype}",
                expected="float32, float16 or bfloat16",
                next_step="save the model in one of these dtypes in its own library, and convert that",
            )
        if not tensor.isfinite().all():
            raise UnsavableModelError(
                f"{where}: {name} holds NaN or infinity",
                expected="finite weights",
                next_step="convert the last checkpoint before the training run diverged",
            )
    dtypes = sorted({tensor.dtype for name, tensor in state.items() if not name.startswith(HEAD_PREFIX)}, key=str)
    widest = dtypes[0]
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    notes = [] if len(dtypes) == 1 else [f"the body mixes {', '.join(map(str, dtypes))}; all of it is {widest} now"]
    heads = {tensor.dtype for name, tensor in state.items() if name.startswith(HEAD_PREFIX)} - {torch.float32}
    notes += [f"the head was {dtype}, is float32 and computes in it" for dtype in sorted(heads, key=str)]
    return widest, notes
