"""The fields of `adapter_config.json` that decide how a LoRA is merged; any other option that is on is refused.

Imports the standard library and `errors`. PEFT itself does not read these files, because it imports modules that some
of the fields name. Meaning of the fields: https://huggingface.co/docs/peft/package_reference/lora.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConversionError, PackageError

MOST_RANK = 1 << 16
SAVE_AGAIN = "correct the field, or save the adapter again with its library's save_pretrained"
MERGE_THERE = "merge it with peft (merge_and_unload), save the result, and convert that"

# Fields that do not change how the adapter is merged.
OF_NO_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",  # `lora.py` reads it to find the base
        "corda_config",  # settings of an initialisation, as are eva_, loftq_ and lora_ga_config
        "eva_config",
        "fan_in_fan_out",  # GPT-2's layers are known to keep [in, out]
        "inference_mode",
        "loftq_config",
        "lora_dropout",  # in training only
        "lora_ga_config",
        "megatron_core",  # used only where there is a megatron_config, which is refused
        "peft_version",
        "qalora_group_size",  # used only with use_qalora, which is refused
        "revision",
        "runtime_config",
    }
)
LITERAL = re.compile(r"\^?(?:[A-Za-z0-9_]|\\?\.)+")


@dataclass(frozen=True)
class LoraSettings:
    """What merging needs to know. Modules are named as in the base model: `transformer.h.0.attn.c_attn`."""

    r: int
    alpha: float
    rslora: bool
    dora: bool
    lora_bias: bool
    bias: str  # which biases were trained too: none, all, lora_only
    targets: tuple[str, ...] | None  # names, or ends of names; None for a regular expression, which is not evaluated
    excluded: tuple[str, ...]
    layers: frozenset[int] | None  # None: all layers
    saved: tuple[str, ...]  # ends of the names of modules that were trained in full (`modules_to_save`)
    rank_pattern: Mapping[str, float] | None  # None if it has regular expressions: ranks are taken from the tensors
    alpha_pattern: Mapping[str, float]

    def is_target(self, module: str, *, embedding: bool) -> bool | None:
        """Whether the settings give a module adapter weights; None if only the tensors can show it."""
        if self.targets is None:
            return None
        layer = re.match(r"transformer\.h\.(\d+)\.", module)
        if self.layers is not None and (layer is None or int(layer[1]) not in self.layers):
            return False
        if self.targets == ("all-linear",):
            return not embedding and not _ends(module, self.excluded)
        return _ends(module, self.targets) and not _ends(module, self.excluded)

    def is_saved(self, module: str) -> bool:
        return any(module.endswith(name) for name in self.saved)

    def scaling(self, module: str, rank: int) -> float:
        """What the product of a module's two matrices is multiplied by.

        Raises:
            PackageError: `rank`, which is that of the tensors, differs from the rank in the settings.
        """
        said = rank if self.rank_pattern is None else _matching(self.rank_pattern, module, self.r)
        if said != rank:
            raise PackageError(
                f"the adapter's weights for {module} have rank {rank}",
                expected=f"{said:g}, from its adapter_config.json",
                next_step="use the adapter_config.json that belongs to these weights",
            )
        alpha = _matching(self.alpha_pattern, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_settings(where: str, fields: Mapping[str, Any]) -> LoraSettings:
    """The settings in an `adapter_config.json`.

    Args:
        where: the adapter's folder, for messages.
        fields: what the file holds.

    Raises:
        ConversionError: not a LoRA of a causal language model, or with an option that is not known here.
        PackageError: a field of the wrong type, or out of range.
    """
    _refuse_other_adapters(where, fields)

    def field(name: str, default: Any, holds: bool, expected: str) -> Any:
        if not holds:
            raise PackageError(
                f"{where}/adapter_config.json: {name!r} is {str(fields[name])[:80]!r}",
                expected=expected,
                next_step=SAVE_AGAIN,
            )
        return fields.get(name, default)

    def switch(name: str) -> bool:
        return bool(field(name, False, type(fields.get(name, False)) is bool, "true or false"))

    def names(name: str) -> tuple[str, ...] | None:
        value = fields.get(name)
        if isinstance(value, str):
            return (value,) if value == "all-linear" else None
        whole = value is None or (isinstance(value, list) and all(isinstance(each, str) for each in value))
        field(name, None, whole, "a list of names, or an expression")
        return tuple(value or ())

    def pattern(name: str, most: float) -> dict[str, float]:
        value = fields.get(name) or {}
        whole = isinstance(value, dict) and all(_is_number(each) and 0 < each <= most for each in value.values())
        field(name, {}, whole, "names of layers and their numbers")
        return dict(value)

    alphas, ranks = pattern("alpha_pattern", 1e9), pattern("rank_pattern", MOST_RANK)
    expressions = [key for key in alphas if not LITERAL.fullmatch(key)]
    if expressions:
        raise ConversionError(
            f"{where} has an alpha_pattern with the expression {expressions[0][:80]!r}",
            expected="names of layers: a stranger's expressions are not evaluated",
            next_step=MERGE_THERE,
        )
    layers = fields.get("layers_to_transform")
    layers = [layers] if type(layers) is int else layers
    field("layers_to_transform", None, layers is None or _are_whole(layers), "numbers of layers")
    pattern_of_layers = fields.get("layers_pattern")
    if pattern_of_layers not in (None, "", [], "h", ["h"]):
        raise _unknown(where, "layers_pattern", pattern_of_layers)
    rank, alpha, bias = fields.get("r", 8), fields.get("lora_alpha", 8), fields.get("bias", "none")
    excluded = fields.get("exclude_modules")
    return LoraSettings(
        r=field("r", 8, type(rank) is int and 1 <= rank <= MOST_RANK, f"a whole number from 1 to {MOST_RANK:,}"),
        alpha=field("lora_alpha", 8, _is_number(alpha) and abs(alpha) <= 1e9, "a number"),
        rslora=switch("use_rslora"),
        dora=switch("use_dora"),
        lora_bias=switch("lora_bias"),
        bias=field("bias", "none", bias in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
        targets=None if isinstance(excluded, str) and excluded else names("target_modules"),
        excluded=names("exclude_modules") or (),
        layers=None if not layers else frozenset(layers),
        saved=names("modules_to_save") or (),
        rank_pattern=ranks if all(map(LITERAL.fullmatch, ranks)) else None,
        alpha_pattern=alphas,
    )


_USED = frozenset(
    {"peft_type", "task_type", "init_lora_weights", "target_modules", "exclude_modules", "modules_to_save", "r"}
    | {"lora_alpha", "bias", "use_rslora", "use_dora", "lora_bias", "rank_pattern", "alpha_pattern"}
    | {"layers_to_transform", "layers_pattern"}
)


def _refuse_other_adapters(where: str, fields: Mapping[str, Any]) -> None:
    kind, task = fields.get("peft_type"), fields.get("task_type")
    if kind != "LORA" or task not in (None, "CAUSAL_LM"):
        raise ConversionError(
            f"{where} holds an adapter of type {str(kind)[:40]!r} for {str(task)[:40]!r}",
            expected="'LORA' for 'CAUSAL_LM'",
            next_step=MERGE_THERE,
        )
    if fields.get("init_lora_weights", True) not in (True, False, "gaussian"):
        raise ConversionError(
            f"{where} holds a LoRA that began with {str(fields['init_lora_weights'])[:40]!r}, which alters its base",
            expected="one that leaves its base model as it is",
            next_step="convert it with peft's path_initial_model_for_weight_conversion, and convert the result",
        )
    for name in sorted(set(fields) - _USED - OF_NO_EFFECT):
        if fields[name]:  # None, false, {} and [] mean that the option is off
            raise _unknown(where, name, fields[name])


def _unknown(where: str, name: str, value: object) -> ConversionError:
    return ConversionError(
        f"{where}/adapter_config.json has {name[:80]!r}: {str(value)[:80]!r}, which is not known here",
        expected="the options of a plain LoRA, rsLoRA or DoRA",
        next_step=MERGE_THERE,
    )


def _ends(module: str, names: tuple[str, ...]) -> bool:
    """PEFT's rule for lists of names: the whole name, or its last parts."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def _matching(patterns: Mapping[str, float], module: str, default: float) -> float:
    """The number of the first pattern that names the module, whole or by its last parts."""
    for pattern, number in patterns.items():
        name = pattern.replace("\\.", ".")
        if module == name.removeprefix("^") or (not name.startswith("^") and module.endswith(f".{name}")):
            return number
    return default


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_whole(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 31 for value in values)
