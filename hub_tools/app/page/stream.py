"""Rollouts that can be looked at while they are drawn: the same tokens as in one call, a few at a time.

Imports torch and the remote code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch

from decoding_gpt2_value import check_tokens
from generation_gpt2_value import Rollout, rollout
from sampling_gpt2_value import Sampling, compact, kept_set, sampling_distribution, whole_number

EACH = 8  # a piece is an eighth of what was drawn before it, since the model reads all of that again


def stream(
    model: Any,
    queries: list[torch.Tensor],
    *,
    sampling: Sampling,
    max_new_tokens: int,
    num_return_sequences: int,
    generator: torch.Generator,
) -> Iterator[Rollout]:
    """Draw responses, and yield the `Rollout` of what was drawn so far: at first after each token, later after a few.

    Each piece is a rollout that goes on from the tokens before it. On a CPU the last one that is yielded holds the
    tokens that a single call of `rollout` with this generator draws, since both use its numbers in the same order.

    Args:
        queries: 1-D tensors of token ids.
        sampling: the settings; `min_new_tokens` counts from the end of the prompt.
        max_new_tokens, num_return_sequences, generator: as in `rollout`.

    Raises:
        TypeError, ValueError: as `rollout`; for lengths, as soon as one token was drawn.
    """
    if whole_number("max_new_tokens", max_new_tokens, 1) < sampling.min_new_tokens:
        raise ValueError(f"min_new_tokens={sampling.min_new_tokens}; expected 0 to max_new_tokens={max_new_tokens}.")
    settings = {**dataclasses.asdict(sampling), "generator": generator}
    first = {"max_new_tokens": 1, "min_new_tokens": min(1, sampling.min_new_tokens)}
    found = rollout(model, queries, num_return_sequences=num_return_sequences, **{**settings, **first})
    vocabulary = check_tokens(model, found.sequences[:, :-1], found.attention_mask[:, :-1], max_new_tokens)
    found = _with_all_bits(found, sampling, vocabulary)
    while True:
        yield _compacted(found, vocabulary)
        drawn = found.responses.shape[1]
        if drawn == max_new_tokens or not found.truncated.any():
            return
        new = min(max_new_tokens - drawn, max(1, drawn // EACH))
        lengths = {"max_new_tokens": new, "min_new_tokens": min(new, max(0, sampling.min_new_tokens - drawn))}
        piece = rollout(model, found.sequences, attention_mask=found.attention_mask, **{**settings, **lengths})
        found = _joined(found, _with_all_bits(piece, sampling, vocabulary))


def _joined(found: Rollout, piece: Rollout) -> Rollout:
    """What was found, with a piece that was drawn after it; rows that had ended stay as they are."""
    running = found.truncated
    pad = (*found.sampling.eos_token_id, 0)[0]

    def put(before: torch.Tensor, column: torch.Tensor, nothing: float) -> torch.Tensor:
        shown = running.view(-1, *[1] * (column.dim() - 1))
        return torch.cat([before, torch.where(shown, column, column.new_full((), nothing))], 1)

    def put_if_there(before: torch.Tensor | None, column: torch.Tensor | None) -> torch.Tensor | None:
        return None if before is None or column is None else put(before, column, 0)

    return Rollout(
        sequences=put(found.sequences, piece.responses, pad),
        attention_mask=put(found.attention_mask, piece.response_mask.long(), 0),
        responses=put(found.responses, piece.responses, pad),
        response_mask=put(found.response_mask, piece.response_mask, False),
        logprobs=put_if_there(found.logprobs, piece.logprobs),
        values=put_if_there(found.values, piece.values),
        truncated=running & piece.truncated,
        kept=put_if_there(found.kept, piece.kept),
        sampling=found.sampling,
    )


def _with_all_bits(found: Rollout, sampling: Sampling, vocabulary: int) -> Rollout:
    """The rollout by the settings of all of it, its kept sets as bits."""
    kept = found.kept
    if kept is not None:
        nothing = torch.zeros((*kept.shape[:-1], vocabulary))
        kept = kept_set(sampling_distribution(nothing, Sampling(), kept=kept), sampling)
    return dataclasses.replace(found, kept=kept, sampling=sampling)


def _compacted(found: Rollout, vocabulary: int) -> Rollout:
    return found if found.kept is None else dataclasses.replace(found, kept=compact(found.kept, vocabulary))
