"""Which tokens top-k and top-p kept, found in hindsight, for tokens of an engine that does not return it.

Imports torch and the remote code.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from decoding_gpt2_value import check_tokens, innermost, inputs_and_head, unwrapped
from generation_gpt2_value import Rollout
from sampling_gpt2_value import compact, kept_set, sampling_distribution, whole_number


@torch.no_grad()
def find_kept_sets(model: Any, rollout: Rollout, *, batch_size: int = 16) -> Rollout:
    """The rollout with the sets that its settings keep under `model`, each with the token that was drawn from it.

    For a rollout of `Rollout.from_tokens` whose engine cut tokens off and did not return which it kept. Call it once,
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
    batch_size = whole_number("batch_size", batch_size, 1)
    if type(rollout).__name__ != "Rollout":  # by name: a package's own class is another one than the checkout's
        raise TypeError(f"find_kept_sets() got a {type(rollout).__name__}; expected a Rollout: see from_tokens().")
    if rollout.kept is not None:
        raise ValueError("the rollout says already what each token was drawn from (rollout.kept); use it as it is.")
    vocabulary = check_tokens(model, rollout.sequences, rollout.attention_mask)
    sampling = rollout.sampling
    sampling.check_vocabulary(vocabulary)
    if not sampling.cuts_off(vocabulary):
        return rollout
    device, T = unwrapped(model)[-1].device, rollout.responses.shape[1]
    found = []
    for rows in torch.arange(len(rollout)).split(batch_size):
        part = rollout[rows].to(device)
        tokens = part.sequences.masked_fill(part.attention_mask == 0, 0)  # padding may be any number
        seen = slice(0, tokens.shape[1] - 1)
        inputs, head, _ = inputs_and_head(innermost(model), tokens, part.attention_mask, seen, T)
        steps = []
        for t in range(T):  # a step at a time: [b, V] logits, never [b, T, V]
            early = torch.full((len(rows),), t < sampling.min_new_tokens, device=device)
            steps.append(kept_set(sampling_distribution(head(inputs[:, t]), sampling, early=early), sampling))
        kept = torch.stack(steps, 1)  # [b, T, ceil(V / 8)]
        drawn = part.responses.masked_fill(~part.response_mask, 0).unsqueeze(-1)
        bits = kept.gather(-1, drawn // 8) | (1 << drawn % 8).to(torch.uint8)
        kept = kept.scatter(-1, drawn // 8, bits).masked_fill(~part.response_mask.unsqueeze(-1), 0)
        found.append(kept.to(rollout.sequences.device))
    return dataclasses.replace(rollout, kept=compact(torch.cat(found), vocabulary))
