"""What drawn tokens say about the distributions that they claim to come from, chunk by chunk.

Method: the randomised probability integral transform of every token (Brockwell, 2007, "Universal residuals: a
multivariate transformation", Statistics & Probability Letters 77; Czado, Gneiting & Held, 2009, "Predictive model
assessment for count data", Biometrics 65). Along a sequence the transforms are independent and uniform if each token is
a draw from its claimed distribution (Rosenblatt, 1952, "Remarks on a multivariate transformation", Annals of
Mathematical Statistics 23).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch

from sampling_gpt2_value import Sampling, sampling_distribution

# Another engine's logits differ by rounding: within this distance (in nats, and in probability mass for top_p) a token
# on the edge of what top-k and top-p keep may have been kept there.
ROUNDING = 1e-3
GROUPS = 512  # of token ids that are counted together
HASH = 2654435761  # Knuth's multiplier: ids that are near each other fall into different groups


class Evidence(NamedTuple):
    """What n drawn tokens were, and sums over them; on the CPU.

    Attributes:
        transforms: `[n]` float64, uniform on [0, 1] for honest draws.
        surprises: `[n]` float64, log p(x) + H(p): mean 0 for honest draws, whatever the distributions are.
        variances: `[n]` float64, of the surprise under the claim.
        impossible: `[n]` bool, the token has probability zero under the claim.
        observed, expected: `[G]` float64, how often tokens of each group were drawn and should have been.
        covariance: `[G, G]` float64, of `observed` under the claim.
    """

    transforms: torch.Tensor
    surprises: torch.Tensor
    variances: torch.Tensor
    impossible: torch.Tensor
    observed: torch.Tensor
    expected: torch.Tensor
    covariance: torch.Tensor

    @classmethod
    def of_all(cls, pieces: Iterable[Evidence]) -> Evidence:
        """The evidence of all tokens of these pieces, one at least."""
        columns: list[tuple[torch.Tensor, ...]] = []
        sums: list[torch.Tensor] = []
        for piece in pieces:
            columns.append(piece[:4])
            sums = [old + new for old, new in zip(sums, piece[4:], strict=True)] if sums else list(piece[4:])
        return cls(*(torch.cat(parts) for parts in zip(*columns, strict=True)), *sums)


def evidence_of(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    sampling: Sampling,
    generator: torch.Generator | None,
    *,
    steps: torch.Tensor | None = None,
    kept: torch.Tensor | None = None,
) -> Evidence:
    """What n tokens `[n]` say with the logits `[n, V]` that they were drawn from; see `sampling_distribution`.

    Raises:
        ValueError: logits are NaN or infinite.
    """
    if not logits.isfinite().all():
        raise ValueError("some logits are NaN or infinite; nothing can be drawn from them. Check the weights.")
    logits = logits.double()
    logprobs = sampling_distribution(logits, sampling, steps=steps, kept=kept).log_softmax(-1)  # [n, V]
    own = logprobs.gather(-1, tokens.unsqueeze(-1))  # [n, 1]
    if kept is None and (own == -math.inf).any():
        # Which tokens top-k and top-p keep is decided by rounding where two are all but tied: another engine may
        # have kept one that is not kept here. It counts as the last token that is.
        on_edge = (own == -math.inf).squeeze(-1) & _is_on_edge(logits, tokens, sampling, steps)
        last = logprobs.masked_fill(logprobs == -math.inf, 0.0).argmin(-1)
        tokens = torch.where(on_edge, last, tokens)
        own = logprobs.gather(-1, tokens.unsqueeze(-1))
    # Tokens are ordered by falling probability, ties by their ids; with u uniform the transform of x is
    # P(tokens before x) + u * p(x).
    probs, ids = logprobs.exp(), torch.arange(logits.shape[-1], device=logits.device)
    is_before = (logprobs > own) | ((logprobs == own) & (ids < tokens.unsqueeze(-1)))
    before = (probs * is_before).sum(-1)
    own, prob = own.squeeze(-1), own.exp().squeeze(-1)  # [n]
    where = "cpu" if generator is None else generator.device
    uniform = torch.rand(tokens.shape, generator=generator, device=where, dtype=torch.float64).to(logits.device)
    finite = logprobs.masked_fill(probs == 0, 0.0)
    entropy = -(probs * finite).sum(-1, keepdim=True)

    G = min(logits.shape[-1], GROUPS)
    group = ids if logits.shape[-1] == G else (ids * HASH % 2**32) * G // 2**32  # [V]
    grouped = probs.new_zeros(len(tokens), G).index_add_(1, group, probs)  # [n, G]
    found = (
        (before + uniform * prob).clamp(0.0, 1.0),
        own + entropy.squeeze(-1),
        (probs * (finite + entropy) ** 2).sum(-1),
        prob == 0,
        torch.bincount(group[tokens], minlength=G).double(),
        grouped.sum(0),
        torch.diag(grouped.sum(0)) - grouped.T @ grouped,
    )
    return Evidence(*(part.cpu() for part in found))


def _is_on_edge(logits, tokens, sampling, steps):
    """`[n]` bool: the token would be kept if truncation were looser by the rounding of float32."""
    looser = dataclasses.replace(sampling, top_p=min(1.0, sampling.top_p + ROUNDING))
    kept = sampling_distribution(logits, looser, steps=steps) > -math.inf
    scaled = sampling_distribution(logits, dataclasses.replace(sampling, top_k=0, top_p=1.0), steps=steps)
    last = scaled.masked_fill(~kept, math.inf).amin(-1)
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) >= last - ROUNDING
