"""Read other people's weight files without running anything that is in them.

Imports the standard library, torch, safetensors, `pickle_outline`, `files`, `layout` and `errors`. safetensors files
hold numbers. Pickles are never unpickled here: a small process of its own says which tensors they hold and where in the
file (see `pickle_outline`), and this module maps that part of the file.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..errors import AmbiguousSourceError, CorruptFileError, UnsafePickleError
from ..files import file_in, read_json
from ..layout import WEIGHTS, WEIGHTS_INDEX
from . import pickle_outline

PICKLED_WEIGHTS = "pytorch_model.bin"

# What transformers writes for a whole model: one file, or an index that names the shards.
MODEL_WEIGHTS = (WEIGHTS, WEIGHTS_INDEX, PICKLED_WEIGHTS, "pytorch_model.bin.index.json")

# Where a value head lies when it is not among the model's weights: TRL's name for it beside an adapter, then
# LLaMA-Factory's.
HEAD_WEIGHTS = (PICKLED_WEIGHTS, "value_head.safetensors", "value_head.bin")

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

PATIENCE = 60  # seconds for the outline of a pickle, which takes a tenth of one

FETCH_AGAIN = "fetch the file again; if it stays so, ask whoever made it"


def only_one(folder: Path, names: tuple[str, ...]) -> Path | None:
    """The one file of `names` that lies in `folder`, None where there is none.

    Raises:
        AmbiguousSourceError: there are several, and nothing says which of them was saved last.
        UnsafeFileError: it is a link out of the folder, or no regular file.
    """
    found = [folder / name for name in names if os.path.lexists(folder / name)]
    if len(found) > 1:
        raise AmbiguousSourceError(
            f"{folder} holds {' and '.join(path.name for path in found)}, and they may differ",
            expected="one of them",
            next_step="move the others away, or pass the file of a whole model itself as the source",
        )
    return file_in(folder, found[0].name) if found else None


def read_state_dict(file: Path) -> dict[str, torch.Tensor]:
    """The tensors, on the CPU, in a `.safetensors` file, in a pickle, or in the shards of an `.index.json`.

    Args:
        file: an existing file. Every name but `*.safetensors` and `*.json` is read as a pickle. The tensors
            may be views of the file: read them before it is written to.

    Raises:
        UnsafePickleError: the pickle asks for more than tensors and plain containers. Nothing of it ran.
        CorruptFileError: the file is damaged, or holds something else than a state dict.
        MissingFileError, UnsafeFileError: an index names a shard that is not there, or that is not beside it.
    """
    if file.suffix == ".json":
        return _read_shards(file)
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)


def _read_shards(index: Path) -> dict[str, torch.Tensor]:
    weight_map = read_json(index.parent, index.name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CorruptFileError(f"{index} has no weight_map", next_step=FETCH_AGAIN)
    state: dict[str, torch.Tensor] = {}
    for name in sorted({str(name) for name in weight_map.values()}):
        # An index is somebody else's file: it may point at its neighbours and nowhere else.
        shard = file_in(index.parent, name)
        if shard.suffix == ".json":
            raise CorruptFileError(f"{index} names {name} as a weight file", next_step=FETCH_AGAIN)
        tensors = read_state_dict(shard)
        odd = sorted({key for key, where in weight_map.items() if where == name} ^ set(tensors))
        if odd:
            raise CorruptFileError(
                f"{index} and {name} disagree about which weights {name} holds: {listed(odd)}",
                next_step="fetch both again, from the same commit",
            )
        state.update(tensors)
    return state


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError) as err:
        # safetensors checks the header; torch may still not know a dtype in it
        raise CorruptFileError(f"{file} cannot be read as safetensors: {_gist(err)}", next_step=FETCH_AGAIN) from err


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, as views of the file; `pickle_outline`, in a process of its own, says where they lie."""
    try:
        with open(file, "rb") as opened:
            content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as err:  # ValueError: an empty file
        raise CorruptFileError(f"{file} cannot be read: {_gist(err)}", next_step=FETCH_AGAIN) from err
    size, made = len(content), 0
    state: dict[str, torch.Tensor] = {}
    for name, (type_name, shape, start) in _outline_of(file).items():
        dtype = getattr(torch, type_name)
        count, length = math.prod(shape), math.prod(shape) * dtype.itemsize
        made += length
        # A tied lm_head is in the file once and in the model twice. More than that was made to fill the memory.
        if start + length > size or made > 2 * size:
            raise CorruptFileError(
                f"{file} has {size:,} bytes, and says that its tensors have {made:,}",
                expected="tensors that lie in the file, each for itself",
                next_step=FETCH_AGAIN,
            )
        if count == 0:
            state[name] = torch.empty(shape, dtype=dtype)
        elif start % dtype.itemsize:  # the older format does not align numbers
            state[name] = torch.frombuffer(bytearray(content[start : start + length]), dtype=dtype).view(shape)
        else:
            state[name] = torch.frombuffer(content, dtype=dtype, count=count, offset=start).view(shape)
    return state


def _outline_of(file: Path) -> dict[str, tuple[str, list[int], int]]:
    """Name -> dtype, shape and first byte of each tensor in a pickle."""
    command = [sys.executable, "-I", "-S", "-B", pickle_outline.__file__, str(file.resolve())]
    try:
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE)
        answer = json.loads(done.stdout) if done.returncode == 0 else {"refused": "ended", "found": done.returncode}
    except subprocess.TimeoutExpired:
        answer = {"refused": "ended", "found": "timeout"}
    if "tensors" in answer:
        return dict(answer["tensors"])
    refused, found = answer["refused"], answer["found"]
    if refused == "unsafe":
        raise UnsafePickleError(
            f"{file} is a pickle that asks for more than plain tensors: {found}. Nothing of it was run",
            expected="a state dict of plain, dense tensors",
            next_step="if you know its maker, load it in the library that wrote it, save model.state_dict() "
            "as safetensors, and convert that",
        )
    if refused == "nested":
        raise CorruptFileError(
            f"{file} holds {found}",
            expected="a state dict: names with plain tensors",
            next_step="where the state dict lies inside (under 'state_dict', 'model', ...), save that part "
            "alone and convert it",
        )
    if refused == "ended":
        raise CorruptFileError(
            f"{file} could not be opened in {PATIENCE} s and {pickle_outline.MEMORY >> 20} MiB ({found})",
            expected="a state dict, whose names and shapes fit into a small part of that",
            next_step=FETCH_AGAIN,
        )
    raise CorruptFileError(
        f"{file} cannot be read as a checkpoint: {found}",
        expected="the state dict of contiguous tensors that torch.save writes",
        next_step=FETCH_AGAIN,
    )


def listed(names: list[str], most: int = 8) -> str:
    """`names` as a sentence lists them, the rest counted."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _gist(err: BaseException) -> str:
    """The first line of an error, or its type where it says nothing."""
    lines = str(err).strip().splitlines()
    return lines[0][:300] if lines else type(err).__name__
