"""Other people's GPT-2 checkpoints, and packages of older versions, as packages of this model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from transformers import GenerationConfig, GPT2Config, PreTrainedTokenizerBase

from modeling_gpt2_value import GPT2ValueModel

from .. import limits
from ..errors import (
    ConversionError,
    LoadError,
    NotAPackageError,
    OptionsError,
    PackageError,
    TokenizerMismatchError,
    as_ours,
)
from ..files import read_json
from ..hub.ask import is_repository_id
from ..hub.download import fetch
from ..layout import CONFIG, GENERATION_CONFIG, HEAD_PREFIX, MODEL_TYPE, TOKENIZER, WEIGHTS, WEIGHTS_INDEX, kind_of
from ..package.config import checked_config, count_numbers, reduce, unknown_fields
from ..package.save import SavedPackage, save_package, save_target
from ..package.stage import make_loadable, package_file_limit, stage
from ..package.tokenizer import load_tokenizer
from ..package.weights import build_model
from .adapters import lora_settings, merge
from .heads import FIELDS, HEAD, SourceFormat, Translation, listed, plain_name, translate
from .pickles import read_tensors

PICKLED_WEIGHTS = "pytorch_model.bin"
# What transformers writes for a whole model: one file, or an index that names the shards.
MODEL_WEIGHTS = (WEIGHTS, WEIGHTS_INDEX, PICKLED_WEIGHTS, "pytorch_model.bin.index.json")
# Files that hold a value head alone: TRL's name for it beside an adapter, then LLaMA-Factory's.
HEAD_WEIGHTS = (PICKLED_WEIGHTS, "value_head.safetensors", "value_head.bin")
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")

_Path = str | os.PathLike[str]
_Tokenizer: TypeAlias = PreTrainedTokenizerBase | _Path | Literal[False] | None


@dataclass(frozen=True)
class Conversion:
    """What was found in a checkpoint, and what became of it: every tensor is in `mapped` or in `dropped`."""

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
        plain = {"files": [str(file) for file in self.files], "dtype": str(self.dtype).removeprefix("torch.")}
        return {**asdict(self), **plain, "package": {**asdict(self.package), "folder": str(self.folder)}}


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checkpoint in memory, as this package's model."""

    model: GPT2ValueModel  # in evaluation mode, on the CPU
    tokenizer: PreTrainedTokenizerBase | None


@dataclass
class _Checkpoint:
    """A checkpoint in memory, not understood yet."""

    state: dict[str, torch.Tensor]
    fields: dict[str, Any]  # config.json
    files: list[Path]
    homes: list[Path]  # where a tokenizer or a generation config may lie, the first that has one counts
    limit: int  # the most bytes that a weight file of this model may have
    adapter: bool = False
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
    tokenizer: _Tokenizer = None,
    summary_first_dropout: float | None = None,
    init_value_head: bool | None = False,
    dtype: torch.dtype | None = None,
    overwrite: bool = True,
    base_model: str | None = None,
    license: str | None = None,
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
        folder: where the package goes, as for `save_package`. A package may be rewritten in its place.
        revision: branch, tag or commit of the repository.
        config: GPT-2's `config.json`, or the folder that holds it; by default the one beside the weights.
        source_format: the library that wrote the head, if the files do not show it, or hold two.
        base: an adapter's base model, a folder or a repository; by default what `adapter_config.json` names.
        tokenizer: a tokenizer, or the folder of one; None for the source's, where it has one; False for none.
        summary_first_dropout: probability of the dropout before the head, in training mode; by default the
            source's. TRL does not record it: there the default is TRL's own, 0.1.
        init_value_head: start with a new head, whose values are all 0. Only for a source without a head, or with one
            that cannot be kept. None for one only where it is needed.
        dtype: of the body; by default the source's.
        overwrite, base_model, license: as for `save_package`.

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
    save_target(folder, overwrite=overwrite)  # checked now, before the work that can take minutes
    read = _read(source, revision, config, base)
    found = translate(
        os.fspath(source),
        read.state,
        read.fields,
        source_format=source_format,
        summary_first_dropout=summary_first_dropout,
        init_value_head=init_value_head,
    )
    loaded = _build(read, found, tokenizer, dtype)
    package = save_package(
        loaded.model, folder, loaded.tokenizer, overwrite=overwrite, base_model=base_model, license=license
    )
    return Conversion(
        source=os.fspath(source),
        package=package,
        source_format=found.source_format,
        files=tuple(read.files),
        adapter=read.adapter,
        mapped=found.mapped,
        dropped={**read.dropped, **found.dropped},
        notes=(*read.notes, *found.notes),
        dtype=loaded.model.dtype,
        tokenizer=None if loaded.tokenizer is None else type(loaded.tokenizer).__name__,
    )


