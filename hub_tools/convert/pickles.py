"""Read the tensors of a weight file that a stranger wrote: safetensors, pickles, or an index of such files.

Everything is read from a private copy. Pickles become safetensors first, in a process of their own: see `unpickle`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from .. import limits
from ..errors import PackageError
from ..files import read_json
from ..limited_process import failure_of, run_limited, search_path_of
from ..package.config import checked_shards
from ..package.stage import stage
from ..package.weights import read_weights
from . import unpickle


def read_tensors(file: Path, *, limit: int) -> dict[str, torch.Tensor]:
    """The tensors, on the CPU, in a `.safetensors` file, in a pickle, or in the shards of an `.index.json`.

    Args:
        file: an existing file. Every name but `*.safetensors` and `*.json` is read as a pickle.
        limit: the most bytes that it, or all shards together, may have.

    Raises:
        PackageError: it is damaged, too large, or holds something else than tensors; a pickle that asks for more than
            tensors, of which nothing ran; an index that names a shard that is not there, or not beside it.
        ResourceLimitError: the copy has no room; see `stage`.
    """
    folder, wanted = file.parent, {file.name}
    if file.suffix == ".json":
        index = read_json(folder, file.name, limit=limits.INDEX_BYTES)
        wanted |= set(checked_shards(index).values())
    with stage(folder, limit_of=lambda name: limit if name in wanted else None, total=limit) as copy:
        pickled = sorted(name for name in wanted if not name.endswith((".safetensors", ".json")))
        if pickled:
            _unpickle(copy.folder, pickled, str(folder))
        return read_weights(copy.folder, file.name)


def _unpickle(folder: Path, names: Sequence[str], where: str) -> None:
    """Replace pickles in a private folder by safetensors, in a process of its own; see `unpickle`."""
    size = sum(path.stat().st_size for path in folder.iterdir())
    bounds = {
        "RLIMIT_DATA": limits.PICKLE_MEMORY + 4 * size,
        "RLIMIT_FSIZE": unpickle.TENSORS_PER_FILE * size + limits.HEADER_BYTES,
        "RLIMIT_CPU": int(limits.PICKLE_SECONDS) + size // (4 * limits.MIB),
    }
    done = run_limited(
        unpickle.__file__,
        *(str(folder / name) for name in names),
        "--",
        *search_path_of("torch", "safetensors"),
        limits=bounds,
        seconds=limits.WAITING * bounds["RLIMIT_CPU"],
        environment={"OMP_NUM_THREADS": "1"},
    )
    if found := failure_of(done):
        raise PackageError(
            f"{', '.join(names)} in {where} cannot be read: {found}",
            expected="a state dict: names with dense tensors, in bounded memory and time",
            next_step="where the state dict lies inside (under 'state_dict', 'model', ...), save that part alone; if "
            "you know its maker, load it in the library that wrote it, and save model.state_dict() as safetensors",
        )
