"""The settings that tokens are drawn by, the distribution that they make of logits, and the draw.

Remote code: this file is copied into every package, so it imports only torch. It computes no logits, and reads nothing
of a model. Sampling and scoring both call `sampling_distribution`, and so cannot disagree. What top-k and top-p cut off
is decided once, when a token is drawn, and kept: a policy that has learnt since, a reference, or another dtype ranks the
tokens otherwise, and cutting off again would leave drawn tokens without probability ("keep sampling mask" in
DeepSeek-V3.2, 2025, arXiv:2512.02556, section 3.1).
"""

import dataclasses
import math
import numbers
from typing import NamedTuple, Optional

import torch
from torch import nn

TEMPERATURES = (1e-30, 1e30)  # beyond these, float32 logits that are divided by them are no longer finite


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings that tokens are drawn by, with the names that `generate()` gives them; checked when it is built.

    Attributes:
        temperature: divides the logits.
        top_k: draw among the k most probable tokens; 0 means off.
        top_p: draw among the most probable tokens that together have this probability; 1.0 means off.
        min_new_tokens: end-of-text tokens cannot be drawn before so many others were.
        eos_token_id: the end-of-text tokens, as a tuple; an int, a list, a tensor or None are accepted.

    Raises:
        ValueError: a setting has the wrong type or is out of range; the message names it, and what was expected.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    eos_token_id: tuple = ()

    def __post_init__(self):
        low, high = TEMPERATURES
        settings = {
            "temperature": number("temperature", self.temperature, low, high),
            "top_k": whole_number("top_k", self.top_k, 0),
            "top_p": number("top_p", self.top_p, 0, 1),
            "min_new_tokens": whole_number("min_new_tokens", self.min_new_tokens, 0),
        }
        if settings["top_p"] == 0:
            raise ValueError(f"top_p={self.top_p!r}; expected a number above 0, and at most 1 (1.0 is off).")
        ids = _plain(self.eos_token_id)
        ids = () if ids is None else tuple(ids) if isinstance(ids, (list, tuple)) else (ids,)
        settings["eos_token_id"] = tuple(whole_number("eos_token_id", token, 0) for token in ids)
        if settings["min_new_tokens"] and not ids:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} has no effect without eos_token_id; pass both or neither."
            )
        for name, value in settings.items():
            object.__setattr__(self, name, value)  # plain int, float and tuple, whatever number types came in

    def check_vocabulary(self, vocabulary):
        """Raise ValueError where these settings cannot draw from a vocabulary of so many tokens."""
        outside = [token for token in self.eos_token_id if token >= vocabulary]
        if outside:
            raise ValueError(
                f"eos_token_id={outside[0]} is not in the vocabulary of {vocabulary} tokens; pass an id below that."
            )
        if self.min_new_tokens and len(set(self.eos_token_id)) == vocabulary:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens} leaves nothing to draw: eos_token_id names every token of the "
                "vocabulary. Pass fewer end-of-text tokens, or min_new_tokens=0."
            )


class Distribution(NamedTuple):
    """What a token is drawn from.

    Attributes:
        logits: `[..., K]` float32 (float64 from float64 logits), divided by the temperature and shifted so that the
            largest is 0; -inf for what cannot be drawn.
        tokens: `[..., K]` int64, which token each logit is of; None where they stand in the order of the vocabulary.
    """

    logits: torch.Tensor
    tokens: Optional[torch.Tensor]

    def logits_of(self, tokens):
        """The logits `[...]` of `tokens [...]`; -inf for one that cannot be drawn."""
        if self.tokens is None:
            return self.logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        return self.logits.masked_fill(self.tokens != tokens.unsqueeze(-1), -math.inf).amax(-1)


def sampling_distribution(logits, sampling, *, early=None, kept=None):
    """Turn a model's logits into the distribution that is sampled and scored. Nothing else here does so.

    The order is that of `generate()`: suppressed tokens, temperature, top-k (Fan et al., 2018, arXiv:1805.04833), then
    top-p among what is left (Holtzman et al., 2020, arXiv:1904.09751). Exactly `top_k` tokens stay, also where several
    are tied.

    Args:
        logits: `[..., V]`, any float dtype.
        sampling: the `Sampling`.
        early: `[...]` bool, True where `min_new_tokens` still suppresses the end-of-text tokens.
        kept: `[..., K]`, which tokens an earlier draw chose among, as `kept_tokens` returned it; the settings cut
            nothing more off.

    Returns:
        `Distribution`.
    """
    vocabulary, tokens = logits.shape[-1], None
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if early is not None:
        ends = torch.tensor(sampling.eos_token_id, dtype=torch.long, device=logits.device)
        logits = torch.where(early.unsqueeze(-1), logits.index_fill(-1, ends, -math.inf), logits)
    if kept is not None and kept.dtype == torch.uint8:
        logits = logits.masked_fill(~_as_mask(kept, vocabulary), -math.inf)
    elif kept is not None:
        tokens = kept.clamp(min=0).long()
        logits = logits.gather(-1, tokens).masked_fill(kept < 0, -math.inf)
    # Shifted before it is divided: at a low temperature the rounding of large quotients would show.
    logits = logits - logits.detach().amax(-1, keepdim=True)
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    if kept is not None:
        return Distribution(logits, tokens)
    if 0 < sampling.top_k < vocabulary:
        logits, tokens = logits.topk(sampling.top_k, sorted=True)
    elif sampling.top_p < 1.0:
        logits, tokens = logits.sort(descending=True)
    if sampling.top_p < 1.0:
        probs = logits.softmax(-1)
        of_more_probable = probs.cumsum(-1, dtype=torch.float64) - probs
        logits = logits.masked_fill(of_more_probable >= sampling.top_p, -math.inf)
    return Distribution(logits, tokens)


