"""Other people's GPT-2 checkpoints, and packages of older versions, as packages of this model."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import FolderRefusedError, OptionsError, PackageError
from ..files import read_json
from ..layout import CONFIG, HEAD_PREFIX, MODEL_TYPE
from ..package.writing.save import SavedPackage, save_package, save_target
from .adapters import lora_settings, merge
from .companions import carried_generation_config, carried_tokenizer
from .config_fields import most_bytes
from .heads import HEAD, SourceFormat, listed, model_of, plain_name, translate
from .weight_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, HEAD_WEIGHTS, MODEL_WEIGHTS, only_one, read_state_dict

_Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Conversion:
    """What `convert_checkpoint` found, and what became of it: every tensor is in `mapped` or in `dropped`."""

    source: str
    package: SavedPackage  # what was written
    source_format: SourceFormat
    files: tuple[Path, ...]  # the weight files that were read
    adapter: bool  # a LoRA was merged into its base
    mapped: dict[str, str]  # tensor of the source (for an adapter: of the merged model) -> tensor of the package
    dropped: dict[str, str]  # the source's tensor -> why it is not in the package
    notes: tuple[str, ...]  # what the source did not specify, and what was chosen
    dtype: torch.dtype  # the body's; the head is float32
    tokenizer: str | None  # the class of the package's tokenizer

    @property
    def folder(self) -> Path:
        """The package's folder."""
        return self.package.folder

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {
            **asdict(self),
            "package": {**asdict(self.package), "folder": str(self.folder)},
            "files": [str(file) for file in self.files],
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@dataclass
class _Checkpoint:
    """A checkpoint in memory, not understood yet."""

    state: dict[str, torch.Tensor]
    fields: dict[str, Any]  # config.json
    files: list[Path]
    homes: list[Path]  # where a tokenizer or a generation config may lie, the first that has one counts
    limit: int  # the most bytes that a weight file of this model may have
    dropped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def convert_checkpoint(
    source: _Path,
    folder: _Path,
    *,
    revision: str | None = None,
    config: _Path | None = None,
    source_format: SourceFormat | None = None,
    base: _Path | None = None,
    tokenizer: PreTrainedTokenizerBase | _Path | Literal[False] | None = None,
    summary_first_dropout: float | None = None,
    init_value_head: bool = False,
    dtype: torch.dtype | None = None,
    overwrite: bool = True,
    **card: Any,
) -> Conversion:
    """Write a GPT-2 checkpoint of any library as a package of this model, with the same logits and values.

    These can be converted, in one file or in shards, as safetensors or pickles, whatever wrappers' prefixes (`module.`,
    `_orig_mod.`, `pretrained_model.`, ...) their tensors' names have:

    - TRL's `AutoModelForCausalLMWithValueHead`, and `GPT2HeadWithValueModel` of the seed notebook;
    - OpenRLHF's critics, and other heads that are one linear layer, also in `value_head.safetensors` or `.bin`;
    - `GPT2ForSequenceClassification` and `GPT2ForTokenClassification` with one label: the classifier becomes the head;
    - a PEFT LoRA folder: the adapter is merged. Its head is the adapter's (trained in it, or beside it as TRL writes
      it), else that of its base;
    - plain GPT-2, with `init_value_head`: this is what `gpt2-value create --base` does;
    - a package of this version or an older one, which is rewritten with this version's code.

    The body keeps its dtype, the head is float32. Nothing of the source is run: pickles are read by
    `torch.load(weights_only=True)` in a process with limited memory and time, and other libraries see only known
    fields of JSON files. The record lists every tensor that is left out.

    Args:
        source: a folder, a repository on the Hub, or a weight file: `*.safetensors`, the `*.index.json` of shards, or
            else a pickle.
        folder: where the package goes, as for `save_package`.
        revision: branch, tag or commit of the repository.
        config: GPT-2's `config.json`, or the folder that holds it; by default the one beside the weights.
        source_format: the library that wrote the head, if the files do not show it, or hold two.
        base: an adapter's base model, a folder or a repository; by default what `adapter_config.json` names.
        tokenizer: a tokenizer, or the folder of one; None for the source's, where it has one; False for none.
        summary_first_dropout: probability of the dropout before the head, in training mode; by default the
            source's. TRL does not record it: there the default is TRL's own, 0.1.
        init_value_head: start with a new head, whose values are all 0. Only for a source without a head, or with one
            that cannot be kept.
        dtype: of the body; by default the source's.
        overwrite, card: as for `save_package` (`license=`, `base_model=`, ...).

    Returns:
        The record of what was found, mapped and dropped.

    Raises:
        PackageError: no weights or no `config.json`; a damaged file, a setting that cannot be right, an unsafe pickle
            or a link out of the folder; unknown or missing tensors, or other shapes than the configuration calls for.
        ConversionError: the body is not a GPT-2, or is quantised; the adapter is not a LoRA; a head of several layers
            or outputs, without `init_value_head`; two heads that differ.
        MissingHeadError: no head, without `init_value_head`.
        MissingLibraryError: an adapter, and PEFT is not installed.
        UnsavableModelError: NaN or infinity among the weights.
        TokenizerMismatchError, ResourceLimitError: the source's tokenizer cannot be loaded.
        OptionsError: an argument that this source has no use for.
        And what `save_package` raises.
    """
    place = folder_of(source, revision)
    weights = _weights_of(place)
    home = weights.parent
    if _is_same(folder, home):
        raise FolderRefusedError(
            f"{folder} holds the checkpoint that is to be converted",
            expected="another folder for the package",
            next_step="name a folder that does not exist yet",
        )
    save_target(folder, overwrite=overwrite)  # checked now, before the work that can take minutes
    is_adapter = weights.name == ADAPTER_CONFIG
    if is_adapter and config is not None:
        raise OptionsError(
            f"config= is for a whole model; {home} is an adapter, and its base has a config.json",
            next_step="leave config out; to name another base: base=",
        )
    if base is not None and not is_adapter:
        raise OptionsError(
            f"base= is for an adapter; {weights} is a whole model",
            next_step="leave base out, or pass an adapter's folder",
        )
    read = _read_adapter(home, base) if is_adapter else _read_model(weights, config, named=weights == place)
    found = translate(
        os.fspath(source),
        read.state,
        read.fields,
        source_format=source_format,
        summary_first_dropout=summary_first_dropout,
        init_value_head=init_value_head,
    )
    model = model_of(found.config, found.state)
    if dtype is not None:
        model.transformer.to(dtype), model.lm_head.to(dtype)
    generation_config = carried_generation_config(read.homes)
    if generation_config is not None:
        model.generation_config = generation_config
    its_tokenizer = carried_tokenizer(tokenizer, read.homes, vocab_size=found.config.vocab_size)
    package = save_package(model, folder, its_tokenizer, overwrite=overwrite, **card)
    return Conversion(
        source=os.fspath(source),
        package=package,
        source_format=found.source_format,
        files=tuple(read.files),
        adapter=is_adapter,
        mapped=found.mapped,
        dropped={**read.dropped, **found.dropped},
        notes=(*read.notes, *found.notes),
        dtype=model.dtype,
        tokenizer=None if its_tokenizer is None else type(its_tokenizer).__name__,
    )


def folder_of(source: _Path, revision: str | None = None) -> Path:
    """A source on this disk: the path itself, or the folder into which a repository of the Hub was downloaded."""
    return Path(source)


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
            expected="a checkpoint on this machine, or OWNER/NAME of a repository on the Hub",
            next_step="check the name",
        )
    if (source / ADAPTER_CONFIG).is_file() and only_one(source, MODEL_WEIGHTS[:2]) is None:
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


