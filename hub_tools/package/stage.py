"""Make a private copy of the files that are needed from somebody else's folder.

Imports the standard library and of hub_tools `config_json`, `errors`, `files`, `layout` and `limits`.

A folder can change between the check and the load. Also, a library reads more of a folder than it is asked for:
adapters, templates, links. So the wanted files of an untrusted folder are copied first, each within its limit, and
everything after that works on the copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from .. import layout, limits
from ..errors import (
    GPT2ValueHubError,
    NotAPackageError,
    OptionsError,
    PackageChangedError,
    PackageError,
    ResourceLimitError,
)
from ..files import AGAIN, open_in, read_json
from . import config as config_fields
from .config import checked_config, count_numbers


@dataclass(frozen=True)
class HubOptions:
    """Options for downloading a repository, named as in `download.fetch`. None of them applies to a folder."""

    revision: str | None = None  # branch, tag or commit
    token: str | None = None  # instead of the one that huggingface_hub knows
    cache_dir: Path | None = None  # instead of huggingface_hub's
    local_files_only: bool = False  # use only the cache, without the network


def repository_id(source: str | os.PathLike[str], options: HubOptions) -> str | None:
    """Return `source` if it has the form `owner/name` and is no local path; None for a folder.

    huggingface_hub checks the id further when it asks the Hub.

    Raises:
        OptionsError: one of the `options` is set, but `source` is a folder.
    """
    if isinstance(source, str) and not os.path.exists(source):
        parts = source.split("/")
        if len(parts) == 2 and not {"", ".", "..", "~"}.intersection(parts):
            return source
    for option in fields(options):
        value = getattr(options, option.name)
        if value:
            raise OptionsError(
                f"{option.name}={'...' if option.name == 'token' else value} for {os.fspath(source)!r}",
                expected="owner/name of a repository on the Hub: a folder has no use for it",
                next_step=f"leave {option.name} out",
            )
    return None


def local_folder(source: str | os.PathLike[str]) -> Path:
    """Return the folder that `source` names.

    Raises:
        NotAPackageError: there is none.
    """
    folder = Path(source)
    if os.path.isdir(folder):  # and not is_dir(), which fails on names that are too long
        return folder
    neighbour = _interrupted_save(folder)
    if neighbour is not None:
        raise NotAPackageError(
            f"{folder} is missing: a save was interrupted; the package that was there is in {neighbour}",
            next_step="save again, which puts it back first, or: "
            + shlex.join(["mv", str(neighbour / "previous"), str(folder)]),
        )
    raise NotAPackageError(
        f"{os.fspath(source)!r} is not a folder",
        expected="the folder of a value-head package",
        next_step="write one: gpt2-value create --base openai-community/gpt2 FOLDER",
    )


def _interrupted_save(folder: Path) -> Path | None:
    """Return the staging folder in which an interrupted save left the package that was at `folder`, if there is one."""
    try:
        real = Path(os.path.realpath(folder))
        pattern = layout.staging_name(real)
        found = sorted(beside for beside in real.parent.iterdir() if pattern.fullmatch(beside.name))
    except (OSError, ValueError):  # nothing can lie at such a place
        return None
    return next((beside for beside in found if (beside / "previous").is_dir()), None)


_PIECE = limits.MIB
# Device, inode, size, mtime and ctime of a file: they change if the file is written to or replaced.
Identity = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class Stage:
    """A private folder with copies of some of the files of `source`."""

    folder: Path  # nobody else can write to it; it has only regular files, no links and no folders
    source: Path
    names: tuple[str, ...]  # everything that lies in the source, copied or not, sorted
    sha256: Mapping[str, str]  # of each file that was copied, as it was copied


@contextmanager
def stage(
    source: str | os.PathLike[str], *, limit_of: Callable[[str], int | None], total: int = limits.WEIGHT_BYTES_AT_MOST
) -> Iterator[Stage]:
    """Copy the wanted files of `source`, and yield the copy; it is removed afterwards.

    Each file is opened once, and checked, hashed and copied through that one handle. A link is followed only if it
    leads to a file of the same folder or, in the Hub's cache, to its blob (see `files.file_in`). Files in subfolders
    are never copied. Later changes to `source` do not affect the copy.

    Args:
        source: a folder.
        limit_of: maps a file's name to the most bytes that it may have, or to None if it is not wanted.
        total: the most bytes that all of the files may have together.

    Raises:
        NotAPackageError: there is no such folder.
        PackageError: a wanted file is a link out of the folder, a device, a pipe or a folder, or cannot be read.
        PackageError: a file, or all together, or the list of files, is larger than its limit.
        PackageChangedError: the folder was written to while it was being copied.
        ResourceLimitError: the temporary folder has no room for the copy.
        ResourceLimitError: a file is delivered more slowly than a slow disk does.
    """
    folder = Path(source)
    with tempfile.TemporaryDirectory(prefix="gpt2-value-", ignore_cleanup_errors=True) as home:
        copy = Path(home, "files")
        copy.mkdir(mode=0o700)
        names = _names(folder)
        sha256: dict[str, str] = {}
        before: dict[str, Identity] = {}
        left = total
        for name in names:
            limit = limit_of(name)
            if limit is None:
                continue
            with _copying(name), open(copy / name, "xb") as copied:
                sha256[name], before[name] = copy_out(folder, name, copied, limit=min(limit, left))
            left -= before[name][2]
        refuse_changes(folder, before)
        yield Stage(copy, folder, names, sha256)


def stage_package(source: str | os.PathLike[str]) -> AbstractContextManager[Stage]:
    """`stage` for a package: copies config, weights, code, tokenizer and record.

    The sizes in `config.json` decide how large the files may be.

    Raises:
        What `stage` raises, and what `check_config` raises for `config.json`.
    """
    config = checked_package_config(read_json(Path(source), layout.CONFIG))
    vocabulary, weights = limits.vocabulary_bytes(config["vocab_size"]), limits.weight_bytes(count_numbers(config))

    def limit_of(name: str) -> int | None:
        return package_file_limit(name, vocabulary=vocabulary, weights=weights)

    return stage(source, limit_of=limit_of, total=weights + limits.BESIDE_BYTES)


def checked_package_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what libraries may see of a package's `config.json`, after checking it.

    Raises:
        NotAPackageError: it is another kind of model's.
        PackageError: what `config.checked_config` raises; or `auto_map` does not name the package's own classes.
    """
    if fields.get("model_type") != layout.MODEL_TYPE:
        raise NotAPackageError(
            f"config.json says model_type {str(fields.get('model_type'))[:80]!r}",
            expected=repr(layout.MODEL_TYPE),
            next_step="make a package of a GPT-2 checkpoint: gpt2-value create --base FOLDER OUT",
        )
    if fields.get("auto_map") != layout.AUTO_MAP:
        raise PackageError(
            f"config.json has auto_map {str(fields.get('auto_map'))[:300]}",
            expected=f"{layout.AUTO_MAP}: the classes in the package itself",
            next_step="GPT2ValueModel.from_pretrained(FOLDER) loads it and runs none of its code; save that",
        )
    return checked_config(fields)


