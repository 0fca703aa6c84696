"""Translate the tensors and `config.json` of other libraries' GPT-2 checkpoints into those of a package.

Reads no file. Sources: trl 0.0.3 to 1.12.0, the last with the head (`trl/experimental/ppo/modeling_value_head.py`),
OpenRLHF (`openrlhf/models/model.py`), transformers (`modeling_gpt2.py`, `SequenceSummary`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from configuration_gpt2_value import GPT2ValueConfig

from ..errors import ConversionError, MissingHeadError, OptionsError, PackageError, UnsavableModelError, as_ours
from ..layout import CONFIG, HEAD_PREFIX, MODEL_TYPE
from ..package.config import OF_THE_CLASS, PROBABILITY, TEXT, Allowed, expected_shapes

SourceFormat = Literal["package", "seed", "trl", "sequence-classification", "token-classification", "linear", "gpt2"]
WEIGHT, BIAS = f"{HEAD_PREFIX}summary.weight", f"{HEAD_PREFIX}summary.bias"

# Parts that wrappers put into tensors' names: DDP, DeepSpeed and Accelerate, torch.compile, FSDP, TRL, PEFT, OpenRLHF.
WRAPPERS = {
    "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "pretrained_model", "base_model",
    "model",
}  # fmt: skip
# Every head that is one linear layer: its name, and the part of it.
HEAD = re.compile(r"((?:.+\.)?summary|v_head|value_head|score|classifier)\.(weight|bias)")
PARTS = {"weight": 2, "bias": 1}  # and their dimensions
HEADS = ("v_head.", "value_head.", "score.", "classifier.")
# Whose a head is by its name. Every other name ends in "summary", and the config tells the library.
FORMATS: Mapping[str, SourceFormat] = {
    "score": "sequence-classification",
    "classifier": "token-classification",
    "v_head": "linear",
    "value_head": "linear",
}
# Classes whose head obeys GPT-2's `summary_*` fields: the seed's, and transformers' own.
OBEDIENT = {"GPT2HeadWithValueModel", "GPT2DoubleHeadsModel"}
# Fields of `config.json` that other libraries' heads obey, and words that some of these ignore.
FIELDS: Mapping[str, Allowed] = {
    **dict.fromkeys(("summary_dropout_prob", "classifier_dropout", "hidden_dropout"), PROBABILITY),
    **dict.fromkeys(("summary_type", "summary_activation"), TEXT),
}
TRL_DROPOUT = 0.1  # TRL's `summary_dropout_prob` where nobody set it
CLASSIFIER_DROPOUT = 0.1  # GPT2ForTokenClassification's where its config has none
# Causal masks, which GPT-2 checkpoints carried as buffers until 2023.
OLD_MASK = re.compile(r"transformer\.h\.\d+\.(attn|crossattention)\.(bias|masked_bias)")
BODY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Translation:
    """A foreign checkpoint in this package's terms."""

    source_format: SourceFormat
    config: GPT2ValueConfig
    state: dict[str, torch.Tensor]  # a package's tensors; lm_head only where it is not tied
    mapped: dict[str, str]
    dropped: dict[str, str]
    notes: tuple[str, ...]
    dtype: torch.dtype  # of the body; the head is float32


def plain_name(label: str) -> str:
    """A tensor's name in the model itself: without the parts of wrappers, and without the file before a colon. A
    linear layer alone in a head's file has no name, and gets OpenRLHF's."""
    file, _, key = label.rpartition(":")
    name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
    return f"value_head.{name}" if file and name in ("weight", "bias") else name


