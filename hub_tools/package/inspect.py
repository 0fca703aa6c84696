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
from functools import partial
from pathlib import Path
from typing import Any

from .. import layout, limits
from ..errors import PackageError, visible
from ..files import AGAIN, file_in, read_json, sha256_in
from . import config as config_fields
from .record import Record, read_record, versions_of
from .stage import Stage, checked_package_config, local_folder, package_file_limit, repository_id
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
    code: tuple[CodeFile, ...]
    versions: dict[str, str]  # of the libraries that wrote the package, as its record names them
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
            report = _inspect(Path(outline), repo_id)
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
    names: Sequence[str] = (),
    sha256: Mapping[str, str] | None = None,
) -> PackageReport:
    """Report on a folder. For a stage, `names` are the names in its source, and `sha256` the hashes of its files."""
    names = names or sorted(os.listdir(folder))
    kinds = {name: layout.kind_of(name) for name in names}
    config = checked_package_config(read_json(folder, layout.CONFIG))
    limit_of = partial(
        package_file_limit,
        vocabulary=limits.vocabulary_bytes(config["vocab_size"]),
        weights=limits.weight_bytes(config_fields.count_numbers(config)),
    )
    most = {name: limit for name in names if (limit := limit_of(name)) is not None}
    for name, limit in most.items():
        if (size := file_in(folder, name).stat().st_size) > limit:
            raise PackageError(f"{name} has {size:,} bytes", expected=f"at most {limit:,}", next_step=AGAIN)
    if sha256 is None:
        sha256 = {name: sha256_in(folder, name) for name in most if hash_weights or kinds[name] != "weights"}
    shards = package_weights(folder, names)
    tensors = {name: tensor for shard in shards.values() for name, tensor in shard.items()}
    head = check_tensors(tensors, config)
    dtypes: dict[str, int] = {}
    for tensor in tensors.values():
        dtypes[FLOATS[tensor.dtype]] = dtypes.get(FLOATS[tensor.dtype], 0) + tensor.elements

    fields = {file: read_json(folder, file, limit=most[file]) for file in config_fields.REDUCED if file in names}
    for file, held in fields.items():
        config_fields.reduce(file, held)
    tokenizer = fields.get(layout.TOKENIZER_CONFIG)
    record = read_record(folder) if layout.RECORD in names else None
    parts = (*layout.REMOTE_CODE, layout.CARD, layout.RECORD, layout.GENERATION_CONFIG)
    used = {layout.WEIGHTS_INDEX, *shards}
    return PackageReport(
        source=source,
        folder=folder,
        commit=None,
        parameters=sum(dtypes.values()),
        dtypes=dtypes,
        weight_files={name: (folder / name).stat().st_size for name in shards},
        head=head,
        tied_embeddings=config_fields.tied(config),
        **{name: config[name] for name in config_fields.SIZES},
        tokenizer=None if tokenizer is None else str(tokenizer.get("tokenizer_class")),
        code=_read_code(folder, {name: sha256[name] for name in most if is_code(name)}),
        versions={} if record is None else record.versions,
        missing=tuple(name for name in parts if name not in names),
        changed=() if record is None else _changed(record, names, sha256),
        pickles=tuple(name for name in names if kinds[name] == "pickle"),
        foreign=tuple(
            name for name in names if kinds[name] == "foreign" or (kinds[name] == "weights" and name not in used)
        ),
        unknown_fields={
            file: unknown for file, held in fields.items() if (unknown := config_fields.unknown_fields(file, held))
        },
    )


def is_code(name: str) -> bool:
    """Whether loading a package with a file of this name may run it."""
    return name.endswith(layout.CODE_SUFFIXES) and name != layout.HANDLER


def _read_code(folder: Path, sha256: Mapping[str, str]) -> tuple[CodeFile, ...]:
    """Say of each file of code which versions have it, and refuse code that a person cannot review."""
    installed = layout.installed_hashes()
    for name in sha256:
        if name.endswith(".py") and (reasons := disguises((folder / name).read_bytes())):
            raise PackageError(
                f"{name!r} cannot be reviewed, since it looks otherwise than it runs: {reasons[0]}",
                expected="code in UTF-8 with printable characters alone",
                next_step="do not use this package",
            )
    return tuple(
        CodeFile(name, digest, installed.get(name) == digest, versions_of(name, digest))
        for name, digest in sha256.items()
    )


def disguises(code: bytes) -> list[str]:
    """Return why what an editor or a terminal shows of this code is not what Python runs; nothing for honest code.

    Python reads a file in the encoding that its first lines name (PEP 263), where every viewer shows UTF-8; a terminal
    obeys control characters, and characters that are not printable can reorder or hide what stands beside them.
    """
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(code).readline)
        lines = code.decode("utf-8").replace("\r\n", "\n").replace("\t", " ").split("\n")
    except (SyntaxError, ValueError):
        return ["it is not UTF-8, or declares an encoding that is none"]
    found = []
    if encoding != "utf-8":
        found.append(f"it declares an encoding, {encoding}, by which Python reads other lines than these")
    if odd := [f"{number}: {visible(line)[:200]}" for number, line in enumerate(lines, 1) if not line.isprintable()]:
        found.append(f"characters that are not what they look like, in {len(odd)} lines, the first {odd[0]}")
    return found


def _changed(record: Record, names: Sequence[str], sha256: Mapping[str, str]) -> tuple[str, ...]:
    """Return the files that differ from the record: changed, missing, or added since. Some may have no known hash."""
    here = {name for name in names if layout.written_by_save(name)} - {layout.CARD, layout.RECORD}
    changed = {name for name, saved in record.sha256.items() if sha256.get(name, saved) != saved}
    return tuple(sorted(changed | ((set(record.sha256) ^ here) - {layout.HANDLER})))  # 0.2.0 recorded its own