def package_file_limit(name: str, *, vocabulary: int, weights: int) -> int | None:
    """The most bytes that a package's file of this name may have; None for a file that no loader needs.

    Args:
        vocabulary: the limit for each of the tokenizer's large files, see `limits.vocabulary_bytes`.
        weights: the limit for all weights together, see `limits.weight_bytes`.
    """
    kind = layout.kind_of(name)
    if name.endswith(layout.CODE_SUFFIXES):
        return limits.CODE_BYTES
    if kind == "config":
        return limits.CONFIG_BYTES
    if kind == "record":
        return limits.RECORD_BYTES
    if name == layout.WEIGHTS_INDEX:
        return limits.INDEX_BYTES
    if kind == "weights":
        return weights
    if name in layout.TOKENIZER_SETTINGS:
        return limits.TOKENIZER_SETTINGS_BYTES
    return vocabulary if kind == "tokenizer" else None


def make_loadable(copy: Stage, code: Iterable[str]) -> Path:
    """Turn the inspected copy of a package into a folder that a library may load, and return that folder.

    The JSON files are reduced to the fields that a library may see (`allowed_fields`). Code that is not in `code` is
    removed. The folder is renamed, so `copy.folder` is gone afterwards.

    Raises:
        What `config_fields.reduce` raises.
    """
    wanted = set(code)
    for path in sorted(copy.folder.iterdir()):
        if path.name.endswith(layout.CODE_SUFFIXES):
            if path.name not in wanted:
                path.unlink()
        elif path.name in config_fields.REDUCED:
            fields = read_json(copy.folder, path.name, limit=limits.INDEX_BYTES)
            path.write_text(json.dumps(config_fields.reduce(path.name, fields)), encoding="utf-8")
    # transformers caches the code that it runs under the folder's name, so equal code gets an equal name
    digest = hashlib.sha256(repr([(name, copy.sha256[name]) for name in sorted(wanted)]).encode()).hexdigest()
    return copy.folder.rename(copy.folder.with_name(f"gpt2_value_{digest[:16]}"))


