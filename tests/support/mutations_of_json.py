"""Ways to spoil a package's JSON: fields of the wrong type or size, fields that would fetch or run something, and files
that are no JSON. `mutations.py` puts them on its list.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hub_tools.package import config
from support.spoiling import (
    CONFIG,
    GENERATION,
    INDEX,
    MODELING,
    RECORD,
    TOKENIZER,
    TOKENIZER_CONFIG,
    Mutation,
    bytes_edit,
    json_edit,
)

DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
HOSTILE: tuple[Any, ...] = (
    -1, 0, 1, 3, 1 << 31, 10**9, 10**30, 10**400, 1.5, 1e308, "", "16", "x" * 1000, "\ud800", "a\0b", None, True, [],
    [16], {}, {"a": {"b": []}}, DEEP, "other/repo", "/etc/passwd", "armed.Tokenizer", {"AutoModel": "armed.Model"},
)  # fmt: skip
# Fields that no table has: they would run something, name other files, or hide a method.
ODD = (
    "to_dict", "validate", "from_dict", "save_pretrained", "__class__", "__dict__", "_commit_hash", "name_or_path",
    "text_config", "sub_configs", "adapter_config", "custom_generate", "assistant_model", "cache_config", "vocab_file",
    "tokenizer_file", "init_inputs", "backend", "torchscript", "base_model_tp_plan", *config.REFUSED, *config.ALIASES,
)  # fmt: skip


def wrong_fields() -> Iterator[Mutation]:
    """Every field that is known, and some that are not, with values of the wrong type or size, or gone."""
    for file, table in ((CONFIG, config.CONFIG), (GENERATION, config.GENERATION), (TOKENIZER_CONFIG, config.TOKENIZER)):
        for number, field in enumerate((*table, *ODD)):
            for value in random.Random(number).sample(HOSTILE, 3 if field in table else 1):
                edit = json_edit(file, lambda c, f=field, v=value: c.update({f: v}))
                yield Mutation("wrong field", f"{file}: {field}={json.dumps(value)[:20]}", edit)
            if field in table:
                yield Mutation("wrong field", f"no {field}", json_edit(file, lambda c, f=field: c.pop(f, None)))


def not_json() -> Iterator[Mutation]:
    texts: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda d: b"",
        "space": lambda d: b" \n",
        "byte order mark": lambda d: b"\xef\xbb\xbf" + d,
        "utf-16": lambda d: d.decode().encode("utf-16"),
        "latin-1": lambda d: d.replace(b"{", b'{"\xe9": 1, ', 1),
        "surrogate": lambda d: d.replace(b"{", b'{"\\ud800": 1, ', 1),
        "zeros": lambda d: b"\0" * 100,
        "deep lists": lambda d: b"[" * 200_000,
        "deep objects": lambda d: d.rstrip()[:-1] + b',"x":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        "huge integer": lambda d: d.rstrip()[:-1] + b',"x":' + b"9" * 5000 + b"}",
        "huge float": lambda d: d.rstrip()[:-1] + b',"x":1e999}',
        "NaN": lambda d: d.rstrip()[:-1] + b',"x":NaN}',
        "400 lists": lambda d: d.rstrip()[:-1] + b',"x":' + b"[" * 400 + b"]" * 400 + b"}",
        "integer that no float holds": lambda d: d.rstrip()[:-1] + b',"x":1' + b"0" * 400 + b"}",
        "key twice, the last of many": lambda d: (
            d.rstrip()[:-1] + b"," + b",".join(b'"%d":0' % n for n in (*range(60_000), 59_999)) + b"}"
        ),
        "key twice": lambda d: d.rstrip()[:-1] + b',"x":1,"x":2}',
        "a list": lambda d: b"[" + d + b"]",
        "a comment": lambda d: d + b"// x",
        "two values": lambda d: d + d,
        "binary": lambda d: random.Random(0).randbytes(2000),
    }
    for name in (CONFIG, GENERATION, RECORD, TOKENIZER_CONFIG, TOKENIZER, INDEX):
        for what, edit in texts.items():
            yield Mutation("not JSON", f"{name}: {what}", bytes_edit(name, edit), "shards" if name == INDEX else "one")

    def sparse(folder: Path, name: str) -> None:
        with open(folder / name, "ab") as file:
            file.truncate(1 << 40)

    for name in (CONFIG, GENERATION, RECORD, TOKENIZER_CONFIG, TOKENIZER, MODELING):
        yield Mutation("oversized", f"{name}: a TiB", lambda folder, n=name: sparse(folder, n))


def tokenizers() -> Iterator[Mutation]:
    for name in (
        "T5Tokenizer",
        "BertTokenizer",
        "LlamaTokenizer",
        "RagTokenizer",
        "BigBirdTokenizer",
        "GPT2Tokenizer",
        "Wav2Vec2CTCTokenizer",
        "../x",
        "",
        7,
    ):
        edit = json_edit(TOKENIZER_CONFIG, lambda c, n=name: c.update(tokenizer_class=n))
        yield Mutation("tokenizer", f"class {name!r}", edit)
    for file in ("special_tokens_map.json", "added_tokens.json"):
        held: tuple[dict[str, Any], ...] = (
            *({field: "../outside"} for field in ("vocab", "merges", "vocab_file", "merges_file", "tokenizer_file")),
            *({"eos_token": value} for value in HOSTILE),
            {"<|endoftext|>": 0}, {"a": 1 << 40}, {"x" * 5000: 1}, {"init_inputs": ["../outside"]},
        )  # fmt: skip
        for fields in held:

            def put(folder: Path, file: str = file, fields: dict[str, Any] = fields) -> None:
                (folder / file).write_text(json.dumps(fields))

            yield Mutation("tokenizer", f"{file}: {json.dumps(fields)[:50]}", put)
    for id in ("9" * 5000, "9" * 12, "\u0663", "-1", "x"):
        edit = json_edit(TOKENIZER_CONFIG, lambda c, i=id: c.update(added_tokens_decoder={i: {"content": "a"}}))
        yield Mutation("tokenizer", f"added_tokens_decoder of {id[:12]!r}", edit)
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    padding = {"direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    shortening = {"strategy": "LongestFirst", "direction": "Right"}
    parts: dict[str, Callable[[dict[str, Any]], Any]] = {
        "no model": lambda t: t.pop("model"),
        "empty": lambda t: t.clear(),
        "unknown model": lambda t: t["model"].update(type="Armed"),
        "negative id": lambda t: t["model"]["vocab"].update(x=-1),
        "huge id": lambda t: t["model"]["vocab"].update(x=(1 << 32) - 1),
        "too huge id": lambda t: t["model"]["vocab"].update(x=1 << 40),
        "merges of nothing": lambda t: t["model"].update(merges=[["no", "such"]]),
        "merges of one": lambda t: t["model"].update(merges=["x"]),
        "no unknown": lambda t: t["model"].update(unk_token="none"),
        "added tokens": lambda t: t.update(added_tokens=[{"id": 1 << 31, "content": ""}]),
        "bad expression": lambda t: t.update(pre_tokenizer={**split, "pattern": {"Regex": "(((("}}),
        "slow expression": lambda t: t.update(pre_tokenizer={**split, "pattern": {"Regex": "(a+)+$"}}),
        "padding": lambda t: t.update(padding={**padding, "strategy": {"Fixed": 1 << 60}}),
        "truncation": lambda t: t.update(truncation={"max_length": 1, "stride": 5, **shortening}),
    }  # fmt: skip
    for what, edit in parts.items():
        yield Mutation("tokenizer", what, json_edit(TOKENIZER, edit))
    for name in (
        "vocab.json",
        "merges.txt",
        "spiece.model",
        "tokenizer.model",
        "added_tokens.json",
        "special_tokens_map.json",
    ):
        yield Mutation(
            "tokenizer",
            f"{name} of noise",
            lambda f, n=name: (f / n).write_bytes(random.Random(1).randbytes(999)) and None,
        )
    yield Mutation("tokenizer", "no tokenizer.json", lambda f: (f / TOKENIZER).unlink())
