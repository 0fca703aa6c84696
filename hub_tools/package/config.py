"""The one table of fields: what of a stranger's JSON files a library may see, and the tensors that a config calls for.

Almost any field can have an effect in transformers, and each version adds more. So each file is reduced to the fields
that are listed here, with their types and ranges, before any library reads it.
Sources: transformers' GPT2Config, GenerationConfig and PreTrainedTokenizerBase.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from .. import layout, limits
from ..errors import NotAPackageError, PackageError

Table = Mapping[str, Any]  # field -> kind of value, see `fits`


def fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a kind: of a type (float: any number), in a range of whole numbers, in a set; of one
    of the kinds in a tuple; or a list, or a table, all of whose values are of the kind in `[kind]` or `{str: kind}`."""
    if isinstance(kind, tuple):
        return any(fits(value, each) for each in kind)
    if isinstance(kind, list):
        return isinstance(value, list) and all(fits(each, kind[0]) for each in value)
    if isinstance(kind, dict):
        return isinstance(value, dict) and all(fits(each, kind[str]) for each in value.values())
    if isinstance(kind, range):
        return type(value) is int and value in kind
    if isinstance(kind, set):
        return any(type(value) is type(each) and value == each for each in kind)
    return type(value) is kind or (kind is float and type(value) is int)


def in_words(kind: Any) -> str:
    """Return what a value is expected to be, for messages."""
    if isinstance(kind, range):
        return f"a whole number from {kind[0]:,} to {kind[-1]:,}"
    return kind.__name__ if isinstance(kind, type) else str(kind or "no such field")


SIZE, ID, DTYPE = range(1, 1 << 31), range(-1, 1 << 31), {"float32", "float16", "bfloat16"}
# A token as transformers writes an AddedToken, several of these, or by id; `try_tokenizer` bounds their length.
TOKENS = (str, dict, [(str, dict)])
SHARD = re.compile(r"[\w.-]{1,200}\.(safetensors|bin|pt|pth)")
SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
GPT2_SIZES = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}

# With these, transformers would not simply load the weights into the model that the other fields describe.
REFUSED = (
    "quantization_config", "compression_config",  # other kernels, other weights
    "custom_pipelines",  # more code
    # may name a kernel on the Hub, which is machine code
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal",
    "transformers_weights",  # the name of another file to load the weights from
    "fusion_config", "distributed_config",  # another graph
    "pruned_heads",  # other shapes
    "hidden_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",  # other names of the sizes
)  # fmt: skip
CONFIG: Table = {
    "model_type": {layout.MODEL_TYPE, "gpt2"},
    "auto_map": dict,
    "architectures": [str],
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
    "transformers_version": str,
    **dict.fromkeys((*SIZES, "n_inner"), SIZE),
    "n_layer": range(1, 1001),
    "activation_function": str,  # one with weights of its own does not load strictly
    **dict.fromkeys(
        ("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout", "summary_last_dropout",
         "layer_norm_epsilon", "initializer_range", "value_head_initializer_range"), float,
    ),
    "summary_type": {"last", "first", "mean", "cls_index"},
    "summary_activation": {"tanh"},
    **dict.fromkeys(
        (
            "summary_use_proj", "summary_proj_to_labels", "detach_value_head", "tie_word_embeddings",
            "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn",
            "use_cache", "return_dict", "output_attentions", "output_hidden_states",
        ),
        bool,
    ),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), ID),
    "eos_token_id": (ID, [ID]),
    "num_labels": {1},  # transformers makes a name for each label, so a large number would fill the memory
    "is_encoder_decoder": {False},
    "add_cross_attention": {False},  # more weights, and another input
    "chunk_size_feed_forward": {0},
    **dict.fromkeys(REFUSED, ()),
}  # fmt: skip
# What a plain GPT-2's config says about its class, which is not this model's.
OF_THE_CLASS = (
    "auto_map", "num_labels", "dtype", "torch_dtype", "transformers_version", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "is_encoder_decoder", "chunk_size_feed_forward",
)  # fmt: skip
# Of `generate()`'s settings, those that choose among the tokens of one model, within a small multiple of its memory.
GENERATION: Table = {
    **dict.fromkeys(
        (
            "max_length", "max_new_tokens", "min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size",
            "temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "repetition_penalty",
            "length_penalty", "guidance_scale", "max_time",
        ),
        float,
    ),
    **dict.fromkeys(("num_beams", "num_return_sequences"), range(1, 17)),
    **dict.fromkeys(
        (
            "do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "return_dict_in_generate",
            "_from_model_config",
        ),
        bool,
    ),
    "early_stopping": (bool, {"never"}),
    "exponential_decay_length_penalty": [float],
    **dict.fromkeys(
        (
            "bos_token_id", "pad_token_id", "eos_token_id", "forced_eos_token_id", "suppress_tokens",
            "begin_suppress_tokens", "bad_words_ids",
        ),
        (ID, [ID], [[ID]]),
    ),
    "transformers_version": str,
}  # fmt: skip

