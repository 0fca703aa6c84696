"""A private copy of the files that are needed of somebody else's folder, for everything that reads it.

Imports the standard library and of hub_tools `config_json`, `errors`, `files`, `layout` and `limits`.

Whoever reads a folder twice, or lets a library read it, can be shown one thing the first time and another thing the
second; and a library reads more of a folder than it is asked for: adapters, templates, links. So a folder that is not
ours is copied first, only the files that are wanted, each within its limit, and everything after that works on the
copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from .. import layout, limits
from ..errors import CorruptFileError, NoRoomError, NotAPackageError, PackageChangedError, UnsafeFileError
from ..files import AGAIN, file_in, read_json
from . import allowed_fields
from .config_json import check_config, count_numbers

_PIECE = limits.MIB
# What changes whenever somebody writes to a file, or puts another one in its place.
_Identity = tuple[int, int, int, int, int]


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
    """Copy the files that are wanted out of `source`, and yield the copy; it is removed afterwards.

    Each file is opened once, and what was opened is what is checked, hashed and copied. A link is followed only where
    it leads to a file of the same folder or, in the Hub's cache, to its blob (see `files.file_in`). Files in folders
    below `source` are never copied. What happens to `source` afterwards, the copy does not see.

    Args:
        source: a folder.
        limit_of: for a file's name the most bytes that it may have, or None for a file that is not wanted.
        total: the most bytes that all of the files may have together.

    Raises:
        NotAPackageError: there is no such folder.
        UnsafeFileError: a wanted file is a link out of the folder, a device, a pipe or a folder, or cannot be read.
        CorruptFileError: a file, or all together, or the list of files, is larger than its limit.
        PackageChangedError: the folder was written to while it was being copied.
        NoRoomError: the temporary folder has no room for the copy.
    """
    folder = Path(source)
    with tempfile.TemporaryDirectory(prefix="gpt2-value-", ignore_cleanup_errors=True) as home:
        copy = Path(home, "files")
        copy.mkdir(mode=0o700)
        names = _names(folder)
        sha256: dict[str, str] = {}
        before: dict[str, _Identity] = {}
        left = total
        for name in names:
            limit = limit_of(name)
            if limit is None:
                continue
            sha256[name], before[name] = _copy(folder, name, copy / name, limit=min(limit, left))
            left -= before[name][2]
        for name, identity in before.items():  # files of two saves, one half each, are nobody's package
            if _identity_of(folder / name) != identity:
                raise PackageChangedError(
                    f"{name!r} in {folder} was written to while it was being read",
                    expected="a folder that stays as it is meanwhile",
                    next_step="run the same again when the writing is done",
                )
        yield Stage(copy, folder, names, sha256)


def stage_package(source: str | os.PathLike[str]) -> AbstractContextManager[Stage]:
    """`stage`, for a package: config, weights, code, tokenizer and record, as large as a model may be that has the
    sizes in `config.json`.

    Raises:
        What `stage` raises, and what `check_config` raises for `config.json`.
    """
    config = read_json(Path(source), layout.CONFIG)
    check_config(config)
    vocabulary, weights = limits.vocabulary_bytes(config["vocab_size"]), limits.weight_bytes(count_numbers(config))

    def limit_of(name: str) -> int | None:
        return package_file_limit(name, vocabulary=vocabulary, weights=weights)

    return stage(source, limit_of=limit_of, total=weights + 512 * limits.MIB)


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
    """Turn the copy of a package, after it was inspected, into a folder that a library may load, and return it.

    The JSON files are reduced to the fields that a library may see (`allowed_fields`). Code that is not in `code` is
    removed. The copy is no copy any more afterwards, and has another name.

    Raises:
        What `allowed_fields.reduce` raises.
    """
    wanted = set(code)
    for path in sorted(copy.folder.iterdir()):
        if path.name.endswith(layout.CODE_SUFFIXES):
            if path.name not in wanted:
                path.unlink()
        elif path.name in allowed_fields.REDUCED:
            fields = read_json(copy.folder, path.name, limit=limits.INDEX_BYTES)
            path.write_text(json.dumps(allowed_fields.reduce(path.name, fields)), encoding="utf-8")
    # transformers keeps a copy of the code that it runs under the folder's name: the same code gets the same name
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
                    raise CorruptFileError(
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


def _copy(folder: Path, name: str, to: Path, *, limit: int) -> tuple[str, _Identity]:
    """Copy one file; return the SHA-256 of what was copied, and the identity of the file that was opened."""
    path = file_in(folder, name)
    digest = hashlib.sha256()
    # a pipe that takes the file's place just now must not make us wait
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise UnsafeFileError(
            f"{name!r} cannot be read: {error.strerror}",
            expected="a readable file",
            next_step="check the permissions of the file",
        ) from error
    with open(descriptor, "rb") as opened:
        status = os.fstat(opened.fileno())
        # what was opened must be what a second look finds at a place that is allowed
        if not stat.S_ISREG(status.st_mode) or not os.path.samestat(status, os.stat(file_in(folder, name))):
            raise PackageChangedError(
                f"{name!r} in {folder} was replaced while it was being read",
                expected="a folder that stays as it is meanwhile",
                next_step="run the same again when the writing is done",
            )
        if status.st_size > limit:
            raise CorruptFileError(
                f"{name} has {status.st_size:,} bytes", expected=f"at most {limit:,}", next_step=AGAIN
            )
        free = shutil.disk_usage(to.parent).free
        if status.st_size > free:
            raise _no_room(f"{name} has {status.st_size:,} bytes, and {to.parent.parent} has room for {free:,}")
        left = status.st_size
        try:
            with open(to, "xb") as copied:
                while left and (piece := opened.read(min(left, _PIECE))):
                    digest.update(piece)
                    copied.write(piece)
                    left -= len(piece)
        except OSError as error:
            raise _no_room(f"copying {name} to {to.parent.parent} failed: {error.strerror}") from error
    return digest.hexdigest(), _identity(status)


def _no_room(found: str) -> NoRoomError:
    return NoRoomError(
        found,
        expected="room for a private copy of the files that are read",
        next_step="name a folder on a larger disk for temporary files: export TMPDIR=FOLDER",
    )


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _identity_of(path: Path) -> _Identity | None:
    try:
        return _identity(os.stat(path))
    except OSError:
        return None