def _read_model(weights: Path, config: _Path | None, *, named: bool) -> _Checkpoint:
    """A whole model, from its weight file. `named`: the user named this file, rather than a folder with it."""
    file = weights.parent / CONFIG if config is None else Path(config)
    file = file / CONFIG if os.path.isdir(file) else file
    if not os.path.isfile(file):
        raise PackageError(
            f"there is no {file}: weights alone do not say how many attention heads they are for",
            expected="the config.json of the GPT-2 that was trained",
            next_step="pass it: config=FILE, or the folder of the model that the training began with",
        )
    fields = read_json(file.parent, file.name)
    limit = most_bytes(str(weights), fields)
    state = read_state_dict(weights, limit=limit, follow=named)
    read = _Checkpoint(state, fields, [weights], [weights.parent], limit)
    return _with_head_file(read, weights.parent, HEAD_WEIGHTS[1:])


def _with_head_file(read: _Checkpoint, home: Path, names: tuple[str, ...]) -> _Checkpoint:
    """Add the value head that lies in a file of its own."""
    file = only_one(home, names)
    if file is not None and file not in read.files:
        head = read_state_dict(file, limit=read.limit)
        read.state |= {f"{file.name}:{key}": tensor for key, tensor in head.items()}
        read.files.append(file)
    return read


