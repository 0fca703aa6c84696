"""Scores of drawn tokens, a chunk of them at a time: the logits of all of them are never held.

Remote code: this file is copied into every package, so it imports only torch and its siblings. The backward pass
computes each chunk again instead of keeping it (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016,
arXiv:1604.06174).
"""

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

try:
    from .decoding_gpt2_value import is_altered, without_dropout
    from .sampling_gpt2_value import is_one_of, sampling_distribution, sampling_logprobs, token_logprob
except ImportError:  # a checkout or a wheel, where these files are top-level modules
    from decoding_gpt2_value import is_altered, without_dropout
    from sampling_gpt2_value import is_one_of, sampling_distribution, sampling_logprobs, token_logprob

# So many (token, vocabulary) logits are held at a time: 100 MB in float32. Smaller products run slower.
CHUNK = 25_000_000


def score_in_chunks(score, head, inputs, others, vocabulary):
    """`score(head(inputs), others)` for N drawn tokens, in chunks.

    Args:
        score: from logits `[n, V]` and a dict of tensors `[n, ...]` to a tuple of tensors `[n]`.
        head: the output layer.
        inputs: `[N, width]`, what it is applied to.
        others: dict of tensors `[N, ...]`, split in the same way.

    Returns:
        The tuple, of tensors `[N]`; floating ones are differentiable in the inputs and in the head's weights.
    """
    rows = max(1, CHUNK // vocabulary)
    pieces = {name: tensor.split(rows) for name, tensor in others.items()}
    chunks = [dict(zip(pieces, piece, strict=True)) for piece in zip(*pieces.values(), strict=True)]
    plain = type(head) is nn.Linear and head.bias is None and not is_altered(head)
    if plain and not torch.is_autocast_enabled(inputs.device.type):
        return _Scores.apply(score, chunks, rows, inputs, head.weight)

    def scores(inputs, chunk):
        return score(head(inputs), chunk)

    if torch.is_grad_enabled():
        again = without_dropout(head, checkpoint)
        columns = [again(scores, *chunk, use_reentrant=False) for chunk in zip(inputs.split(rows), chunks, strict=True)]
    else:
        columns = [scores(*chunk) for chunk in zip(inputs.split(rows), chunks, strict=True)]
    return tuple(torch.cat(column) for column in zip(*columns, strict=True))


class _Scores(torch.autograd.Function):
    """The chunks through a plain output layer, whose gradient is summed in place: one copy of it, not one a chunk."""

    @staticmethod
    def forward(ctx, score, chunks, rows, inputs, weight):
        ctx.save_for_backward(inputs, weight)
        ctx.score, ctx.chunks, ctx.rows = score, chunks, rows
        columns = zip(*(score(x @ weight.t(), c) for x, c in zip(inputs.split(rows), chunks, strict=True)), strict=True)
        found = tuple(torch.cat(column) for column in columns)
        ctx.mark_non_differentiable(*(column for column in found if not column.is_floating_point()))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        inputs, weight = ctx.saved_tensors
        to_inputs = torch.empty_like(inputs)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[4] else None
        start = 0
        for x, chunk in zip(inputs.split(ctx.rows), ctx.chunks, strict=True):
            at = slice(start, start + len(x))
            start += len(x)
            logits = (x @ weight.t()).requires_grad_()
            with torch.enable_grad():
                columns = ctx.score(logits, chunk)
            pairs = [(c, g[at]) for c, g in zip(columns, gradients, strict=True) if c.requires_grad]
            scored, weights = zip(*pairs, strict=True)
            (to_logits,) = torch.autograd.grad(scored, logits, weights)
            to_inputs[at] = to_logits @ weight
            if to_weight is not None:
                to_weight.addmm_(to_logits.t(), x)
        return None, None, None, to_inputs, to_weight


def score(logits, chunk, *, rollout, with_entropy, reference_head=None):
    """Log-probability, entropy, KL and finiteness `[n]` of n drawn tokens with logits `[n, V]`; 0 if not asked for."""
    suppress = None
    if "early" in chunk:
        suppress = chunk["early"].unsqueeze(-1) & is_one_of(rollout.eos_token_id, logits.shape[-1], logits.device)
    settings = {"temperature": rollout.temperature, "suppress": suppress}
    cut = {"top_k": rollout.top_k, "top_p": rollout.top_p, "support": chunk.get("support")}
    distribution = sampling_distribution(logits, **settings, **cut)
    logprob = token_logprob(distribution, logits, chunk["tokens"], **settings)
    entropy = kl = torch.zeros_like(logprob)
    if with_entropy:
        possible = distribution.logits.masked_fill(distribution.logits == -math.inf, 0.0)
        entropy = distribution.logits.logsumexp(-1) - (distribution.logits.softmax(-1) * possible).sum(-1)
    if reference_head is not None:
        own = sampling_logprobs(logits, **settings, **cut)
        with torch.no_grad():
            other = reference_head(chunk["reference_inputs"]).to(logits.device)
            other = sampling_logprobs(other, **settings, **cut)
        never = own == -math.inf
        kl = (own.exp() * (own.masked_fill(never, 0.0) - other.masked_fill(never, 0.0))).sum(-1)
    return logprob, entropy, kl, finite(logits)


def finite(logits):
    """Whether all of `logits [..., V]` are finite: their sum is so exactly when each of them is."""
    return logits.detach().sum(-1, dtype=torch.float32).isfinite()
