"""Other people's value-head checkpoints in, as packages of this model; plain GPT-2 out.

Imports torch, transformers, the remote code and the rooms of hub_tools that it needs; peft only for an adapter. What each
library writes was read in its source, and for TRL in what it writes: trl 0.0.3 to 1.12.0 (the last with the head;
`trl/experimental/ppo/modeling_value_head.py`), trlx (`trlx/models/modeling_ppo.py`), transformers (`modeling_gpt2.py`).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, GenerationConfig, GPT2Config, PreTrainedTokenizerBase

from configuration_gpt2_value import GPT2ValueConfig
from modeling_gpt2_value import GPT2ValueModel

from .errors import (
    AmbiguousSourceError,
    FolderRefusedError,
    MissingFileError,
    MissingHeadError,
    NonFiniteWeightsError,
    TokenizerMismatchError,
    UnconvertibleHeadError,
    UnsupportedModelError,
    WeightsMismatchError,
)
from .layout import CONFIG, GENERATION_CONFIG, HEAD_PREFIX
from .reading import read_json
from .save import save_package
from .state_files import ADAPTER_CONFIG, HEAD_WEIGHTS, MODEL_WEIGHTS, listed, only_one, read_state_dict

if TYPE_CHECKING:
    from collections.abc import Iterable

SourceFormat = Literal["seed", "trl", "trlx", "sequence-classification", "token-classification", "gpt2"]

HEAD_WEIGHT, HEAD_BIAS = "v_head.summary.weight", "v_head.summary.bias"

# A wrapper's own attribute for the model in it: TRL's and trlx's. The head is the wrapper's and stands without.
PREFIXES = {"pretrained_model.": "trl", "base_model.": "trlx"}
# trlx's frozen upper layers: a copy of the reference model's, for the KL term.
REFERENCE_PREFIX = "frozen_head."
# Causal masks, which GPT-2 checkpoints carried as buffers until 2023.
OLD_MASK = re.compile(r"transformer\.h\.\d+\.(attn|crossattention)\.(bias|masked_bias)")

TRL_DROPOUT = 0.1  # `summary_dropout_prob` where nobody set it; TRL does not save what somebody set
CLASSIFIER_DROPOUT = 0.1  # GPT2ForTokenClassification's, where its config has none

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` found and what became of it. Every tensor of the source is in `mapped` or `dropped`."""

    source: Path
    folder: Path  # the package
    source_format: SourceFormat
    prefix: str  # what stood before the body's names: "", "pretrained_model." or "base_model."
    files: tuple[str, ...]  # the weight files that were read
    adapter: bool  # a PEFT adapter was merged into its base
    mapped: dict[str, str]  # the source's tensor -> the package's
    dropped: dict[str, str]  # the source's tensor -> why it is not in the package
    notes: tuple[str, ...]  # choices that the source left open, and how they were made
    dtype: torch.dtype  # the body's; the head is always float32
    tokenizer: str | None  # the class of the tokenizer in the package


@dataclass(frozen=True)
class _Source:
    """A checkpoint as it lies on the disk, read and not yet understood."""

    state: dict[str, torch.Tensor]
    config: dict[str, Any]
    files: tuple[Path, ...]
    homes: tuple[Path, ...]  # where to look for a tokenizer and a generation config, in this order
    adapter: bool
    dropped: dict[str, str]
    notes: tuple[str, ...]


