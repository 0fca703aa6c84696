"""What a mutation of a package is, and the edits that mutations are made of. See `mutations.py` for the list."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CANARY = "canary"
CONFIG, GENERATION, RECORD = "config.json", "generation_config.json", "verification.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
MODELING = "modeling_gpt2_value.py"
CODE = tuple(f"{name}_gpt2_value.py" for name in ("configuration", "decoding", "generation", "modeling", "sampling"))
Edit = Callable[[Path], None]


@dataclass(frozen=True)
class Mutation:
    """`base` is the package to spoil: "one" (one weight file and a tokenizer) or "shards"."""

    kind: str
    name: str
    edit: Edit
    base: str = "one"


def data_of(data: bytes) -> int:
    """Where a safetensors file's data begins."""
    return 8 + int(struct.unpack("<Q", data[:8])[0])


def flip(data: bytes, seed: int, begin: int, end: int) -> bytes:
    flipped = bytearray(data)
    rng = random.Random(seed)
    flipped[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def bytes_edit(name: str, edit: Callable[[bytes], bytes]) -> Edit:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(edit((folder / name).read_bytes()))

    return apply


def json_edit(name: str, edit: Callable[[dict[str, Any]], Any]) -> Edit:
    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        edit(value)
        (folder / name).write_text(json.dumps(value))

    return apply


def header_edit(edit: Callable[[dict[str, Any]], Any]) -> Edit:
    """Rewrite a safetensors header; the edit changes it in place, or returns the bytes."""

    def change(data: bytes) -> bytes:
        header = json.loads(data[8 : data_of(data)])
        made = edit(header)
        new = made if isinstance(made, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(new)) + new + data[data_of(data) :]

    return bytes_edit(WEIGHTS, change)


def link_out(folder: Path, name: str) -> None:
    """Move a file out of the package, and link to it."""
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)


def append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


class Bomb:
    """Creates the canary when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mknod, (self.path,)
