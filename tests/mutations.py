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
from collections.abc import Callable, Iterator
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


def mutations() -> list[Mutation]:
    """All of them, in the same order on every run."""
    makers = (
        truncated, flipped, spliced, lying_headers, wrong_weights, wrong_shards, wrong_fields, armed_fields, not_json,
        generation_configs, tokenizers, special_files, pickles, changed_code,
    )  # fmt: skip
    return [mutation for maker in makers for mutation in maker()]


def truncated() -> Iterator[Mutation]:
    places = {WEIGHTS: (0, 1, 7, 8, 9, 100, 1000, 3000, -5000, -1000, -64, -4, -1)}
    texts = (CONFIG, GENERATION, RECORD, TOKENIZER, TOKENIZER_CONFIG, *CODE)
    places |= {name: (0, 1, 30, -100, -3, -1) for name in texts}
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
        "product overflows": {"shape": [1 << 32, 1 << 32]},
        "negative shape": {"shape": [-24, -16]},
        "fractional shape": {"shape": [24.0, 16]},
        "true in shape": {"shape": [True, 384]},
        "no shape": {"shape": None},
        "shape of 1000": {"shape": [1] * 1000},
        "digits": {"shape": [int("9" * 300), 1]},
        "transposed": {"shape": [16, 24]},
        "flat": {"shape": [384]},
        "backward offsets": {"data_offsets": [1536, 0]},
        "far offsets": {"data_offsets": [0, 1 << 60]},
        "negative offsets": {"data_offsets": [-1536, 0]},
        "three offsets": {"data_offsets": [0, 1, 2]},
        "text offsets": {"data_offsets": ["0", "1536"]},
        "unknown dtype": {"dtype": "F8_E4M3"},
        "dtype is a list": {"dtype": ["F32"]},
        "half the dtype": {"dtype": "F16"},
        "integers": {"dtype": "I32"},
        "one key more": {"evil": 1},
    }
    for what, entry in entries.items():
        yield Mutation("lying header", what, header_edit(lambda h, e=entry: h[name].update(e)))
    heads: dict[str, Callable[[dict[str, Any]], Any]] = {
        "overlap": lambda h: h[name].update(data_offsets=h["transformer.h.0.attn.c_attn.weight"]["data_offsets"]),
        "shared data": lambda h: h["transformer.h.0.ln_1.bias"].update(h["transformer.h.0.ln_2.bias"]),
        "missing entry": lambda h: h.pop(name),
        "no entries": lambda h: h.clear(),
        "no metadata": lambda h: h.pop("__metadata__"),
        "other framework": lambda h: h.update(__metadata__={"format": "flax"}),
        "metadata is a list": lambda h: h.update(__metadata__=["pt"]),
        "metadata of numbers": lambda h: h.update(__metadata__={"format": "pt", "n": 1}),
        "entry is a list": lambda h: h.update({name: [1, 2]}),
        "odd name": lambda h: h.update({"../../" + name: h.pop(name)}),
        "empty tensors": lambda h: h.update({f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(5000)}),
        "key twice": lambda h: json.dumps(h)[:-1].encode() + b"," + json.dumps({name: h[name]})[1:].encode(),
        "deep": lambda h: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "byte order mark": lambda h: b"\xef\xbb\xbf" + json.dumps(h).encode(),
        "leading space": lambda h: b"  " + json.dumps(h).encode(),
        "not utf-8": lambda h: json.dumps(h).encode().replace(b"wte", b"w\xffe"),
        "utf-16": lambda h: json.dumps(h).encode("utf-16"),
        "a list": lambda h: b"[1]",
        "nan": lambda h: json.dumps(h)[:-1].encode() + b',"x":NaN}',
        "trailing text": lambda h: json.dumps(h).encode() + b"x",
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
        "pytorch_model.bin", "model-00001-of-00002.safetensors\0", "", ".", None, 7, ["x"], "model-99999-of-99999.safetensors",
        "..\\outside.safetensors", "file:///etc/passwd", "model-00001-of-00002.safetensors/../../outside.safetensors",
    )  # fmt: skip
    for target in targets:
        yield Mutation("index", f"names {target!r}", index(lambda m, t=target: m.update({first: t})), "shards")
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


