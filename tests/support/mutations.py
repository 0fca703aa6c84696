"""Ways to spoil a package: truncated, flipped, lying, linked, armed. Each is repeatable, and harmless to read about.

`mutations()` lists them; `fuzz_packages.py` applies them. Whatever would run code in them would create the file that
`CANARY` names, in the package's parent folder.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from support.mutations_of_json import not_json, tokenizers, wrong_fields
from support.spoiling import (
    CANARY,
    CODE,
    CONFIG,
    GENERATION,
    INDEX,
    MODELING,
    RECORD,
    TOKENIZER,
    TOKENIZER_CONFIG,
    WEIGHTS,
    Bomb,
    Edit,
    Mutation,
    append,
    bytes_edit,
    data_of,
    flip,
    header_edit,
    json_edit,
    link_out,
    replace_by_folder,
)


def mutations() -> list[Mutation]:
    """All of them, in the same order on every run."""
    makers = (
        truncated, flipped, spliced, lying_headers, wrong_weights, wrong_shards, wrong_fields, not_json, tokenizers,
        special_files, pickles, changed_code,
    )  # fmt: skip
    return [mutation for maker in makers for mutation in maker()]


def truncated() -> Iterator[Mutation]:
    places = {WEIGHTS: (0, 1, 7, 8, 9, 100, 1000, 3000, -5000, -1000, -64, -4, -1)}
    texts = (CONFIG, GENERATION, RECORD, TOKENIZER, TOKENIZER_CONFIG, *CODE)
    places |= dict.fromkeys(texts, (0, 1, 30, -100, -3, -1))
    for name, lengths in places.items():
        for length in lengths:
            yield Mutation("truncated", f"{name} [:{length}]", bytes_edit(name, lambda data, n=length: data[:n]))
    for length in (0, 1, 50, -30, -2):
        yield Mutation("truncated", f"{INDEX} [:{length}]", bytes_edit(INDEX, lambda d, n=length: d[:n]), "shards")


def flipped() -> Iterator[Mutation]:
    """One bit, anywhere in the file."""
    counts = {CONFIG: 60, GENERATION: 10, RECORD: 15, TOKENIZER: 20, TOKENIZER_CONFIG: 10, MODELING: 5, CODE[0]: 5}
    for name, count in counts.items():
        for seed in range(count):
            yield Mutation("flipped bit", f"{name} #{seed}", bytes_edit(name, lambda d, s=seed: flip(d, s, 0, len(d))))
    for seed in range(60):
        yield Mutation(
            "flipped bit", f"header #{seed}", bytes_edit(WEIGHTS, lambda d, s=seed: flip(d, s, 0, data_of(d)))
        )
    for seed in range(30):
        edit = bytes_edit(WEIGHTS, lambda d, s=seed: flip(d, s, data_of(d), len(d)))
        yield Mutation("flipped bit", f"data #{seed}", edit)
    for seed in range(20):
        yield Mutation(
            "flipped bit", f"index #{seed}", bytes_edit(INDEX, lambda d, s=seed: flip(d, s, 0, len(d))), "shards"
        )


def spliced() -> Iterator[Mutation]:
    """A few bytes removed, doubled or replaced, in any file."""

    def splice(folder: Path, seed: int) -> None:
        rng = random.Random(seed)
        path = rng.choice(sorted(folder.iterdir()))
        data = bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 4)):
            begin = rng.randrange(len(data))
            end = min(len(data), begin + rng.randint(1, 40))
            data[begin:end] = rng.choice([b"", data[begin:end] * 2, rng.randbytes(end - begin), b"9" * 30, b'"', b"{["])
        path.write_bytes(data)

    for seed in range(60):
        yield Mutation("spliced", f"#{seed}", lambda folder, s=seed: splice(folder, s), ("one", "shards")[seed % 2])


def lying_headers() -> Iterator[Mutation]:
    for length in (0, 1, 2, 1 << 16, 17 << 20, 100 << 20, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1):
        edit = bytes_edit(WEIGHTS, lambda d, n=length: struct.pack("<Q", n) + d[8:])
        yield Mutation("lying header", f"length {length}", edit)

    def sparse(folder: Path) -> None:
        """A header of 32 MiB in a file of a TiB that takes no space."""
        with open(folder / WEIGHTS, "r+b") as file:
            file.write(struct.pack("<Q", 32 << 20))
            file.truncate(1 << 40)

    yield Mutation("lying header", "sparse TiB", sparse)
    name = "transformer.wte.weight"
    entries: dict[str, dict[str, Any]] = {
        "huge shape": {"shape": [1 << 62, 1 << 62]},
        "no shape": {"shape": None},
        "shape of 1000": {"shape": [1] * 1000},
        "transposed": {"shape": [16, 24]},
        "negative offsets": {"data_offsets": [-1536, 0]},
        "unknown dtype": {"dtype": "F8_E4M3"},
        "half the dtype": {"dtype": "F16"},
        "integers": {"dtype": "I32"},
        "one key more": {"evil": 1},
    }
    for what, entry in entries.items():
        yield Mutation("lying header", what, header_edit(lambda h, e=entry: h[name].update(e)))
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    heads: dict[str, Callable[[dict[str, Any]], Any]] = {
        "overlap": lambda h: h[name].update(data_offsets=h["transformer.h.0.attn.c_attn.weight"]["data_offsets"]),
        "missing entry": lambda h: h.pop(name),
        "no entries": lambda h: h.clear(),
        "no metadata": lambda h: h.pop("__metadata__"),
        "other framework": lambda h: h.update(__metadata__={"format": "flax"}),
        "odd name": lambda h: h.update({"../../" + name: h.pop(name)}),
        "empty tensors": lambda h: h.update({f"x{i}": dict(empty) for i in range(5000)}),
        "key twice": lambda h: json.dumps(h)[:-1].encode() + b"," + json.dumps({name: h[name]})[1:].encode(),
        "deep": lambda h: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "trailing spaces": lambda h: json.dumps(h).encode() + b" " * 64,
    }  # fmt: skip
    for what, edit in heads.items():
        yield Mutation("lying header", what, header_edit(edit))


def wrong_weights() -> Iterator[Mutation]:
    import torch

    def tensors(edit: Callable[[dict[str, Any]], Any]) -> Edit:
        from safetensors.torch import load_file, save_file

        def apply(folder: Path) -> None:
            weights = load_file(folder / WEIGHTS)
            edit(weights)
            save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})

        return apply

    def fill(name: str, value: float) -> Callable[[dict[str, Any]], Any]:
        return lambda weights: weights[name].view(-1)[-1:].fill_(value)

    for value in (float("nan"), float("inf"), -float("inf")):
        for name in ("transformer.wte.weight", "transformer.h.0.mlp.c_fc.bias", "v_head.summary.weight"):
            yield Mutation("not finite", f"{value} in {name}", tensors(fill(name, value)))
    head = "v_head.summary.weight"
    edits: dict[str, Callable[[dict[str, Any]], Any]] = {
        "no head": lambda w: [w.pop(name) for name in (head, "v_head.summary.bias")],
        "half a head": lambda w: w.pop(head),
        "missing layer norm": lambda w: w.pop("transformer.ln_f.bias"),
        "extra tensor": lambda w: w.update(evil=torch.zeros(3)),
        "extra layer": lambda w: w.update({"transformer.h.7.ln_1.bias": torch.zeros(16)}),
        "untied output": lambda w: w.update({"lm_head.weight": torch.ones(24, 16)}),
        "old masks": lambda w: w.update({"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16)}),
        "prefix lost": lambda w: [w.update({k.removeprefix("transformer."): w.pop(k)}) for k in list(w)],
        "head of two": lambda w: w.update({head: torch.zeros(2, 16)}),
        "head transposed": lambda w: w.update({head: torch.zeros(16, 1)}),
        "smaller vocabulary": lambda w: w.update({"transformer.wte.weight": torch.zeros(23, 16)}),
        "empty embedding": lambda w: w.update({"transformer.wpe.weight": torch.zeros(0, 16)}),
        "float64": lambda w: w.update({head: w[head].double()}),
        "int8": lambda w: w.update({head: w[head].to(torch.int8)}),
        "bool": lambda w: w.update({head: w[head].bool()}),
        "nothing": lambda w: w.clear(),
        "another model's": lambda w: [tensor.add_(1) for tensor in w.values()],
    }
    for what, edit in edits.items():
        yield Mutation("wrong tensors", what, tensors(edit))

    def long_context(folder: Path) -> None:
        """Small weights, consistent with their config, from which transformers 4 makes 4 GB of masks."""
        tensors(lambda w: w.update({"transformer.wpe.weight": torch.zeros(1 << 16, 16)}))(folder)
        json_edit(CONFIG, lambda c: c.update(n_positions=1 << 16))(folder)

    yield Mutation("wrong tensors", "65,536 positions", long_context)


def wrong_shards() -> Iterator[Mutation]:
    def index(edit: Callable[[dict[str, Any]], Any]) -> Edit:
        return json_edit(INDEX, lambda value: edit(value["weight_map"]))

    first = "transformer.wte.weight"
    targets: tuple[Any, ...] = (
        "../outside.safetensors", "/etc/passwd", "/dev/zero", "sub/model-00001-of-00002.safetensors", WEIGHTS,
        "pytorch_model.bin", "model-00001-of-00002.safetensors\0", "", ".", None, 7, ["x"],
        "model-99999-of-99999.safetensors", "..\\outside.safetensors", "file:///etc/passwd",
        "model-00001-of-00002.safetensors/../../outside.safetensors", "\ud800.safetensors", "x" * 5000, "CON",
        "model-0000\u0661-of-00002.safetensors", "model-00001-of-00002.safetensors:x",
        "./model-00001-of-00002.safetensors",
    )  # fmt: skip
    for target in targets:
        yield Mutation("index", f"names {target!r:.60}", index(lambda m, t=target: m.update({first: t})), "shards")
    whole: dict[str, Callable[[dict[str, Any]], Any]] = {
        "empty": lambda m: m.clear(),
        "one tensor less": lambda m: m.pop(first),
        "one tensor more": lambda m: m.update(evil=m[first]),
        "shards exchanged": lambda m: m.update({first: sorted(set(m.values()) - {m[first]})[0]}),
        "100,000 names": lambda m: m.update({f"x{i}": m[first] for i in range(100_000)}),
    }
    for what, edit in whole.items():
        yield Mutation("index", what, index(edit), "shards")
    yield Mutation("index", "weight_map is a list", json_edit(INDEX, lambda v: v.update(weight_map=[1])), "shards")

    def shards(folder: Path) -> list[Path]:
        return sorted(folder.glob("model-*.safetensors"))

    files: dict[str, Edit] = {
        "first missing": lambda f: shards(f)[0].unlink(),
        "last missing": lambda f: shards(f)[-1].unlink(),
        "all missing": lambda f: [path.unlink() for path in shards(f)] and None,
        "first twice": lambda f: shards(f)[1].write_bytes(shards(f)[0].read_bytes()) and None,
        "truncated": lambda f: os.truncate(shards(f)[0], 500),
        "a folder": lambda f: replace_by_folder(shards(f)[0]),
        "a file beside": lambda f: (f / WEIGHTS).write_bytes(shards(f)[0].read_bytes()) and None,
        "link out": lambda f: link_out(f, shards(f)[0].name),
    }
    for what, move in files.items():
        yield Mutation("shards", what, move, "shards")
    yield Mutation("shards", "index beside one file", lambda f: (f / INDEX).write_text('{"weight_map": {}}') and None)


def special_files(
    names: Sequence[str] = (CONFIG, WEIGHTS, GENERATION, TOKENIZER, TOKENIZER_CONFIG, RECORD, MODELING, "README.md"),
) -> Iterator[Mutation]:
    """Links, devices, pipes, sockets and folders in the places of files."""

    def instead(make: Callable[[Path], Any]) -> Callable[[str], Edit]:
        def of(name: str) -> Edit:
            def apply(folder: Path) -> None:
                (folder / name).unlink()
                make(folder / name)

            return apply

        return of

    def unix_socket(path: Path) -> None:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's address is short
        try:
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(path.name)
        finally:
            os.chdir(here)

    kinds: dict[str, Callable[[str], Edit]] = {
        "link out": lambda name: lambda folder: link_out(folder, name),
        "link to itself": instead(lambda path: path.symlink_to(path.name)),
        "link to nothing": instead(lambda path: path.symlink_to("nothing")),
        "link to a device": instead(lambda path: path.symlink_to("/dev/zero")),
        "link to this process": instead(lambda path: path.symlink_to("/proc/self/environ")),
        "pipe": instead(os.mkfifo),
        "socket": instead(unix_socket),
        "folder": instead(lambda path: path.mkdir()),
        "missing": instead(lambda path: None),
    }
    for what, make in kinds.items():
        for name in names:
            yield Mutation("special file", f"{name}: {what}", make(name))


def pickles() -> Iterator[Mutation]:
    def bomb(folder: Path) -> bytes:
        return pickle.dumps(Bomb(str(folder.parent / CANARY)))

    names = (
        "pytorch_model.bin",
        "model.pt",
        "training_args.bin",
        "vocab.pkl",
        "optimizer.pt",
        "x.PKL",
        "tokenizer.pickle",
    )
    for name in names:
        yield Mutation("pickle", f"{name} beside", lambda f, n=name: (f / n).write_bytes(bomb(f)) and None)
    for name in (*names, WEIGHTS):

        def alone(folder: Path, name: str = name) -> None:
            (folder / WEIGHTS).unlink()
            (folder / name).write_bytes(bomb(folder))

        yield Mutation("pickle", f"{name} for the weights", alone)
    for name in (CONFIG, TOKENIZER, GENERATION, RECORD):
        yield Mutation("pickle", f"as {name}", lambda f, n=name: (f / n).write_bytes(bomb(f)) and None)


def changed_code() -> Iterator[Mutation]:
    def arm(folder: Path) -> str:
        return f"open({str(folder.parent / CANARY)!r}, 'w')\n"

    for name in CODE:
        yield Mutation("code", f"{name} appended", lambda f, n=name: append(f / n, "\n" + arm(f)))
        yield Mutation("code", f"{name} replaced", lambda f, n=name: (f / n).write_text(arm(f)) and None)
        yield Mutation("code", f"{name} one space more", lambda f, n=name: append(f / n, " "))
        yield Mutation("code", f"{name} missing", lambda f, n=name: (f / n).unlink())
    beside = (
        "__init__.py", "armed.py", "setup.py", "sitecustomize.py", "conftest.py", "torch.py", "transformers.py",
        "custom_generate/generate.py", "sub/modeling_gpt2_value.py", "__pycache__/modeling_gpt2_value.cpython-311.pyc",
        "usercustomize.py", "armed.pth", "modeling_gpt2_value.so",
    )  # fmt: skip
    for name in beside:

        def put(folder: Path, name: str = name) -> None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(arm(folder))

        yield Mutation("code", f"{name} beside", put)
    adapter = (
        '{"base_model_name_or_path": "../outside", "peft_type": "LORA", "auto_mapping": {"parent_library": "armed"}}'
    )
    yield Mutation(
        "code", "adapter_config.json beside", lambda f: (f / "adapter_config.json").write_text(adapter) and None
    )
