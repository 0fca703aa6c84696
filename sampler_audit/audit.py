"""The audit of tokens that a model is said to have drawn, and of the logits that such tokens were scored by.

Imports torch, the remote code, and of this package `claim`, `evidence`, `statistics` and `report`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from decoding_gpt2_value import check_tokens as check_fit
from decoding_gpt2_value import innermost, inputs_and_head, unwrapped
from generation_gpt2_value import Rollout
from sampling_gpt2_value import Sampling, number, whole_number

from . import statistics
from .claim import check_tokens, read_claim
from .evidence import Evidence
from .report import SamplerAudit

MIN_TOKENS = 50  # fewer leave less than 10 to a bin, too few for the chi-square approximation
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
    model is in, and positions count the tokens that the mask admits, as in `rescore`. Tokens of a `Rollout` are tested
    as draws from the very sets that it kept, which the audit takes as given; where there is no record of these, tokens
    at the edge of what top-k and top-p keep are allowed the rounding of float32. At no time are there logits of
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
    _check_options(alpha, generator)
    batch_size = whole_number("batch_size", batch_size, 1)
    inner = _language_model(model)
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    masks: dict[str, Any] = {
        "prompt_length": prompt_length,
        "attention_mask": attention_mask,
        "response_mask": response_mask,
    }
    settings: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_new_tokens": min_new_tokens,
    }
    claim = read_claim(sequences, vocabulary, **masks, **settings, eos_token_id=eos_token_id).to(inner.device)
    check_fit(model, claim.tokens, claim.attention_mask)

    T = claim.columns
    evidence = Evidence.none(vocabulary)
    columns = {"tokens": claim.tokens[:, -T:], "kept": claim.kept if claim.kept is None else claim.kept[:, -T:]}
    columns["early"] = claim.early[:, -T:] if claim.sampling.min_new_tokens else None
    seen = slice(0, claim.tokens.shape[1] - 1)
    for rows in torch.arange(len(claim.tokens)).split(batch_size):
        drawn = claim.drawn[rows, -T:]
        if not drawn.any():
            continue
        with torch.no_grad():
            part = claim.tokens[rows], claim.attention_mask[rows], seen, T
            inputs, head, _ = inputs_and_head(innermost(model), *part)
        chunks = {name: column[rows] for name, column in columns.items() if column is not None}
        chunks = {name: c[drawn].split(_rows_at_a_time(vocabulary)) for name, c in {"inputs": inputs, **chunks}.items()}
        for pieces in zip(*chunks.values(), strict=True):
            chunk = dict(zip(chunks, pieces, strict=True))
            with torch.no_grad():
                logits = head(chunk.pop("inputs"))
            evidence.add(logits, sampling=claim.sampling, generator=generator, **chunk)
    return _judge(evidence, claim.drawn[:, -T:].cpu(), alpha)


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
        logits: `[B, T, V]` or `[n, V]`, any float dtype; where a token was drawn, the logits that it is scored by.
        tokens: `[B, T]` or `[n]` int64, the tokens that were drawn there. Leave padding out: `logits[mask],
            tokens[mask]`. Where no row is padded, `[B, T]` is better: only there can be tested whether all rows and
            all steps were drawn alike, and whether rows repeat each other.
        temperature, top_k, top_p: the claimed settings, as in `rollout`.
        generator, alpha: as in `audit_sampler`.

    Returns:
        `SamplerAudit`.

    Raises:
        TypeError, ValueError: shapes, settings, tokens or logits are not as above, or there are fewer than 50 tokens.
    """
    _check_options(alpha, generator)
    sampling = Sampling(temperature, top_k, top_p)
    for name, found in (("logits", logits), ("tokens", tokens)):
        if not isinstance(found, torch.Tensor):
            raise TypeError(f"{name} is a {type(found).__name__}; expected a tensor.")
    if not logits.is_floating_point():
        raise TypeError(f"logits are {logits.dtype}; expected a float dtype.")
    if logits.dim() < 1 or logits.shape[:-1] != tokens.shape:
        raise ValueError(
            f"logits has shape {list(logits.shape)}, tokens {list(tokens.shape)}; expected [..., vocabulary] and [...]."
        )
    vocabulary = logits.shape[-1]
    check_tokens(tokens, torch.ones_like(tokens, dtype=torch.bool), vocabulary)
    evidence = Evidence.none(vocabulary)
    pieces = logits.detach().reshape(-1, vocabulary), tokens.long().reshape(-1).to(logits.device)
    for chunk, drawn in zip(*(piece.split(_rows_at_a_time(vocabulary)) for piece in pieces), strict=True):
        evidence.add(chunk, drawn, sampling, generator=generator)
    shape = (-1, tokens.shape[-1]) if tokens.dim() > 1 else (1, -1)
    return _judge(evidence, torch.ones(tokens.shape, dtype=torch.bool).reshape(shape), alpha)


def _judge(evidence: Evidence, drawn: torch.Tensor, alpha: float) -> SamplerAudit:
    """The result, for `drawn [B, T]` bool: where on the grid of rows and steps the tokens of the evidence stand."""
    n = len(evidence.transforms)
    if n < MIN_TOKENS:
        raise ValueError(f"{n} tokens are claimed as drawn; the test needs at least {MIN_TOKENS}: draw more.")

    def on_grid(column):
        return torch.zeros(drawn.shape, dtype=torch.float64).masked_scatter(drawn, column)

    transforms, variances = on_grid(evidence.transforms), on_grid(evidence.variances)
    calibration, edges, histogram = statistics.calibration(evidence.transforms)
    tests = {
        "calibration": calibration,
        "identity": statistics.identity(evidence.observed, evidence.expected, evidence.covariance),
        "order": statistics.order(transforms, drawn),
        "spread": statistics.spread(transforms, variances, drawn, evenness=1.0 - calibration.p_value),
    }
    impossible = int(evidence.impossible.sum())
    return SamplerAudit(
        statistic=calibration.statistic,
        degrees_of_freedom=int(calibration.degrees_of_freedom),
        tests=tests,
        p_value=0.0 if impossible else statistics.both(*(test.p_value for test in tests.values() if test.was_made)),
        alpha=alpha,
        bias_nats=-math.inf if impossible else float(evidence.surprises.mean()),
        standard_error=math.nan if impossible else float(evidence.surprises.std() / math.sqrt(n)),
        tokens=n,
        impossible=impossible,
        edges=tuple(edges.tolist()),
        histogram=tuple(int(count) for count in histogram),
        transforms=evidence.transforms,
    )


def _check_options(alpha, generator):
    if number("alpha", alpha, 0, 1) in (0, 1):
        raise ValueError(f"alpha={alpha}; expected a number between 0 and 1, such as 1e-3.")
    if not isinstance(generator, (torch.Generator, type(None))):
        raise TypeError(f"generator is a {type(generator).__name__}; expected torch.Generator().manual_seed(...).")


def _language_model(model):
    """The model inside its wrappers."""
    try:
        return unwrapped(model)[-1]
    except TypeError as error:
        raise TypeError(f"{error} For logits that you have already, see audit_logits().") from error


def _rows_at_a_time(vocabulary):
    return max(1, CHUNK // vocabulary)