HOSTILE: tuple[Any, ...] = (
    -1, 0, 1, 3, 1 << 31, 10**30, 1.5, 1e308, "", "16", "x" * 1000, None, True, [], [16], {}, {"a": {"b": []}},
)  # fmt: skip


def wrong_fields() -> Iterator[Mutation]:
    """Every field of GPT-2's config with values of the wrong type or size."""
    fields = (
        "vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner", "activation_function", "resid_pdrop",
        "embd_pdrop", "attn_pdrop", "layer_norm_epsilon", "initializer_range", "summary_type", "summary_use_proj",
        "summary_activation", "summary_proj_to_labels", "summary_first_dropout", "summary_last_dropout",
        "scale_attn_weights", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
        "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention", "detach_value_head",
        "value_head_initializer_range", "num_labels", "id2label", "label2id", "architectures", "dtype",
        "transformers_version", "model_type", "auto_map",
    )  # fmt: skip
    for number, field in enumerate(fields):
        for value in random.Random(number).sample(HOSTILE, 4):
            yield Mutation(
                "wrong field",
                f"{field}={str(value)[:20]}",
                json_edit(CONFIG, lambda c, f=field, v=value: c.update({f: v})),
            )
        yield Mutation("wrong field", f"no {field}", json_edit(CONFIG, lambda c, f=field: c.pop(f, None)))


def armed_fields() -> Iterator[Mutation]:
    """Fields with which a loader would fetch or run something, and names that hide methods."""
    maps: tuple[Any, ...] = (
        {"AutoModel": "other/repo--modeling_gpt2_value.GPT2ValueModel"},
        {"AutoConfig": "other/repo--configuration_gpt2_value.GPT2ValueConfig"},
        {"AutoModel": "../armed.GPT2ValueModel"},
        {"AutoModel": "armed.GPT2ValueModel"},
        {"AutoModel": "os.system"},
        {"AutoTokenizer": ["armed.Tokenizer", None]},
        {"AutoModel": ["modeling_gpt2_value.GPT2ValueModel"]},
        {"AutoModel": None},
    )
    for value in maps:
        yield Mutation("auto_map", str(value)[:60], json_edit(CONFIG, lambda c, v=value: c["auto_map"].update(v)))
    fields: dict[str, Any] = {
        "attn_implementation": "other/kernel",
        "_attn_implementation": "other/kernel:function",
        "_attn_implementation_internal": "other/kernel",
        "_experts_implementation": "other/kernel",
        "transformers_weights": "../outside.safetensors",
        "quantization_config": {"quant_method": "torchao"},
        "compression_config": {"x": 1},
        "custom_pipelines": {"x": {"impl": "armed.Pipe"}},
        "fusion_config": {"x": True},
        "distributed_config": {"tp_size": 2},
        "pruned_heads": {"0": [0, 1]},
        "num_labels": 10**9,
        "n_positions": 1 << 24,
        "n_ctx": 1 << 40,
        "hidden_size": 8,
        "num_hidden_layers": 10**6,
        "max_position_embeddings": 1 << 24,
        "torch_dtype": "save",
        "dtype": "load",
        "architectures": ["os.system"],
        "tokenizer_class": "armed.Tokenizer",
        "is_encoder_decoder": True,
        "torchscript": True,
        "tie_encoder_decoder": True,
        "problem_type": "armed",
        "text_config": {"model_type": "gpt2"},
        "decoder": {"model_type": "gpt2"},
        "vision_config": {"auto_map": {"AutoModel": "other/repo--x.Y"}},
        "sub_configs": {"x": "y"},
        "base_model_tp_plan": {"x": "colwise"},
        "chunk_size_feed_forward": -1,
        "to_dict": 1,
        "get_text_config": "x",
        "save_pretrained": None,
        "__class__": "x",
        "__dict__": {},
        "_name_or_path": "/etc/passwd",
        "name_or_path": "other/repo",
        "_commit_hash": "main",
        "adapter_config": {"base_model_name_or_path": "other/repo"},
        "generation_config": {"do_sample": True},
        "return_dict": False,
        "output_attentions": True,
        "gradient_checkpointing": True,
    }
    for field, value in fields.items():
        yield Mutation("armed field", field, json_edit(CONFIG, lambda c, f=field, v=value: c.update({f: v})))


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


