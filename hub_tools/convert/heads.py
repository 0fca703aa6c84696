"""Translate the tensors and `config.json` of other libraries' GPT-2 checkpoints into those of a package.

Reads no file. Sources: trl 0.0.3 to 1.12.0, the last with the head (`trl/experimental/ppo/modeling_value_head.py`),
OpenRLHF (`openrlhf/models/model.py`), transformers (`modeling_gpt2.py`, `SequenceSummary`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from configuration_gpt2_value import GPT2ValueConfig
from modeling_gpt2_value import GPT2ValueModel

from ..errors import ConversionError, MissingHeadError, OptionsError, PackageError, as_ours
from ..layout import HEAD_PREFIX, MODEL_TYPE
from ..package.config import OF_THE_CLASS, Table, expected_shapes, tied
from ..package.weights import build_model

SourceFormat = Literal["package", "seed", "trl", "sequence-classification", "token-classification", "linear", "gpt2"]
WEIGHT, BIAS = f"{HEAD_PREFIX}summary.weight", f"{HEAD_PREFIX}summary.bias"

# Parts that wrappers put into tensors' names: DDP, DeepSpeed and Accelerate, torch.compile, FSDP, TRL, PEFT, OpenRLHF.
WRAPPERS = {
    "module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "pretrained_model", "base_model",
    "model",
}  # fmt: skip
# Every head that is one linear layer: its name, and the part of it.
HEAD = re.compile(r"((?:.+\.)?summary|v_head|value_head|score|classifier)\.(weight|bias)")
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
# The fields with which other libraries set the dropout before the head, and their default. The others have none.
OF_TRL, OF_TRANSFORMERS = ("summary_dropout_prob",), ("classifier_dropout", "hidden_dropout")
DROPOUTS: Mapping[str, tuple[str, ...]] = {"trl": OF_TRL, "token-classification": OF_TRANSFORMERS}
DROPOUT = 0.1
# Fields of `config.json` that other libraries' heads obey, and words that some of these ignore.
FIELDS: Table = {
    **dict.fromkeys(OF_TRL + OF_TRANSFORMERS, float),
    **dict.fromkeys(("summary_type", "summary_activation"), str),
}
# Causal masks, which GPT-2 checkpoints carried as buffers until 2023.
OLD_MASK = re.compile(r"transformer\.h\.\d+\.(attn|crossattention)\.(bias|masked_bias)")
# Fields of GPT-2's config that a package does not have, or has its own of.
NOT_KEPT = {"architectures", "model_type", *OF_THE_CLASS, *OF_TRL, *OF_TRANSFORMERS}


@dataclass(frozen=True)
class Translation:
    """A foreign checkpoint in this package's terms."""

    source_format: SourceFormat
    fields: dict[str, Any]  # of a package's config.json
    state: dict[str, torch.Tensor]  # a package's; without lm_head where it is tied, and without what is new of a head
    mapped: dict[str, str]
    dropped: dict[str, str]
    notes: tuple[str, ...]


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
    dtype: torch.dtype | None = None,
) -> Translation:
    """The tensors and the configuration of a package that computes the same as the checkpoint in its own library.

    Args:
        where: the checkpoint's path, for messages.
        state: its tensors by name; `FILE:NAME` for those in a file of the head's own.
        fields: what `checked_config` returned for its `config.json`, with `FIELDS`.
        source_format, summary_first_dropout, init_value_head, dtype: see `convert_checkpoint`.

    Raises:
        ConversionError, MissingHeadError, OptionsError: see `convert_checkpoint`.
    """
    if source_format not in (None, *get_args(SourceFormat)):
        raise OptionsError(
            f"source_format={source_format!r}",
            expected=f"one of {', '.join(get_args(SourceFormat))}",
            next_step="leave it out: mostly the files tell",
        )
    labels = _by_name(where, state)
    dropped: dict[str, str] = {}
    library, head = _choose_head(where, state, fields, labels, dropped, source_format, new=init_value_head is True)
    config = {name: value for name, value in fields.items() if name not in NOT_KEPT} | _head_fields(fields, library)
    notes = []
    if summary_first_dropout is not None:
        config["summary_first_dropout"] = summary_first_dropout
    elif library == "trl" and "summary_dropout_prob" not in fields:
        notes.append(f"summary_first_dropout is {DROPOUT}, TRL's default: a checkpoint of TRL's records none")
    if init_value_head is True:
        config["summary_use_proj"] = True
    if not head and config.get("summary_use_proj", True):
        if init_value_head is False:
            raise MissingHeadError(
                f"{where} has no value head ({library} checkpoint, {len(state)} tensors)",
                expected=f"{WEIGHT} and {BIAS}, or the head of another library",
                next_step="where the head is in another file, put it beside the weights as "
                "value_head.safetensors; to start with a new one: init_value_head=True",
            )
        notes.append("the value head is new: every value is 0")

    mapped = {label: f"{HEAD_PREFIX}summary.{part}" for part, label in head.items()}
    for name, label in labels.items():
        if OLD_MASK.fullmatch(name):
            dropped[label] = "a causal mask, which GPT-2 no longer stores"
        elif name == "lm_head.weight" and tied(config):
            embeddings = state.get(labels.get("transformer.wte.weight", ""))
            if embeddings is not None and not torch.equal(state[label].float(), embeddings.float()):
                # transformers 4 ties it nevertheless, 5 does not: nobody can tell what is meant.
                raise ConversionError(
                    f"{where}: {label} is not transformer.wte.weight, to which config.json ties it",
                    expected="equal weights, or tie_word_embeddings false",
                    next_step="set tie_word_embeddings to false in config.json if the output layer has its own weights",
                )
            dropped[label] = "config.json ties it to transformer.wte.weight, as transformers then does"
        elif label not in dropped:
            mapped.setdefault(label, name)
    for label in mapped:
        if state[label].dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ConversionError(
                f"{where}: {label} is {state[label].dtype}",
                expected="float32, float16 or bfloat16",
                next_step="save the model in one of these dtypes in its own library, and convert that",
            )
    body = {name: state[label] for label, name in mapped.items() if label not in head.values()}
    widest = functools.reduce(torch.promote_types, (tensor.dtype for tensor in body.values()))
    found = {name: tensor.to(dtype or widest) for name, tensor in body.items()}
    found |= {mapped[label]: state[label].float() for label in head.values()}
    return Translation(library, config, found, mapped, dropped, tuple(notes))


