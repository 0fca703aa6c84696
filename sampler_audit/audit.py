"""The audit of a model's drawn tokens, and of the logits that they were scored by.

Imports torch, the remote code, and of this package `claim`, `evidence`, `statistics` and `report`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import math
import torch

from decoding_gpt2_value import innermost, run, without_dropout
from generation_gpt2_value import Rollout
from sampling_gpt2_value import Sampling, number, whole_number

from . import statistics
from .claim import check_tokens, read_claim
from .evidence import Evidence
from .report import SamplerAudit

MIN_TOKENS = 50  # fewer leave less than 5 to a bin, too few for the chi-square approximation
CHUNK = 2**21  # (token, vocabulary) pairs at a time: 16 MiB for each float64 temporary


def audit_sampler(
    model: Any,
    sequences: Rollout | torch.Tensor | Sequence[torch.Tensor],
    *,
    prompt_length: int | Sequence[int] | torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    response_mask: torch.Tensor | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_new_tokens: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    alpha: float = 1e-3,
    batch_size: int = 16,
) -> SamplerAudit:
    """Test whether tokens are draws from `model` under the claimed settings.

    The tokens may come from anywhere: a `Rollout`, `generate()`, another engine. The claim is what a trainer would
    score: which tokens (`prompt_length` with `eos_token_id`, or `response_mask`) and by which distribution
    (`temperature`, `top_k`, `top_p`, `min_new_tokens`; by default the model's own). Dropout is off, whatever mode the
    model is in, and positions count the tokens that the mask admits, as in `rescore`. At no time are there logits of
    more than `batch_size` rows; of a GPT-2, of more than a chunk of tokens.

    Args:
        model: the causal language model of transformers that the tokens claim to be drawn from.
        sequences: a `Rollout`, which brings its own masks and settings (pass nothing of these); or `[B, P+T]` token
            ids, prompts and responses; or a list of 1-D tensors of any lengths, each a prompt with its response.
        prompt_length: columns before the first token of the response, padding included: one number, or one a row. What
            follows is claimed as drawn: up to the first end-of-text token, that one included, with `eos_token_id`;
            all of it without. Padding that is scored like the tokens before it is claimed too, and is found out.
        attention_mask: `[B, P+T]`, or `[B, P]` of the prompts alone, 0 for padding; default: no padding.
        response_mask: `[B, P+T]`, or `[B, T]` of the last T columns, instead of `prompt_length`: True for the tokens
            that are claimed as drawn, one by one.
        temperature, top_k, top_p, min_new_tokens: the claimed settings, as in `rollout`; default: 1, 0, 1, 0.
        eos_token_id: an id, or several, that end a response, and that `min_new_tokens` keeps away.
        generator: of the uniform numbers that the method needs, one a token; default: torch's global one. Another
            state gives another p-value, as another sample would.
        alpha: the level of the verdict.
        batch_size: rows in one forward pass.

    Returns:
        `SamplerAudit`.

    Raises:
        TypeError, ValueError: the claim is unclear or contradicts itself, fewer than 50 tokens are claimed, a token is
            not in the vocabulary, or logits are NaN or infinite.
    """
    _check_level(alpha)
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; expected at least 1.")
    vocabulary = _vocabulary(model)
    masks = {"prompt_length": prompt_length, "attention_mask": attention_mask, "response_mask": response_mask}
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_new_tokens": min_new_tokens}
    claim = read_claim(sequences, vocabulary, **masks, **settings, eos_token_id=eos_token_id).to(model.device)

    T = claim.columns
    is_eos = torch.zeros(vocabulary, dtype=torch.bool, device=model.device)
    is_eos[list(claim.eos_token_id)] = True
    parts = []
    for rows in torch.arange(len(claim.tokens)).split(batch_size):
        drawn = claim.drawn[rows, -T:]
        if not drawn.any():
            continue
        with torch.no_grad():
            states = last_states(model, claim.tokens[rows], claim.attention_mask[rows], T)
        inputs = {"inputs": states.inputs, "tokens": claim.tokens[rows, -T:], "early": claim.early[rows, -T:]}
        if claim.support is not None:
            inputs["support"] = claim.support[rows, -T:]
        chunks = {name: tensor[drawn].split(max(1, CHUNK // vocabulary)) for name, tensor in inputs.items()}
        for columns in zip(*chunks.values(), strict=True):
            chunk = dict(zip(chunks, columns, strict=True))
            with torch.no_grad():
                logits = states.head(chunk["inputs"])
            suppress = chunk["early"].unsqueeze(-1) & is_eos if claim.early.any() else None
            edge = {"suppress": suppress, "support": chunk.get("support")}
            parts.append(_transform(logits, chunk["tokens"], generator, **edge, **claim.settings))
    return _judge(parts, alpha)


def audit_logits(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    alpha: float = 1e-3,
) -> SamplerAudit:
    """Test whether tokens are draws from the logits that a trainer scored them by, wherever these come from.

    For a scoring pass that is not `rescore`: mistakes in its positions, masks or dropout are found too.

    Args:
        logits: `[..., V]`, any float dtype; where a token was drawn, the logits that it is scored by.
        tokens: `[...]` int64, the tokens that were drawn there; leave padding out: `logits[mask], tokens[mask]`.
        temperature, top_k, top_p, generator, alpha: as in `audit_sampler`.

    Returns:
        `SamplerAudit`.

    Raises:
        TypeError, ValueError: shapes, settings, tokens or logits are not as above, or there are fewer than 50 tokens.
    """
    _check_level(alpha)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    check_settings(**settings)
    if logits.dim() < 1 or logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"logits has shape {list(logits.shape)}, tokens {list(tokens.shape)}; expected [..., vocabulary] and [...]."
        )
    vocabulary = logits.shape[-1]
    check_tokens(tokens, torch.ones_like(tokens, dtype=torch.bool), vocabulary)
    rows = max(1, CHUNK // vocabulary)
    flat_tokens = tokens.reshape(-1).to(logits.device)
    chunks = zip(logits.detach().reshape(-1, vocabulary).split(rows), flat_tokens.split(rows), strict=True)
    return _judge([_transform(*chunk, generator, **settings) for chunk in chunks], alpha)


@torch.no_grad()
def _transform(logits, tokens, generator, *, suppress=None, support=None, **settings):
    """Of n tokens under `logits [n, V]`: transforms, log p(x) + H(p), and whether impossible; `[3, n]` float64.

    Tokens are ordered by falling probability, ties by their ids. With V uniform the transform is
    P(tokens before x) + V * p(x).
    """
    if not logits.sum(-1, dtype=torch.float32).isfinite().all():
        raise ValueError("some logits are NaN or infinite; nothing can be drawn from them. Check the weights.")
    logits = logits.double()
    logprobs = sampling_logprobs(logits, suppress=suppress, support=support, **settings)  # [n, V]
    probs = logprobs.exp()
    own = logprobs.gather(-1, tokens.unsqueeze(-1))  # [n, 1]
    ids = torch.arange(logits.shape[-1], device=logits.device)
    is_before = (logprobs > own) | ((logprobs == own) & (ids < tokens.unsqueeze(-1)))
    before = (probs * is_before).sum(-1)
    own, prob = own.squeeze(-1), own.exp().squeeze(-1)
    if (prob == 0).any():
        # Which tokens top-k and top-p keep is decided by rounding where two are all but tied: another engine may have
        # kept one that is not kept here. It counts as the last token that is.
        on_edge = (prob == 0) & _is_on_edge(logits, tokens, suppress, settings)
        smallest = probs.masked_fill(probs == 0, 1.0).amin(-1)
        own, prob = torch.where(on_edge, smallest.log(), own), torch.where(on_edge, smallest, prob)
        before = torch.where(on_edge, 1.0 - smallest, before)
    entropy = -(probs * logprobs.masked_fill(probs == 0, 0.0)).sum(-1)
    where = "cpu" if generator is None else generator.device
    uniform = torch.rand(tokens.shape, generator=generator, device=where, dtype=torch.float64).to(logits.device)
    transforms = (before + uniform * prob).clamp(0.0, 1.0)
    return torch.stack([transforms, own + entropy, (prob == 0).double()]).cpu()


def _is_on_edge(logits, tokens, suppress, settings):
    """`[n]` bool: the token would be kept if truncation were looser by the rounding of float32."""
    looser = {**settings, "top_p": min(1.0, settings["top_p"] + ROUNDING)}
    kept = sampling_logprobs(logits, suppress=suppress, **looser) > -math.inf
    scaled = logits / settings["temperature"]
    if suppress is not None:
        scaled = scaled.masked_fill(suppress, -math.inf)
    last = scaled.masked_fill(~kept, math.inf).amin(-1)
    return scaled.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) >= last - ROUNDING


def _judge(parts: Iterable[torch.Tensor], alpha: float) -> SamplerAudit:
    """The likelihood-ratio test of uniformity (G-test), with Williams' correction (1976, Biometrika 63)."""
    transforms, terms, is_impossible = torch.cat([torch.zeros(3, 0, dtype=torch.float64), *parts], dim=1)
    n = len(transforms)
    if n < MIN_TOKENS:
        raise ValueError(f"{n} tokens are claimed as drawn; the test needs at least {MIN_TOKENS}: draw more.")
    edges = _edges(n)
    widths = edges.diff()
    observed = torch.bincount(torch.bucketize(transforms, edges[1:-1], right=True), minlength=len(widths)).double()
    g = 2.0 * torch.special.xlogy(observed, observed / (n * widths)).sum()
    freedom = len(widths) - 1
    statistic = (g / (1.0 + ((1.0 / widths).sum() - 1.0) / (6.0 * n * freedom))).clamp(min=0.0)
    # The upper tail of the chi-square distribution is a regularised incomplete gamma function.
    p_value = torch.special.gammaincc(torch.tensor(freedom / 2.0, dtype=torch.float64), statistic / 2.0)
    impossible = int(is_impossible.sum())
    return SamplerAudit(
        statistic=float(statistic),
        degrees_of_freedom=freedom,
        p_value=0.0 if impossible else float(p_value),
        alpha=alpha,
        bias_nats=-math.inf if impossible else float(terms.mean()),
        standard_error=math.nan if impossible else float(terms.std() / math.sqrt(n)),
        tokens=n,
        impossible=impossible,
        edges=tuple(edges.tolist()),
        histogram=tuple(int(count) for count in observed),
        transforms=transforms,
    )


def _edges(n: int) -> torch.Tensor:
    """Edges of the bins for n transforms: even ones, the last halved while at least 10 are expected in each half."""
    edges = [bin / EVEN_BINS for bin in range(EVEN_BINS)]
    tail = 1.0 / EVEN_BINS
    while n * tail / 2 >= 10:
        tail /= 2
        edges.append(1.0 - tail)
    return torch.tensor([*edges, 1.0], dtype=torch.float64)


def _check_level(alpha):
    if not 0 < alpha < 1:
        raise ValueError(f"alpha={alpha}; expected a number in (0, 1), such as 1e-3.")


def _vocabulary(model):
    if not hasattr(model, "get_input_embeddings"):
        raise TypeError(
            f"got a {type(model).__name__}; expected a causal language model of transformers. For logits that you have "
            "already, see audit_logits()."
        )
    return model.get_input_embeddings().weight.shape[0]
