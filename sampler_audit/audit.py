"""The audit of tokens that a model is said to have drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from decoding_gpt2_value import check_tokens
from generation_gpt2_value import Rollout, aligned
from sampling_gpt2_value import Sampling, number
from scoring_gpt2_value import check_rollout

from . import statistics
from .engine import scoring_inputs
from .evidence import Evidence, evidence_of
from .report import SamplerAudit

MIN_TOKENS = 50  # fewer leave less than 10 to a bin, too few for the chi-square approximation
CHUNK = 2**21  # (token, vocabulary) pairs at a time: 16 MiB for each float64 temporary


@torch.no_grad()
def audit_sampler(
    model: Any,
    tokens: Rollout | torch.Tensor,
    *,
    prompt_length: int | None = None,
    attention_mask: torch.Tensor | None = None,
    sampling: Sampling | None = None,
    generator: torch.Generator | None = None,
    alpha: float = 1e-3,
    batch_size: int = 16,
) -> SamplerAudit:
    """Test whether tokens are draws from `model` under the claimed settings.

    The claim is what a trainer would score: which tokens, and by which distribution. Dropout is off, whatever mode the
    model is in, and positions count the tokens that the mask admits, as in `rescore`. Tokens of a `Rollout` are tested
    as draws from the very sets that it kept, which the audit takes as given; where there is no record of these, tokens
    at the edge of what top-k and top-p keep are allowed the rounding of float32. At no time are there logits of
    more than `batch_size` rows; of a GPT-2, of more than a chunk of tokens.

    Args:
        model: the causal language model of transformers that the tokens claim to be drawn from.
        tokens: a `Rollout`, which brings its own masks and settings (another engine's tokens become one by
            `rollout_from_tokens`). Or `[B, P+T]` token ids, as `generate()` returns them.
        prompt_length: P, where `tokens` is a tensor. What follows is claimed as drawn: up to the first end-of-text
            token of `sampling`, that one included; all of it where `sampling` has none. Padding that is scored like
            the tokens before it is claimed too, and is found out.
        attention_mask: `[B, P]` or `[B, P+T]`, 0 for padding of the prompts; default: no padding.
        sampling: the claimed settings; default: `Sampling()`, the model's own distribution.
        generator: of the uniform numbers that the method needs, one a token; default: torch's global one. Another
            state gives another p-value, as another sample would.
        alpha: the level of the verdict.
        batch_size: rows in one forward pass.

    Returns:
        `SamplerAudit`.

    Raises:
        TypeError, ValueError: the claim is unclear, fewer than 50 tokens are claimed, a token is not in the vocabulary,
            or logits are NaN or infinite.
    """
    if number("alpha", alpha, 0, 1, float) in (0, 1):
        raise ValueError(f"alpha={alpha}; expected a number between 0 and 1, such as 1e-3.")
    batch_size = number("batch_size", batch_size, 1)
    claim: Any = tokens
    if type(tokens).__name__ != "Rollout":  # by name: a package's own class is another one than the checkout's
        claim = _claim(tokens, prompt_length, attention_mask, sampling or Sampling())
    elif not prompt_length is attention_mask is sampling is None:
        what = "got a Rollout together with prompt_length, attention_mask or sampling; it brings its own"
        raise TypeError(f"{what}. Leave them out, or pass rollout.sequences to audit it under another claim.")
    vocabulary = check_tokens(model, claim.sequences, claim.attention_mask)
    if claim is tokens:
        check_rollout(claim, vocabulary)
    claim.sampling.check_vocabulary(vocabulary)
    T = claim.responses.shape[1]

    def pieces() -> Iterable[Evidence]:
        for part, inputs, head in scoring_inputs(model, claim, batch_size):
            mask = part.response_mask
            steps = torch.arange(T, device=mask.device).expand_as(mask)
            columns = [inputs, part.sequences[:, -T:], steps, *([] if part.kept is None else [part.kept])]
            chunks = (column[mask].split(max(1, CHUNK // vocabulary)) for column in columns)
            for hidden, tokens, step, *kept in zip(*chunks, strict=True):
                sets = kept[0] if kept else None
                yield evidence_of(head(hidden), tokens, claim.sampling, generator, steps=step, kept=sets)

    return judge(pieces(), claim.response_mask.cpu(), alpha)


def _claim(tokens, prompt_length, attention_mask, sampling) -> Rollout:
    """The tokens `[B, P+T]` after `prompt_length` columns, each row up to its first end, as a `Rollout`."""
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2:
        what = f"got a {type(tokens).__name__} {getattr(tokens, 'dtype', '')} {[*getattr(tokens, 'shape', ())]}"
        raise TypeError(f"{what}; expected a Rollout, as from rollout_from_tokens(), or [batch, tokens] of ids.")
    P = number("prompt_length", prompt_length, 1)
    if attention_mask is not None:
        attention_mask = torch.as_tensor(attention_mask)[:, :P]
    prompts, seen = aligned("prompts", tokens[:, :P], attention_mask, pad=-1)
    responses = tokens[:, P:].long()
    ends = torch.isin(responses, torch.tensor(sampling.eos_token_id, dtype=torch.long, device=tokens.device))
    drawn = ends.cumsum(1) == ends.long()  # no end before this token
    sequences, seen = torch.cat([prompts, responses], 1), torch.cat([seen, drawn.long()], 1)
    return Rollout(sequences, seen, responses, drawn, None, None, ~ends.any(1), None, sampling)


def judge(pieces: Iterable[Evidence], drawn: torch.Tensor, alpha: float) -> SamplerAudit:
    """The result, for `drawn [B, T]` bool: where on the grid of rows and steps the tokens of the evidence stand."""
    n = int(drawn.sum())
    if n < MIN_TOKENS:
        raise ValueError(f"{n} tokens are claimed as drawn; the test needs at least {MIN_TOKENS}: draw more.")
    evidence = Evidence.of_all(pieces)
    transforms, variances = (
        torch.zeros(drawn.shape, dtype=torch.float64).masked_scatter(drawn, column)
        for column in (evidence.transforms, evidence.variances)
    )
    calibration = statistics.calibration(evidence.transforms)
    tests = {
        "calibration": calibration,
        "identity": statistics.identity(evidence.observed, evidence.expected, evidence.covariance),
        "order": statistics.order(transforms, drawn),
        "spread": statistics.spread(transforms, variances, drawn, evenness=1.0 - calibration.p_value),
    }
    impossible = int(evidence.impossible.sum())
    return SamplerAudit(
        tests=tests,
        p_value=0.0 if impossible else statistics.both(*(test.p_value for test in tests.values() if test.was_made)),
        alpha=alpha,
        bias_nats=-math.inf if impossible else float(evidence.surprises.mean()),
        standard_error=math.nan if impossible else float(evidence.surprises.std() / math.sqrt(n)),
        tokens=n,
        impossible=impossible,
        transforms=evidence.transforms,
    )
