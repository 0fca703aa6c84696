"""Honest draws for code that insists on `generate()`: `model.generate(..., custom_generate=honest_generate)`.

Imports torch, transformers and the model's `rollout`. transformers prepares inputs, settings and masks as always, and
then calls this function in the place of its own loop (its documentation: "Customizing model generation").
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    LogitNormalization,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from decoding_gpt2_value import positions
from generation_gpt2_value import rollout

from .errors import DishonestSettingError

if TYPE_CHECKING:
    from generation_gpt2_value import Rollout

# Settings of a GenerationConfig that `rollout` obeys, and those that change no draw: how to cache, how to compile, and
# what is for beams alone, which are refused.
OBEYED = (
    "do_sample temperature top_k top_p eos_token_id pad_token_id max_length max_new_tokens min_length min_new_tokens"
)
OBEYED += " num_return_sequences return_dict_in_generate"
WITHOUT_EFFECT = "use_cache cache_implementation cache_config max_cache_len return_legacy_cache prefill_chunk_size"
WITHOUT_EFFECT += (
    " compile_config disable_compile continuous_batching_config early_stopping length_penalty bos_token_id"
)
WITHOUT_EFFECT += " renormalize_logits _from_model_config transformers_version"
# What transformers makes of these settings, and the setting whose value it must have: a caller's own may have another.
PROCESSORS = {
    TemperatureLogitsWarper: "temperature",
    TopKLogitsWarper: "top_k",
    TopPLogitsWarper: "top_p",
    MinLengthLogitsProcessor: "min_length",
    MinNewTokensLengthLogitsProcessor: "min_new_tokens",
    LogitNormalization: None,
}
CRITERIA = {MaxLengthCriteria: "max_length", EosTokenCriteria: None}
# Arguments of the forward pass that `generate()` itself prepares, from the prompt and its mask.
PREPARED = ("attention_mask", "position_ids", "past_key_values", "cache_position", "use_cache", "logits_to_keep")


@dataclass
class HonestOutput(GenerateDecoderOnlyOutput):
    """What `generate(return_dict_in_generate=True)` returns: the tokens, and the rollout that they are from.

    Attributes:
        sequences: `[B, P+T]` int64, the prompts as they were passed and the tokens that were drawn.
        rollout: their `Rollout`: log-probabilities, values, kept sets, and the settings that they were drawn by.
    """

    rollout: Any = None


def honest_generate(
    model: Any,
    input_ids: torch.Tensor,
    *,
    generation_config: GenerationConfig,
    logits_processor: Any = (),
    stopping_criteria: Any = (),
    generator: torch.Generator | None = None,
    **model_kwargs: Any,
) -> torch.Tensor | HonestOutput:
    """Draw by `rollout`, in a call of `model.generate(ids, do_sample=True, custom_generate=honest_generate)`.

    The draw obeys `temperature`, `top_k`, `top_p`, `eos_token_id`, `pad_token_id`, `max_new_tokens` and
    `min_new_tokens` (or `max_length`, `min_length`) of the generation config, `num_return_sequences`, and a
    `generator`. The config's own default of `top_k` is 50: pass `top_k=0` to draw among all tokens. Use
    `return_dict_in_generate` to get the rollout, which knows its settings. transformers does not pass a streamer on:
    it sees the prompt only.

    Args:
        model: any causal language model of transformers.
        input_ids: `[B, P]` int64, prompts; the other arguments, too, are what `generate()` prepares.

    Returns `[B, P+T]` int64, T columns up to the last token that was drawn; or a `HonestOutput`, if the config has
    `return_dict_in_generate`. Raises DishonestSettingError for any other setting, processor of logits or stopping rule
    that would change the distribution or the output, and what `rollout` raises.
    """
    _refuse_settings(generation_config)
    _refuse_functions("logits_processor", logits_processor, PROCESSORS, generation_config)
    _refuse_functions("stopping_criteria", stopping_criteria, CRITERIA, generation_config)
    P = input_ids.shape[1]
    mask = model_kwargs.get("attention_mask")
    mask = torch.ones_like(input_ids) if mask is None else mask
    _refuse_inputs(model_kwargs, mask)
    early = max(generation_config.min_new_tokens or 0, (generation_config.min_length or 0) - P)
    drawn: Rollout = rollout(
        model,
        input_ids,
        attention_mask=mask,
        max_new_tokens=generation_config.max_length - P,
        min_new_tokens=early,
        temperature=generation_config.temperature,
        top_k=generation_config.top_k or 0,
        top_p=generation_config.top_p,
        eos_token_id=generation_config.eos_token_id,
        pad_token_id=generation_config.pad_token_id,
        generator=generator,
    )
    columns = int(drawn.response_mask.any(0).sum())  # `generate()` stops where the last row has ended
    sequences = torch.cat([input_ids, drawn.responses[:, :columns].to(input_ids.device)], dim=1)
    return HonestOutput(sequences=sequences, rollout=drawn) if generation_config.return_dict_in_generate else sequences


def _refuse_settings(config: GenerationConfig) -> None:
    if not config.do_sample:
        found = "do_sample=False asks for the most probable tokens, and honest_generate draws"
        raise DishonestSettingError(found, next_step="pass do_sample=True, or leave custom_generate out.")
    neutral = GenerationConfig().to_dict()
    # transformers 5 fills these in before it calls us.
    neutral |= getattr(GenerationConfig, "_get_default_generation_params", dict)()
    known = {*OBEYED.split(), *WITHOUT_EFFECT.split()}
    for name, value in config.to_dict().items():
        is_copy = name.endswith("_token_tensor")  # of the ids, which transformers adds before it calls us
        if name not in known and not is_copy and value not in (None, False, neutral.get(name)):
            found = f"{name}={value!r} changes what generate() draws or returns, and rollout has no such setting"
            next_step = f"leave it out, or set model.generation_config.{name} = None if it comes from there."
            raise DishonestSettingError(found, next_step=next_step)


def _refuse_functions(argument: str, functions: Any, known: dict, config: GenerationConfig) -> None:
    """Refuse what the caller added to the processors or criteria that `generate()` makes of the settings."""
    for function in functions:
        setting = known.get(type(function))
        differs = setting is not None and getattr(function, setting) != getattr(config, setting)
        if type(function) not in known or differs:
            found = f"{argument} holds a {type(function).__name__} that is not of the generation config"
            expected = "the settings alone, so that tokens can be scored by what they were drawn from"
            raise DishonestSettingError(found, expected=expected, next_step="leave it out.")


def _refuse_inputs(model_kwargs: dict, mask: torch.Tensor) -> None:
    found = next((name for name, value in model_kwargs.items() if value is not None and name not in PREPARED), None)
    cache, given = model_kwargs.get("past_key_values"), model_kwargs.get("position_ids")
    if cache is not None and cache.get_seq_length() > 0:
        found = "past_key_values"
    if given is not None and not (given.to(mask.device) == positions(mask))[mask.bool()].all():
        found = "position_ids"
    if found is not None:
        what = f"generate() was called with {found}, which rollout has no use for"
        raise DishonestSettingError(what, expected="input_ids and attention_mask", next_step="leave it out.")
