"""The fields of JSON files that a library may see: those that are known here, with their types and ranges.

Imports the standard library and of hub_tools `errors`, `files` and `layout`.

Almost any field can have an effect in transformers, and each version adds more. So a file is reduced to the fields
listed here before transformers reads it. A field that is known to name other files, other code or another model is
refused. Any other field that is not listed is left out, and reported by `unknown_fields`.
Sources: transformers' GPT2Config, GenerationConfig and PreTrainedTokenizerBase.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ... import layout
from ...errors import PackageError
from ...files import AGAIN


@dataclass(frozen=True)
class Allowed:
    """What a field may be."""

    holds: Callable[[Any], bool]
    expected: str


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _int(low: int, high: int = (1 << 31) - 1, *, null: bool = False) -> Allowed:
    return Allowed(
        lambda value: (null and value is None) or (_is_int(value) and low <= value <= high),
        f"a whole number from {low:,} to {high:,}" + (", or null" if null else ""),
    )


def _number(low: float, high: float = 1e12, *, null: bool = False) -> Allowed:
    return Allowed(
        lambda value: (null and value is None) or (_is_number(value) and low <= value <= high),
        f"a number from {low:g} to {high:g}" + (", or null" if null else ""),
    )


def _one_of(*values: Any) -> Allowed:
    return Allowed(
        lambda value: any(value == each and type(value) is type(each) for each in values), f"one of {values}"
    )


def _text(pattern: str, expected: str) -> Allowed:
    return Allowed(lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None, expected)


def _list_of(item: Callable[[Any], bool], most: int, expected: str, *, null: bool = True) -> Allowed:
    return Allowed(
        lambda value: (
            (null and value is None)
            or (isinstance(value, list) and len(value) <= most and all(item(each) for each in value))
        ),
        expected,
    )


def _is_token_id(value: Any) -> bool:
    return _is_int(value) and -1 <= value < 1 << 31


BOOL = _one_of(True, False)
BOOL_OR_NULL = _one_of(True, False, None)
PROBABILITY = _number(0, 1)
TOKEN_ID = _int(-1, null=True)
TOKEN_IDS = Allowed(
    lambda value: (
        value is None
        or _is_token_id(value)
        or (isinstance(value, list) and len(value) <= 1000 and all(map(_is_token_id, value)))
    ),
    "a token's id, a list of at most 1,000, or null",
)
VERSION = Allowed(lambda value: value is None or (isinstance(value, str) and len(value) <= 40), "a version, or null")
DTYPE = _one_of("float32", "float16", "bfloat16", None)
NULL = _one_of(None)

CONFIG: dict[str, Allowed] = {
    "model_type": _one_of(layout.MODEL_TYPE, "gpt2"),
    "auto_map": Allowed(lambda value: value == layout.AUTO_MAP, f"{layout.AUTO_MAP}"),
    "architectures": _list_of(
        lambda name: isinstance(name, str) and re.fullmatch(r"\w{1,80}", name) is not None, 8, "a list of class names"
    ),
    **dict.fromkeys(("dtype", "torch_dtype"), DTYPE),
    "transformers_version": VERSION,
    **dict.fromkeys(("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"), _int(1)),
    "n_inner": _int(1, null=True),
    "activation_function": _one_of(
        "gelu", "gelu_10", "gelu_accurate", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh",
        "gelu_python_tanh", "laplace", "leaky_relu", "linear", "mish", "quick_gelu", "relu", "relu2", "relu6",
        "sigmoid", "silu", "swish", "tanh",
    ),  # those of transformers' activations that have no weights
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), PROBABILITY),
    **dict.fromkeys(("summary_first_dropout", "summary_last_dropout"), PROBABILITY),
    "layer_norm_epsilon": _number(0, 1),
    **dict.fromkeys(("initializer_range", "value_head_initializer_range"), _number(0, 1e6)),
    "summary_type": _one_of("last", "first", "mean", "cls_index"),
    "summary_activation": _one_of("tanh", None),
    **dict.fromkeys(
        (
            "summary_use_proj", "summary_proj_to_labels", "detach_value_head", "tie_word_embeddings",
            "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention",
            "use_cache", "return_dict", "output_attentions", "output_hidden_states",
        ),
        BOOL,
    ),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), TOKEN_ID),
    "eos_token_id": TOKEN_IDS,
    "num_labels": _one_of(1),
    "id2label": Allowed(
        lambda value: isinstance(value, dict) and set(value) <= {"0"} and all(map(_is_label, value.values())),
        "one label",
    ),
    "label2id": Allowed(
        lambda value: isinstance(value, dict) and len(value) <= 1 and all(each == 0 for each in value.values()),
        "one label",
    ),
    "is_encoder_decoder": _one_of(False),
    "chunk_size_feed_forward": _one_of(0),
}  # fmt: skip

GENERATION: dict[str, Allowed] = {
    **dict.fromkeys(("max_length", "max_new_tokens", "min_length", "min_new_tokens"), _int(0, null=True)),
    **dict.fromkeys(
        (
            "do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "output_attentions",
            "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "token_healing",
            "low_memory", "disable_compile", "_from_model_config",
        ),
        BOOL_OR_NULL,
    ),
    "early_stopping": _one_of(True, False, "never", None),
    **dict.fromkeys(("num_beams", "num_return_sequences", "num_beam_groups"), _int(1, 1024, null=True)),
    **dict.fromkeys(("top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), _int(0, null=True)),
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "penalty_alpha",
         "repetition_penalty", "encoder_repetition_penalty", "diversity_penalty", "max_time"),
        _number(0, null=True),
    ),
    **dict.fromkeys(("length_penalty", "guidance_scale"), _number(-1e12, null=True)),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "decoder_start_token_id", "forced_bos_token_id"), TOKEN_ID),
    **dict.fromkeys(("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"), TOKEN_IDS),
    "bad_words_ids": _list_of(
        lambda ids: isinstance(ids, list) and 0 < len(ids) <= 100 and all(map(_is_token_id, ids)),
        10_000,
        "lists of token ids, or null",
    ),
    "exponential_decay_length_penalty": Allowed(
        lambda value: value is None
        or (isinstance(value, list) and len(value) == 2 and _is_int(value[0]) and _is_number(value[1])),
        "[a number of tokens, a factor], or null",
    ),
    "stop_strings": Allowed(lambda value: _are_stops(value), "a text, a list of texts, or null"),
    "cache_implementation": Allowed(
        lambda value: value is None or (isinstance(value, str) and re.fullmatch(r"[a-z_]{1,40}", value) is not None),
        "the name of a cache of transformers' own, or null",
    ),
    "transformers_version": VERSION,
    # features that a GPT-2 does not need, and that run or download something else
    **dict.fromkeys(
        ("assistant_early_exit", "cache_config", "compile_config", "constraints",
         "continuous_batching_config", "dola_layers", "force_words_ids", "prompt_lookup_num_tokens", "sequence_bias",
         "speculation_type", "use_mtp", "watermarking_config", "custom_generate", "assistant_model", "auto_map",
         "trust_remote_code", "quantization_config", "generation_mode"),
        NULL,
    ),
}  # fmt: skip


def _are_stops(value: Any) -> bool:
    stops = value if isinstance(value, list) else [] if value is None else [value]
    return len(stops) <= 1000 and all(isinstance(stop, str) and 0 < len(stop) <= 1000 for stop in stops)


def _is_label(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 200


def _is_token(value: Any) -> bool:
    """A token, as text or as transformers writes an AddedToken."""
    if isinstance(value, dict):
        flags = {name: flag for name, flag in value.items() if name not in ("content", "__type", "id")}
        return (
            not isinstance(value.get("content"), dict)
            and _is_token(value.get("content"))
            and value.get("__type", "AddedToken") == "AddedToken"
            and set(flags) <= {"lstrip", "rstrip", "single_word", "normalized", "special"}
            and all(flag is None or type(flag) is bool for flag in flags.values())
        )
    return isinstance(value, str) and len(value) <= 1000


def _is_named(value: Any) -> bool:
    """A chat template with a name. transformers 4 and 5.0 write it to a file of that name, wherever that leads."""
    return (
        isinstance(value, dict)
        and set(value) == {"name", "template"}
        and all(isinstance(each, str) for each in value.values())
        and re.fullmatch(r"\w{1,80}", value["name"]) is not None
    )


TOKEN = Allowed(lambda value: value is None or _is_token(value), "a token, or null")
TOKENS = Allowed(
    lambda value: (
        value is None
        or (
            isinstance(value, (list, dict))
            and all(map(_is_token, value.values() if isinstance(value, dict) else value))
        )
    ),
    "a list of tokens, or null",
)
SPECIAL_TOKENS: dict[str, Allowed] = {
    **dict.fromkeys(
        ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token"), TOKEN
    ),
    **dict.fromkeys(("additional_special_tokens", "extra_special_tokens"), TOKENS),
}

TOKENIZER: dict[str, Allowed] = {
    "tokenizer_class": _text(r"\w{1,80}", "the name of a tokenizer of transformers' own"),
    **SPECIAL_TOKENS,
    "added_tokens_decoder": Allowed(
        lambda value: isinstance(value, dict)
        and all(re.fullmatch("[0-9]{1,9}", id) and _is_token(token) for id, token in value.items()),
        "ids and their tokens",
    ),
    **dict.fromkeys(
        (
            "add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "do_lower_case",
            "do_basic_tokenize", "keep_accents", "legacy", "lower_case", "remove_space", "split_special_tokens",
            "strip_accents", "tokenize_chinese_chars", "trim_offsets", "wordpieces_prefix_only",
        ),
        BOOL_OR_NULL,
    ),
    "model_max_length": _number(1, 1e31, null=True),
    **dict.fromkeys(("padding_side", "truncation_side"), _one_of("left", "right")),
    "errors": _one_of("strict", "replace", "ignore"),
    "extra_ids": _int(0, 1000),
    "model_input_names": _list_of(
        lambda name: isinstance(name, str) and re.fullmatch(r"\w{1,80}", name) is not None, 8, "names of inputs"
    ),
    "chat_template": Allowed(
        lambda value: (
            value is None or isinstance(value, str) or (isinstance(value, list) and all(map(_is_named, value)))
        ),
        "a template, a list of templates with the names of files, or null",
    ),
}  # fmt: skip

# Fields that transformers writes and does not read, or that have no effect on a GPT-2.
_OF_NO_EFFECT = {
    layout.CONFIG: {"_name_or_path", "n_ctx", "task_specific_params", "gradient_checkpointing", "problem_type",
                    "output_past", "_num_labels"},
    layout.GENERATION_CONFIG: {"_commit_hash"},
    layout.TOKENIZER_CONFIG: {"backend", "from_slow", "is_local", "local_files_only", "name_or_path",
                              "processor_class", "special_tokens_map_file", "max_len", "tokenizer_type"},
    layout.SPECIAL_TOKENS_MAP: set(),
}  # fmt: skip

# transformers turns every field into an attribute, which would hide a method of the same name.
METHODS = frozenset(
    {
        "convert_rope_params_to_dict", "default_config_fields", "dict_dtype_to_str", "from_dict", "from_gpt2",
        "from_json_file", "from_model_config", "from_pretrained", "from_text_audio_configs",
        "from_text_vision_configs", "get_config_dict", "get_generation_mode",
        "get_mtp_config", "get_text_config", "is_custom_code", "is_remote_code", "nested_rope_parameter_keys",
        "push_to_hub", "register_for_auto_class", "save_pretrained", "standardize_rope_params", "to_dict",
        "to_diff_dict", "to_json_file", "to_json_string", "update", "update_from_string", "validate",
        "validate_architecture", "validate_layer_type", "validate_output_attentions", "validate_rope",
        "validate_token_ids",
    }
)  # fmt: skip

_TABLES = {
    layout.CONFIG: CONFIG,
    layout.GENERATION_CONFIG: GENERATION,
    layout.TOKENIZER_CONFIG: TOKENIZER,
    layout.SPECIAL_TOKENS_MAP: SPECIAL_TOKENS,
}
REDUCED = (*_TABLES, layout.ADDED_TOKENS, layout.WEIGHTS_INDEX)
# Settings of a tokenizer that are paths of files or contain them, or that are passed to the constructor by position.
_PLACES = re.compile(r"vocab|merges|.*_file|.*_path|.*_dir|init_inputs|sp_model_kwargs|mecab_kwargs|.*_kwargs")


def reduce(file: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of one of a package's JSON files (see `REDUCED`) that a library may see.

    Args:
        file: the file's name, `layout.CONFIG` for instance.
        fields: what it holds.

    Raises:
        PackageError: a known field has a value of the wrong type, or out of range.
        PackageError: a tokenizer's field that names another file.
    """
    if file == layout.WEIGHTS_INDEX:  # transformers needs both, and reads nothing else
        return {"metadata": {}, "weight_map": _shards(fields.get("weight_map"))}
    if file == layout.ADDED_TOKENS:
        return _added_tokens(fields)
    table, kept = _TABLES[file], {}
    for name, value in fields.items():
        if name in table:
            if not table[name].holds(value):
                raise PackageError(
                    f"{file}: {name!r} is {str(value)[:80]!r}", expected=table[name].expected, next_step=AGAIN
                )
            kept[name] = value
        elif name in _OF_NO_EFFECT[file]:
            continue
        elif name.startswith("_") or name in METHODS:
            raise PackageError(
                f"{file} has a field {name[:80]!r}, which would hide a method or another part of transformers",
                expected="a setting",
                next_step=f"remove {name[:80]!r} from {file}",
            )
        elif file in (layout.TOKENIZER_CONFIG, layout.SPECIAL_TOKENS_MAP) and _PLACES.fullmatch(name) and value:
            raise PackageError(
                f"{file} has {name} {str(value)[:200]!r}",
                expected="a tokenizer that is read from the package's own files",
                next_step=f"remove {name} from {file}, or save the tokenizer again",
            )
    return kept


