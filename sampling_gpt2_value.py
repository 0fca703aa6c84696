"""The settings that tokens are drawn by, the distribution that they make of logits, and the draw.

Remote code, which imports only torch. Sampling and scoring both call `sampling_distribution`, and cannot disagree. What
top-k and top-p cut off is decided at the draw, and kept: another policy or dtype ranks tokens otherwise, and would give
drawn tokens no probability ("keep sampling mask" in DeepSeek-V3.2, 2025, arXiv:2512.02556, section 3.1).
"""

import dataclasses
import math

import torch

SMALLEST, LARGEST = 1e-30, 1e30  # of a temperature: beyond, float32 logits divided by it are no longer finite


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings that tokens are drawn by, with the names that `generate()` gives them; checked when it is built.

    Attributes:
        temperature: divides the logits.
        top_k: draw among the k most probable tokens; 0 means off.
        top_p: draw among the most probable tokens that together have this probability; 1.0 means off.
        min_new_tokens: end-of-text tokens cannot be drawn before so many others were.
        eos_token_id: the end-of-text tokens, as a tuple; an int, a list, a tensor or None are accepted.

    Raises ValueError where a setting has the wrong type or is out of range, naming it and what was expected.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    eos_token_id: tuple = ()

    def __post_init__(self):
        vars(self).update(  # the class is frozen. Whatever number types came in: int, float and tuple
            temperature=number("temperature", self.temperature, SMALLEST, LARGEST, float),
            top_k=number("top_k", self.top_k, 0),
            top_p=number("top_p", self.top_p, SMALLEST, 1, float),
            min_new_tokens=number("min_new_tokens", self.min_new_tokens, 0),
            eos_token_id=tuple(number("eos_token_id", token, 0) for token in listed(self.eos_token_id)),
        )
        if self.min_new_tokens and not self.eos_token_id:
            raise ValueError(f"min_new_tokens={self.min_new_tokens} has no effect without eos_token_id; pass both.")

    @property
    def pad_token_id(self):
        """What fills a row after its end where nothing else is asked for."""
        return (*self.eos_token_id, 0)[0]

    def cuts_off(self, vocabulary):
        """Whether top-k or top-p leave any of so many tokens out."""
        return self.top_p < 1.0 or 0 < self.top_k < vocabulary

    def check_vocabulary(self, vocabulary):
        """Raise ValueError where an end-of-text token is not among so many."""
        for token in self.eos_token_id:
            number("eos_token_id", token, 0, vocabulary - 1)


def sampling_distribution(logits, sampling, *, steps=None, kept=None):
    """Turn a model's logits into the distribution that is sampled and scored. Nothing else here does so.

    The order is that of `generate()`: suppressed tokens, temperature, top-k (Fan et al., 2018, arXiv:1805.04833), then
    top-p among what is left (Holtzman et al., 2020, arXiv:1904.09751). Exactly `top_k` tokens stay, also where several
    are tied.

    Args:
        logits: `[..., V]`, any float dtype.
        sampling: the `Sampling`.
        steps: `[...]` int64, or one number: how many tokens of the response come before. None: enough of them.
        kept: which tokens an earlier draw chose among, `as_bits`: the settings then cut nothing off.

    Returns `[..., V]` float32 (float64 from float64): logits divided by the temperature, up to a constant for each row;
    -inf for what cannot be drawn. Their `log_softmax(-1)` are log-probabilities.
    """
    vocabulary = logits.shape[-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if sampling.min_new_tokens and steps is not None:
        early = torch.as_tensor(steps, device=logits.device) < sampling.min_new_tokens
        without_ends = logits.clone()
        without_ends[..., list(sampling.eos_token_id)] = -math.inf
        logits = torch.where(early[..., None], without_ends, logits)
    if kept is not None:
        logits = logits.masked_fill(~as_mask(kept, vocabulary), -math.inf)
    if sampling.temperature != 1.0:
        # Shifted before it is divided: at a low temperature the rounding of large quotients would show.
        logits = (logits - logits.detach().amax(-1, True)) / sampling.temperature
    if kept is not None or not sampling.cuts_off(vocabulary):
        return logits
    highest, tokens = logits.topk(min(sampling.top_k or vocabulary, vocabulary))
    if sampling.top_p < 1.0:
        probs = highest.softmax(-1)
        of_more_probable = probs.cumsum(-1, dtype=torch.float64) - probs
        highest = highest.masked_fill(of_more_probable >= sampling.top_p, -math.inf)
    return torch.full_like(logits, -math.inf).scatter(-1, tokens, highest)


def as_bits(mask):
    """A mask `[..., V]` bool as `[..., ceil(V / 8)]` uint8, lowest bit first. So a rollout stores its kept sets."""
    mask = torch.nn.functional.pad(mask.byte(), (0, -mask.shape[-1] % 8))
    return sum(mask[..., bit::8] << bit for bit in range(8))


def as_mask(kept, vocabulary):
    """What `as_bits` returned, as a mask `[..., V]` bool."""
    bits = torch.arange(8, dtype=torch.uint8, device=kept.device)
    mask = (kept[..., None] >> bits).bitwise_and(1).flatten(-2)
    # Padding by a negative number cuts the last byte's spare bits off.
    return torch.nn.functional.pad(mask, (0, vocabulary - mask.shape[-1])).bool()


def draw(logits, uniform):
    """Draw one index for each row of `logits [B, K]` by inversion of the distribution function at `uniform [B]`.

    One uniform number in [0, 1) makes one draw (Devroye, "Non-Uniform Random Variate Generation", 1986, chapter III).
    Sums are in float64, so that no tail is lost to rounding. An index of probability zero is never returned.

    Returns the indices `[B]` int64 and their log-probabilities `[B]`, of the logits' dtype (NaN where a logit is NaN).
    """
    logits = logits - logits.amax(-1, True)
    running = logits.exp().cumsum(-1, dtype=torch.float64)  # [B, K]
    total = running[:, -1:]
    index = torch.searchsorted(running, uniform[..., None] * total, right=True)  # [B, 1]
    index = index.clamp(max=logits.shape[-1] - 1)  # where a logit is NaN, it is beyond
    return index.squeeze(-1), (logits.gather(-1, index) - total.log()).squeeze(-1).to(logits.dtype)


def listed(ids):
    """One id, several in a list, a tuple or a tensor, or None, as a tuple."""
    try:
        return tuple(ids)
    except TypeError:  # one id, or None
        return () if ids is None else (ids,)


def number(name, value, low, high=math.inf, kind=int):
    """`value` as a plain int, or float. ValueError where it is none from `low` to `high`."""
    plain = value.tolist() if hasattr(value, "tolist") else value  # a tensor's or an array's number
    if isinstance(plain, bool) or not isinstance(plain, (int, kind)) or not low <= plain <= high:
        raise ValueError(f"{name}={value!r}; expected {low} to {high}, of the type {kind.__name__}.")
    return kind(plain)
