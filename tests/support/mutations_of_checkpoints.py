"""Ways to spoil other libraries' checkpoints: every field of their JSON, headers, and the archives of pickles.

`slow/fuzz_checkpoints.py` tries them. See `mutations.py` for the ways to spoil a package.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hub_tools.convert import adapters, heads
from hub_tools.package import config
from support import mutations, spoiling
from support.spoiling import CODE, CONFIG, GENERATION, INDEX, RECORD, Mutation, header_edit, json_edit

ADAPTER_CONFIG, ADAPTER, PICKLE = "adapter_config.json", "adapter_model.safetensors", "pytorch_model.bin"
HOSTILE: tuple[Any, ...] = (
    *spoiling.HOSTILE, -1e300, "../outside", "/etc/passwd", "\x1b[2J\u202e", ["x"] * 1000,
    {"x" * 1000: 1}, [[1]], False,
)  # fmt: skip
CONFIG_FIELDS = (
    *config.CONFIG, *heads.FIELDS, "attribute_map", "quantization_config", "pruned_heads", "to_dict",
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
    yield from _headers(ADAPTER)
    yield from mutations.special_files((ADAPTER_CONFIG, ADAPTER, "value_head.safetensors"))
    yield from mutations.not_json((ADAPTER_CONFIG,))


def of_pickles(count: int) -> Iterator[Mutation]:
    """Archives of `torch.save` with bits flipped, half of them at the end, where the directory is; cut; appended to."""
    for seed in range(count):
        yield Mutation("archive", f"bytes {seed}", lambda folder, s=seed: _spoil(folder / PICKLE, s))


def _set(file: str, field: str, value: Any) -> Mutation:
    return Mutation(
        file.removesuffix(".json"),
        f"{field}={json.dumps(value)[:30]}",
        json_edit(file, lambda c: c.update({field: value})),
    )


def _headers(name: str) -> Iterator[Mutation]:
    """Every field of a few entries of a safetensors header, with hostile values."""
    for number in range(3):
        for key in ("dtype", "shape", "data_offsets"):
            for value in (*HOSTILE, [0], [-1, 4], [0, 1 << 62], "F8_E4M3", "I64", [1 << 40, 1 << 40]):

                def edit(header: dict[str, Any], number: int = number, key: str = key, value: Any = value) -> None:
                    entries = [entry for name, entry in sorted(header.items()) if name != "__metadata__"]
                    entries[number * len(entries) // 3][key] = value

                yield Mutation("header", f"{number}.{key}={json.dumps(value)[:30]}", header_edit(name, edit))


def _spoil(file: Path, seed: int) -> None:
    rng, data = random.Random(seed), bytearray(file.read_bytes())
    action = seed % 4
    if action < 2:
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(-600 if action else -len(data), 0)] ^= 1 << rng.randrange(8)
    elif action == 2:
        del data[rng.randrange(len(data)) :]
    else:
        data += rng.choice((b"PK\x05\x06", b"PK\x05\x06" + b"\0" * 18, b"PK\x01\x02" + b"\0" * 60, b"\0" * 30))
    file.write_bytes(bytes(data))
