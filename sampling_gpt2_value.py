"""From logits to the distribution that a token is drawn from, and the draw.

Remote code: this file is copied into every package, so it imports only torch. Sampling and scoring both call
`sampling_distribution`, and so cannot disagree. Sampling is by inversion: one uniform number for each drawn token
(Devroye, "Non-Uniform Random Variate Generation", 1986, chapter III).
"""

import math
from typing import NamedTuple, Optional

import torch
from torch import nn

# Logits of the same token, computed with a cache and without, differ by float32 rounding: 1e-6 to 1e-5. Within this
# distance (in nats, and in probability mass for top_p) scoring takes the side that sampling took.
ROUNDING = 1e-3


class Distribution(NamedTuple):
    """What a token is drawn from: `logits [..., K]` float32, -inf for what cannot be drawn, sorted if truncated.

    `tokens [..., K]` says which token each logit is of, or is None where they stand in the order of the vocabulary
    (K = V). `support [...]` counts the tokens that can be drawn, or is None without truncation.
    """

    logits: torch.Tensor
    tokens: Optional[torch.Tensor]
    support: Optional[torch.Tensor]


def sampling_distribution(logits, *, temperature=1.0, top_k=0, top_p=1.0, suppress=None, support=None):
    """The one function that turns a model's logits into the distribution that is sampled and scored.

    The order is that of transformers' `generate()`: suppressed tokens, temperature, top-k (Fan et al., 2018,
    arXiv:1805.04833), then top-p among what is left (Holtzman et al., 2020, arXiv:1904.09751). Exactly `top_k` tokens
    are kept, also where several are tied.

    Args:
        logits: `[..., V]`, any float dtype.
        suppress: bool, broadcastable to `logits`, True for a token that cannot be drawn here.
        support: `[...]` int64, how many tokens an earlier call kept for `top_p`; kept again wherever `top_p` allows
            it within `ROUNDING`.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if suppress is not None:
        logits = logits.masked_fill(suppress, -math.inf)
    if temperature != 1.0:
        logits = logits / temperature
    vocabulary = logits.shape[-1]
    if top_p < 1.0:
        logits, tokens = logits.topk(top_k, sorted=True) if 0 < top_k < vocabulary else logits.sort(descending=True)
        probs = logits.softmax(-1)
        mass = probs.cumsum(-1, dtype=torch.float64)
        before = mass - probs  # of the more probable tokens: a token is kept while this is below top_p
        kept = (before < top_p).sum(-1)
        if support is not None:
            last = (support - 1).clamp(0, logits.shape[-1] - 1).unsqueeze(-1)
            on_edge = (before.gather(-1, last) < top_p + ROUNDING) & (mass.gather(-1, last) > top_p - ROUNDING)
            kept = torch.where(on_edge.squeeze(-1), support, kept)
        rank = torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill(rank >= kept.unsqueeze(-1), -math.inf)
        return Distribution(logits, tokens, kept)
    if 0 < top_k < vocabulary:
        logits, tokens = logits.topk(top_k, sorted=True)
        return Distribution(logits, tokens, torch.full(logits.shape[:-1], top_k, device=logits.device))
    return Distribution(logits, None, None)


def sampling_logprobs(logits, *, temperature=1.0, top_k=0, top_p=1.0, suppress=None, support=None):
    """Log-probabilities `[..., V]` float32 of every token of the vocabulary under `sampling_distribution`."""
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "suppress": suppress, "support": support}
    distribution = sampling_distribution(logits, **settings)
    logprobs = distribution.logits.log_softmax(-1)
    if distribution.tokens is None:
        return logprobs
    nowhere = torch.full(logits.shape, -math.inf, dtype=logprobs.dtype, device=logits.device)
    return nowhere.scatter(-1, distribution.tokens, logprobs)


def token_logprob(distribution, logits, tokens, *, temperature=1.0, suppress=None):
    """Log-probabilities `[...]` of `tokens [...]` under the `distribution` that was made of `logits [..., V]`."""
    own = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1).to(distribution.logits.dtype) / temperature
    if suppress is not None:
        own = own.masked_fill(suppress.expand(logits.shape).gather(-1, tokens.unsqueeze(-1)).squeeze(-1), -math.inf)
    logprob = own - distribution.logits.logsumexp(-1)
    if distribution.tokens is None:
        return logprob
    # A token is in if it is as probable as the last one kept. Where two are tied up to rounding, sampling may have
    # kept the one and this call the other; their probabilities are the same, and so is the normaliser.
    last = distribution.logits.gather(-1, (distribution.support - 1).unsqueeze(-1)).squeeze(-1)
    return logprob.masked_fill(own < last - ROUNDING, -math.inf)


def is_one_of(tokens, vocabulary, device):
    """`[V]` bool, True for these tokens."""
    found = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    found[list(tokens)] = True
    return found


def draw(logits, uniform):
    """One index for each row of `logits [B, K]`, by inversion of `uniform [B]` in [0, 1).

    Blocks of sqrt(K) are summed first and the index is found inside one block: cumulative sums over a whole vocabulary
    cost more than the rest of the step. Sums are float64, so that no tail is lost to rounding; an index of probability
    zero is never returned.

    Returns:
        indices `[B]` and the rows' log-normalisers `[B]` float32 (not finite where a logit is NaN or +inf).
    """
    rows, width = logits.shape
    block = math.isqrt(width - 1) + 1
    highest = logits.max(-1, keepdim=True).values
    weights = nn.functional.pad((logits - highest).exp(), (0, -width % block)).view(rows, -1, block)
    blocks = weights.sum(-1, dtype=torch.float64).cumsum(-1)  # [B, K / block]
    total = blocks[:, -1:]
    target = uniform.to(torch.float64).unsqueeze(-1) * total
    # The first block whose cumulative weight exceeds the target has weight; `last` guards against rounding up.
    chosen = torch.minimum((blocks <= target).sum(-1, keepdim=True), _last_positive(weights.amax(-1)))
    below = torch.where(chosen > 0, blocks.gather(-1, (chosen - 1).clamp(min=0)), 0.0)
    inside = weights.gather(1, chosen.unsqueeze(-1).expand(-1, -1, block)).squeeze(1)  # [B, block]
    running = inside.cumsum(-1, dtype=torch.float64)
    index = torch.minimum((running <= target - below).sum(-1, keepdim=True), _last_positive(inside))
    return (chosen * block + index).squeeze(-1), (highest + total.log()).float().squeeze(-1)


def _last_positive(weights):
    """The last index `[B, 1]` with a positive weight, 0 where there is none (a row of NaN)."""
    places = torch.arange(weights.shape[-1], device=weights.device)
    return (places * (weights > 0)).amax(-1, keepdim=True)
