"""Reading files that may be hostile: bounded sizes, strict JSON, safetensors headers, no links that lead elsewhere.

Imports only the standard library, `errors` and `limits`. Runs nothing and opens no pickle. The weights' format:
https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shlex
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import PackageChangedError, PackageError
from .limits import HEADER_BYTES as HEADER_LIMIT
from .limits import JSON_LEVELS
from .limits import MIB as MIB

ITEM_SIZES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

LFS_POINTER = b"version https://git-lfs.github.com/spec/"  # https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md

AGAIN = "download the package again, or write it again with hub_tools.save_package"


@dataclass(frozen=True)
class Tensor:
    """One entry of a safetensors header."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


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
            next_step=AGAIN,
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
        raise PackageError(f"{name!r} is not a regular file", expected="a file", next_step=AGAIN)
    return path


@contextmanager
def open_in(folder: Path, name: str) -> Iterator[BinaryIO]:
    """Open a package's file to read its bytes. What was opened is a file that `file_in` allows, also where somebody
    puts a link or a pipe in its place meanwhile.

    Raises:
        PackageError: see `file_in`; or it cannot be read.
        PackageChangedError: it was replaced just now.
    """
    path = file_in(folder, name)
    # a pipe that takes the file's place after it was looked at must not make us wait
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise PackageError(
            f"{name!r} cannot be read: {error.strerror}",
            expected="a readable file",
            next_step="check its permissions: " + shlex.join(["ls", "-l", str(path)]),
        ) from error
    with open(descriptor, "rb") as opened:
        status = os.fstat(descriptor)
        try:
            same = stat.S_ISREG(status.st_mode) and os.path.samestat(status, os.stat(file_in(folder, name)))
        except (OSError, PackageError):  # by now it leads elsewhere, or nowhere
            same = False
        if not same:
            raise PackageChangedError(
                f"{name!r} in {folder} was replaced while it was being read",
                expected="a folder that stays as it is meanwhile",
                next_step="run the same again when the writing is done",
            )
        yield opened


def sha256_in(folder: Path, name: str) -> str:
    """SHA-256 of a package's file, in hexadecimal, as large as it was when it was opened.

    Raises:
        What `open_in` raises.
    """
    digest = hashlib.sha256()
    with open_in(folder, name) as opened:
        left = os.fstat(opened.fileno()).st_size
        while left > 0 and (piece := opened.read(min(left, MIB))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def read_json(folder: Path, name: str, *, limit: int = MIB) -> dict[str, Any]:
    """Read a JSON object from a file of at most `limit` bytes.

    Raises:
        PackageError: see `file_in`.
        PackageError: too large, not UTF-8, not JSON, nested too deep, a key twice, a NaN, or not an
            object.
    """
    return parse_json(_read(folder, name, limit), name)


def read_bytes(folder: Path, name: str, *, limit: int) -> bytes:
    """Read a file of at most `limit` bytes.

    Raises:
        PackageError: see `file_in`.
        PackageError: too large.
    """
    return _read(folder, name, limit)


def parse_json(data: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object strictly; see `read_json`. `name` is for the message."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {key[:80]!r} twice")
            found[key] = value
        return found

    def refuse(word: str) -> Any:
        raise ValueError(f"the value {word}")

    def finite(word: str) -> float:
        number = float(word)
        if not math.isfinite(number):
            raise ValueError(f"the number {word[:80]}, which is out of range")
        return number

    def whole(word: str) -> int:
        number = int(word)
        finite(word)  # a number that no float holds is an error wherever it is compared with one
        return number

    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=refuse,
            parse_float=finite,
            parse_int=whole,
        )
        _refuse_nesting(value)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        what = "JSON nested too deep" if isinstance(error, RecursionError) else str(error)[:300]
        raise PackageError(f"{name} holds {what}", expected="valid JSON", next_step=AGAIN) from error
    if not isinstance(value, dict):
        raise PackageError(f"{name} holds a {type(value).__name__}", expected="a JSON object", next_step=AGAIN)
    return value


