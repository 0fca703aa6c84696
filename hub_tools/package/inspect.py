"""Read a package without running any of it: JSON and safetensors headers; pickles are never opened.

Needs neither torch nor transformers. The idea to look before loading is from skops:
https://skops.readthedocs.io/en/stable/persistence.html.
"""

from __future__ import annotations

import io
import os
import tempfile
import tokenize
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .. import layout, limits
from ..errors import PackageError, visible
from ..files import AGAIN, file_in, read_json, sha256_in
from . import config as config_fields
from .config import tied
from .record import Record, read_record, releases, versions_of
from .stage import Stage, checked_package_config, local_folder, repository_id
from .weights import FLOATS, Head, check_tensors, package_weights


@dataclass(frozen=True)
class CodeFile:
    """A file that loading the package with `trust_remote_code=True` may run."""

    name: str
    sha256: str
    installed: bool  # byte-identical to this installed version's file of the same name
    releases: tuple[str, ...]  # the versions that have it, byte for byte: releases, and the installed one


@dataclass(frozen=True)
class PackageReport:
    """What is inside a package. Nothing of it was run."""

    source: str
    folder: Path  # for a repository on the Hub: where its files are in the Hub's cache
    commit: str | None  # of a repository on the Hub
    parameters: int  # tied embeddings count once
    dtypes: dict[str, int]  # torch's name for the type -> parameters of that type
    weight_files: dict[str, int]  # name -> bytes
    head: Head | None
    tied_embeddings: bool
    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    tokenizer: str | None  # its class
    has_generation_config: bool
    code: tuple[CodeFile, ...]
    auto_map: dict[str, str]
    versions: dict[str, str]  # of the libraries that wrote the package, if it names them
    record: bool  # whether `verify_package` has numbers to compare with
    missing: tuple[str, ...]  # files of a complete package that this one lacks
    changed: tuple[str, ...]  # files that were changed, removed or added since the save
    pickles: tuple[str, ...]
    foreign: tuple[str, ...]  # other files that do not belong to a package
    unknown_fields: dict[str, tuple[str, ...]]  # file -> fields that are not known here, and are hidden from libraries

    @property
    def code_sha256(self) -> dict[str, str]:
        """The Python files and their SHA-256. Once you have read them, pass it to `load_package(reviewed_sha256=)`."""
        return {file.name: file.sha256 for file in self.code if file.name.endswith(".py")}

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**asdict(self), "folder": str(self.folder)}