def generation_configs() -> Iterator[Mutation]:
    fields: dict[str, Any] = {
        "temperature": "hot", "top_k": -5, "top_p": 1e300, "eos_token_id": {"a": 1}, "bos_token_id": "x" * 100,
        "pad_token_id": [[]], "max_length": 10**30, "num_beams": None, "validate": 1, "to_dict": "x", "update": {},
        "from_dict": [], "custom_generate": "other/repo", "trust_remote_code": True, "cache_implementation": "armed",
        "cache_config": 7, "watermarking_config": {"greenlist_ratio": "x"}, "compile_config": {"backend": "armed"},
        "transformers_version": 3, "_from_model_config": "x", "_commit_hash": [], "do_sample": "maybe",
        "sequence_bias": [[["x"], "y"]], "bad_words_ids": [["x"]], "assistant_model": "other/repo", "__class__": 1,
        "return_dict_in_generate": 1, "output_scores": [], "generation_mode": "x", "get_generation_mode": 3,
        "quantization_config": {"x": 1}, "auto_map": {"X": "other/repo--x.Y"}, "prompt_lookup_num_tokens": "x",
    }  # fmt: skip
    for field, value in fields.items():
        yield Mutation("generation config", field, json_edit(GENERATION, lambda c, f=field, v=value: c.update({f: v})))


def tokenizers() -> Iterator[Mutation]:
    settings: dict[str, Any] = {
        "auto_map": {"AutoTokenizer": ["armed.Tokenizer", None]}, "tokenizer_class": "os.system", "backend": "armed",
        "added_tokens_decoder": {"x": 1}, "model_max_length": "x", "chat_template": "{{ ''.__class__.__mro__ }}",
        "eos_token": {"__type": "AddedToken", "content": 1}, "extra_special_tokens": 3, "tokenizer_file": "/etc/passwd",
        "vocab_file": "/etc/passwd", "special_tokens_map_file": "/etc/passwd", "name_or_path": "other/repo",
        "init_inputs": ["x"], "padding_side": "up", "clean_up_tokenization_spaces": "x", "from_slow": True,
        "processor_class": "armed", "fix_mistral_regex": "x", "add_prefix_space": "x", "model_input_names": 3,
    }  # fmt: skip
    for field, value in settings.items():
        yield Mutation("tokenizer", field, json_edit(TOKENIZER_CONFIG, lambda c, f=field, v=value: c.update({f: v})))
    for name in (
        "T5Tokenizer",
        "BertTokenizer",
        "LlamaTokenizer",
        "RagTokenizer",
        "GPT2Tokenizer",
        "Wav2Vec2CTCTokenizer",
        "../x",
        "",
        7,
    ):
        edit = json_edit(TOKENIZER_CONFIG, lambda c, n=name: c.update(tokenizer_class=n))
        yield Mutation("tokenizer", f"class {name!r}", edit)
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
        "bad expression": lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(((("}, "behavior": "Isolated", "invert": False}),
        "slow expression": lambda t: t.update(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}),
        "padding": lambda t: t.update(padding={"strategy": {"Fixed": 1 << 60}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}),
        "truncation": lambda t: t.update(truncation={"max_length": 1, "strategy": "LongestFirst", "stride": 5, "direction": "Right"}),
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


def special_files() -> Iterator[Mutation]:
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
        for name in (CONFIG, WEIGHTS, GENERATION, TOKENIZER, TOKENIZER_CONFIG, RECORD, MODELING, "README.md"):
            yield Mutation("special file", f"{name}: {what}", make(name))


class Bomb:
    """Creates the canary when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mknod, (self.path,)


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


# How they are made


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