def _names(folder: Path) -> tuple[str, ...]:
    """The names in a folder, sorted."""
    found: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                found.append(entry.name)
                if len(found) > limits.NAMES_IN_A_FOLDER:
                    raise PackageError(
                        f"{folder} has more than {limits.NAMES_IN_A_FOLDER:,} files",
                        expected="a folder with one model",
                        next_step="move the model's files to a folder of their own",
                    )
    except OSError as error:
        raise NotAPackageError(
            f"{os.fspath(folder)!r} cannot be read: {error.strerror}",
            expected="a folder with a model",
            next_step="check the name, and the permissions of the folder",
        ) from error
    return tuple(sorted(found))


@contextmanager
def private_file(path: Path, *, limit: int) -> Iterator[tuple[BinaryIO, Identity]]:
    """Yield a private copy of one file, open for reading, and the identity of the file that was copied.

    The copy has no name, so nobody else can shorten or change it. Rules and errors are those of `stage`.
    """
    with ExitStack() as stack:
        with _copying(path.name):
            copied = stack.enter_context(tempfile.TemporaryFile(prefix="gpt2-value-"))
            _, identity = copy_out(path.parent, path.name, copied, limit=limit)
            copied.flush()
            copied.seek(0)
        yield copied, identity


def copy_out(folder: Path, name: str, copied: BinaryIO, *, limit: int) -> tuple[str, Identity]:
    """Copy one file of a folder into an open one of ours.

    Returns:
        The SHA-256 of what was copied, and the identity of the file that it was copied from.

    Raises:
        What `stage` raises for a file.
    """
    digest, here = hashlib.sha256(), tempfile.gettempdir()
    with open_in(folder, name) as opened:
        status = os.fstat(opened.fileno())
        if status.st_size > limit:
            raise PackageError(f"{name} has {status.st_size:,} bytes", expected=f"at most {limit:,}", next_step=AGAIN)
        free = shutil.disk_usage(here).free
        if status.st_size > free:
            raise _no_room(f"{name} has {status.st_size:,} bytes, and {here} has room for {free:,}")
        left, ends = status.st_size, time.monotonic() + limits.copy_seconds(status.st_size)
        while left and (piece := opened.read(min(left, _PIECE))):
            digest.update(piece)
            copied.write(piece)
            left -= len(piece)
            if left and time.monotonic() > ends:
                raise _too_slow(name, done=status.st_size - left, size=status.st_size)
    return digest.hexdigest(), _identity(status)


@contextmanager
def _copying(name: str) -> Iterator[None]:
    """Raise ResourceLimitError for what the system refuses in the block."""
    try:
        yield
    except GPT2ValueHubError:
        raise
    except OSError as error:
        raise _no_room(f"copying {name} to a private place failed: {error.strerror}") from error


def _too_slow(name: str, *, done: int, size: int) -> ResourceLimitError:
    return ResourceLimitError(
        f"{name} is delivered too slowly: {done:,} of {size:,} bytes in {limits.copy_seconds(size):.0f} s",
        expected=f"at least {limits.COPY_BYTES_PER_SECOND:,} bytes a second",
        next_step="copy it to a disk of this machine first",
    )


def _no_room(found: str) -> ResourceLimitError:
    return ResourceLimitError(
        found,
        expected="room for a private copy of the files that are read",
        next_step="name a folder on a larger disk for temporary files: export TMPDIR=FOLDER",
    )


def identities(folder: Path, names: Iterable[str]) -> dict[str, Identity]:
    """The identities of those of `names` that are in `folder`, for `refuse_changes` to compare later."""
    found = {name: _identity_of(folder / name) for name in names}
    return {name: identity for name, identity in found.items() if identity is not None}


def refuse_changes(folder: Path, before: Mapping[str, Identity]) -> None:
    """Refuse a folder whose files were written to meanwhile, because it may mix the files of two saves.

    Args:
        folder: the folder that was read.
        before: the files that were read, and their identities when reading began.

    Raises:
        PackageChangedError.
    """
    for name, identity in before.items():
        if _identity_of(folder / name) != identity:
            raise PackageChangedError(
                f"{name!r} in {folder} was written to while it was being read",
                expected="a folder that stays as it is meanwhile",
                next_step="run the same again when the writing is done",
            )


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _identity_of(path: Path) -> Identity | None:
    try:
        return _identity(os.stat(path))
    except OSError:
        return None