def load_checkpoint(
    source: _Path,
    *,
    revision: str | None = None,
    tokenizer: _Tokenizer = None,
    init_value_head: bool | None = None,
) -> LoadedCheckpoint:
    """Read a checkpoint of any library, or a package, as this model. Arguments and errors are `convert_checkpoint`'s.

    The installed classes are used; no code of the source is run, so a package needs no review.
    """
    read = _read(source, revision, None, None)
    found = translate(os.fspath(source), read.state, read.fields, init_value_head=init_value_head)
    return _build(read, found, tokenizer)


def _read(source: _Path, revision: str | None, config: _Path | None, base: _Path | None) -> _Checkpoint:
    place = folder_of(source, revision)
    weights = _weights_of(place)
    is_adapter = weights.name == ADAPTER_CONFIG
    if (config if is_adapter else base) is not None:
        raise OptionsError(
            f"config= for {place}, which is an adapter: its base has a config.json"
            if is_adapter
            else f"base= for {place}, which is a whole model",
            expected="base= for an adapter, config= for a whole model",
            next_step="leave it out",
        )
    return _read_adapter(weights.parent, base) if is_adapter else _read_model(weights, config, named=weights == place)


def _build(
    read: _Checkpoint, found: Translation, tokenizer: _Tokenizer, dtype: torch.dtype | None = None
) -> LoadedCheckpoint:
    """The model, with the generation config and the tokenizer that lie beside its weights."""
    state = {
        name: tensor if name.startswith(HEAD_PREFIX) else tensor.to(dtype or found.dtype)
        for name, tensor in found.state.items()
    }
    model = build_model(found.config, state)
    model.generation_config = _generation_config(read.homes) or model.generation_config
    return LoadedCheckpoint(model, _tokenizer(tokenizer, read.homes, vocab_size=found.config.vocab_size))


def folder_of(source: _Path, revision: str | None = None) -> Path:
    """A source on this disk: the path itself, or the folder into which a repository of the Hub was downloaded."""
    name = os.fspath(source)
    if not os.path.exists(name) and is_repository_id(name):
        return fetch(name, revision=revision, checkpoint=True).folder
    if revision is not None:
        raise OptionsError(
            f"revision={revision!r} for {name[:300]!r}",
            expected="OWNER/NAME of a repository on the Hub: a folder has no revisions",
            next_step="leave revision out",
        )
    return Path(source)


def _only_one(folder: Path, names: Sequence[str]) -> Path | None:
    """The one file of `names` that is in `folder`; None if there is none.

    Raises:
        ConversionError: there are several, and nothing shows which of them was saved last.
    """
    found = [folder / name for name in names if os.path.lexists(folder / name)]
    if len(found) > 1:
        raise ConversionError(
            f"{folder} holds {' and '.join(path.name for path in found)}, and they may differ",
            expected="one of them",
            next_step="move the others away, or pass the file of a whole model itself as the source",
        )
    return found[0] if found else None


def _weights_of(source: Path) -> Path:
    """The file that `source` means: itself, an adapter's `adapter_config.json`, or the model's weights."""
    if os.path.isfile(source):  # and not is_file(), which fails on names that are too long
        return source
    if not os.path.isdir(source):
        raise NotAPackageError(
            f"there is no file or folder {source}",
            expected="a checkpoint on this machine, or OWNER/NAME of a repository on the Hub",
            next_step="check the name",
        )
    if os.path.lexists(source / ADAPTER_CONFIG) and _only_one(source, MODEL_WEIGHTS[:2]) is None:
        return source / ADAPTER_CONFIG
    weights = _only_one(source, MODEL_WEIGHTS)
    if weights is None:
        names = sorted(path.name for path in source.iterdir())
        raise PackageError(
            f"{source} holds no weights under a name of transformers': {listed(names) or 'it is empty'}",
            expected=" or ".join(MODEL_WEIGHTS),
            next_step="where they are under another name, pass that file itself",
        )
    return weights


def _read_model(weights: Path, config: _Path | None = None, *, named: bool = False) -> _Checkpoint:
    """A whole model, from its weight file. `named`: the user named this file, rather than a folder with it."""
    home = weights.parent
    file = home / CONFIG if config is None else Path(config)
    file = file / CONFIG if os.path.isdir(file) else file
    if not os.path.isfile(file):
        raise PackageError(
            f"there is no {file}: weights alone do not say how many attention heads they are for",
            expected="the config.json of the GPT-2 that was trained",
            next_step="pass it: config=FILE, or the folder of the model that the training began with",
        )
    given = read_json(file.parent, file.name)
    fields = checked_config(given, where=str(file), also=FIELDS)
    unknown = unknown_fields(given, fields)
    notes = (f"fields of {CONFIG} that are not known here, and were left out: {listed([*unknown])}",) if unknown else ()
    limit = limits.foreign_bytes(count_numbers(fields), fields["n_layer"] * fields["n_positions"] ** 2)
    read = _Checkpoint(read_tensors(weights, limit=limit, follow=named), fields, [weights], [home], limit, notes=notes)
    return _with_head_file(read, home, HEAD_WEIGHTS[1:])


