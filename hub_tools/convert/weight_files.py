"""Read other people's weight files without running anything that is in them.

Imports the standard library, torch, `pickle_outline`, `stage`, `files`, `limits`, `layout` and `errors`. No other
library reads these files. The header of a safetensors file says where its tensors are; for a pickle, a small child
process finds them (see `pickle_outline`). This module then maps those parts of a private copy of the file into memory.
"""

from __future__ import annotations

import math
import mmap
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

import torch

from .. import limits
from ..errors import ConversionError, GPT2ValueHubError, PackageError
from ..files import file_in, parse_json, read_json
from ..layout import WEIGHTS, WEIGHTS_INDEX
from ..limited_process import run_limited, search_path_of
from ..package.reading.stage import Identity, private_file, refuse_changes
from . import unpickle
from .heads import listed

PICKLED_WEIGHTS = "pytorch_model.bin"

# What transformers writes for a whole model: one file, or an index that names the shards.
MODEL_WEIGHTS = (WEIGHTS, WEIGHTS_INDEX, PICKLED_WEIGHTS, "pytorch_model.bin.index.json")

# Files that hold a value head apart from the model's weights: TRL's name for it beside an adapter, then
# LLaMA-Factory's.
HEAD_WEIGHTS = (PICKLED_WEIGHTS, "value_head.safetensors", "value_head.bin")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
Outline = dict[str, tuple[torch.dtype, list[int], int]]  # name -> dtype, shape, first byte in the file

FETCH_AGAIN = "fetch the file again; if it stays so, ask whoever made it"


