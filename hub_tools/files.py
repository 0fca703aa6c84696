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

from .errors import PackageError, as_ours
from .limits import JSON_LEVELS, MIB


@contextmanager
def open_in(folder: Path, name: str) -> Iterator[BinaryIO]:
    """Open a package's file to read its bytes, after making sure that it is a regular file that lies in the package.

    Links are followed only to where the Hub's own cache puts them: `snapshots/<commit>/x -> blobs/<hash>`.

    Raises:
        PackageError: there is no such file (or a link to nothing); it cannot be read.
        PackageError: a link out of the package, a device, a pipe, a folder.
    """
    path = folder / name
    with as_ours(lambda _: PackageError(f"{name[:300]!r} is not in {folder}, or is a link to nothing")):
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
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
    with as_ours(lambda gist: PackageError(f"{name!r} cannot be read: {gist}", next_step="check its permissions")):
        opened = path.open("rb")
    with opened:
        yield opened


def read_json(folder: Path, name: str, *, limit: int = MIB) -> dict[str, Any]:
    """Read a JSON object from a file of at most `limit` bytes.

    Raises:
        PackageError: see `open_in`.
        PackageError: too large, not UTF-8, not JSON, nested too deep, a NaN, or not an object.
    """
    with open_in(folder, name) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > limit:
            raise PackageError(f"{name} has {size:,} bytes", expected=f"at most {limit:,}")
        data = opened.read(limit)
    with as_ours(
        lambda gist: PackageError(
            f"{name} holds no such object: {gist}", expected=f"a JSON object, at most {JSON_LEVELS} levels deep"
        )
    ):
        value: Any = json.loads(data.decode("utf-8"))
        _refuse_extremes(value)
        if not isinstance(value, dict):
            raise TypeError(f"a {type(value).__name__}")
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
        raise ValueError(f"more than {JSON_LEVELS} levels")