def _refuse_nesting(value: Any) -> None:
    """Whoever copies or shows a deeply nested value runs out of stack: deep ones are refused where they are read."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(JSON_LEVELS):
        inner = [each.values() if isinstance(each, dict) else each for each in level]
        level = [each for values in inner for each in values if isinstance(each, (dict, list))]
        if not level:
            return
    raise RecursionError


def read_safetensors_header(folder: Path, name: str) -> dict[str, Tensor]:
    """Read the tensors' names, types and shapes from the header of a safetensors file. Its data is not read, but must
    have exactly the size that the header says.

    Raises:
        PackageError: see `file_in`.
        PackageError: the header is truncated, oversized or not valid, or does not describe the file's
            bytes.
    """

    def corrupt(found: str, expected: str, next_step: str = AGAIN) -> PackageError:
        return PackageError(f"{name}: {found}", expected=expected, next_step=next_step)

    with open_in(folder, name) as opened:
        size = os.fstat(opened.fileno()).st_size
        start = opened.read(len(LFS_POINTER))
        opened.seek(0)
        (length,) = struct.unpack("<Q", opened.read(8).ljust(8, b"\0"))
        raw = opened.read(length) if length <= min(size - 8, HEADER_LIMIT) else b""
    if start == LFS_POINTER:
        raise corrupt(
            "a git-lfs pointer, which stands for the weights and is not the weights",
            "the weights themselves",
            "fetch them, in the checkout that this is: git lfs pull; or download the repository: hf download",
        )
    if size < 8:
        raise corrupt(
            f"a file of {size} bytes", "a safetensors file, which begins with the 8-byte length of its header"
        )
    if length > min(size - 8, HEADER_LIMIT):
        raise corrupt(
            f"its header claims {length:,} bytes; the file has {size:,}",
            f"a header of at most {HEADER_LIMIT:,} bytes that lies in the file",
        )
    if not raw.startswith(b"{"):
        raise corrupt(f"its header begins with {raw[:8]!r}", "a JSON object")
    header = parse_json(raw, f"{name} (header)")

    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or metadata.get("format") != "pt":
        raise corrupt("its metadata does not say which framework wrote it", "{'format': 'pt'}")
    if not header:
        raise corrupt("it holds no tensors", "a model's weights")

    tensors, spans = {}, []
    for tensor_name, entry in header.items():
        tensors[tensor_name], span = _tensor(
            entry,
            lambda found, t=tensor_name: corrupt(f"tensor {t!r}: {found}", "dtype, shape and data_offsets that agree"),
        )
        spans.append(span)
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise corrupt(f"its tensors overlap or leave a hole at byte {position:,}", "tensors one after the other")
        position = end
    if position != size - 8 - length:
        raise corrupt(f"{size - 8 - length:,} bytes of data", f"the {position:,} bytes that its header describes")
    return tensors


def _tensor(entry: Any, corrupt: Any) -> tuple[Tensor, tuple[int, int]]:
    """Return one header entry as a `Tensor`, and the bytes that it occupies."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise corrupt("its entry is not complete")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZES:
        raise corrupt(f"dtype {str(dtype)[:40]!r}")
    # bounds far beyond any GPT-2: Python's integers would follow any nonsense
    if not isinstance(shape, list) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 1 << 48 for n in shape):
        raise corrupt(f"shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in offsets):
        raise corrupt(f"data_offsets {str(offsets)[:80]}")
    begin, end = offsets
    tensor = Tensor(dtype, tuple(shape))
    if end - begin != tensor.elements * ITEM_SIZES[dtype]:
        raise corrupt(f"{end - begin:,} bytes for {dtype} of shape {shape}")
    return tensor, (begin, end)


def _read(folder: Path, name: str, limit: int) -> bytes:
    """All bytes of a file, refusing more than `limit`."""
    with open_in(folder, name) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > limit:
            raise PackageError(f"{name} has {size:,} bytes", expected=f"at most {limit:,}", next_step=AGAIN)
        return opened.read(limit)