SPECIAL_TOKENS: Table = dict.fromkeys(
    ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
     "additional_special_tokens", "extra_special_tokens"), TOKENS,
)  # fmt: skip
# No field is among them that holds the path of a file, or arguments by position.
TOKENIZER: Table = {
    "tokenizer_class": str,
    **SPECIAL_TOKENS,
    "added_tokens_decoder": TOKENS,
    **dict.fromkeys(
        (
            "add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "do_lower_case",
            "do_basic_tokenize", "keep_accents", "legacy", "lower_case", "remove_space", "split_special_tokens",
            "strip_accents", "tokenize_chinese_chars", "trim_offsets", "wordpieces_prefix_only",
        ),
        bool,
    ),
    "model_max_length": float,
    "padding_side": {"left", "right"},
    "truncation_side": {"left", "right"},
    "errors": {"strict", "replace", "ignore"},
    "extra_ids": range(1001),
    "model_input_names": [str],
    "chat_template": str,  # and no list of them: transformers 4 and 5.0 write each to a file of the name that it has
    "auto_map": (),  # code
}  # fmt: skip

_TABLES: Mapping[str, Table] = {
    layout.CONFIG: CONFIG,
    layout.GENERATION_CONFIG: GENERATION,
    layout.TOKENIZER_CONFIG: TOKENIZER,
    layout.SPECIAL_TOKENS_MAP: SPECIAL_TOKENS,
}
REDUCED = (*_TABLES, layout.ADDED_TOKENS, layout.WEIGHTS_INDEX)


def reduce(file: str, fields: Mapping[str, Any], *, where: str = "", also: Table | None = None) -> dict[str, Any]:
    """Return the fields of one of a package's JSON files (see `REDUCED`) that a library may see.

    Args:
        file: the file's name, `layout.CONFIG` for instance.
        fields: what it holds.
        where: its path, for messages.
        also: more fields, or other values, that are allowed here.

    Raises:
        PackageError: a known field has a value of the wrong type, or out of range.
    """
    if file == layout.WEIGHTS_INDEX:  # transformers needs both, and reads nothing else
        return {"metadata": {}, "weight_map": checked_shards(fields)}
    table = {**(_TABLES.get(file) or dict.fromkeys(fields, ID)), **(also or {})}  # added_tokens.json has ids alone
    kept = {}
    for name, value in fields.items():
        kind = table.get(name)
        if kind is None or (kind == () and not value):
            continue
        if value is not None and not fits(value, kind):
            raise PackageError(f"{where or file}: {name[:80]!r} is {repr(value)[:80]}", expected=in_words(kind))
        kept[name] = value
    return kept