def convert_checkpoint(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    config: str | os.PathLike[str] | None = None,
    source_format: SourceFormat | None = None,
    base: str | os.PathLike[str] | None = None,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    summary_first_dropout: float | None = None,
    init_value_head: bool = False,
    overwrite: bool = True,
) -> Conversion:
    """Write another library's GPT-2 checkpoint as a package of this model, with the same logits and values.

    Understood are: the seed's `GPT2HeadWithValueModel` (also TRL's until 0.1.0); TRL's
    `AutoModelForCausalLMWithValueHead`, with plain names or below `pretrained_model.`; a PEFT LoRA folder with TRL's
    head beside the adapter, which is merged; trlx's `AutoModelForCausalLMWithValueHead`, whose two-layer head has no
    place here (see `init_value_head`); `GPT2ForSequenceClassification` and `GPT2ForTokenClassification` with one label,
    whose classifier becomes the value head; and plain GPT-2, with `init_value_head`.

    The body keeps its dtype, the head is float32. Pickles are read with `torch.load(weights_only=True)` and in no other
    way. No tensor is left out unless the record says so.

    Args:
        source: a folder, or a weight file in it: `*.safetensors`, a `*.index.json` of shards, anything else a pickle.
        folder: where the package goes, as for `save_package`.
        config: GPT-2's `config.json`, or the folder that holds it, where there is none beside the weights.
        source_format: the library that wrote the checkpoint, where names alone do not tell.
        base: for an adapter, the folder of the model that it belongs to, instead of the one that `adapter_config.json`
            names (a path, or a repository on the Hub).
        tokenizer: a tokenizer or the folder of one, instead of the source's own.
        summary_first_dropout: probability of the dropout before the head, in training mode, instead of the source's
            own; TRL's checkpoints do not record it, and 0.1, its default, is assumed.
        init_value_head: start with a new head, every value 0, where the source has none or one that cannot be kept.
        overwrite: as for `save_package`.

    Returns:
        The record of what was found, mapped and dropped.

    Raises:
        MissingFileError: no weights, or no `config.json`.
        UnsafePickleError: the pickle would run code. Nothing of it ran.
        CorruptFileError, UnsafeFileError: a damaged file, or an index that points elsewhere.
        AmbiguousSourceError: two readings that give different models; the message says how to choose.
        UnsupportedModelError: the body is not a GPT-2, or is quantised, or an adapter other than LoRA.
        UnconvertibleHeadError: a head of several layers or labels, without `init_value_head`.
        MissingHeadError: no head, without `init_value_head`.
        WeightsMismatchError: unknown or missing tensors, or other shapes than the configuration calls for.
        NonFiniteWeightsError: NaN or infinity among the weights.
        MissingDependencyError: an adapter, and peft is not installed.
        ValueError: an argument that this source has no use for.
    """
    source, folder = Path(source), Path(folder)
    if source_format is not None and source_format not in get_args(SourceFormat):
        raise ValueError(f"source_format={source_format!r}; expected one of {', '.join(get_args(SourceFormat))}")
    if folder.resolve() in (source.resolve(), source.resolve().parent if source.is_file() else None):
        raise FolderRefusedError(
            f"{folder} is the checkpoint to convert", expected="another folder", next_step="name a new folder"
        )
    found = _read_source(source, config=config, base=base)
    _refuse_other_bodies(found)
    prefix, understood = _recognise(found, source_format)
    dropped = dict(found.dropped)
    notes = list(found.notes)

    value_config, config_notes = _value_config(found, understood, summary_first_dropout)
    notes += config_notes
    model = GPT2ValueModel(value_config)
    wanted = model.state_dict()

    state: dict[str, torch.Tensor] = {}
    mapped: dict[str, str] = {}
    head, head_dropped = _head(found.state, understood, value_config, init_value_head=init_value_head)
    dropped |= head_dropped
    for key, tensor in found.state.items():
        if key in head_dropped:
            continue
        name = head.get(key) or _body_name(key, prefix)
        if key.startswith(REFERENCE_PREFIX) and understood == "trlx":
            dropped[key] = "the frozen layers of trlx's reference model"
        elif OLD_MASK.fullmatch(name):
            dropped[key] = "a causal mask, which no GPT-2 stores any more"
        elif name == "lm_head.weight" and understood.endswith("classification"):
            raise AmbiguousSourceError(
                f"{source} is a classifier, and holds {key} as well",
                next_step="save the model again in one class, and convert that",
            )
        else:
            mapped[key] = name
            state[name] = tensor
    if len(state) != len(mapped):
        twice = sorted(key for key, name in mapped.items() if list(mapped.values()).count(name) > 1)
        raise AmbiguousSourceError(
            f"{source} holds the same weight under two names: {listed(twice)}",
            expected="each weight once",
            next_step="delete one of the two from the state dict, and convert again",
        )
    _complete(state, wanted, found, value_config, understood, notes)
    if init_value_head:
        for name in (HEAD_WEIGHT, HEAD_BIAS):
            state[name] = torch.zeros_like(wanted[name])
    _check_shapes(source, state, wanted, {name: key for key, name in mapped.items()})
    dtype = _body_dtype(source, state, notes)

    model.to(dtype)
    model.v_head.float()
    model.load_state_dict(state, strict=True)
    model.eval()
    _carry_generation_config(model, found.homes)
    with_tokenizer = _tokenizer(tokenizer, found.homes)
    save_package(model, folder, with_tokenizer, overwrite=overwrite)
    return Conversion(
        source=source,
        folder=folder,
        source_format=understood,
        prefix=prefix,
        files=tuple(str(file) for file in found.files),
        adapter=found.adapter,
        mapped=mapped,
        dropped=dropped,
        notes=tuple(notes),
        dtype=dtype,
        tokenizer=type(with_tokenizer).__name__ if with_tokenizer is not None else None,
    )
