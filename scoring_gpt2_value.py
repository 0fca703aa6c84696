"""Scoring given tokens under a model: log-probabilities, values, entropy and KL, without holding all logits at once.

Remote code, which imports only torch, transformers and its siblings. Logits are computed a chunk of tokens at a time,
and again in the backward pass (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174).
"""

import contextlib
import dataclasses
import math
import warnings
from typing import Any, Optional

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

try:
    from .decoding_gpt2_value import check_tokens, innermost, inputs_and_head, run, takes_requests, unwrapped
    from .sampling_gpt2_value import Sampling, sampling_distribution
except ImportError:  # a checkout or a wheel, where these files are top-level modules
    from decoding_gpt2_value import check_tokens, innermost, inputs_and_head, run, takes_requests, unwrapped
    from sampling_gpt2_value import Sampling, sampling_distribution

# So many (token, vocabulary) logits are held at a time: 100 MB in float32. Smaller products run slower.
CHUNK = 25_000_000


@dataclasses.dataclass
class Rescored(ModelOutput):
    """The tokens of a rollout under a model. All `[B, T]` float32 (float64 from a float64 model), 0 where masked.

    Attributes:
        logprobs: of the tokens, over the tokens that each draw chose among.
        values: of the state before each token; None for a model without a value head.
        entropy: of the same distributions, in nats; None unless asked for.
        kl: KL(model || reference) of the same distributions, in nats, summed over the tokens; None without a reference.
    """

    logprobs: Optional[torch.Tensor] = None
    values: Optional[torch.Tensor] = None
    entropy: Optional[torch.Tensor] = None
    kl: Optional[torch.Tensor] = None


