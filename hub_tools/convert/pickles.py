"""Read the tensors of a weight file that a stranger wrote: safetensors, pickles, or an index of such files.

Everything is read from a private copy. Pickles become safetensors first, in a process of their own: see `unpickle`.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import limits
from ..errors import PackageError
from ..files import read_json
from ..limited_process import run_limited, search_path_of
from ..package.config import checked_shards
from ..package.stage import stage
from ..package.weights import read_weights
from . import unpickle


def read_tensors(file: Path, *, limit: int, follow: bool = False) -> dict[str, torch.Tensor]:
    """The tensors, on the CPU, in a `.safetensors` file, in a pickle, or in the shards of an `.index.json`.

    Args:
        file: an existing file. Every name but `*.safetensors` and `*.json` is read as a pickle.
        limit: the most bytes that it, or all shards together, may have.
        follow: follow a link wherever it leads. For a file that the user named.

    Raises:
        PackageError: it is damaged, too large, or holds something else than tensors; a pickle that asks for more than
            tensors, of which nothing ran; an index that names a shard that is not there, or not beside it.
        ResourceLimitError: the copy has no room, or takes too long; see `stage`.
    """
    if follow and file.resolve().parent.name != "blobs":  # in the Hub's cache, a blob's name says nothing
        file = file.resolve()
    folder, name = file.parent, file.name
    weight_map = {"": name}
    if name.endswith(".json"):
        weight_map = checked_shards(read_json(folder, name, limit=limits.INDEX_BYTES))
    wanted = set(weight_map.values())
    with stage(folder, limit_of=lambda each: limit if each in wanted else None, total=limit) as copy:
        for lost in sorted(wanted - set(copy.names)):
            raise PackageError(
                f"{file} names {lost}, which is not there", next_step="fetch it from where the others are"
            )
        pickled = sorted(each for each in wanted if not each.endswith(".safetensors"))
        if pickled:
            _unpickle(copy.folder, pickled, str(folder))
        weight_map = {key: f"{shard}.safetensors" if shard in pickled else shard for key, shard in weight_map.items()}
        if name.endswith(".json"):
            (copy.folder / name).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
        return read_weights(copy.folder, weight_map.get("", name))


def _unpickle(folder: Path, names: Sequence[str], where: str) -> None:
    """Replace pickles in a private folder by safetensors, in a process of its own; see `unpickle`."""
    size = sum((folder / name).stat().st_size for name in names)
    bounds = {
        "RLIMIT_DATA": limits.PICKLE_MEMORY + 4 * size,
        "RLIMIT_FSIZE": unpickle.TENSORS_PER_FILE * size + limits.HEADER_BYTES,
        "RLIMIT_CPU": int(limits.PICKLE_SECONDS) + size // (4 * limits.MIB),
    }
    found = f"{names[0]} could not be read in bounded time"
    try:
        done = run_limited(
            unpickle.__file__,
            *(str(folder / name) for name in names),
            "--",
            *search_path_of("torch", "safetensors"),
            limits=bounds,
            seconds=limits.WAITING * bounds["RLIMIT_CPU"],
            environment={"OMP_NUM_THREADS": "1"},
        )
        found = done.stdout.strip()
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
            found = f"{names[0]} is no file that torch.load reads: {reason[:300]}"
    except subprocess.TimeoutExpired:
        pass  # the process was killed
    if found:
        raise PackageError(
            f"in {where}, {found}",
            expected="a state dict: names with dense tensors, in bounded memory and time",
            next_step="where the state dict lies inside (under 'state_dict', 'model', ...), save that part alone; if "
            "you know its maker, load it in the library that wrote it, and save model.state_dict() as safetensors",
        )
