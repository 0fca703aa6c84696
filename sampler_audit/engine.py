"""Tokens that another engine drew, as a `Rollout`, and the sets that its top-k and top-p kept, found in hindsight.

Imports torch and the remote code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from decoding_gpt2_value import check_tokens, device_of, inputs_and_head
from generation_gpt2_value import Rollout, aligned
from sampling_gpt2_value import Sampling, as_bits, number, sampling_distribution


def rollout_from_tokens(
    prompts: torch.Tensor | Sequence[Any],
    responses: torch.Tensor | Sequence[Any],
    *,
    attention_mask: torch.Tensor | None = None,
    sampling: Sampling | None = None,
    logprobs: Sequence[Sequence[float]] | None = None,
    kept: Sequence[Sequence[Iterable[int]]] | None = None,
    pad_token_id: int | None = None,
) -> Rollout:
    """The tokens that another engine drew, as a `Rollout` without values, for `rescore`, the audit and training.

    Args:
        prompts, attention_mask, pad_token_id: as in `rollout`, one prompt for each response.
        responses: the tokens drawn in each row, lists or tensors; with the end-of-text token, and nothing after it.
        sampling: the `Sampling` that the engine was asked for; default: `Sampling()`.
        logprobs: of these tokens, as the engine gave them, row by row.
        kept: `kept[row][step]`: the ids that the draw chose among, or a dict with these keys. `rescore` needs them
            where `sampling` cuts tokens off; `find_kept_sets` finds them in hindsight.

    Returns:
        a new `Rollout`; its `logprobs` are None where the engine gave none.

    Raises:
        TypeError, ValueError: these do not fit each other, or nobody can have drawn a token: it comes after the end of
            its row, ends it before `min_new_tokens`, is not in its kept set, or has a log-probability above 0.
    """
    sampling = sampling or Sampling()
    pad = sampling.pad_token_id if pad_token_id is None else number("pad_token_id", pad_token_id, 0)
    starts, prompt_mask = aligned("prompts", prompts, attention_mask, pad=pad)  # [B, P]
    ids, mask = (x.to(starts.device) for x in aligned("responses", responses, pad=pad, right=True))  # [B, T]
    drawn, (B, T) = mask.bool(), mask.shape
    if len(starts) != B or not drawn.any():
        raise ValueError(f"got {len(starts)} prompts, {B} responses; expected as many, with a token at least.")
    for name, given in (("logprobs", logprobs), ("kept", kept)):
        if given is not None and [len(row) for row in given] != mask.sum(1).tolist():
            raise ValueError(f"the rows of {name} are not as long as the responses; expected one for each token.")
    ends = drawn & torch.isin(ids, torch.tensor(sampling.eos_token_id, dtype=torch.long, device=mask.device))
    refused = {
        "has no prompt before it; begin with the end-of-text token": ~prompt_mask.any(1, keepdim=True),
        "comes after the row's end; cut the row there": ends.cumsum(1) > ends.long(),
        "ends the row before min_new_tokens": ends & (drawn.cumsum(1) <= sampling.min_new_tokens),
    }
    numbers = sets = None
    if logprobs is not None:
        rows = [torch.as_tensor(row, dtype=torch.float32).view(-1) for row in logprobs]
        numbers = pad_sequence(rows, batch_first=True).detach().to(mask.device)  # [B, T]
        refused["has a log-probability above 0, or not finite"] = ~(numbers < 1e-3) | numbers.isinf()
    if kept is not None:
        # What is below 0 is no id.
        found = [torch.as_tensor([*step], dtype=torch.int32) for row in kept for step in row]
        width = 1 + int(torch.cat([*found, ids.flatten().cpu()]).max())
        fits = [bool((step == id).any()) for step, id in zip(found, ids[drawn].tolist(), strict=True)]
        refused["is not in its kept set of ids"] = drawn.masked_scatter(drawn, ~torch.tensor(fits, device=mask.device))
        each = [as_bits(torch.isin(torch.arange(width), step)) for step in found]  # [K] for each token
        sets = torch.zeros((B, T, len(each[0])), dtype=torch.uint8, device=mask.device)
        sets = sets.masked_scatter(drawn[..., None], torch.stack(each).to(mask.device))
    for what, where in refused.items():
        for row, step in (where & drawn).nonzero().tolist():
            raise ValueError(f"responses[{row}][{step}], the token {int(ids[row, step])}, {what}.")
    tokens, seen = torch.cat([starts, ids], 1), torch.cat([prompt_mask, mask], 1)
    return Rollout(tokens, seen, ids, drawn, numbers, None, ~ends.any(1), sets, sampling)


@torch.no_grad()
def find_kept_sets(model: Any, rollout: Rollout, *, batch_size: int = 16) -> Rollout:
    """The rollout with the sets that its settings keep under `model`, each with the token that was drawn from it.

    For a rollout of `rollout_from_tokens` whose engine cut tokens off and did not return which it kept. Call it once,
    with the weights that the engine served: whoever scores the tokens later does so over these sets. Its rounding may
    have let the engine keep a token that is not kept here; where it was drawn, it is put into its set. Whether the
    tokens are draws from such sets at all is for `audit_sampler` to say, before: with the sets, no token is impossible.

    Args:
        model: the causal language model of transformers that the engine served.
        rollout: one without `kept`.
        batch_size: rows in one forward pass.

    Returns:
        a new `Rollout`; the same one where its settings cut nothing off.

    Raises:
        TypeError, ValueError: the rollout has its sets already, or does not fit the model.
    """
    batch_size = number("batch_size", batch_size, 1)
    check_is_rollout(rollout)
    if rollout.kept is not None:
        raise ValueError("the rollout says already what each token was drawn from (rollout.kept); use it as it is.")
    vocabulary = check_tokens(model, rollout.sequences, rollout.attention_mask)
    sampling = rollout.sampling
    sampling.check_vocabulary(vocabulary)
    if not sampling.cuts_off(vocabulary):
        return rollout
    T, found = rollout.responses.shape[1], []
    for part, inputs, head in scoring_inputs(model, rollout, batch_size):
        steps, drawn = [], part.sequences[:, -T:, None]
        for t in range(T):  # a step at a time: [b, V] logits, never [b, T, V]
            scaled = sampling_distribution(head(inputs[:, t]), sampling, steps=t)
            steps.append(as_bits(scaled.scatter(-1, drawn[:, t], 0.0).isfinite()))
        kept = torch.stack(steps, 1).masked_fill(~part.response_mask[..., None], 0)  # [b, T, ceil(V / 8)]
        found.append(kept.to(rollout.sequences.device))
    return dataclasses.replace(rollout, kept=torch.cat(found))


def check_is_rollout(rollout: Any) -> None:
    """Raise TypeError where it is no `Rollout`, by name: a package's own class is another one than the checkout's."""
    if type(rollout).__name__ != "Rollout":
        raise TypeError(f"got a {type(rollout).__name__}; expected a Rollout, as from rollout_from_tokens().")


def scoring_inputs(model: Any, rollout: Rollout, batch_size: int) -> Iterator[tuple[Rollout, torch.Tensor, Any]]:
    """Some rows at a time, on the model's device: the rows, inputs `[b, T, ...]` of an output layer, that layer."""
    device, T = device_of(model), rollout.responses.shape[1]
    for rows in torch.arange(len(rollout.sequences)).split(batch_size):
        part = rollout[rows].to(device)
        tokens = part.sequences.masked_fill(part.attention_mask == 0, 0)  # padding may be any number
        inputs, head = inputs_and_head(model, tokens, part.attention_mask, T)
        yield dataclasses.replace(part, sequences=tokens), inputs, head
