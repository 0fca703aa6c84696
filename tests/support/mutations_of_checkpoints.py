"""Ways to spoil other libraries' checkpoints: every field of their JSON, and pickles, opcode by opcode.

`slow/fuzz_checkpoints.py` tries them. See `mutations.py` for the ways to spoil a package.
"""

from __future__ import annotations

import itertools
import json
import os
import pickle
import pickletools
import random
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hub_tools.convert import adapters, heads
from hub_tools.package import config
from support import mutations, spoiling
from support.spoiling import CANARY, CODE, CONFIG, GENERATION, INDEX, RECORD, Mutation, header_edit, json_edit

ADAPTER_CONFIG, ADAPTER, PICKLE = "adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin"
HOSTILE: tuple[Any, ...] = (
    *spoiling.HOSTILE, -1e300, "../outside", "/etc/passwd", "\x1b[2J\u202e", ["x"] * 1000,
    {"x" * 1000: 1}, [[1]], False,
)  # fmt: skip
CONFIG_FIELDS = (
    *config.CONFIG, *heads.FIELDS, *config.ALIASES, "attribute_map", "quantization_config", "pruned_heads", "to_dict",
    "__class__",
)  # fmt: skip
ADAPTER_FIELDS = (
    *adapters.FIELDS, *sorted(adapters.OF_NO_EFFECT), "megatron_config", "layer_replication", "target_parameters",
    "an_option_of_tomorrow", "__class__",
)  # fmt: skip


def of_checkpoints() -> Iterator[Mutation]:
    """For a checkpoint in safetensors with a tokenizer and generation settings."""
    for field in CONFIG_FIELDS:
        for value in HOSTILE:
            yield _set(CONFIG, field, value)
    yield from mutations.wrong_fields()
    yield from mutations.tokenizers()
    yield from mutations.not_json((CONFIG, GENERATION, "tokenizer_config.json"))
    for number, field in enumerate(("temperature", "eos_token_id", "watermarking_config", "custom_generate", "x")):
        for value in random.Random(number).sample(HOSTILE, 8):
            yield _set(GENERATION, field, value)
    for name in ("chat_template.jinja", "config.json", "tokenizer_config.json", "model.safetensors"):
        yield Mutation("link", name, lambda folder, n=name: _link(folder, n))
    for field in ("vocab", "merges", "vocab_file", "merges_file", "tokenizer_file", "bpe_codes_file", "name_or_path"):
        yield _set("tokenizer_config.json", field, "../outside.json")
    yield from _headers("model.safetensors")
    yield from mutations.special_files((CONFIG, GENERATION, "tokenizer.json", "tokenizer_config.json"))
    for mutation in (*mutations.damaged_files(), *mutations.lying_headers()):
        if mutation.base == "one" and not mutation.name.startswith((RECORD, *CODE)):
            yield mutation


def of_shards() -> Iterator[Mutation]:
    """For a checkpoint in shards."""
    yield from mutations.wrong_shards()
    yield from mutations.not_json((INDEX,))
    shard = "model-00001-of-00003.safetensors"
    yield from mutations.special_files((INDEX, shard))


def of_adapters() -> Iterator[Mutation]:
    """For an adapter's folder."""
    for field in ADAPTER_FIELDS:
        for value in HOSTILE:
            yield _set(ADAPTER_CONFIG, field, value)
    yield Mutation(
        "adapter",
        "megatron",
        json_edit(ADAPTER_CONFIG, lambda c: c.update(megatron_config={"a": 1}, megatron_core="armed.payload")),
    )
    yield from _headers(ADAPTER)
    yield from mutations.special_files((ADAPTER_CONFIG, ADAPTER, "value_head.safetensors"))
    yield from mutations.not_json((ADAPTER_CONFIG,))


