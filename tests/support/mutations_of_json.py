"""Ways to spoil a package's JSON: fields of the wrong type or size, fields that would fetch or run something, and files
that are no JSON. `mutations.py` puts them on its list.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    -1, 0, 1, 3, 1 << 31, 10**30, 10**400, 1.5, 1e308, "", "16", "x" * 1000, "\ud800", "a\0b", None, True, [], [16], {},
    {"a": {"b": []}}, DEEP,
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
                f"{field}={json.dumps(value)[:20]}",
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