def translate(
    where: str,
    state: Mapping[str, torch.Tensor],
    fields: Mapping[str, Any],
    *,
    source_format: SourceFormat | None = None,
    summary_first_dropout: float | None = None,
    init_value_head: bool | None = False,
) -> Translation:
    """The tensors and the configuration of a package that computes the same as the checkpoint in its own library.

    Args:
        where: the checkpoint's path, for messages.
        state: its tensors by name; `FILE:NAME` for those in a file of the head's own.
        fields: what `checked_config` returned for its `config.json`, with `FIELDS`.
        source_format, summary_first_dropout: see `convert_checkpoint`.
        init_value_head: see `convert_checkpoint`; None for a new head only where none can be kept.

    Raises:
        ConversionError, PackageError, MissingHeadError, UnsavableModelError, OptionsError: see `convert_checkpoint`.
    """
    if source_format not in (None, *get_args(SourceFormat)):
        raise OptionsError(
            f"source_format={source_format!r}",
            expected=f"one of {', '.join(get_args(SourceFormat))}",
            next_step="leave it out: mostly the files tell. A head of several layers, as trlx's, cannot be kept; its "
            "policy can: init_value_head=True",
        )
    dropped: dict[str, str] = {}
    labels = _by_name(where, state, dropped)
    format_, head = _choose_head(where, state, fields, labels, dropped, source_format, new=bool(init_value_head))
    config, notes = _value_config(where, fields, format_, summary_first_dropout)
    if config.n_layer > len(state):  # a bound for the list of expected tensors
        raise PackageError(
            f"{where}: its configuration says {config.n_layer} layers; the weights are {len(state)} tensors",
            next_step="pass the config.json that belongs to these weights: config=",
        )
    shapes = expected_shapes(config.to_dict())

    mapped = {label: f"{HEAD_PREFIX}summary.{part}" for part, label in head.items()}
    unknown = []
    for name, label in labels.items():
        if label in mapped or label in dropped:
            continue
        if OLD_MASK.fullmatch(name):
            if name.endswith(".bias") and not _is_causal(state[label]):
                raise ConversionError(
                    f"{where}: {label} is not a causal mask (shape {list(state[label].shape)})",
                    expected="ones on and below the diagonal: each token sees itself and those before it",
                    next_step="use the library that wrote it; this attention has no conversion",
                )
            dropped[label] = "a causal mask, which GPT-2 no longer stores"
        elif name == "lm_head.weight" and name not in shapes:
            embeddings = labels.get("transformer.wte.weight", label)  # without them, they are reported as missing
            if not same(state[label], state[embeddings]):
                raise ConversionError(
                    f"{where}: {label} and {embeddings} differ, and config.json ties them",
                    expected="the same numbers in both",
                    next_step='to keep both, set "tie_word_embeddings": false in config.json; to keep the '
                    f"embeddings, delete {label} from the state dict",
                )
            dropped[label] = "the same numbers as transformer.wte.weight, to which it is tied"
        elif name in shapes and not name.startswith(HEAD_PREFIX):
            mapped[label] = name
        else:
            unknown.append(label)
    _refuse_mismatch(where, state, shapes, mapped, unknown)
    if WEIGHT in shapes and not head and init_value_head is False:
        raise MissingHeadError(
            f"{where} has no value head ({format_} checkpoint, {len(state)} tensors)",
            expected=f"{WEIGHT} and {BIAS}, or the head of another library",
            next_step="where the head is in another file, put it beside the weights as "
            "value_head.safetensors; to start with a new one: init_value_head=True",
        )
    if WEIGHT not in shapes and init_value_head:
        raise OptionsError(
            f"init_value_head=True, and {where} has a value head without weights", next_step="leave it out"
        )
    translated = {name: state[label] for label, name in mapped.items()}
    dtype, dtype_notes = _body_dtype(where, translated)
    for name, tensor in translated.items():
        translated[name] = tensor.float() if name.startswith(HEAD_PREFIX) else tensor.to(dtype)
    for name in (name for name in shapes if name not in translated):  # of the head: all else was refused
        translated[name] = torch.zeros(shapes[name])
    if head and "bias" not in head:
        notes.append(f"{BIAS} is 0: {head['weight']} has no bias")
    if "lm_head.weight" not in labels and not format_.startswith(("trl", "seed", "package", "gpt2")):
        notes.append("lm_head is tied to transformer.wte: the checkpoint has none")
    if not head and init_value_head:
        notes.append("the value head is new: every value is 0")
    return Translation(format_, config, translated, mapped, dropped, (*notes, *dtype_notes), dtype)


def _by_name(where: str, state: Mapping[str, torch.Tensor], dropped: dict[str, str]) -> dict[str, str]:
    """The model's own names of the tensors, and under which label of `state` each is found."""
    names = {label: plain_name(label) for label in state}
    if "wte.weight" in names.values():  # GPT2Model's names, as in the first GPT-2 checkpoints
        body = ("wte.", "wpe.", "h.", "ln_f.")
        names = {label: f"transformer.{name}" if name.startswith(body) else name for label, name in names.items()}
    labels: dict[str, str] = {}
    for label, name in names.items():
        first = labels.setdefault(name, label)
        if first == label:
            continue
        if not same(state[first], state[label]):
            raise ConversionError(
                f"{where} holds {first} and {label}, which differ, and are one tensor without their wrappers' names",
                expected="one of them",
                next_step="remove the other one from the state dict, or move the file of its own away",
            )
        dropped[label] = f"the same numbers as {first}"
    return labels