def _by_name(where: str, labels: Iterable[str]) -> dict[str, str]:
    """The model's own names of the tensors, with the label of each in the checkpoint."""
    names = {label: plain_name(label) for label in labels}
    if "wte.weight" in names.values():  # GPT2Model's names, as in the first GPT-2 checkpoints
        body = ("wte.", "wpe.", "h.", "ln_f.")
        names = {label: f"transformer.{name}" if name.startswith(body) else name for label, name in names.items()}
    found: dict[str, str] = {}
    for label, name in names.items():
        if found.setdefault(name, label) != label:
            raise ConversionError(
                f"{where} holds {found[name]} and {label}, which are one tensor without their wrappers' names",
                expected="one of them",
                next_step="remove the other one from the state dict, or move the file of its own away",
            )
    return found


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
        ConversionError: several heads, or one that cannot be kept, unless a `new` one is wanted.
    """
    summary: SourceFormat = "seed" if OBEDIENT & {*(fields.get("architectures") or ())} else "trl"
    if fields.get("model_type") == MODEL_TYPE:
        summary = "package"
    elif told in ("seed", "trl"):
        summary = told
    found: dict[str, dict[str, str]] = {}
    for name, label in labels.items():
        if match := HEAD.fullmatch(name):
            found.setdefault(match[1], {})[match[2]] = label
    libraries = {stem: FORMATS.get(stem, summary) for stem in found}
    usable = [stem for stem in found if _is_usable(state, fields, libraries[stem], found[stem])]
    chosen = [stem for stem in usable if told in (None, libraries[stem])]
    heads = sorted(label for name, label in labels.items() if name.startswith(HEADS) or HEAD.fullmatch(name))
    if new or not heads:
        dropped |= dict.fromkeys(heads, "another value head: the new one takes its place")
        return told or ("gpt2" if summary == "trl" else summary), {}
    if len(chosen) != 1:
        raise ConversionError(
            f"{where} has {'several value heads' if chosen else 'a value head that cannot be kept'}: "
            f"{listed([f'{label} {list(state[label].shape)}' for label in heads])}",
            expected=f"one linear layer to one value, [1, {fields['n_embd']}] by config.json, and its bias [1]",
            next_step="say which library's it is: source_format=; or keep the policy alone and start a new head: "
            "init_value_head=True",
        )
    kept = found[chosen[0]]
    others = [label for stem in usable for label in found[stem].values() if label not in kept.values()]
    dropped |= dict.fromkeys(others, f"a second value head; {kept['weight']} is kept")
    return libraries[chosen[0]], kept


def _is_usable(
    state: Mapping[str, torch.Tensor], fields: Mapping[str, Any], library: SourceFormat, parts: Mapping[str, str]
) -> bool:
    """Whether a head has the shapes that its library gives it. (The bias of a `summary` is never missing.)"""
    shapes = expected_shapes({**fields, **_head_fields(fields, library), "n_layer": 0})
    whole = {"weight", "bias"} if library in ("package", "seed", "trl") else {"weight"}
    return whole <= set(parts) and all(
        shapes.get(f"{HEAD_PREFIX}summary.{part}") == state[label].shape for part, label in parts.items()
    )


def _head_fields(fields: Mapping[str, Any], library: SourceFormat) -> dict[str, Any]:
    """What a library's head does, in the fields of a package's config. A package's own head obeys those it has."""
    if library in ("package", "gpt2"):
        return {}
    if library == "seed":  # applies tanh, and treats every other word as no activation
        return {"summary_activation": "tanh" if fields.get("summary_activation") == "tanh" else None}
    names = DROPOUTS.get(library, ())
    given = [fields[name] for name in names if fields.get(name) is not None]
    return {  # one linear layer, whatever GPT-2's fields say
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "summary_proj_to_labels": True,
        "summary_activation": None,
        "summary_first_dropout": given[0] if given else DROPOUT if names else 0.0,
        "summary_last_dropout": 0.0,
    }


def model_of(where: str, fields: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> GPT2ValueModel:
    """The model, in evaluation mode, with new weights of 0 for what `state` lacks of the value head.

    Raises:
        PackageError: the tensors, or the fields of the config, are not those of a GPT-2 with a value head.
    """
    new = {
        name: torch.zeros(shape)
        for name, shape in expected_shapes({**fields, "n_layer": 0}).items()
        if name.startswith(HEAD_PREFIX)
    }
    try:
        with as_ours(lambda gist: PackageError(gist, next_step="")):
            return build_model(GPT2ValueConfig.from_dict(dict(fields)), {**new, **state})
    except PackageError as error:
        raise PackageError(
            f"{where}: {error.found}",
            expected="the tensors of the GPT-2 in its config.json and of a value head, and no others",
            next_step="pass the config.json that belongs to these weights: config=; remove what is no part of the "
            "model from the state dict; merge adapters first, by their library's merge_and_unload",
        ) from error


def listed(names: list[str], most: int = 8) -> str:
    """`names` as a sentence lists them, the rest counted."""
    shown = ", ".join(name[:120] for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
