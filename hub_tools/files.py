"""Reading files that may be hostile: bounded sizes, strict JSON, no links that lead elsewhere."""

from __future__ import annotations

import json
import os
import shlex
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .errors import AGAIN as AGAIN
from .errors import PackageError
from .layout import sha256_of
from .limits import JSON_LEVELS, MIB

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md


def file_in(folder: Path, name: str) -> Path:
    """Return the path of a package's file, after making sure that it is a regular file that lies in the package.

    Links are followed only to where the Hub's own cache puts them: `snapshots/<commit>/x -> blobs/<hash>`.

    Raises:
        PackageError: there is no such file (or a link to nothing).
        PackageError: a link out of the package, a device, a pipe, a folder.
    """
    path = folder / name
    try:
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, before Python 3.13; a NUL or a surrogate
        raise PackageError(
            f"{name!r} is a link to nothing" if os.path.islink(path) else f"{name[:300]!r} is not in {folder}",
            expected=f"a file {name[:300]}",
        ) from error
    homes = [folder.resolve()]
    if homes[0].parent.name == "snapshots":
        homes.append(homes[0].parent.parent / "blobs")
    if real.parent not in homes:
        raise PackageError(
            f"{name!r} leads out of the package, to {str(real)!r}",
            expected="a file in the package itself",
            next_step="replace the link by the file, if you trust it: "
            + shlex.join(["cp", "--remove-destination", str(real), str(path)]),
        )
    if not stat.S_ISREG(mode):
        raise PackageError(f"{name!r} is not a regular file", expected="a file")
    return path


@contextmanager
def open_in(folder: Path, name: str) -> Iterator[BinaryIO]:
    """Open a package's file to read its bytes.

    Raises:
        PackageError: see `file_in`; or it cannot be read.
    """
    path = file_in(folder, name)
    try:
        opened = path.open("rb")
    except OSError as error:
        raise PackageError(
            f"{name!r} cannot be read: {error.strerror}",
            expected="a readable file",
            next_step="check its permissions: " + shlex.join(["ls", "-l", str(path)]),
        ) from error
    with opened:
        yield opened


def sha256_in(folder: Path, name: str) -> str:
    """SHA-256 of a package's file, in hexadecimal.

    Raises:
        What `open_in` raises.
    """
    with open_in(folder, name):  # it is a file of the package, and can be read
        return sha256_of(folder / name)


def read_json(folder: Path, name: str, *, limit: int = MIB) -> dict[str, Any]:
    """Read a JSON object from a file of at most `limit` bytes.

    Raises:
        PackageError: see `file_in`.
        PackageError: too large, not UTF-8, not JSON, nested too deep, a NaN, or not an object.
    """
    with open_in(folder, name) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > limit:
            raise PackageError(f"{name} has {size:,} bytes", expected=f"at most {limit:,}")
        data = opened.read(limit)
    try:
        value = json.loads(data.decode("utf-8"))
        _refuse_extremes(value)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        what = "JSON nested too deep" if isinstance(error, RecursionError) else str(error)[:300]
        raise PackageError(f"{name} holds {what}", expected="valid JSON") from error
    if not isinstance(value, dict):
        raise PackageError(f"{name} holds a {type(value).__name__}", expected="a JSON object")
    return value


def _refuse_extremes(value: Any) -> None:
    """Refuse numbers that no float holds, which fail wherever they are compared with one, and deep nesting, for which
    whoever copies or shows a value runs out of stack."""
    level = [value]
    for _ in range(JSON_LEVELS):
        inner: list[Any] = []
        for each in level:
            if isinstance(each, (dict, list)):
                inner += each.values() if isinstance(each, dict) else each
            elif isinstance(each, (int, float)) and not abs(each) < sys.float_info.max:
                raise ValueError(f"the number {str(each)[:80]}, which is out of range")
        level = inner
    if level:
        raise RecursionError