def _choose_head(
    where: str,
    state: Mapping[str, torch.Tensor],
    fields: Mapping[str, Any],
    labels: Mapping[str, str],
    dropped: dict[str, str],
    told: SourceFormat | None,
    *,
    new: bool,
) -> tuple[SourceFormat, dict[str, str]]:
    """The library whose head it is, and the labels of the head's weight and bias; none for a new head.

    Raises:
        ConversionError: two heads that differ, or one that cannot be kept, unless a `new` one is wanted.
    """
    found: dict[str, dict[str, str]] = {}
    for name, label in labels.items():
        if match := HEAD.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = label
    formats = {stem: FORMATS.get(stem) or _summarys_format(where, state, fields, told) for stem in found}
    usable = [stem for stem in found if _is_usable(state, fields, formats[stem], stem, found[stem])]
    chosen = [stem for stem in usable if told in (None, formats[stem])]
    if not chosen:
        others = [label for name, label in labels.items() if name.startswith(HEADS) or HEAD.fullmatch(name)]
        if others and not new:
            raise ConversionError(
                f"{where} has a value head that cannot be kept{f' as {told}' if told else ''}: "
                f"{listed([f'{label} {list(state[label].shape)}' for label in sorted(others)])}",
                expected=f"one linear layer to one value, [1, n_embd] and its bias [1]: that is all that {WEIGHT} and "
                f"{BIAS} can express",
                next_step="keep the policy alone and start a new head: init_value_head=True"
                + (", or leave source_format out" if told else ""),
            )
        dropped |= dict.fromkeys(others, "a value head that is not one linear layer to one value")
        plain: SourceFormat = "seed" if OBEDIENT & set(fields.get("architectures") or ()) else "gpt2"
        return told or ("package" if fields.get("model_type") == MODEL_TYPE else plain), {}
    head = found[chosen[0]]
    if new:
        raise OptionsError(
            f"init_value_head=True, and {where} has a value head that can be kept: {', '.join(head.values())}",
            next_step="leave init_value_head out",
        )
    for stem in usable:
        parts = found[stem]
        if parts is head:
            continue
        pairs = [[state[each[part]] if part in each else torch.zeros(1) for each in (head, parts)] for part in PARTS]
        if stem in chosen and not all(same(*pair) for pair in pairs):
            raise ConversionError(
                f"{where} has two value heads that differ: {head['weight']} ({formats[chosen[0]]}) and "
                f"{parts['weight']} ({formats[stem]})",
                expected="one head",
                next_step="say which: source_format=, or remove the other from the state dict",
            )
        dropped |= dict.fromkeys(parts.values(), f"a second value head; {head['weight']} is kept")
    return formats[chosen[0]], head


def _is_usable(
    state: Mapping[str, torch.Tensor],
    fields: Mapping[str, Any],
    source_format: SourceFormat,
    stem: str,
    parts: Mapping[str, str],
) -> bool:
    """Whether a head is one linear layer with as many outputs as its library gives it. (`summary` needs its bias.)"""
    own = fields if source_format in ("seed", "package") else {}
    rows = 1 if own.get("summary_proj_to_labels", True) else fields["n_embd"]
    sides = {part: state[label].shape for part, label in parts.items()}
    whole = set(sides) == set(PARTS) or (stem in FORMATS and "weight" in sides)
    fits = all(len(side) == PARTS[part] and side[0] == rows for part, side in sides.items())
    return whole and fits and own.get("summary_use_proj", True)


def _summarys_format(
    where: str, state: Mapping[str, torch.Tensor], fields: Mapping[str, Any], told: SourceFormat | None
) -> SourceFormat:
    """Whose the head `*.summary` is: a package's, the seed's (GPT-2's fields say what it does) or TRL's."""
    if fields.get("model_type") == MODEL_TYPE:
        return "package"
    if told in ("seed", "trl"):
        return told
    classes = set(fields.get("architectures") or ())
    wrapped = any("pretrained_model" in label.split(".") for label in state)
    if wrapped or "GPT2LMHeadModel" in classes or "summary_dropout_prob" in fields:
        return "trl"
    seed, trl = (_value_config(where, fields, format_, None)[0].to_dict() for format_ in ("seed", "trl"))
    if not OBEDIENT & classes and seed != trl:
        raise ConversionError(
            f"{where} may be the seed's or TRL's: its config.json names no class, and sets summary_* "
            "fields, which the seed's head obeys and TRL's ignores",
            next_step='say which: source_format="seed" or source_format="trl"',
        )
    return "seed"