@dataclasses.dataclass(frozen=True, eq=False)
class ScoreRequest:
    """What `forward(score=...)` is asked: the scores of T tokens, the first of which follows column -T of the input."""

    tokens: torch.Tensor  # [B, T] int64
    drawn: torch.Tensor  # [B, T] bool, which of them to score
    sampling: Sampling
    kept: Optional[torch.Tensor]  # as in the rollout
    with_entropy: bool
    reference: Any  # for the KL: () -> inputs [B, T, ...], their output layer; FSDP2 would cast tensors that it sees

    def answer(self, inputs, head, values):
        """The `Rescored` of a model with the logits `head(inputs [B, >= T, ...])`, and such `values` or None."""
        drawn, T = self.drawn, self.drawn.shape[1]
        early = torch.arange(T, device=drawn.device) < self.sampling.min_new_tokens
        columns = {"inputs": inputs[:, -T:], "tokens": self.tokens, "kept": self.kept, "early": early.expand_as(drawn)}
        if self.reference is not None:
            columns["reference_inputs"] = self.reference()[0]
        columns = {name: column[drawn.to(column.device)] for name, column in columns.items() if column is not None}
        rows = max(1, CHUNK // getattr(head, "out_features", inputs.shape[-1]))
        pieces = zip(*(column.split(rows) for column in columns.values()), strict=True)
        chunks = [dict(zip(columns, piece, strict=True)) for piece in pieces]
        # Nothing in a chunk is random. The model's caller may be in a checkpoint of its own.
        parts = [checkpoint(self._score, head, c, use_reentrant=False, preserve_rng_state=False) for c in chunks]
        found = (torch.cat(column) for column in zip(*parts, strict=True))
        logprobs, entropy, kl = (torch.zeros_like(drawn, dtype=x.dtype).masked_scatter(drawn, x) for x in found)
        values = None if values is None else torch.where(drawn, values[:, -T:], 0.0)
        return Rescored(logprobs, values, entropy if self.with_entropy else None, kl if self.reference else None)

    def _score(self, head, chunk):
        """Log-probability, entropy and KL `[n]` of n drawn tokens; NaN where logits are not finite, 0 if not asked."""
        logits = head(chunk["inputs"])  # [n, V]
        how = {"early": chunk["early"], "kept": chunk.get("kept")}
        scaled = sampling_distribution(logits, self.sampling, **how)
        normaliser = scaled.logsumexp(-1)
        logprob = scaled.gather(-1, chunk["tokens"].unsqueeze(-1)).squeeze(-1) - normaliser
        logprob = logprob.masked_fill(~logits.detach().isfinite().all(-1), math.nan)
        entropy = kl = torch.zeros_like(logprob)
        if self.with_entropy or self.reference is not None:
            possible = scaled > -math.inf
            logprobs = (scaled - normaliser.unsqueeze(-1)).masked_fill(~possible, 0.0)
            probs = logprobs.exp() * possible
            if self.with_entropy:
                entropy = -(probs * logprobs).sum(-1)
            if self.reference is not None:
                with torch.no_grad():
                    other = self.reference()[1](chunk["reference_inputs"]).to(logits.device)
                    other = sampling_distribution(other, self.sampling, **how).log_softmax(-1)
                kl = (probs * (logprobs - other.masked_fill(~possible, 0.0))).sum(-1)
        return logprob, entropy, kl


def rescore(model, rollout, *, with_entropy=False, reference=None):
    """Score the rollout's tokens under this model, over the tokens that each draw chose among; differentiable.

    With the model that made the rollout, the log-probabilities and values are those in it (in float32 within 1e-5, or
    1e-6 * max |logit| / temperature where that is more). With any other, exp(logprobs - rollout.logprobs) is 1 in the
    mean, within its error. Dropout is off, whatever mode the model is in; gradient checkpointing stays as it is.

    A `GPT2ValueModel` is called once, in the wrapper that it was passed in; of a `GPT2LMHeadModel`, the body and the
    output layer. Any other model, or a forward that was replaced or hooked, gives its logits `[B, T, vocabulary]`.

    Args:
        model: any causal language model of transformers with the rollout's vocabulary.
        rollout: a `Rollout` of B rows and T response columns.
        with_entropy: also give the entropy of the sampling distribution at each token.
        reference: a second model; also give the KL divergence to it at each token. It receives no gradient. Or
            "disable_adapter": the model is a PeftModel, whose base is run with the adapter off (for all threads).

    Returns `Rescored`. Raises TypeError or ValueError if the rollout does not fit the model, or logits are not finite.
    """
    if type(rollout).__name__ != "Rollout" or not hasattr(rollout, "sampling"):
        # By name: a package's own class is another one than the checkout's. 0.1.0's had no `sampling`.
        raise TypeError(f"rescore() got a {type(rollout).__name__}; expected the Rollout of this version.")
    adapter: Any = next((wrapper for wrapper in unwrapped(model) if hasattr(wrapper, "disable_adapter")), None)
    asks, inner = isinstance(reference, str), unwrapped(model)[-1]
    if asks and (reference != "disable_adapter" or adapter is None):
        raise ValueError(f'reference={reference!r}; expected a model, or "disable_adapter" with a PeftModel.')
    if asks:
        reference = model
    elif reference is not None and hasattr(inner, "peft_config") and unwrapped(reference)[-1] is inner:
        raise ValueError('the reference is the model itself, whose KL is 0; pass reference="disable_adapter".')
    vocabulary = check_tokens(model, rollout.sequences, rollout.attention_mask)
    rollout.sampling.check_vocabulary(vocabulary, rollout.kept)
    if rollout.kept is None and rollout.sampling.cuts_off(vocabulary):
        what = f"{rollout.sampling} cuts tokens off, and the rollout does not say which (`kept` is None)"
        raise ValueError(f"{what}. Pass kept=..., or the rollout of sampler_audit.find_kept_sets(model, rollout).")
    its = vocabulary if reference is None else check_tokens(reference, rollout.sequences, rollout.attention_mask)
    if its != vocabulary:
        raise ValueError(f"the model's vocabulary has {vocabulary} tokens, the reference's {its}; expected the same.")
    head = [*getattr(inner, "v_head", nn.Identity()).parameters()] if hasattr(inner, "peft_config") else []
    if torch.is_grad_enabled() and head and not any(weight.requires_grad or weight.any() for weight in head):
        what = 'the value head is 0 and frozen; LoraConfig(..., modules_to_save=["v_head"]) trains it'
        warnings.warn(what, stacklevel=2)
    rollout, T = rollout.to(inner.device), rollout.responses.shape[1]
    tokens = rollout.sequences.masked_fill(rollout.attention_mask == 0, 0)  # padding may be any number
    seen = tokens, rollout.attention_mask, slice(0, tokens.shape[1] - 1)
    other = None
    if reference is not None:
        device = unwrapped(reference)[-1].device
        with torch.no_grad(), adapter.disable_adapter() if asks else contextlib.nullcontext():
            other = inputs_and_head(innermost(reference), *(x.to(device) for x in seen[:2]), seen[2], T)[:2]
    asked, mask = rollout.responses.masked_fill(~rollout.response_mask, 0), rollout.response_mask
    request = ScoreRequest(asked, mask, rollout.sampling, rollout.kept, with_entropy, other and (lambda: other))
    if takes_requests(model):
        scored: Any = Rescored(**run(model, *seen, score=request, use_cache=False)[0])
    else:
        scored = request.answer(*inputs_and_head(model, *seen, T))
    check_finite(scored.logprobs if scored.kl is None else scored.logprobs.where(~scored.kl.isnan(), scored.kl))
    return scored


def check_finite(logprobs):
    """Raise ValueError where logits were not finite: these `logprobs [B, T]` are NaN."""
    for row, step in logprobs.isnan().nonzero().tolist():
        what = f"the logits of row {row} at step {step} are NaN or infinite; nothing can be drawn or scored from them"
        raise ValueError(f"{what}. Check the weights (a diverged training step?), or use bfloat16 instead of float16.")