def _shards(weight_map: Any) -> dict[str, str]:
    """Check the names in the index of shards, because transformers opens these files wherever they are."""
    if not isinstance(weight_map, dict) or not weight_map:
        raise PackageError(
            f"{layout.WEIGHTS_INDEX} has no weight_map", expected="tensor names and their files", next_step=AGAIN
        )
    for shard in weight_map.values():
        if not isinstance(shard, str) or not layout.SHARD.fullmatch(shard):
            raise PackageError(
                f"{layout.WEIGHTS_INDEX} names the file {str(shard)[:200]!r}",
                expected="files of the package, like model-00001-of-00002.safetensors",
                next_step=AGAIN,
            )
    return weight_map


def _added_tokens(fields: Mapping[str, Any]) -> dict[str, Any]:
    for token, id in fields.items():
        if not _is_token(token) or not _is_token_id(id):
            raise PackageError(
                f"{layout.ADDED_TOKENS} has {token[:80]!r}: {str(id)[:80]!r}",
                expected="tokens and their ids",
                next_step=AGAIN,
            )
    return dict(fields)


def unknown_fields(file: str, fields: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields that are not known here, which `reduce` leaves out."""
    return tuple(sorted(set(fields) - set(_TABLES[file]) - _OF_NO_EFFECT[file]))
