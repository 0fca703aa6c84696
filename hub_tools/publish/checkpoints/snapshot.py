"""A copy of a model's weights in one block of memory, and the same on the disk for another process to map.

Imports the standard library, torch. The copy is what training cannot tear: it is made between two
steps, and the block is used again for the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

ALIGNMENT = 64  # bytes; enough for every dtype and vector unit


@dataclass(frozen=True)
class Place:
    """Where one tensor lies in the block. Tied tensors have the same place."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def of(self, block: torch.Tensor) -> torch.Tensor:
        """The tensor in `block`: a view, no copy."""
        return block[self.offset : self.offset + self.size].view(self.dtype).view(self.shape)


class Snapshot:
    """A block of main memory for the weights of one layout (names, dtypes, shapes), to be filled again and again."""

    def __init__(self, places: tuple[Place, ...]) -> None:
        self.places = places
        self._block = torch.empty(max((place.offset + place.size for place in places), default=0), dtype=torch.uint8)

    def fill(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy the weights; afterwards nothing that happens to `state` reaches the copy."""
        done = set()
        with torch.no_grad():
            for place in self.places:
                if place.offset not in done:
                    place.of(self._block).copy_(state[place.name])  # from a GPU too; waits for it
                    done.add(place.offset)

    def write(self, path: Path) -> None:
        """Write the block to a file, in one call, during which other threads run.

        Raises:
            OSError: the system refused, the disk is full.
        """
        with open(path, "wb", buffering=0) as file:
            rest = memoryview(self._block.numpy().data)
            while rest:
                rest = rest[file.write(rest) :]


def places_of(state: Mapping[str, torch.Tensor]) -> tuple[Place, ...]:
    """A layout for these weights; tensors that share their data share their place."""
    places, offsets, end = [], dict[object, int](), 0
    for name, tensor in state.items():
        identity = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        offset = offsets.setdefault(identity if tensor.numel() else name, end)
        places.append(Place(name, tensor.dtype, tuple(tensor.shape), offset))
        end = max(end, -(-(offset + places[-1].size) // ALIGNMENT) * ALIGNMENT)
    return tuple(places)


def map_snapshot(path: Path, places: tuple[Place, ...]) -> dict[str, torch.Tensor]:
    """The weights that `Snapshot.write` wrote, mapped from the file, which must stay until they are let go."""
    block = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    return {place.name: place.of(block) for place in places}
