"""A foreign checkpoint's `config.json`, reduced to the fields that are known, as the configuration of a package.

Imports transformers' GPT2Config, the remote code's configuration, and of hub_tools `allowed_fields`, `config_json`,
`errors`, `limits`, `layout` and `library_errors`. No library sees a field that is not listed here or in
`allowed_fields`, nor a value that is out of range.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import GPT2Config

from configuration_gpt2_value import GPT2ValueConfig

from .. import limits
from ..errors import ConversionError, PackageError, as_ours
from ..layout import MODEL_TYPE
from ..package.config import CONFIG, PROBABILITY, Allowed, count_numbers

TRL_DROPOUT = 0.1  # TRL's `summary_dropout_prob` where nobody set it
CLASSIFIER_DROPOUT = 0.1  # GPT2ForTokenClassification's where its config has none

# How every head works that is one linear layer, whatever GPT-2's `summary_*` fields say.
ONE_LINEAR_LAYER: Mapping[str, Any] = {
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "summary_proj_to_labels": True,
    "summary_activation": None,
    "summary_first_dropout": 0.0,
    "summary_last_dropout": 0.0,
}

_WORD = Allowed(lambda value: value is None or (isinstance(value, str) and len(value) <= 80), "a word, or null")
# Fields that describe the class and dtype of a checkpoint. A package sets its own.
_OURS = (
    "model_type", "auto_map", "num_labels", "id2label", "label2id", "dtype", "torch_dtype", "transformers_version",
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "is_encoder_decoder",
    "chunk_size_feed_forward",
)  # fmt: skip
FIELDS: dict[str, Allowed] = {
    **{name: allowed for name, allowed in CONFIG.items() if name not in _OURS},
    # any word is allowed, because the heads of some libraries ignore these fields
    **dict.fromkeys(("summary_type", "summary_activation"), _WORD),
    "summary_dropout_prob": PROBABILITY,  # TRL's
    **dict.fromkeys(
        ("classifier_dropout", "hidden_dropout"),
        Allowed(lambda value: value is None or PROBABILITY.holds(value), "a probability, or null"),
    ),
}
_OF_NO_EFFECT = {
    *_OURS, "_name_or_path", "n_ctx", "task_specific_params", "gradient_checkpointing", "output_past", "problem_type",
    "_num_labels", "is_decoder", "pruned_heads",
}  # fmt: skip
_GPT2_SIZES = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
# Other names of the same numbers. transformers would let them override the first ones.
_ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}


def known_fields(where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that a library may see, after checking them.

    Args:
        where: the checkpoint's path, for messages.
        fields: its `config.json`.

    Raises:
        ConversionError: another body than GPT-2's, or one that is quantised or pruned.
        PackageError: a value of the wrong type, or out of range.
    """
    _refuse_other_bodies(where, fields)
    kept = {}
    for name, value in fields.items():
        if name in FIELDS:
            if not FIELDS[name].holds(value):
                raise PackageError(
                    f"{where}: its config.json has {name!r}: {str(value)[:80]!r}",
                    expected=FIELDS[name].expected,
                    next_step="correct that field, or pass the config.json that belongs to the weights: config=",
                )
            kept[name] = value
        elif name in _ALIASES and value != fields.get(_ALIASES[name], value):
            raise PackageError(
                f"{where}: its config.json has {name!r}: {str(value)[:80]!r}, and another {_ALIASES[name]!r}",
                expected="one number of each kind, under GPT-2's own name",
                next_step=f"remove {name}, or pass the config.json that belongs to the weights: config=",
            )
        elif name in _ALIASES:
            kept |= known_fields(where, {_ALIASES[name]: value})
    return kept


def most_bytes(where: str, fields: Mapping[str, Any]) -> int:
    """The most bytes that the weights of a checkpoint with this `config.json` may have; see `limits.foreign_bytes`.

    Raises:
        What `known_fields` raises.
    """
    sizes = {**_GPT2_SIZES, **known_fields(where, fields)}
    return limits.foreign_bytes(count_numbers(sizes), sizes["n_layer"] * sizes["n_positions"] ** 2)


def left_out(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """A note on fields that are left out of the package, and that might have had an effect in transformers."""
    names = sorted(str(name)[:40] for name in set(fields) - set(FIELDS) - _OF_NO_EFFECT - set(_ALIASES))
    if not names:
        return ()
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return (f"fields of config.json that are not known here, and were left out: {shown}",)


def value_config(
    where: str, fields: Mapping[str, Any], source_format: str, summary_first_dropout: float | None
) -> tuple[GPT2ValueConfig, list[str]]:
    """The configuration of a package. GPT-2's own fields are kept; the head's are set to how that library's head works.

    Args:
        where: the checkpoint's path, for messages.
        fields: what `known_fields` returned.
        source_format: the library; see `heads`.
        summary_first_dropout: see `convert_checkpoint`.

    Raises:
        PackageError: GPT-2 cannot have this configuration.
    """
    notes: list[str] = []
    head: dict[str, Any] = {}
    if source_format == "seed":
        # the seed notebook's head applies tanh, and treats every other word as no activation
        head["summary_activation"] = "tanh" if fields.get("summary_activation") == "tanh" else None
    elif source_format not in ("gpt2", "package"):
        head = dict(ONE_LINEAR_LAYER)
    if source_format == "trl":
        head["summary_first_dropout"] = fields.get("summary_dropout_prob", TRL_DROPOUT)
        if "summary_dropout_prob" not in fields and summary_first_dropout is None:
            notes.append(f"summary_first_dropout is {TRL_DROPOUT}, TRL's default: a checkpoint of TRL's records none")
    elif source_format == "token-classification":
        given = (fields.get("classifier_dropout"), fields.get("hidden_dropout"), CLASSIFIER_DROPOUT)
        head["summary_first_dropout"] = next(rate for rate in given if rate is not None)
    if summary_first_dropout is not None:
        head["summary_first_dropout"] = summary_first_dropout
    others = ("architectures", "summary_dropout_prob", "classifier_dropout", "hidden_dropout")
    kept = {name: value for name, value in fields.items() if name not in others}
    with as_ours(lambda gist: _not_gpt2(where, gist)):
        return GPT2ValueConfig.from_gpt2(GPT2Config.from_dict({**kept, **head})), notes


def _not_gpt2(where: str, gist: str) -> PackageError:
    return PackageError(
        f"{where}: its config.json cannot be a GPT-2's: {gist}",
        next_step="correct that field, or pass the config.json that belongs to the weights: config=",
    )


def _refuse_other_bodies(where: str, fields: Mapping[str, Any]) -> None:
    model_type = fields.get("model_type", "gpt2")  # the first GPT-2 checkpoints do not say
    if model_type not in ("gpt2", MODEL_TYPE):
        raise ConversionError(
            f"{where} is a model of type {str(model_type)[:80]!r}",
            expected="'gpt2': this package is a GPT-2 with a value head, and has no other body",
            next_step="use the library that wrote it; there is no conversion",
        )
    for name in ("quantization_config", "compression_config"):
        if fields.get(name) is not None:
            raise ConversionError(
                f"{where} is quantised (config.json has a {name})",
                expected="float32, float16 or bfloat16 weights",
                next_step="load it in its own library, call model.dequantize(), save it, and convert that",
            )
    for name in ("pruned_heads", "is_encoder_decoder"):
        if fields.get(name):
            raise ConversionError(
                f"{where}: its config.json has {name!r}: {str(fields[name])[:80]!r}",
                expected="a decoder with all of its heads",
                next_step="use the library that wrote it; there is no conversion",
            )