def of_pickles(count: int) -> Iterator[Mutation]:
    """`count` spoiled pickles, each in an archive that is whole, and a quarter as many spoiled archives."""
    for seed in range(count):
        yield Mutation("pickle", f"opcodes {seed}", lambda folder, s=seed: _repickle(folder / PICKLE, s))
    for seed in range(count // 4):
        yield Mutation("archive", f"bytes {seed}", lambda folder, s=seed: _spoil_archive(folder / PICKLE, s))
    yield Mutation("pickle", "runs", lambda folder: _arm(folder))


def _set(file: str, field: str, value: Any) -> Mutation:
    return Mutation(
        file.removesuffix(".json"),
        f"{field}={json.dumps(value)[:30]}",
        json_edit(file, lambda c: c.update({field: value})),
    )


def _link(folder: Path, name: str) -> None:
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    if (folder / name).exists():
        (folder / name).rename(outside / name)
    else:
        (outside / name).write_text("a secret")
    (folder / name).symlink_to(outside / name)


def _headers(name: str) -> Iterator[Mutation]:
    """Every field of a few entries of a safetensors header, with hostile values."""
    for number in range(3):
        for key in ("dtype", "shape", "data_offsets"):
            for value in (*HOSTILE, [0], [-1, 4], [0, 1 << 62], "F8_E4M3", "I64", [1 << 40, 1 << 40]):

                def edit(header: dict[str, Any], number: int = number, key: str = key, value: Any = value) -> None:
                    entries = [entry for name, entry in sorted(header.items()) if name != "__metadata__"]
                    entries[number * len(entries) // 3][key] = value

                yield Mutation("header", f"{number}.{key}={json.dumps(value)[:30]}", header_edit(name, edit))


def _records(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {entry.filename: archive.read(entry) for entry in archive.infolist()}


def _write(file: Path, records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


GLOBALS = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch\nload\n",
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n",
    b"ctorch\nHalfStorage\n", b"ctorch._tensor\n_rebuild_from_type_v2\n", b"carmed\npayload\n",
)  # fmt: skip
PIECES = (
    *GLOBALS, b"N", b"}", b")", b"]", b"K\x00", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"(", b"t",
    b"R", b"b", b"Q", b"0", b"2", b"\x85", b"\x86", b"u", b"s", b"r\xff\xff\xff\x7f", b"h\x00", b"h\x05", b".", b"1",
    b"X\xff\xff\xff\xff", b"\x8d" + b"\xff" * 8, b"G\x7f\xf0" + b"\0" * 6, b"\x93", b"\x81", b"c__main__\nUnpickler\n",
)  # fmt: skip


def _repickle(file: Path, seed: int) -> None:
    """Replace, drop, repeat or insert one to three opcodes of the pickle."""
    rng, records = random.Random(seed), _records(file)
    name = next(name for name in records if name.endswith("/data.pkl"))
    data = records[name]
    places = [place for _, _, place in pickletools.genops(data)] + [len(data)]
    parts = [data[place:end] for place, end in itertools.pairwise(places)]
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(1, len(parts))
        action = rng.randrange(5)
        if action == 0:
            parts[at] = rng.choice(PIECES)
        elif action == 1:
            parts.insert(at, rng.choice(PIECES))
        elif action == 2:
            del parts[at]
        elif action == 3:
            parts.insert(at, rng.choice(parts))
        else:
            numbers = [i for i, part in enumerate(parts) if part[:1] in b"KMJ" and len(part) > 1]
            at = rng.choice(numbers)
            parts[at] = b"J" + struct.pack("<i", rng.choice((-1, 0, 1, 7, 1 << 20, (1 << 31) - 1)))
    records[name] = b"".join(parts)
    _write(file, records)


def _spoil_archive(file: Path, seed: int) -> None:
    """Flip bytes, cut, append, compress, or swap the records of the archive."""
    rng, data = random.Random(seed), bytearray(file.read_bytes())
    action = seed % 6
    if action == 0:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif action == 1:  # at the end, where the archive's directory is
        data[-rng.randrange(1, 600)] ^= 1 << rng.randrange(8)
    elif action == 2:
        del data[rng.randrange(len(data)) :]
    elif action == 3:
        data += rng.choice((b"PK\x05\x06", b"PK\x05\x06" + b"\0" * 18, b"PK\x01\x02" + b"\0" * 60, b"\0" * 30))
    elif action == 4:
        _write(file, _records(file), zipfile.ZIP_DEFLATED)
        return
    else:
        records = _records(file)
        one, other = rng.sample(sorted(records), 2)
        records[one], records[other] = records[other], records[one]
        _write(file, records)
        return
    file.write_bytes(bytes(data))


def _arm(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mknod, (str(folder.parent / CANARY),)

    records = _records(folder / PICKLE)
    name = next(name for name in records if name.endswith("/data.pkl"))
    records[name] = pickle.dumps({"a": Bomb()})
    _write(folder / PICKLE, records)