def _with_head_file(read: _Checkpoint, home: Path, names: Sequence[str]) -> _Checkpoint:
    """Add the value head that lies in a file of its own."""
    file = _only_one(home, names)
    if file is not None and file not in read.files:
        read.state |= {f"{file.name}:{key}": tensor for key, tensor in read_tensors(file, limit=read.limit).items()}
        read.files.append(file)
    return read


def _read_adapter(home: Path, base: _Path | None) -> _Checkpoint:
    """An adapter, merged into its base."""
    fields = read_json(home, ADAPTER_CONFIG)
    settings = lora_settings(str(home), fields)
    file = _only_one(home, ADAPTER_WEIGHTS)
    if file is None:
        raise PackageError(
            f"{home} has an {ADAPTER_CONFIG} and no adapter weights",
            expected=" or ".join(ADAPTER_WEIGHTS),
            next_step="save the adapter again with its library's save_pretrained",
        )
    under = _base_of(home, fields) if base is None else folder_of(base)
    base_file = _only_one(under, MODEL_WEIGHTS) if os.path.isdir(under) else None
    if base_file is None:
        raise PackageError(
            f"{under}, the adapter's base model, is no folder with weights",
            expected=" or ".join(MODEL_WEIGHTS),
            next_step="name the folder of the base model: base=",
        )
    read = _read_model(base_file)
    understood = translate(str(under), read.state, read.fields, init_value_head=None)
    adapter = read_tensors(file, limit=read.limit)
    state, has_head, notes = merge(understood, adapter, settings, where=str(file), of=str(under))
    if understood.dtype != torch.float32:
        notes += (f"the adapter is merged in {understood.dtype}, which rounds: a float32 base keeps more of it",)
    dropped = {f"{under.name}/{label}": why for label, why in understood.dropped.items()}
    merged = _Checkpoint(
        state, {}, [*read.files, file], [home, under], read.limit, True, dropped, (*read.notes, *notes)
    )
    _with_head_file(merged, home, HEAD_WEIGHTS)
    beside = any(HEAD.fullmatch(plain_name(label)) for label in merged.state if ":" in label)
    in_base = [label for label, name in understood.mapped.items() if name.startswith(HEAD_PREFIX)]
    if has_head or (in_base and not beside):
        merged.fields = {**understood.config.to_dict(), "model_type": MODEL_TYPE}
    else:
        merged.state = {name: tensor for name, tensor in merged.state.items() if not name.startswith(HEAD_PREFIX)}
        dropped |= {f"{under.name}/{label}": "the base's own value head: the adapter brings one" for label in in_base}
        merged.fields = {**read.fields, "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
    merged.fields["tie_word_embeddings"] = "lm_head.weight" not in state
    return merged


def _base_of(home: Path, fields: dict[str, Any]) -> Path:
    """The folder of the model that an adapter names."""
    name, revision = fields.get("base_model_name_or_path"), fields.get("revision")
    if not isinstance(name, str) or not name or "\0" in name or not isinstance(revision, (str, type(None))):
        raise PackageError(
            f"{home / ADAPTER_CONFIG} names the base model {str(name)[:80]!r} at the revision {str(revision)[:80]!r}",
            expected="a folder, or a repository on the Hub and its branch, tag or commit",
            next_step="name the base model's folder: base=",
        )
    return folder_of(name, revision if is_repository_id(name) else None)


def _tokenizer(given: _Tokenizer, homes: Sequence[Path], *, vocab_size: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was given, or for None the first one in `homes`; None if there is none, and for False."""
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    if given is False:
        return None
    folders = homes if given is None else [Path(given)]
    home = next((home for home in folders if any(os.path.lexists(home / name) for name in TOKENIZER)), None)
    if home is None and given is None:
        return None
    home = home or folders[0]
    vocabulary = limits.vocabulary_bytes(vocab_size)

    def limit_of(name: str) -> int | None:
        return package_file_limit(name, vocabulary=vocabulary, weights=0) if kind_of(name) == "tokenizer" else None

    try:
        with stage(home, limit_of=limit_of) as copy:
            # transformers takes the tokenizer's class from the config if the tokenizer's settings do not name it
            return load_tokenizer(make_loadable(copy, ()), str(home), config=GPT2Config())
    except LoadError as err:
        raise TokenizerMismatchError(
            f"the tokenizer in {home} cannot be loaded: {err.found}",
            expected="the files of a tokenizer of transformers' own",
            next_step="pass a tokenizer: tokenizer=, or move its files out of the folder",
        ) from err


def _generation_config(homes: Sequence[Path]) -> GenerationConfig | None:
    """The generation config in the first of `homes` that has one; None if there is none."""
    home = next((home for home in homes if os.path.lexists(home / GENERATION_CONFIG)), None)
    if home is None:
        return None
    file = str(home / GENERATION_CONFIG)
    fields = reduce(GENERATION_CONFIG, read_json(home, GENERATION_CONFIG), where=file)
    with as_ours(
        lambda gist: PackageError(
            f"{file} is not valid: {gist}",
            next_step="correct the field, or remove the file: the model works without it",
        )
    ):
        config = GenerationConfig.from_dict(fields)
        config.validate(strict=True)
    return config