def inspect_package(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    hash_weights: bool = False,
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> PackageReport:
    """Report what is inside a package, without running any of it.

    Every tensor's name, shape and dtype is compared with what `config.json` calls for, so a report means that the
    weights are complete. A package that cannot be read, or that contradicts itself, is refused. What is unusual but
    harmless to *read* (another version's code, pickles, foreign files, no head) is only reported; `verify_package`
    refuses it.

    Args:
        source: a package's folder, or the id of a repository on the Hub (`owner/name`). From a repository, the JSON and
            code files are downloaded, and only the headers of the weights.
        revision: branch, tag or commit of the repository.
        hash_weights: also hash the weights (about a second per GB), and compare with the hashes of the record. The
            weights of a repository are then downloaded.
        token: for the Hub, instead of the one that huggingface_hub knows.
        cache_dir: the Hub's cache, instead of huggingface_hub's.
        local_files_only: use only the Hub's cache, without the network. Offline mode does the same.

    Raises:
        OptionsError: an option for the Hub, but the source is a folder.
        RemoteNotFoundError, AuthenticationError, HubUnavailableError: the download failed.
        NotAPackageError: no such folder, or `config.json` describes another kind of model.
        PackageError: a file without which there is no model.
        PackageError: truncated, oversized, invalid JSON, or values that cannot be right.
        PackageError: links out of the package, devices, pipes.
        PackageError: the only weights are a pickle.
        PackageError: tensors that are missing, unknown, or of the wrong shape or dtype.
        PackageError: `auto_map` does not name the package's own classes.
    """
    options: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    options["local_files_only"] = local_files_only
    repo_id = repository_id(source, **options)
    if repo_id is None:
        return _inspect(local_folder(source), os.fspath(source), hash_weights=hash_weights)
    from ..hub import ask, download

    options["cache_dir"] = None if cache_dir is None else Path(cache_dir)
    if hash_weights or local_files_only or ask.offline():
        snapshot = download.fetch(repo_id, **options)
        report = _inspect(snapshot.folder, repo_id, hash_weights=hash_weights)
    else:
        del options["local_files_only"]
        with tempfile.TemporaryDirectory(prefix="gpt2-value-inspect-") as outline:
            snapshot = download.fetch_outline(repo_id, Path(outline), **options)
            report = _inspect(Path(outline), repo_id, hash_weights=False)
    return replace(report, folder=snapshot.folder, commit=snapshot.commit)


def inspect_stage(copy: Stage, source: str) -> PackageReport:
    """Report on a private copy of a package (see `stage_package`), for which the hashes of all files are known."""
    report = _inspect(copy.folder, source, names=copy.names, sha256=copy.sha256)
    return replace(report, folder=copy.source, commit=copy.commit)


def _inspect(
    folder: Path,
    source: str,
    *,
    hash_weights: bool = False,
    names: Sequence[str] | None = None,
    sha256: Mapping[str, str] | None = None,
) -> PackageReport:
    """Report on a folder. For a stage, `names` are the names in its source, and `sha256` the hashes of its files."""
    names = sorted(os.listdir(folder)) if names is None else names
    pickles = tuple(name for name in names if layout.kind_of(name) == "pickle")

    config = read_json(folder, layout.CONFIG)
    checked_package_config(config)
    has_generation_config = layout.GENERATION_CONFIG in names
    generation_config = read_json(folder, layout.GENERATION_CONFIG) if has_generation_config else {}
    config_fields.reduce(layout.GENERATION_CONFIG, generation_config)
    tokenizer, tokenizer_config = _read_tokenizer(folder, names, limits.vocabulary_bytes(config["vocab_size"]))

    _, shards = package_weights(folder, names)
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    head = check_tensors(tensors, config)
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        dtypes[FLOATS[tensor.dtype]] = dtypes.get(FLOATS[tensor.dtype], 0) + tensor.elements

    code = _read_code(folder, names)
    record = read_record(folder) if layout.RECORD in names else None
    used = {layout.WEIGHTS_INDEX, *shards}
    return PackageReport(
        source=source,
        folder=folder,
        commit=None,
        parameters=sum(dtypes.values()),
        dtypes=dtypes,
        weight_files={name: (folder / name).stat().st_size for name in shards},
        head=head,
        tied_embeddings=tied(config),
        vocab_size=config["vocab_size"],
        n_positions=config["n_positions"],
        n_embd=config["n_embd"],
        n_layer=config["n_layer"],
        n_head=config["n_head"],
        tokenizer=tokenizer,
        has_generation_config=has_generation_config,
        code=code,
        auto_map=config["auto_map"],
        versions=_versions(config, record),
        record=record is not None,
        missing=tuple(
            name
            for name in (*layout.REMOTE_CODE, layout.CARD, layout.RECORD, layout.GENERATION_CONFIG)
            if name not in names
        ),
        changed=_changed(folder, names, record, hash_weights=hash_weights, sha256=sha256),
        pickles=pickles,
        foreign=tuple(
            name
            for name in names
            if layout.kind_of(name) == "foreign" or (layout.kind_of(name) == "weights" and name not in used)
        ),
        unknown_fields={
            file: unknown
            for file, fields in (
                (layout.CONFIG, config),
                (layout.GENERATION_CONFIG, generation_config),
                (layout.TOKENIZER_CONFIG, tokenizer_config),
            )
            if (unknown := config_fields.unknown_fields(file, fields))
        },
    )


def _read_tokenizer(folder: Path, names: Sequence[str], vocabulary: int) -> tuple[str | None, dict[str, Any]]:
    """Return the tokenizer's class, if the package has a tokenizer, and its settings.

    Refuses tokenizers that bring code, or that are read from other places. Vocabularies can be large, so they are not
    read; only their size is compared with `vocabulary`, the most bytes.
    """
    files = [name for name in names if layout.kind_of(name) == "tokenizer"]
    for name in files:
        if name in (layout.SPECIAL_TOKENS_MAP, layout.ADDED_TOKENS):
            config_fields.reduce(name, read_json(folder, name, limit=limits.TOKENIZER_SETTINGS_BYTES))
        elif name == layout.TOKENIZER_CONFIG:
            continue
        else:
            size = file_in(folder, name).stat().st_size
            limit = limits.TOKENIZER_SETTINGS_BYTES if name in layout.TOKENIZER_SETTINGS else vocabulary
            if size > limit:
                raise PackageError(f"{name} has {size:,} bytes", expected=f"at most {limit:,}", next_step=AGAIN)
    if layout.TOKENIZER_CONFIG not in files:
        return None, {}
    settings = read_json(folder, layout.TOKENIZER_CONFIG, limit=limits.TOKENIZER_SETTINGS_BYTES)
    if "auto_map" in settings:
        raise PackageError(
            f"{layout.TOKENIZER_CONFIG} has auto_map {str(settings['auto_map'])[:300]}",
            expected="a tokenizer of transformers' own, which brings no code",
            next_step="save the package again with such a tokenizer",
        )
    # the class is only shown here, so any name is allowed; loading is strict about it
    config_fields.reduce(layout.TOKENIZER_CONFIG, {k: v for k, v in settings.items() if k != "tokenizer_class"})
    return str(settings.get("tokenizer_class"))[:80], settings


def _read_code(folder: Path, names: Sequence[str]) -> tuple[CodeFile, ...]:
    """Hash every file of code in the package, and refuse code that looks otherwise than it runs."""
    installed, known = layout.installed_hashes(), releases()
    files = []
    for name in names:
        if name.endswith(layout.CODE_SUFFIXES) and name != layout.HANDLER:
            size = file_in(folder, name).stat().st_size
            if size > limits.CODE_BYTES:
                raise PackageError(
                    f"{name!r} has {size:,} bytes", expected=f"at most {limits.CODE_BYTES:,}", next_step=AGAIN
                )
            digest = sha256_in(folder, name)
            if name.endswith(".py"):
                _refuse_disguises(name, (folder / name).read_bytes())
            files.append(CodeFile(name, digest, installed.get(name) == digest, versions_of(name, digest, known)))
    return tuple(files)


def _refuse_disguises(name: str, code: bytes) -> None:
    """Refuse code that a person cannot review, because what an editor or a terminal shows is not what Python runs.

    Python reads a file in the encoding that its first lines name (PEP 263), where every viewer shows UTF-8; a terminal
    obeys control characters, and characters that are not printable can reorder or hide what stands beside them.

    Raises:
        PackageError.
    """
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(code).readline)
        text = code.decode("utf-8")
    except (SyntaxError, ValueError):
        encoding, text = "unknown", ""
    lines = text.replace("\r\n", "\n").replace("\t", " ").split("\n")
    odd = next((number for number, line in enumerate(lines, 1) if not line.isprintable()), None)
    if encoding != "utf-8" or odd is not None:
        what = f"its line {odd}: {visible(lines[odd - 1])[:200]}" if odd is not None else f"its encoding, {encoding!r}"
        raise PackageError(
            f"{name!r} cannot be reviewed, since it looks otherwise than it runs, because of {what}",
            expected="code in UTF-8 with printable characters alone",
            next_step="do not use this package",
        )


def _versions(config: Mapping[str, Any], record: Record | None) -> dict[str, str]:
    """Return the versions of the libraries that wrote the package."""
    if record is not None:
        return record.versions
    version = config.get("transformers_version")
    return {} if version is None else {"transformers": str(version)[:40]}


def _changed(
    folder: Path,
    names: Sequence[str],
    record: Record | None,
    *,
    hash_weights: bool,
    sha256: Mapping[str, str] | None,
) -> tuple[str, ...]:
    """Return the files that differ from the record: changed, missing, or added since."""
    if record is None:
        return ()
    here = {name for name in names if layout.written_by_save(name)} - {layout.CARD, layout.RECORD}
    changed = (set(record.sha256) ^ here) - {layout.HANDLER}  # version 0.2.0 recorded its own
    for name in here & set(record.sha256):
        if sha256 is not None:
            found = sha256[name]
        elif hash_weights or layout.kind_of(name) != "weights":
            found = sha256_in(folder, name)
        else:
            continue
        if found != record.sha256[name]:
            changed.add(name)
    return tuple(sorted(changed))
