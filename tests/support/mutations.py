"""Ways to spoil a package: damaged, lying, linked, armed. Each is repeatable, and harmless to read about.

`mutations()` lists them; `fuzz_packages.py` applies them. Whatever would run code in them would create the file that
`CANARY` names, in the package's parent folder.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hub_tools.package import config
from support.spoiling import (
    CANARY,
    CODE,
    CONFIG,
    GENERATION,
    HOSTILE,
    INDEX,
    MODELING,
    RECORD,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    Bomb,
    Edit,
    Mutation,
    bytes_edit,
    damaged,
    header_edit,
    instead,
    json_edit,
    link_out,
    put,
)

# Fields that no table has: they would run something, name other files, or hide a method.
ODD = (
    "to_dict", "validate", "from_dict", "save_pretrained", "__class__", "__dict__", "_commit_hash", "name_or_path",
    "text_config", "sub_configs", "adapter_config", "custom_generate", "assistant_model", "cache_config", "vocab_file",
    "tokenizer_file", "init_inputs", "backend", "torchscript", "base_model_tp_plan", *config.REFUSED,
)  # fmt: skip


def mutations() -> list[Mutation]:
    """All of them, in the same order on every run."""
    makers = (
        damaged_files, lying_headers, wrong_weights, wrong_shards, wrong_fields, not_json, tokenizers, special_files,
        pickles, changed_code,
    )  # fmt: skip
    return [mutation for maker in makers for mutation in maker()]


def damaged_files() -> Iterator[Mutation]:
    for name in (WEIGHTS, CONFIG, GENERATION, RECORD, TOKENIZER, TOKENIZER_CONFIG):
        yield from damaged(name, 60)
    yield from damaged(MODELING, 10)
    yield from damaged(INDEX, 40, "shards")


def lying_headers() -> Iterator[Mutation]:
    for length in (0, 1, 2, 1 << 16, 17 << 20, 100 << 20, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        edit = bytes_edit(WEIGHTS, lambda data, n=length: struct.pack("<Q", n) + data[8:])
        yield Mutation("lying header", f"length {length}", edit)
    empty = {f"x{number}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(5000)}
    yield Mutation("lying header", "empty tensors", header_edit(WEIGHTS, lambda header: header.update(empty)))


def wrong_weights() -> Iterator[Mutation]:
    import torch
    from safetensors.torch import load_file, save_file

    def tensors(edit: Callable[[dict[str, Any]], Any]) -> Edit:
        def apply(folder: Path) -> None:
            weights = load_file(folder / WEIGHTS)
            edit(weights)
            save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

        return apply

    changes: dict[str, Callable[[Any], Any]] = {
        "not a number": lambda tensor: tensor * float("nan"),
        "infinite": lambda tensor: tensor / 0,
        "float64": lambda tensor: tensor.double(),
        "integers": lambda tensor: tensor.to(torch.int8),
        "of two": lambda tensor: tensor.expand(2, *tensor.shape).contiguous(),
        "another model's": lambda tensor: tensor + 1,
        "empty": lambda tensor: tensor[:0],
    }
    for name in ("transformer.wte.weight", "transformer.ln_f.bias", "v_head.summary.weight"):
        for what, change in changes.items():
            edit = tensors(lambda weights, n=name, c=change: weights.update({n: c(weights[n])}))
            yield Mutation("wrong tensors", f"{name} {what}", edit)
        yield Mutation("wrong tensors", f"{name} missing", tensors(lambda weights, n=name: weights.pop(n)))
    for name in ("transformer.h.7.ln_1.bias", "lm_head.weight"):
        more = tensors(lambda weights, n=name: weights.update({n: torch.ones(24, 16)}))
        yield Mutation("wrong tensors", f"{name} more", more)
    no_head = tensors(lambda weights: [weights.pop(name) for name in list(weights) if name.startswith("v_head.")])
    yield Mutation("wrong tensors", "no head", no_head)


def wrong_shards() -> Iterator[Mutation]:
    first, shard = "transformer.wte.weight", "model-00001-of-00002.safetensors"
    targets = (
        "../outside.safetensors", "/dev/zero", f"sub/{shard}", WEIGHTS, "pytorch_model.bin", f"{shard}\0", ".",
        "model-99999-of-99999.safetensors", "..\\outside.safetensors", f"{shard}/../../outside.safetensors",
        "\ud800.safetensors", "model-0000\u0661-of-00002.safetensors", f"./{shard}", *HOSTILE,
    )  # fmt: skip
    for target in targets:
        edit = json_edit(INDEX, lambda v, t=target: v["weight_map"].update({first: t}))
        yield Mutation("index", f"names {json.dumps(target)[:60]}", edit, "shards")
    many = json_edit(INDEX, lambda v: v["weight_map"].update({f"x{i}": shard for i in range(100_000)}))
    yield Mutation("index", "100,000 names", many, "shards")

    def shards(folder: Path) -> list[Path]:
        return sorted(folder.glob("model-*.safetensors"))

    files: dict[str, Edit] = {
        "first missing": lambda f: shards(f)[0].unlink(),
        "all missing": lambda f: [path.unlink() for path in shards(f)],
        "a file beside": lambda f: (f / WEIGHTS).write_bytes(shards(f)[0].read_bytes()),
        "link out": lambda f: link_out(f, shards(f)[0].name),
    }
    for what, move in files.items():
        yield Mutation("shards", what, move, "shards")


def wrong_fields() -> Iterator[Mutation]:
    """Every field that is known, and some that are not, with values of the wrong type or size, or gone."""
    for file, table in ((CONFIG, config.CONFIG), (GENERATION, config.GENERATION), (TOKENIZER_CONFIG, config.TOKENIZER)):
        for number, field in enumerate((*table, *ODD)):
            for value in random.Random(number).sample(HOSTILE, 3 if field in table else 1):
                edit = json_edit(file, lambda c, f=field, v=value: c.update({f: v}))
                yield Mutation("wrong field", f"{file}: {field}={json.dumps(value)[:20]}", edit)
            if field in table:
                yield Mutation("wrong field", f"no {field}", json_edit(file, lambda c, f=field: c.pop(f, None)))


def not_json(
    files: Sequence[str] = (CONFIG, GENERATION, RECORD, TOKENIZER_CONFIG, TOKENIZER, INDEX),
) -> Iterator[Mutation]:
    def more(text: bytes) -> Callable[[bytes], bytes]:
        return lambda data: data.rstrip()[:-1] + b"," + text + b"}"

    texts: dict[str, Callable[[bytes], bytes]] = {
        "utf-16": lambda data: data.decode().encode("utf-16"),
        "surrogate": more(b'"\\ud800": 1'),
        "deep objects": more(b'"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        "huge integer": more(b'"x":' + b"9" * 5000),
        "integer that no float holds": more(b'"x":1' + b"0" * 400),
        "huge float": more(b'"x":1e999'),
        "NaN": more(b'"x":NaN'),
    }
    for name in files:
        base = "shards" if name == INDEX else "one"
        for what, edit in texts.items():
            yield Mutation("not JSON", f"{name}: {what}", bytes_edit(name, edit), base)
        yield Mutation("not JSON", f"{name}: a TiB", lambda folder, n=name: os.truncate(folder / n, 1 << 40), base)


def tokenizers() -> Iterator[Mutation]:
    for name in ("T5Tokenizer", "BertTokenizer", "LlamaTokenizer", "RagTokenizer", "BigBirdTokenizer", "GPT2Tokenizer"):
        edit = json_edit(TOKENIZER_CONFIG, lambda c, n=name: c.update(tokenizer_class=n))
        yield Mutation("tokenizer", f"class {name}", edit)
    for file in ("special_tokens_map.json", "added_tokens.json"):
        for field in ("vocab_file", "tokenizer_file", "eos_token", "init_inputs", "x" * 5000):
            for value in HOSTILE:
                edit = put(file, json.dumps({field: value}))
                yield Mutation("tokenizer", f"{file}: {field[:20]}={json.dumps(value)[:30]}", edit)
    for id in ("9" * 5000, "9" * 12, "\u0663", "-1", "x"):
        edit = json_edit(TOKENIZER_CONFIG, lambda c, i=id: c.update(added_tokens_decoder={i: {"content": "a"}}))
        yield Mutation("tokenizer", f"added_tokens_decoder of {id[:12]!r}", edit)
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    for expression in ("((((", "(a+)+$"):
        edit = json_edit(TOKENIZER, lambda t, e=expression: t.update(pre_tokenizer={**split, "pattern": {"Regex": e}}))
        yield Mutation("tokenizer", f"expression {expression}", edit)
    for name in ("vocab.json", "merges.txt", "spiece.model", "added_tokens.json", "special_tokens_map.json"):
        yield Mutation("tokenizer", f"{name} of noise", put(name, random.Random(1).randbytes(999)))
    yield Mutation("tokenizer", "no tokenizer.json", lambda folder: (folder / TOKENIZER).unlink())


def special_files(
    names: Sequence[str] = (CONFIG, WEIGHTS, GENERATION, TOKENIZER, TOKENIZER_CONFIG, RECORD, MODELING, "README.md"),
) -> Iterator[Mutation]:
    """Links, devices, pipes, sockets and folders in the places of files."""

    kinds: dict[str, Callable[[Path], Any]] = {
        "link to itself": lambda path: path.symlink_to(path.name),
        "link to nothing": lambda path: path.symlink_to("nothing"),
        "link to a device": lambda path: path.symlink_to("/dev/zero"),
        "link to this process": lambda path: path.symlink_to("/proc/self/environ"),
        "pipe": os.mkfifo,
        "folder": Path.mkdir,
        "missing": lambda path: None,
    }
    for name in names:
        yield Mutation("special file", f"{name}: link out", lambda folder, n=name: link_out(folder, n))
        for what, make in kinds.items():
            yield Mutation("special file", f"{name}: {what}", instead(name, make))


def pickles() -> Iterator[Mutation]:
    beside = ("pytorch_model.bin", "model.pt", "training_args.bin", "vocab.pkl", "x.PKL", "tokenizer.pickle")
    for name in (*beside, WEIGHTS, CONFIG, TOKENIZER, GENERATION, RECORD):
        for others in ("beside", "alone"):

            def edit(folder: Path, name: str = name, others: str = others) -> None:
                if others == "alone":
                    (folder / WEIGHTS).unlink()
                (folder / name).write_bytes(pickle.dumps(Bomb(folder)))

            yield Mutation("pickle", f"{name} {others}", edit)


def changed_code() -> Iterator[Mutation]:
    def arm(folder: Path) -> str:
        return f"\nopen({str(folder.parent / CANARY)!r}, 'w')\n"

    for name in CODE:
        yield Mutation("code", f"{name} appended", lambda f, n=name: (f / n).write_text((f / n).read_text() + arm(f)))
        yield Mutation("code", f"{name} one space more", bytes_edit(name, lambda data: data + b" "))
        yield Mutation("code", f"{name} missing", lambda f, n=name: (f / n).unlink())
    beside = (
        "__init__.py", "armed.py", "setup.py", "sitecustomize.py", "torch.py", "transformers.py", "armed.pth",
        "custom_generate/generate.py", "sub/modeling_gpt2_value.py", "__pycache__/modeling_gpt2_value.cpython-311.pyc",
        "modeling_gpt2_value.so", *CODE,
    )  # fmt: skip
    for name in beside:
        yield Mutation("code", f"{name} beside", lambda folder, n=name: put(n, arm(folder))(folder))
    adapter = (
        '{"base_model_name_or_path": "../outside", "peft_type": "LORA", "auto_mapping": {"parent_library": "armed"}}'
    )
    yield Mutation("code", "adapter_config.json beside", put("adapter_config.json", adapter))
