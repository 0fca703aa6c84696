"""Other people's value-head checkpoints, as packages of this model.

Imports torch, transformers, the model and of hub_tools what is below: `weight_files` reads weights and runs nothing of
them, `lora` merges adapters, `formats` knows what each library's tensors mean, `companions` reads the tokenizer.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from modeling_gpt2_value import GPT2ValueModel

from ..errors import (
    ConversionError,
    FolderRefusedError,
    OptionsError,
    PackageError,
)
from ..files import read_json
from ..layout import CONFIG, HEAD_PREFIX
from ..package.save import save_package, save_target
from ..package.stage import identities, refuse_changes
from .companions import carried_generation_config, carried_tokenizer
from .config_fields import SourceFormat, most_bytes
from .formats import translate
from .lora import merge_adapter
from .weight_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    HEAD_WEIGHTS,
    MODEL_WEIGHTS,
    listed,
    only_one,
    read_state_dict,
)

_Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` found, and what became of it: every tensor is in `mapped` or in `dropped`."""

    source: Path
    folder: Path  # the package
    source_format: SourceFormat
    prefix: str  # of the body's tensor names in the source: "", "pretrained_model." or "base_model."
    files: tuple[Path, ...]  # the weight files that were read
    adapter: bool  # a LoRA was merged into its base
    mapped: dict[str, str]  # tensor of the source (for an adapter: of the merged model) -> tensor of the package
    dropped: dict[str, str]  # the source's tensor -> why it is not in the package
    notes: tuple[str, ...]  # what the source did not specify, and what was chosen
    dtype: torch.dtype  # the body's; the head is float32
    tokenizer: str | None  # the class of the package's tokenizer

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {
            **asdict(self),
            "source": str(self.source),
            "folder": str(self.folder),
            "files": [str(file) for file in self.files],
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@dataclass(frozen=True)
class _Read:
    """A checkpoint in memory, not understood yet."""

    state: dict[str, torch.Tensor]
    fields: dict[str, Any]  # config.json
    files: list[Path]
    homes: list[Path]  # where a tokenizer or a generation config may lie, the first that has one counts
    adapter: bool
    dropped: dict[str, str]
    limit: int  # the most bytes that a weight file of this model may have
    notes: tuple[str, ...] = ()


def convert_checkpoint(
    source: _Path,
    folder: _Path,
    *,
    config: _Path | None = None,
    source_format: SourceFormat | None = None,
    base: _Path | None = None,
    tokenizer: PreTrainedTokenizerBase | _Path | None = None,
    summary_first_dropout: float | None = None,
    init_value_head: bool = False,
    overwrite: bool = True,
) -> Conversion:
    """Write another library's GPT-2 checkpoint as a package of this model, with the same logits and values.

    These checkpoints can be converted:

    - `GPT2HeadWithValueModel` of the seed notebook (and of TRL until 0.1.0);
    - TRL's `AutoModelForCausalLMWithValueHead`, with or without the prefix `pretrained_model.`;
    - a PEFT LoRA folder with TRL's head beside the adapter; the adapter is merged;
    - trlx's `AutoModelForCausalLMWithValueHead`; its head of two layers cannot be kept (see `init_value_head`);
    - `GPT2ForSequenceClassification` and `GPT2ForTokenClassification` with one label; the classifier becomes the head;
    - plain GPT-2, with `init_value_head`.

    The body keeps its dtype, the head is float32. Pickles are not unpickled: a child process with limited memory and
    time finds the tensors in them (see `pickle_outline`). Other libraries see only known fields of JSON files. The
    record lists every tensor that is left out.

    Args:
        source: a folder, or a weight file: `*.safetensors`, the `*.index.json` of shards, or else a pickle.
        folder: where the package goes, as for `save_package`.
        config: GPT-2's `config.json`, or the folder that holds it; by default the one beside the weights.
        source_format: the library that wrote the checkpoint, if its files do not show it.
        base: the folder of an adapter's base model; by default the path, or the repository on the Hub, that
            `adapter_config.json` names.
        tokenizer: a tokenizer, or the folder of one; by default the source's, where it has one.
        summary_first_dropout: probability of the dropout before the head, in training mode; by default the
            source's. TRL does not record it: there the default is TRL's own, 0.1.
        init_value_head: start with a new head, whose values are all 0. Only for a source without a head, or with one
            that cannot be kept.
        overwrite: as for `save_package`.

    Returns:
        The record of what was found, mapped and dropped.

    Raises:
        PackageError: no weights or no `config.json`, or no base model for an adapter.
        PackageError: the pickle asks for more than tensors. Nothing of it ran.
        PackageError: a damaged file, or a setting that cannot be right.
        PackageError: a link out of the source's folder, or an index or a tokenizer that names files elsewhere.
        ConversionError: the source can be read in two ways that give different models; the error says how to
            choose.
        ConversionError: the body is not a GPT-2, or is quantised, or the adapter is not a LoRA.
        ConversionError: a head of several layers or outputs, without `init_value_head`.
        MissingHeadError: no head, without `init_value_head`.
        PackageError: unknown or missing tensors, or other shapes than the configuration calls for.
        UnsavableModelError: NaN or infinity among the weights.
        TokenizerMismatchError: the source's tokenizer cannot be loaded.
        ResourceLimitError: opening it takes more memory or time than a tokenizer needs.
        OptionsError: an argument that this source has no use for.
        And what `save_package` raises.
    """
    source = Path(source)
    weights = _weights_of(source)
    home = weights.parent
    if _is_same(folder, home):
        raise FolderRefusedError(
            f"{folder} holds the checkpoint that is to be converted",
            expected="another folder for the package",
            next_step="name a folder that does not exist yet",
        )
    save_target(folder, overwrite=overwrite)  # checked now, before the work that can take minutes
    folder = Path(folder)
    known = {CONFIG, ADAPTER_CONFIG, weights.name, *MODEL_WEIGHTS, *HEAD_WEIGHTS, *ADAPTER_WEIGHTS}
    before = identities(home, known)
    if weights.name == ADAPTER_CONFIG:
        read = _read_adapter(home, config=config, base=base)
    else:
        read = _read_model(weights, config=config, base=base, named=weights == source)
    _add_head_file(read, home)
    refuse_changes(home, before)

    found = translate(
        str(source),
        read.state,
        read.fields,
        source_format=source_format,
        summary_first_dropout=summary_first_dropout,
        init_value_head=init_value_head,
    )
    model = GPT2ValueModel(found.config)
    model.to(found.dtype)
    model.v_head.float()
    # strict: every tensor of the model is replaced, and nothing is left over
    model.load_state_dict({"lm_head.weight": found.state["transformer.wte.weight"], **found.state})
    model.eval()
    generation_config = carried_generation_config(read.homes)
    if generation_config is not None:
        model.generation_config = generation_config
    its_tokenizer = carried_tokenizer(tokenizer, read.homes, vocab_size=found.config.vocab_size)
    save_package(model, folder, its_tokenizer, overwrite=overwrite)
    return Conversion(
        source=source,
        folder=folder,
        source_format=found.source_format,
        prefix=found.prefix,
        files=tuple(read.files),
        adapter=read.adapter,
        mapped=found.mapped,
        dropped={**read.dropped, **found.dropped},
        notes=(*read.notes, *found.notes, *_merge_notes(read.adapter, found.dtype)),
        dtype=found.dtype,
        tokenizer=None if its_tokenizer is None else type(its_tokenizer).__name__,
    )


def _is_same(one: _Path, other: _Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except (OSError, TypeError, ValueError):  # one of them is not there, or cannot be
        return False


def _weights_of(source: Path) -> Path:
    """The file that `source` means: itself, an adapter's `adapter_config.json`, or the model's weights."""
    if os.path.isfile(source):  # and not is_file(), which fails on names that are too long
        return source
    if not os.path.isdir(source):
        raise PackageError(
            f"there is no file or folder {source}",
            expected="a checkpoint on this machine",
            next_step="fetch it first: huggingface_hub.snapshot_download(REPO), which returns its folder",
        )
    if (source / ADAPTER_CONFIG).is_file():
        return source / ADAPTER_CONFIG
    weights = only_one(source, MODEL_WEIGHTS)
    if weights is None:
        names = sorted(path.name for path in source.iterdir())
        raise PackageError(
            f"{source} holds no weights under a name of transformers': {listed(names) or 'it is empty'}",
            expected=" or ".join(MODEL_WEIGHTS),
            next_step="where they are under another name, pass that file itself",
        )
    return weights


def _fields(home: Path, config: _Path | None) -> dict[str, Any]:
    """The configuration of a whole model."""
    file = home / CONFIG if config is None else Path(config)
    file = file / CONFIG if os.path.isdir(file) else file
    if not os.path.isfile(file):
        raise PackageError(
            f"there is no {file}: weights alone do not say how many attention heads they are for",
            expected="the config.json of the GPT-2 that was trained",
            next_step="pass it: config=FILE, or the folder of the model that the training began with",
        )
    return read_json(file.parent, file.name)


def _read_model(weights: Path, *, config: _Path | None, base: _Path | None, named: bool) -> _Read:
    """A whole model, from its weight file. `named`: the user named this file, rather than a folder with it."""
    if base is not None:
        raise OptionsError(
            f"base= is for an adapter; {weights} is a whole model",
            next_step="leave base out, or pass an adapter's folder",
        )
    fields = _fields(weights.parent, config)
    limit = most_bytes(str(weights), fields)
    state = read_state_dict(weights, limit=limit, follow=named)
    return _Read(state, fields, [weights], [weights.parent], adapter=False, dropped={}, limit=limit)


def _read_adapter(home: Path, *, config: _Path | None, base: _Path | None) -> _Read:
    """An adapter's folder, merged into its base."""
    if config is not None:
        raise OptionsError(
            f"config= is for a whole model; {home} is an adapter, and its base has a config.json",
            next_step="leave config out; to name another base: base=",
        )
    merged = merge_adapter(home, None if base is None else Path(base))
    files, homes = list(merged.files), [home, merged.base]
    return _Read(
        merged.state,
        merged.fields,
        files,
        homes,
        adapter=True,
        dropped=merged.dropped,
        limit=merged.limit,
        notes=merged.notes,
    )


def _add_head_file(read: _Read, home: Path) -> None:
    """Add the value head that lies in a file of its own, beside an adapter or beside a model without one."""
    if any(key.startswith(HEAD_PREFIX) for key in read.state):
        return
    file = only_one(home, HEAD_WEIGHTS if read.adapter else HEAD_WEIGHTS[1:])
    if file is None or file in read.files:
        return
    head = read_state_dict(file, limit=read.limit)
    twice = sorted(set(head) & set(read.state))
    if twice:
        raise ConversionError(
            f"{file} and {read.files[0]} both hold {listed(twice)}",
            expected="the value head alone in the separate file",
            next_step="remove one of the two files, or pass the file of the whole model itself",
        )
    read.state.update(head)
    read.files.append(file)


def _merge_notes(adapter: bool, dtype: torch.dtype) -> tuple[str, ...]:
    if not adapter or dtype == torch.float32:
        return ()
    return (f"the adapter is merged in {dtype}, which rounds: a float32 base keeps more of it",)