def only_one(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The one file of `names` that is in `folder`; None if there is none.

    Raises:
        ConversionError: there are several, and nothing shows which of them was saved last.
        PackageError: it is a link out of the folder, or no regular file.
    """
    found = [folder / name for name in names if os.path.lexists(folder / name)]
    if len(found) > 1:
        raise ConversionError(
            f"{folder} holds {' and '.join(path.name for path in found)}, and they may differ",
            expected="one of them",
            next_step="move the others away, or pass the file of a whole model itself as the source",
        )
    return file_in(folder, found[0].name) if found else None


def read_state_dict(
    file: Path, *, limit: int = limits.WEIGHT_BYTES_AT_MOST, follow: bool = False
) -> dict[str, torch.Tensor]:
    """The tensors, on the CPU, in a `.safetensors` file, in a pickle, or in the shards of an `.index.json`.

    Args:
        file: an existing file. Every name but `*.safetensors` and `*.json` is read as a pickle. The tensors are views
            of a private copy, so what happens to the file later does not reach them.
        limit: the most bytes that it, or all shards together, may have.
        follow: follow a link wherever it leads. For a file that the user named.

    Raises:
        PackageError: the pickle asks for more than tensors and plain containers. Nothing of it ran.
        PackageError: the file is damaged, too large, or holds something else than a state dict.
        PackageError: an index names a shard that is not there, or that is not beside it.
        PackageChangedError: it was written to while it was being read.
        ResourceLimitError: the copy has no room, or takes too long; see `stage`.
    """
    if file.suffix == ".json":
        return _read_shards(file, limit=limit)
    place = Path(os.path.realpath(file)) if follow else file
    state, identity = _tensors_in(file, place, limit=limit)
    refuse_changes(place.parent, {place.name: identity})
    return state


def _read_shards(index: Path, *, limit: int) -> dict[str, torch.Tensor]:
    weight_map = read_json(index.parent, index.name, limit=limits.INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PackageError(f"{index} has no weight_map", next_step=FETCH_AGAIN)
    tensors_of: dict[str, set[str]] = {}
    for key, name in weight_map.items():
        if not isinstance(name, str):
            raise PackageError(f"{index} names {str(name)[:80]} as a weight file", next_step=FETCH_AGAIN)
        tensors_of.setdefault(name, set()).add(key)
    state: dict[str, torch.Tensor] = {}
    before: dict[str, Identity] = {}
    for name, keys in sorted(tensors_of.items()):
        # An index is not trusted: it may only name files in its own folder.
        shard = file_in(index.parent, name)
        if shard.suffix == ".json":
            raise PackageError(f"{index} names {name} as a weight file", next_step=FETCH_AGAIN)
        tensors, before[name] = _tensors_in(shard, shard, limit=limit)
        limit -= before[name][2]
        odd = sorted(keys ^ set(tensors))
        if odd:
            raise PackageError(
                f"{index} and {name} disagree about which weights {name} holds: {listed(odd)}",
                next_step="fetch both again, from the same commit",
            )
        state.update(tensors)
    refuse_changes(index.parent, before)
    return state


def _tensors_in(file: Path, place: Path, *, limit: int) -> tuple[dict[str, torch.Tensor], Identity]:
    """The tensors of the file at `place`, as views of a private copy. (`file` is its name, for messages.)

    If the file itself were mapped and then shrank, this process would crash.
    """
    with private_file(place, limit=limit) as (copied, identity):
        try:
            if file.suffix == ".safetensors":
                content = mmap.mmap(copied.fileno(), 0, access=mmap.ACCESS_COPY)
                outline = _header_of(file, content)
            else:
                content, outline = _unpickled(file, copied)
        except (OSError, ValueError) as err:  # ValueError: an empty file
            if isinstance(err, GPT2ValueHubError):
                raise
            raise PackageError(f"{file} cannot be read: {_gist(err)}", next_step=FETCH_AGAIN) from err
    return _views(file, content, outline), identity


def _views(file: Path, content: mmap.mmap, outline: Outline) -> dict[str, torch.Tensor]:
    size, made = len(content), 0
    state: dict[str, torch.Tensor] = {}
    for name, (dtype, shape, start) in outline.items():
        count, length = math.prod(shape), math.prod(shape) * dtype.itemsize
        made += length
        if math.prod(max(side, 1) for side in shape) >= 1 << 48:  # torch fails also where there are none
            raise PackageError(
                f"{file} has a tensor {name[:120]!r} of shape {shape}",
                expected="numbers that can be counted",
                next_step=FETCH_AGAIN,
            )
        # A tied lm_head is in the file once and in the model twice. A larger factor means an attack on the memory.
        if start + length > size or made > limits.TENSORS_PER_FILE * size:
            raise PackageError(
                f"{file} has {size:,} bytes, and says that its tensors have {made:,}",
                expected="tensors that lie in the file, each for itself",
                next_step=FETCH_AGAIN,
            )
        if count == 0:
            state[name] = torch.empty(shape, dtype=dtype)
        elif start % dtype.itemsize:  # torch's older format does not align numbers
            state[name] = torch.frombuffer(bytearray(content[start : start + length]), dtype=dtype).view(shape)
        else:
            state[name] = torch.frombuffer(content, dtype=dtype, count=count, offset=start).view(shape)
    return state


def _header_of(file: Path, content: mmap.mmap) -> Outline:
    """The tensors that the header of a safetensors file names (https://github.com/huggingface/safetensors#format)."""

    def corrupt(found: str) -> PackageError:
        return PackageError(
            f"{file} cannot be read as safetensors: {found}", expected="a valid header", next_step=FETCH_AGAIN
        )

    length = int.from_bytes(content[:8], "little")
    if length > min(len(content) - 8, limits.HEADER_BYTES):
        raise corrupt(f"its header claims {length:,} bytes of {len(content):,}")
    header = parse_json(content[8 : 8 + length], f"{file} (header)")
    header.pop("__metadata__", None)
    outline: Outline = {}
    for name, entry in header.items():
        fields: dict[str, Any] = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = fields.get("dtype"), fields.get("shape", 0), fields.get("data_offsets", 0)
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise corrupt(f"tensor {name[:120]!r} of type {str(dtype)[:80]}")
        if not _whole_numbers(shape, most=8) or not _whole_numbers(offsets, most=2) or len(offsets) != 2:
            raise corrupt(f"tensor {name[:120]!r} with shape {str(shape)[:80]} at {str(offsets)[:80]}")
        if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
            raise corrupt(f"tensor {name[:120]!r} with shape {str(shape)[:80]} at {str(offsets)[:80]}")
        outline[name] = (DTYPES[dtype], shape, 8 + length + offsets[0])
    return outline


def _whole_numbers(numbers: Any, *, most: int) -> bool:
    return (
        isinstance(numbers, list) and len(numbers) <= most and all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)
    )


def _unpickled(file: Path, copied: BinaryIO) -> tuple[mmap.mmap, Outline]:
    """The tensors of a pickle, which a process of its own writes as safetensors; see `unpickle`."""
    size = os.fstat(copied.fileno()).st_size
    with tempfile.TemporaryDirectory(prefix="gpt2-value-", ignore_cleanup_errors=True) as home:
        target = Path(home, WEIGHTS)
        bounds = {
            "RLIMIT_DATA": limits.PICKLE_MEMORY + 4 * size,
            "RLIMIT_FSIZE": unpickle.TENSORS_PER_FILE * size + limits.HEADER_BYTES,
            "RLIMIT_CPU": int(limits.PICKLE_SECONDS),
        }
        found = "it took too long"
        try:
            done = run_limited(
                unpickle.__file__,
                f"/dev/fd/{copied.fileno()}",
                str(target),
                *search_path_of("torch", "safetensors"),
                limits=bounds,
                seconds=limits.WAITING * limits.PICKLE_SECONDS,
                environment={"OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=(copied.fileno(),),
                text=True,
                errors="replace",
            )
            found = done.stdout.strip() if done.returncode == 0 else f"its reader ended with {done.returncode}"
        except subprocess.TimeoutExpired:
            pass  # the process was killed
        if not found:
            with open(target, "rb") as opened:
                content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
            return content, _header_of(file, content)
    raise PackageError(
        f"{file} holds {found}",
        expected="a state dict of dense tensors, in bounded memory and time",
        next_step="if you know its maker, load it in the library that wrote it, save model.state_dict() as "
        "safetensors, and convert that",
    )


def _gist(err: BaseException) -> str:
    """The first line of an error, or its type where it says nothing."""
    lines = str(err).strip().splitlines()
    return lines[0][:300] if lines else type(err).__name__
