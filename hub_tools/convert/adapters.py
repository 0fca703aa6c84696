"""Merge a LoRA adapter, as PEFT saves it, into its base model. PEFT merges, and sees only checked settings.

PEFT's own loader would import modules that `adapter_config.json` names, and match names by its expressions. Meaning of
the fields: https://huggingface.co/docs/peft/package_reference/lora.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch

from configuration_gpt2_value import GPT2ValueConfig

from ..errors import ConversionError, MissingHeadError, MissingLibraryError, PackageError, as_ours
from ..layout import HEAD_PREFIX
from ..package.weights import build_model
from .heads import BIAS, BODY_DTYPES, WEIGHT, Translation, listed, plain_name, same

MOST_NAMES = 512
MERGE_THERE = "merge it with peft (merge_and_unload), save the result, and convert that"
# Other initialisations (pissa, olora, loftq, corda, lora_ga) change the base model, and the adapter is what differs.
KEEPS_THE_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
# Fields that do not change how the adapter is merged: those of its training, its base, its initialisation; and those
# that say which layers it has, of which rank. Some of these are expressions, and the tensors say it as well.
OF_NO_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "peft_type", "task_type", "init_lora_weights", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "r",
}  # fmt: skip
LITERAL = re.compile(r"\^?(?:[A-Za-z0-9_]|\\?\.)+")  # a name; nothing in it can take long to match


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 1e9


def _is_switch(value: Any) -> bool:
    return type(value) is bool


# What decides how a LoRA is merged, and what it may be.
FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "lora_alpha": _is_number,
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), _is_switch),
    "bias": ("none", "all", "lora_only").__contains__,
    "modules_to_save": lambda names: isinstance(names, list) and all(isinstance(name, str) for name in names),
    "alpha_pattern": lambda alphas: isinstance(alphas, dict) and all(map(_is_number, alphas.values())),
}


def lora_settings(where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an `adapter_config.json` that PEFT may see.

    Raises:
        ConversionError: not a LoRA of a causal language model, or with an option that is not known here.
        PackageError: a field of the wrong type, or out of range.
    """
    kind, task = fields.get("peft_type"), fields.get("task_type")
    if kind != "LORA" or task not in (None, "CAUSAL_LM"):
        raise ConversionError(
            f"{where} holds an adapter of type {str(kind)[:40]!r} for {str(task)[:40]!r}",
            expected="'LORA' for 'CAUSAL_LM'",
            next_step=MERGE_THERE,
        )
    began = fields.get("init_lora_weights", True)
    if began not in KEEPS_THE_BASE:
        raise ConversionError(
            f"{where} holds a LoRA that began with {str(began)[:40]!r}, which alters its base",
            expected="one that leaves its base model as it is",
            next_step="convert it with peft's path_initial_model_for_weight_conversion, and convert the result",
        )
    settings = {}
    for name, value in fields.items():
        if name in OF_NO_EFFECT or (value is None and name not in ("lora_alpha", "bias")):
            continue
        if name in FIELDS:
            if not FIELDS[name](value) or (isinstance(value, (list, dict)) and len(value) > MOST_NAMES):
                raise PackageError(
                    f"{where}/adapter_config.json: {name!r} is {str(value)[:80]!r}",
                    expected=f"what peft.LoraConfig has there, and {MOST_NAMES} names at most",
                    next_step="correct the field, or save the adapter again with its library's save_pretrained",
                )
            settings[name] = value
        elif value:  # false, {} and [] mean that the option is off
            raise ConversionError(
                f"{where}/adapter_config.json has {name[:80]!r}: {str(value)[:80]!r}, which is not known here",
                expected="the options of a plain LoRA, rsLoRA or DoRA",
                next_step=MERGE_THERE,
            )
    if odd := [key for key in settings.get("alpha_pattern", ()) if not LITERAL.fullmatch(key)]:
        raise ConversionError(
            f"{where} has an alpha_pattern with the expression {odd[0][:80]!r}",
            expected="names of layers: a stranger's expressions are not evaluated",
            next_step=MERGE_THERE,
        )
    return settings