def _read_adapter(home: Path, base: _Path | None) -> _Checkpoint:
    """An adapter, merged into its base."""
    fields = read_json(home, ADAPTER_CONFIG)
    settings = lora_settings(str(home), fields)
    file = only_one(home, ADAPTER_WEIGHTS)
    if file is None:
        raise PackageError(
            f"{home} has an {ADAPTER_CONFIG} and no adapter weights",
            expected=" or ".join(ADAPTER_WEIGHTS),
            next_step="save the adapter again with its library's save_pretrained",
        )
    under = _base_of(home, fields) if base is None else folder_of(base)
    base_file = only_one(under, MODEL_WEIGHTS) if os.path.isdir(under) else None
    if base_file is None:
        raise PackageError(
            f"{under}, the adapter's base model, has no weights",
            expected=" or ".join(MODEL_WEIGHTS),
            next_step="name the folder of the base model: base=",
        )
    read = _read_model(base_file, None, named=False)
    understood = translate(str(under), read.state, read.fields, init_value_head=None)
    adapter = read_state_dict(file, limit=read.limit)
    state, has_head, notes = merge(understood, adapter, settings, where=str(file), of=str(under))
    if understood.dtype != torch.float32:
        notes += (f"the adapter is merged in {understood.dtype}, which rounds: a float32 base keeps more of it",)
    dropped = {f"{under.name}/{label}": why for label, why in understood.dropped.items()}
    merged = _Checkpoint(state, {}, [base_file, file], [home, under], read.limit, dropped, notes)
    _with_head_file(merged, home, HEAD_WEIGHTS)
    beside = any(HEAD.fullmatch(plain_name(label)) for label in merged.state if ":" in label)
    in_base = [label for label, name in understood.mapped.items() if name.startswith(HEAD_PREFIX)]
    if not has_head and (beside or not in_base):
        for name in [name for name in state if name.startswith(HEAD_PREFIX)]:
            del merged.state[name]
        dropped |= {
            f"{under.name}/{label}": "the base model's own value head: the adapter brings one" for label in in_base
        }
        merged.fields = {**read.fields, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    else:
        merged.fields = {**understood.config.to_dict(), "model_type": MODEL_TYPE}
    merged.fields["tie_word_embeddings"] = "lm_head.weight" not in state
    return merged


def _base_of(home: Path, fields: dict[str, Any]) -> Path:
    """The folder of the model that an adapter names."""
    name, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not isinstance(name, str) or not name or not isinstance(revision, (str, type(None))):
        raise PackageError(
            f"{home / ADAPTER_CONFIG} names the base model {str(name)[:80]!r} at the revision {str(revision)[:80]!r}",
            expected="a folder, or a repository on the Hub and its branch, tag or commit",
            next_step="name the base model's folder: base=",
        )
    return folder_of(name, revision)
