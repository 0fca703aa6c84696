"""Other people's GPT-2 checkpoints, and packages of older versions, as packages of this model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
from ..layout import CONFIG, GENERATION_CONFIG, HEAD_PREFIX, MODEL_TYPE, TOKENIZER, WEIGHTS, WEIGHTS_INDEX
from ..package.config import checked_config, count_numbers
from ..package.replace import check_target
from ..package.save import SavedPackage, save_package
from ..package.stage import make_loadable, package_file_limit, stage
from ..package.tokenizer import load_tokenizer
from .adapters import lora_settings, merge
from .heads import FIELDS, HEAD, SourceFormat, Translation, listed, model_of, plain_name, translate
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

    package: SavedPackage  # what was written
    source_format: SourceFormat
    files: tuple[Path, ...]  # the weight files that were read: of an adapter, its base's first
    mapped: dict[str, str]  # tensor of the source (for an adapter: of the merged model) -> tensor of the package
    dropped: dict[str, str]  # the source's tensor -> why it is not in the package
    notes: tuple[str, ...]  # what the source did not specify, and what was chosen


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
    notes: tuple[str, ...]
    dropped: dict[str, str]

    def add_head(self, home: Path, names: Sequence[str]) -> None:
        """Read the value head that lies in a file of its own, where there is one."""
        if _first_with(names, [home]) and (file := _one_of(home, names)) not in self.files:
            self.state |= {f"{file.name}:{key}": tensor for key, tensor in read_tensors(file, limit=self.limit).items()}
            self.files.append(file)


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
        source_format: the library that wrote the head, where the files hold several, or do not show it: a head
            `summary` is read as TRL's unless the config names the seed's class.
        base: an adapter's base model, a folder or a repository; by default what `adapter_config.json` names.
        tokenizer: a tokenizer, or the folder of one; None for the source's, where it has one; False for none.
        summary_first_dropout: probability of the dropout before the head, in training mode; by default the
            source's. TRL does not record it: there the default is TRL's own, 0.1.
        init_value_head: start with a new head, whose values are all 0, in the place of any other. None for a new one
            only where there is none.
        dtype: of the body; by default the source's, or the widest of its dtypes.
        overwrite, base_model, license: as for `save_package`.

    Returns:
        The record of what was found, mapped and dropped.

    Raises:
        PackageError: no weights or no `config.json`; a damaged file, a setting that cannot be right, an unsafe pickle
            or a link out of the folder; unknown or missing tensors, or other shapes than the configuration calls for.
        ConversionError: weights of another type; the adapter is not a LoRA; a head of several layers or outputs,
            without `init_value_head`; several heads.
        MissingHeadError: no head, without `init_value_head`.
        MissingLibraryError: an adapter, and PEFT is not installed.
        UnsavableModelError: NaN or infinity among the weights.
        TokenizerMismatchError: the source's tokenizer cannot be loaded.
        OptionsError: an argument that this source has no use for.
        And what `save_package` raises.
    """
    check_target(folder, overwrite=overwrite)  # checked now, before the work that can take minutes
    read = _read(source, revision, config, base)
    found = translate(
        os.fspath(source),
        read.state,
        read.fields,
        source_format=source_format,
        summary_first_dropout=summary_first_dropout,
        init_value_head=init_value_head,
        dtype=dtype,
    )
    loaded = _build(read, found, tokenizer)
    package = save_package(
        loaded.model, folder, loaded.tokenizer, overwrite=overwrite, base_model=base_model, license=license
    )
    return Conversion(
        package=package,
        source_format=found.source_format,
        files=tuple(read.files),
        mapped=found.mapped,
        dropped={**read.dropped, **found.dropped},
        notes=(*read.notes, *found.notes),
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
    weights = _weights_of(_folder_of(source, revision))
    is_adapter = weights.name == ADAPTER_CONFIG
    if (config if is_adapter else base) is not None:
        raise OptionsError(
            f"{'config' if is_adapter else 'base'}= for {weights}",
            expected="base= for an adapter, config= for a whole model",
            next_step="leave it out",
        )
    return _read_adapter(weights.parent, base) if is_adapter else _read_model(weights, config)


def _build(read: _Checkpoint, found: Translation, tokenizer: _Tokenizer) -> LoadedCheckpoint:
    """The model, with the generation config and the tokenizer that lie beside its weights."""
    model = model_of(str(read.files[0]), found.fields, found.state)
    home = _first_with([GENERATION_CONFIG], read.homes)
    if home is not None:
        with (
            as_ours(lambda gist: PackageError(f"{home / GENERATION_CONFIG}: {gist}", next_step="correct or remove it")),
            stage(home, limit_of={GENERATION_CONFIG: limits.CONFIG_BYTES}.get) as copy,
        ):
            model.generation_config = GenerationConfig.from_pretrained(make_loadable(copy, ()), local_files_only=True)
    return LoadedCheckpoint(model, _tokenizer(tokenizer, read.homes, vocab_size=model.config.vocab_size))


def _folder_of(source: _Path, revision: str | None = None) -> Path:
    """A source on this disk: the path itself, or the folder into which a repository of the Hub was downloaded."""
    name = os.fspath(source)
    if not os.path.exists(name):
        if is_repository_id(name):
            return fetch(name, revision=revision, checkpoint=True)
        raise NotAPackageError(
            f"there is no file or folder {name}",
            expected="a checkpoint on this machine, or OWNER/NAME of a repository on the Hub",
            next_step="check the name; name an adapter's base, where that has moved: base=",
        )
    if revision is not None:
        raise OptionsError(f"revision={revision!r} for a folder, which has no revisions", next_step="leave it out")
    return Path(source)


def _first_with(names: Iterable[str], homes: Sequence[Path]) -> Path | None:
    """The first folder that has one of these files."""
    return next((home for home in homes if any(os.path.lexists(home / name) for name in names)), None)


def _one_of(folder: Path, names: Sequence[str]) -> Path:
    """The one file of `names` that is in `folder`.

    Raises:
        PackageError: there is none.
        ConversionError: there are several, and nothing shows which of them was saved last.
    """
    found = [folder / name for name in names if os.path.lexists(folder / name)]
    if not found:
        raise PackageError(
            f"{folder} holds no weights under a name of their library's: it has "
            f"{listed(sorted(os.listdir(folder))) or 'no files'}",
            expected=" or ".join(names),
            next_step="where a whole model's are under another name, pass that file itself",
        )
    if len(found) > 1:
        raise ConversionError(
            f"{folder} holds {' and '.join(path.name for path in found)}, and they may differ",
            expected="one of them",
            next_step="move the others away, or pass the file of a whole model itself as the source",
        )
    return found[0]


def _weights_of(source: Path) -> Path:
    """The file that `source` means: itself, an adapter's `adapter_config.json`, or the model's weights."""
    if os.path.isfile(source):
        return source
    if os.path.lexists(source / ADAPTER_CONFIG) and _first_with(MODEL_WEIGHTS[:2], [source]) is None:
        return source / ADAPTER_CONFIG
    return _one_of(source, MODEL_WEIGHTS)


def _read_model(weights: Path, config: _Path | None = None) -> _Checkpoint:
    """A whole model, from its weight file."""
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
    left_out = sorted(repr(name[:80]) for name in set(given) - set(fields))
    notes = (f"fields of {CONFIG} that were left out: {listed(left_out)}",) if left_out else ()
    limit = limits.foreign_bytes(count_numbers(fields), fields["n_layer"] * fields["n_positions"] ** 2)
    read = _Checkpoint(read_tensors(weights, limit=limit), fields, [weights], [home], limit, notes, {})
    if 12 * fields["n_layer"] > len(read.state):  # a bound for the time that it takes to make the model
        raise PackageError(
            f"{file} says n_layer {fields['n_layer']:,}; {weights} holds {len(read.state):,} tensors",
            expected="12 tensors or more for each layer",
            next_step="pass the config.json that belongs to these weights: config=",
        )
    read.add_head(home, HEAD_WEIGHTS[1:])
    return read


def _read_adapter(home: Path, base: _Path | None) -> _Checkpoint:
    """An adapter, merged into its base."""
    fields = read_json(home, ADAPTER_CONFIG)
    settings = lora_settings(f"{home / ADAPTER_CONFIG}", fields)
    file = _one_of(home, ADAPTER_WEIGHTS)
    name, revision = (fields.get("base_model_name_or_path"), fields.get("revision")) if base is None else (base, None)
    if not isinstance(name, (str, os.PathLike)) or not isinstance(revision, (str, type(None))):
        raise PackageError(
            f"{home / ADAPTER_CONFIG} names the base model {str(name)[:80]!r} at the revision {str(revision)[:80]!r}",
            expected="a folder, or a repository on the Hub and its branch, tag or commit",
            next_step="name the base model's folder: base=",
        )
    under = _folder_of(name, None if os.path.exists(name) else revision)
    # An adapter that lies in the base is not merged, and an adapter is no base.
    base_file = under if os.path.isfile(under) else _one_of(under, MODEL_WEIGHTS)
    read = _read_model(base_file)
    understood = translate(str(under), read.state, read.fields, init_value_head=None)
    tensors = read_tensors(file, limit=read.limit)
    read.state = merge(understood, tensors, settings, where=str(file), of=str(under))
    read.files.append(file)
    read.homes.insert(0, home)
    read.dropped = {f"{under.name}/{label}": why for label, why in understood.dropped.items()}
    read.add_head(home, HEAD_WEIGHTS)
    if any(HEAD.fullmatch(plain_name(label)) for label in read.state if ":" in label):
        read.state = {name: tensor for name, tensor in read.state.items() if not name.startswith(HEAD_PREFIX)}
        replaced = [label for label, name in understood.mapped.items() if name.startswith(HEAD_PREFIX)]
        why = "the base's own value head: the adapter brings one"
        read.dropped |= {f"{under.name}/{label}": why for label in replaced}
        read.fields = {**read.fields, "model_type": "gpt2", "architectures": None}
    else:
        read.fields = {**understood.fields, "model_type": MODEL_TYPE}
    read.fields["tie_word_embeddings"] = "lm_head.weight" not in read.state
    return read


def _tokenizer(given: _Tokenizer, homes: Sequence[Path], *, vocab_size: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer that was given, or for None the first one in `homes`; None if there is none, and for False."""
    if given is False or isinstance(given, PreTrainedTokenizerBase):
        return None if given is False else given
    home = _first_with(TOKENIZER, homes) if given is None else Path(given)
    if home is None:
        return None
    vocabulary = limits.vocabulary_bytes(vocab_size)
    most = {name: package_file_limit(name, vocabulary=vocabulary, weights=0) for name in TOKENIZER}
    try:
        with stage(home, limit_of=most.get) as copy:
            # transformers takes the tokenizer's class from the config if the tokenizer's settings do not name it
            return load_tokenizer(make_loadable(copy, ()), str(home), config=GPT2Config())
    except LoadError as err:
        raise TokenizerMismatchError(
            f"the tokenizer in {home} cannot be loaded: {err.found}",
            expected="the files of a tokenizer of transformers' own",
            next_step="pass a tokenizer: tokenizer=, or move its files out of the folder",
        ) from err
