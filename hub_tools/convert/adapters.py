"""Merge a LoRA adapter, as PEFT saves it, into its base model. PEFT merges, and sees only checked settings.

PEFT's own loader would import modules that `adapter_config.json` names, and match names by its expressions. Meaning of
the fields: https://huggingface.co/docs/peft/package_reference/lora.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import ConversionError, MissingLibraryError, PackageError, as_ours
from ..layout import HEAD_PREFIX
from ..package.config import Table, fits, in_words
from .heads import Translation, listed, model_of, plain_name

MOST_PATTERNS = 512  # PEFT tries each of them for each layer
# Fields that do not change how the adapter is merged: those of its training, its base, its initialisation; and those
# that say which layers it has, of which rank. Some of these are expressions, and the tensors say it as well.
OF_NO_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode",
    "loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "r",
}  # fmt: skip
LITERAL = re.compile(r"\^?(?:[A-Za-z0-9_]|\\?\.)+")  # a name; nothing in it can take long to match


# What decides how a LoRA is merged, and what it may be. All else has to be off.
MERGED: Table = {
    "lora_alpha": float,
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), bool),
    "bias": {"none", "all", "lora_only"},
    "modules_to_save": [str],
    "alpha_pattern": {str: float},
}
FIELDS: Table = {
    **MERGED,
    "peft_type": {"LORA"},
    "task_type": {"CAUSAL_LM"},
    # others (pissa, olora, loftq, corda, lora_ga) change the base model, and the adapter is what differs
    "init_lora_weights": (bool, {"gaussian", "orthogonal", "eva", "mica"}),
}


def lora_settings(where: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an `adapter_config.json` that PEFT may see.

    Raises:
        ConversionError: not a LoRA of a causal language model, an option that is not known here, or a value of the
            wrong type or out of range.
    """
    given = {name: value for name, value in fields.items() if value is not None and name not in OF_NO_EFFECT}
    for name, value in {"peft_type": "", **given}.items():
        kind = FIELDS.get(name, ())  # an option that is not known here has to be off
        holds = fits(value, kind) if kind else not value
        if holds and name == "alpha_pattern":
            holds = len(value) <= MOST_PATTERNS and all(map(LITERAL.fullmatch, value))
        if not holds:
            raise ConversionError(
                f"{where}: {name[:80]!r} is {str(value)[:80]!r}",
                expected=in_words(kind),
                next_step="merge it with peft (merge_and_unload), save the result, and convert that",
            )
    return {name: value for name, value in given.items() if name in MERGED}


def merge(
    base: Translation, adapter: Mapping[str, torch.Tensor], settings: Mapping[str, Any], *, where: str, of: str
) -> dict[str, torch.Tensor]:
    """A base model's weights with the adapter in them.

    Args:
        base: a GPT-2, with a value head or without.
        adapter: the tensors that PEFT saved.
        settings: what `lora_settings` returned.
        where, of: the adapter and its base, for messages.

    Returns:
        The weights, each in the dtype that it had; `lm_head.weight` only where it is not the embeddings' any more.

    Raises:
        PackageError: the adapter has other tensors, or other shapes, than its settings and the base say.
        MissingLibraryError: PEFT is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingLibraryError(
            "PEFT, which merges adapters, is not installed", next_step="pip install peft"
        ) from error

    def does_not_fit(gist: str) -> PackageError:
        return PackageError(
            f"{where} does not fit its base model {of}: {gist}",
            expected="the adapter's weights for each layer that adapter_config.json names",
            next_step="name the base model that the adapter was trained on: base=; where that is the one, save the "
            "adapter again with its library's save_pretrained",
        )

    found = {_saved_name(key): tensor for key, tensor in adapter.items()}
    if len(found) < len(adapter):
        raise does_not_fit("it has two tensors for one place")
    parts = {re.fullmatch(r"(.+)\.lora_(?:embedding_)?A(?:\.weight)?", name): tensor for name, tensor in found.items()}
    ranks = {part[1]: len(tensor) if tensor.dim() else 0 for part, tensor in parts.items() if part}
    embeddings = base.state["transformer.wte.weight"]
    before = {"lm_head.weight": embeddings, **base.state}
    # Untied, so that an adapter of the embeddings leaves lm_head alone, as it does while it is not merged.
    fields = {**base.fields, "tie_word_embeddings": False}
    model = model_of(of, fields, before).float()  # rounded once, at the end
    if not any(name.startswith(HEAD_PREFIX) for name in found):
        del model.v_head  # it is no part of what was trained, also where all linear layers were
    with warnings.catch_warnings(), as_ours(does_not_fit):
        warnings.simplefilter("ignore")  # that GPT-2's layers are transposed
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            target_modules=[*ranks],
            rank_pattern={re.escape(module): rank for module, rank in ranks.items()},
            **settings,
        )
        adapted = peft.PeftModel(model, config, low_cpu_mem_usage=True)
        wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if settings.get("bias") == "lora_only":  # PEFT before 0.21 did not save these, though they were trained
            wanted |= {name for name, _ in adapted.named_parameters() if name.endswith(".base_layer.bias")}
        places = {_saved_name(name): name for name in wanted}
        # Embeddings may lie beside their adapter, as they are in the base.
        unchanged = {name for name, weight in before.items() if name in found and torch.equal(found[name], weight)}
        odd = set(found) - set(places) - unchanged
        if only_one := odd | (set(places) - set(found)):
            raise does_not_fit(f"only one of the two has {listed(sorted(only_one))}")
        weights = {places[name]: found[name].float() for name in places}
        peft.set_peft_model_state_dict(adapted, weights, low_cpu_mem_usage=True)
        merged = adapted.merge_and_unload(safe_merge=True).state_dict()
    state = {name: merged[name].detach().to(weight.dtype) for name, weight in base.state.items() if name in merged}
    state |= {name: found[name].float() for name in found if name.startswith(HEAD_PREFIX)}
    lm_head = merged["lm_head.weight"].to(embeddings.dtype)
    if not torch.equal(lm_head, state["transformer.wte.weight"]):
        state["lm_head.weight"] = lm_head
    return base.state | state


def _saved_name(key: str) -> str:
    """The name of an adapter's tensor, whichever version of PEFT wrote it, and through which wrappers."""
    parts = [part for part in plain_name(key).split(".") if part not in ("base_layer", "modules_to_save", "default")]
    return ".".join(parts).replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
