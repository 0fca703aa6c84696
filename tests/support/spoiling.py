"""What a mutation of a folder is, the edits that mutations are made of, and values that nobody expects."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub_tools import layout

CANARY = "canary"  # what a mutation's code would create, in the parent folder
CONFIG, GENERATION, RECORD = layout.CONFIG, layout.GENERATION_CONFIG, layout.RECORD
WEIGHTS, INDEX, CODE = layout.WEIGHTS, layout.WEIGHTS_INDEX, layout.REMOTE_CODE
TOKENIZER, TOKENIZER_CONFIG, MODELING = "tokenizer.json", layout.TOKENIZER_CONFIG, "modeling_gpt2_value.py"
Edit = Callable[[Path], Any]

DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
HOSTILE: tuple[Any, ...] = (
    -1, 0, 1, 3, 1 << 31, 10**9, 10**30, 10**400, 1.5, 1e308, "", "16", "x" * 1000, "\ud800", "a\0b", None, True, [],
    [16], {}, {"a": {"b": []}}, DEEP, "other/repo", "/etc/passwd", "armed.Tokenizer", {"AutoModel": "armed.Model"},
)  # fmt: skip


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


def bytes_edit(name: str, edit: Callable[[bytes], bytes]) -> Edit:
    return lambda folder: (folder / name).write_bytes(edit((folder / name).read_bytes()))


def json_edit(name: str, edit: Callable[[dict[str, Any]], Any]) -> Edit:
    def apply(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        edit(value)
        (folder / name).write_text(json.dumps(value))

    return apply


def header_edit(name: str, edit: Callable[[dict[str, Any]], Any]) -> Edit:
    """Rewrite a safetensors header; the edit changes it in place, or returns the bytes."""

    def change(data: bytes) -> bytes:
        header = json.loads(data[8 : data_of(data)])
        made = edit(header)
        new = made if isinstance(made, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(new)) + new + data[data_of(data) :]

    return bytes_edit(name, change)


def put(name: str, content: str | bytes) -> Edit:
    """Write a file, in a folder of its own where its name has one."""

    def apply(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return apply


def instead(name: str, make: Callable[[Path], Any]) -> Edit:
    """Put what `make` makes in the place of a file."""

    def apply(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return apply


def link_out(folder: Path, name: str) -> None:
    """Move a file out of the package, and link to it."""
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)


def damage(data: bytes, seed: int) -> bytes:
    """Flip a bit; or cut the end off; or remove, double or replace a few bytes."""
    rng = random.Random(seed)
    begin = rng.randrange(len(data) if seed % 3 else min(len(data), 2000))
    piece = data[begin : begin + rng.randint(1, 40)]
    flipped = bytes([data[begin] ^ 1 << rng.randrange(8)]) + piece[1:]
    new = rng.choice([flipped, flipped, flipped, b"", piece * 2, rng.randbytes(8), b"9" * 30, b"{["])
    return data[:begin] + new + (data[begin + len(piece) :] if seed % 4 else b"")


def misplaced(tree: Any, seed: int) -> None:
    """Somewhere in a JSON value, put a value that nobody expects, take one away, or give it another name."""
    rng = random.Random(seed)
    places = [(tree, key) for key in tree]
    for held, key in places:
        inner = held[key]
        if isinstance(inner, (dict, list)):
            places += [(inner, name) for name in (inner if isinstance(inner, dict) else range(len(inner)))]
    held, key = rng.choice(places)
    value = held[key]
    if seed % 4 or isinstance(held, list):
        held[key] = rng.choice(HOSTILE)
    else:
        del held[key]
        held.update({rng.choice(("x", "../../x", key * 2)): value} if seed % 8 else {})


def damaged(name: str, count: int, base: str = "one") -> Iterator[Mutation]:
    """A file with damaged bytes and, where it is JSON or begins with it, with values that are out of place."""
    tree_edit = header_edit if name.endswith(".safetensors") else json_edit
    for seed in range(count):
        yield Mutation("damaged", f"{name} #{seed}", bytes_edit(name, lambda data, s=seed: damage(data, s)), base)
        if not name.endswith(".py"):
            edit = tree_edit(name, lambda tree, s=seed: misplaced(tree, s))
            yield Mutation("misplaced", f"{name} #{seed}", edit, base)


class Bomb:
    """Creates the canary when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder.parent / CANARY)

    def __reduce__(self) -> Any:
        return os.mknod, (self.path,)