def merge(
    base: Translation, adapter: Mapping[str, torch.Tensor], settings: Mapping[str, Any], *, where: str, of: str
) -> tuple[dict[str, torch.Tensor], bool, tuple[str, ...]]:
    """A base model's weights with the adapter in them.

    Args:
        base: a GPT-2, with a value head or without.
        adapter: the tensors that PEFT saved.
        settings: what `lora_settings` returned.
        where, of: the adapter and its base, for messages.

    Returns:
        The weights, each in the dtype that it had; `lm_head.weight` only where it is not the embeddings' any more.
        Whether the adapter holds weights of the value head. Notes.

    Raises:
        PackageError: the adapter has other tensors, or other shapes, than its settings and the base say.
        ConversionError: integers in it.
        MissingHeadError: it changes a head of which neither holds the weights.
        MissingLibraryError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingLibraryError(
            "PEFT, which merges adapters, is not installed", next_step="pip install peft"
        ) from error
    found = {_saved_name(key): tensor for key, tensor in adapter.items()}
    if len(found) < len(adapter):
        raise _does_not_fit(where, of, "it has two tensors for one place")
    for name, tensor in found.items():
        if tensor.dtype not in BODY_DTYPES:
            raise ConversionError(
                f"the adapter's {name} is {tensor.dtype}",
                expected="float32, float16 or bfloat16",
                next_step="save the adapter in one of these dtypes in its own library, and convert that",
            )
    parts = {re.fullmatch(r"(.+)\.lora_(?:embedding_)?A(?:\.weight)?", name): tensor for name, tensor in found.items()}
    ranks = {part[1]: len(tensor) if tensor.dim() else 0 for part, tensor in parts.items() if part}
    layers: dict[str, Any] = {
        "target_modules": [*ranks],
        "rank_pattern": {re.escape(module): rank for module, rank in ranks.items()},
    }
    # Untied, so that an adapter of the embeddings leaves lm_head alone, as it does while it is not merged.
    config = GPT2ValueConfig.from_dict({**base.config.to_dict(), "tie_word_embeddings": False})
    embeddings = base.state["transformer.wte.weight"]
    before = {"lm_head.weight": embeddings, **base.state}
    model = build_model(config, before).float()  # rounded once, at the end
    has_head = any(name.startswith(HEAD_PREFIX) for name in found)
    if has_head and not {WEIGHT, BIAS} & set(base.mapped.values()) and {WEIGHT, BIAS} - set(found):
        raise MissingHeadError(
            f"{where} changes a value head, and its base model {of} has none",
            expected="a base with that head, or an adapter that holds all of it",
            next_step='name the base with the head that was trained: base=; or train with modules_to_save=["v_head"]',
        )
    if any(name.startswith(f"{HEAD_PREFIX}summary.lora_") for name in found):  # of 0.2.0, whose head PEFT adapts
        outputs, inputs = base.state[WEIGHT].shape
        linear = torch.nn.Linear(inputs, outputs)
        linear.load_state_dict(model.v_head.summary.state_dict())
        model.v_head.summary = linear
    if not has_head:
        del model.v_head  # it is no part of what was trained, also where all linear layers were
    with warnings.catch_warnings(), as_ours(lambda gist: _does_not_fit(where, of, gist)):
        warnings.simplefilter("ignore")  # that GPT-2's layers are transposed
        adapted = peft.PeftModel(
            model, peft.LoraConfig(task_type="CAUSAL_LM", **layers, **settings), low_cpu_mem_usage=True
        )
        wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if settings.get("bias") == "lora_only":  # PEFT before 0.21 did not save these
            wanted |= {name for name, _ in adapted.named_parameters() if name.endswith(".base_layer.bias")}
        places = {_saved_name(name): name for name in wanted}
        # Embeddings may lie beside their adapter, as they are in the base.
        odd = {name for name in set(found) - set(places) if name not in before or not same(found[name], before[name])}
        lost = set(places) - set(found)
        if settings.get("bias") == "lora_only" and lost and all(name.endswith(".bias") for name in lost):
            raise PackageError(
                f"{where} lacks biases that were trained: {listed(sorted(lost))}",
                expected='the biases of all adapted layers, as "bias": "lora_only" in adapter_config.json says',
                next_step="save the adapter again with PEFT 0.21 or newer, since older ones leave them out; or, to go "
                'on with the biases of the base model, write "bias": "none" into adapter_config.json',
            )
        if odd or lost:
            raise _does_not_fit(where, of, f"only one of the two has {listed(sorted(odd | lost))}")
        weights = {places[name]: found[name].float() for name in places}
        peft.set_peft_model_state_dict(adapted, weights, low_cpu_mem_usage=True)
        merged = adapted.merge_and_unload(safe_merge=True).state_dict()
    notes = []
    state = {name: merged[name].detach().to(weight.dtype) for name, weight in base.state.items() if name in merged}
    lm_head = merged["lm_head.weight"].to(embeddings.dtype)
    if base.config.tie_word_embeddings and not torch.equal(lm_head, state["transformer.wte.weight"]):
        state["lm_head.weight"] = lm_head
        notes.append("lm_head is not tied to transformer.wte any more: the adapter changes one of the two alone")
    return {**base.state, **state}, has_head, tuple(notes)


def _saved_name(key: str) -> str:
    """The name of an adapter's tensor, whichever version of PEFT wrote it, and through which wrappers."""
    parts = [part for part in plain_name(key).split(".") if part not in ("base_layer", "modules_to_save", "default")]
    return ".".join(parts).replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def _does_not_fit(where: str, of: str, gist: str) -> PackageError:
    return PackageError(
        f"{where} does not fit its base model {of}: {gist}",
        expected="the adapter's weights for each layer that adapter_config.json names",
        next_step="name the base model that the adapter was trained on: base=; where that is the one, save the adapter "
        "again with its library's save_pretrained",
    )