def checked_shards(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the map of an index of shards: tensor -> file, each a plain name of a weight file beside it.

    transformers opens these files wherever they are, so an index is not trusted to name them.

    Raises:
        PackageError: no map, or the name of another file.
    """
    weight_map: Any = index.get("weight_map")
    shards = [*map(str, weight_map.values())] if isinstance(weight_map, dict) else []
    wrong = [shard for shard in shards if not SHARD.fullmatch(shard)]
    if wrong or not shards:
        raise PackageError(
            f"the index of shards names the files {str(wrong or weight_map)[:200]}",
            expected="a weight_map of tensors to files beside it, like model-00001-of-00002.safetensors",
        )
    return dict(weight_map)


def checked_config(
    fields: Mapping[str, Any], *, where: str = layout.CONFIG, also: Table | None = None
) -> dict[str, Any]:
    """Return what libraries may see of the `config.json` of a package or a plain GPT-2, after checking it.

    Every size is there and positive, fits the others, and calls for no more memory than the weights need. Of a plain
    GPT-2, what its config says about its class and labels is left out, and a size that is missing is GPT-2's own.

    Args:
        fields: what the file holds.
        where: its path, for messages.
        also: more fields, or other values, that are allowed here: another library's.

    Raises:
        NotAPackageError: another kind of model.
        PackageError: a value that cannot be right, or a field that makes a loader read other files, run other code, or
            allocate far more memory than the weights need.
    """
    model_type = fields.get("model_type", "gpt2")  # the first GPT-2 checkpoints do not say
    if model_type not in (layout.MODEL_TYPE, "gpt2"):
        raise NotAPackageError(
            f"{where} says model_type {str(model_type)[:80]!r}",
            expected=f"{layout.MODEL_TYPE!r}, or 'gpt2'",
            next_step="use the library that wrote it; this model has no other body than GPT-2's",
        )
    if model_type == "gpt2":
        own = {name: value for name, value in fields.items() if name not in OF_THE_CLASS}
        fields = {**GPT2_SIZES, **own, "model_type": "gpt2"}
    if missing := [name for name in SIZES if fields.get(name) is None]:
        raise PackageError(f"{where} lacks {missing}", expected="a positive whole number for each size")
    found = reduce(layout.CONFIG, fields, where=where, also=also)
    most = math.isqrt(limits.MASK_BYTES // found["n_layer"])
    if found["n_positions"] > most:
        raise PackageError(
            f"{where}: 'n_positions' is {found['n_positions']:,}",
            expected=f"at most {most:,} with {found['n_layer']:,} layers: transformers 4 keeps its square in each",
        )
    return found


def tied(config: Mapping[str, Any]) -> bool:
    """Whether the language model's head has the embeddings' weights."""
    return bool(config.get("tie_word_embeddings", True))


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every tensor that the fields of `config.json` call for.

    GPT-2 stores its matrices as `[in, out]` (transformers' Conv1D); the head is `[out, in]` (torch's Linear).
    """
    n, inner = config["n_embd"], config.get("n_inner") or 4 * config["n_embd"]
    layer = {"ln_1": (n,), "ln_2": (n,), "attn.c_attn": (n, 3 * n), "attn.c_proj": (n, n)}
    layer |= {"mlp.c_fc": (n, inner), "mlp.c_proj": (inner, n)}
    parts = {f"h.{i}.{name}": shape for i in range(config["n_layer"]) for name, shape in layer.items()}
    shapes: dict[str, tuple[int, ...]] = {f"transformer.{name}.weight": shape for name, shape in parts.items()}
    shapes["transformer.ln_f.weight"] = (n,)
    shapes |= {name.replace("weight", "bias"): shape[-1:] for name, shape in shapes.items()}
    shapes["transformer.wte.weight"] = (config["vocab_size"], n)
    shapes["transformer.wpe.weight"] = (config["n_positions"], n)
    if not tied(config):
        shapes["lm_head.weight"] = shapes["transformer.wte.weight"]
    if config.get("summary_use_proj", True):
        outputs = 1 if config.get("summary_proj_to_labels", True) else n
        shapes |= {"v_head.summary.weight": (outputs, n), "v_head.summary.bias": (outputs,)}
    return shapes


def count_numbers(config: Mapping[str, Any]) -> int:
    """Return how many numbers all tensors of a package have together."""
    return sum(map(math.prod, expected_shapes(config).values()))