def _value_config(
    where: str, fields: Mapping[str, Any], source_format: str, summary_first_dropout: float | None
) -> tuple[GPT2ValueConfig, list[str]]:
    """The configuration of a package, and notes. GPT-2's own fields are kept; the head's say how that library's works.

    Raises:
        PackageError: GPT-2 cannot have this configuration.
    """
    notes: list[str] = []
    head: dict[str, Any] = {}
    if source_format == "seed":
        # the seed notebook's head applies tanh, and treats every other word as no activation
        head["summary_activation"] = "tanh" if fields.get("summary_activation") == "tanh" else None
    elif source_format not in ("gpt2", "package"):  # one linear layer, whatever GPT-2's fields say
        head = {"summary_type": "cls_index", "summary_use_proj": True, "summary_proj_to_labels": True}
        head |= {"summary_activation": None, "summary_first_dropout": 0.0, "summary_last_dropout": 0.0}
    if source_format == "trl":
        head["summary_first_dropout"] = fields.get("summary_dropout_prob", TRL_DROPOUT)
        if "summary_dropout_prob" not in fields and summary_first_dropout is None:
            notes.append(f"summary_first_dropout is {TRL_DROPOUT}, TRL's default: a checkpoint of TRL's records none")
    elif source_format == "token-classification":
        given = (fields.get("classifier_dropout"), fields.get("hidden_dropout"), CLASSIFIER_DROPOUT)
        head["summary_first_dropout"] = next(rate for rate in given if rate is not None)
    if summary_first_dropout is not None:
        head["summary_first_dropout"] = summary_first_dropout
    others = ("architectures", "model_type", *OF_THE_CLASS, *(set(FIELDS) - {"summary_type", "summary_activation"}))
    kept = {name: value for name, value in fields.items() if name not in others}
    with as_ours(
        lambda gist: PackageError(
            f"{where}: its {CONFIG} cannot be a GPT-2's: {gist}",
            next_step="correct that field, or pass the config.json that belongs to the weights: config=",
        )
    ):
        return GPT2ValueConfig.from_dict({**kept, **head}), notes


def _refuse_mismatch(
    where: str,
    state: Mapping[str, torch.Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    mapped: Mapping[str, str],
    unknown: list[str],
) -> None:
    missing = sorted(set(shapes) - set(mapped.values()) - {WEIGHT, BIAS})
    if unknown or missing:
        what = [f"unknown tensors: {listed(sorted(unknown))}"] if unknown else []
        what += [f"missing tensors: {listed(missing)}"] if missing else []
        way_out = (
            "remove what does not belong to the model from the state dict, or save the model again in its own "
            "library; if layers do not fit, pass the config.json that belongs to them: config="
        )
        if any(".base_layer." in key for key in unknown):  # PEFT's, while an adapter is attached
            way_out = (
                "the adapter is not merged: load it in its own library, call merge_and_unload() on the PEFT model and "
                "save that, or convert the folder that the PEFT model's save_pretrained wrote"
            )
        raise PackageError(
            f"{where} has {'; '.join(what)}",
            expected="the tensors of a GPT-2 and of a value head that this package knows, and no others",
            next_step=way_out,
        )
    for key, name in mapped.items():
        if tuple(state[key].shape) != shapes[name]:
            raise PackageError(
                f"{where}: {key} has shape {list(state[key].shape)}",
                expected=f"{list(shapes[name])}, from its config.json",
                next_step="pass the config.json that belongs to these weights: config=",
            )


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same numbers, in whichever types."""
    return one.shape == other.shape and bool((one == other).all())


def _is_causal(mask: torch.Tensor) -> bool:
    """Whether `mask [1, 1, T, T]` is 0 above the diagonal, and nowhere else."""
    side = mask.shape[-1] if mask.dim() else 0
    return mask.shape == (1, 1, side, side) and torch.equal(mask[0, 0] != 0, torch.ones(side, side).bool().tril())


def _body_dtype(where: str, state: Mapping[str, torch.Tensor]) -> tuple[torch.dtype, list[str]]:
    """The dtype that holds every weight of the body exactly; refuses what is not a finite float."""
    for name, tensor in state.items():
        if tensor.dtype not in BODY_DTYPES:
            raise ConversionError(
                f"{where}: {name} is {tensor.dtype}",
                expected="float32, float16 or bfloat16",
                next_step="save the model in one of these dtypes in its own library, and convert that",
            )
        if not tensor.isfinite().all():
            raise UnsavableModelError(
                f"{where}: {name} holds NaN or infinity",
                expected="finite weights",
                next_step="convert the last checkpoint before the training run diverged",
            )
    dtypes = sorted({tensor.dtype for name, tensor in state.items() if not name.startswith(HEAD_PREFIX)}, key=str)
    widest = dtypes[0]
    for dtype in dtypes:
        widest = torch.promote_types(widest, dtype)
    notes = [] if len(dtypes) == 1 else [f"the body mixes {', '.join(map(str, dtypes))}; all of it is {widest} now"]
    heads = {tensor.dtype for name, tensor in state.items() if name.startswith(HEAD_PREFIX)} - {torch.float32}
    notes += [f"the head was {dtype}, is float32 and computes in it" for dtype in sorted(heads, key=str)]
    return widest, notes


def listed(names: list[str], most: int = 8) -> str:
    """`names` as a sentence lists them, the rest counted."""
    shown = ", ".join(name[:120] for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