def sampling_logprobs(logits, sampling, *, early=None, kept=None):
    """Log-probabilities `[..., V]` of every token of the vocabulary, -inf for what cannot be drawn."""
    distribution = sampling_distribution(logits, sampling, early=early, kept=kept)
    logprobs = distribution.logits.log_softmax(-1)
    if distribution.tokens is None:
        return logprobs
    nowhere = torch.full(logits.shape, -math.inf, dtype=logprobs.dtype, device=logits.device)
    return nowhere.scatter_reduce(-1, distribution.tokens, logprobs, "amax")


def kept_tokens(distribution, vocabulary):
    """Which tokens can be drawn, for a distribution of known `tokens [..., K]`, in the fewer bytes.

    Returns:
        `[..., K]` int32, their ids, and -1 in the place of a token that cannot be drawn; or `[..., ceil(V / 8)]` uint8,
        one bit for each token of the vocabulary, the lowest first.
    """
    possible, tokens = distribution.logits > -math.inf, distribution.tokens
    width = -(-vocabulary // 8)
    if 4 * tokens.shape[-1] <= width:
        return tokens.masked_fill(~possible, -1).int()
    mask = torch.zeros((*tokens.shape[:-1], 8 * width), dtype=torch.uint8, device=tokens.device)
    mask.scatter_(-1, tokens, possible.byte())
    return (mask.unflatten(-1, (width, 8)) << _bits(mask)).sum(-1, dtype=torch.uint8)


def fewest_bytes(kept, vocabulary):
    """The same sets `[B, T, ...]`, as ids where these are smaller than a bit mask, without unused columns."""
    if kept.dtype != torch.uint8:
        longest = int((kept >= 0).sum(-1).amax())
        return kept[..., :longest].clone()
    sizes = [_as_mask(row, vocabulary).sum(-1).amax() for row in kept]
    longest = int(torch.stack(sizes).amax())
    if 4 * longest > kept.shape[-1]:
        return kept
    rows = []
    for row in kept:  # [T, width]; the sorted ones of a mask stand first, and are its tokens
        is_kept, tokens = _as_mask(row, vocabulary).byte().topk(longest)
        rows.append(tokens.masked_fill(is_kept == 0, -1).int())
    return torch.stack(rows)


def _as_mask(kept, vocabulary):
    """A bit mask `[..., ceil(V / 8)]` uint8 as `[..., V]` bool."""
    return (kept.unsqueeze(-1) >> _bits(kept)).bitwise_and(1).flatten(-2)[..., :vocabulary].bool()


def _bits(like):
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def draw(logits, uniform):
    """Draw one index for each row of `logits [B, K]`, the largest of which is 0, by inversion of `uniform [B]`.

    One uniform number in [0, 1) is used for each draw (Devroye, "Non-Uniform Random Variate Generation", 1986, chapter
    III). Blocks of sqrt(K) are summed first and the index is found inside one block: cumulative sums over a whole
    vocabulary cost more than the rest of the step. Sums are float64, so that no tail is lost to rounding; an index of
    probability zero is never returned.

    Returns:
        indices `[B]` int64 and their log-probabilities `[B]`, of the logits' dtype (NaN where a logit is NaN).
    """
    rows, width = logits.shape
    block = math.isqrt(width - 1) + 1
    weights = nn.functional.pad(logits.exp(), (0, -width % block)).view(rows, -1, block)
    blocks = weights.sum(-1, dtype=torch.float64).cumsum(-1)  # [B, K / block]
    total = blocks[:, -1:]
    target = uniform.to(torch.float64).unsqueeze(-1) * total
    # The first block whose cumulative weight exceeds the target has weight; `_last_positive` guards against rounding up.
    chosen = torch.minimum((blocks <= target).sum(-1, keepdim=True), _last_positive(weights.amax(-1)))
    below = torch.where(chosen > 0, blocks.gather(-1, (chosen - 1).clamp(min=0)), 0.0)
    inside = weights.gather(1, chosen.unsqueeze(-1).expand(-1, -1, block)).squeeze(1)  # [B, block]
    running = inside.cumsum(-1, dtype=torch.float64)
    index = chosen * block + torch.minimum((running <= target - below).sum(-1, keepdim=True), _last_positive(inside))
    index = index.clamp(max=width - 1)  # a row of NaN has no index of positive probability
    return index.squeeze(-1), (logits.gather(-1, index) - total.log()).squeeze(-1).to(logits.dtype)


def _last_positive(weights):
    """The last index `[B, 1]` with a positive weight, 0 where there is none (a row of NaN)."""
    places = torch.arange(weights.shape[-1], device=weights.device)
    return (places * (weights > 0)).amax(-1, keepdim=True)


def is_finite(logits):
    """Whether all of `logits [..., V]` are finite: their sum is so exactly when each of them is."""
    return logits.detach().sum(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).isfinite()


def whole_number(name, value, low):
    """`value` as an int; ValueError where it is no whole number of at least `low`."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Integral) or plain < low:
        raise ValueError(f"{name}={value!r}; expected an int >= {low}.")
    return int(plain)


def number(name, value, low, high):
    """`value` as a float; ValueError where it is no number from `low` to `high`."""
    plain = _plain(value)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Real) or not low <= plain <= high:
        raise ValueError(f"{name}={value!r}; expected a number from {low} to {high}.")
    return float(plain)


def _plain(value):
    """A tensor's or an array's numbers as Python's; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value
