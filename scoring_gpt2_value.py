"""Scoring given tokens under a model: log-probabilities, values, entropy and KL, without holding all logits at once.

Remote code, which imports only torch, transformers and its siblings. Where many logits would be held, they are computed
a chunk of tokens at a time, and again in the backward pass (Chen et al., "Training Deep Nets with Sublinear Memory
Cost", 2016, arXiv:1604.06174).
"""

import collections
import contextlib
import math
from dataclasses import dataclass, replace
from functools import partial
from weakref import WeakKeyDictionary

import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

try:
    from .decoding_gpt2_value import (
        call_with,
        check_tokens,
        device_of,
        inputs_and_head,
        is_spread,
        logits_alone,
        unwrapped,
        vocabulary_of,
        wrapped,
    )
    from .sampling_gpt2_value import sampling_distribution
except ImportError:
    if __package__:  # in a package the siblings are there: it is transformers that lacks a name
        raise
    # In a checkout or a wheel these files are top-level modules.
    from decoding_gpt2_value import (
        call_with,
        check_tokens,
        device_of,
        inputs_and_head,
        is_spread,
        logits_alone,
        unwrapped,
        vocabulary_of,
        wrapped,
    )
    from sampling_gpt2_value import sampling_distribution
KEPT = 2**26  # up to so many logits are kept for the backward pass: 256 MiB in float32
CHUNK = 2**24  # above, so many (token, vocabulary) logits are held at a time: 64 MiB in float32


@dataclass
class Rescored(ModelOutput):
    """The tokens of a rollout under a model. All `[B, T]` float32 (float64 from a float64 model), 0 where masked.

    Attributes:
        logprobs: of the tokens, over the tokens that each draw chose among; None with `values_only`.
        values: of the state before each token; None for a model without a value head.
        entropy: of the same distributions, in nats; None unless asked for.
        kl: KL(model || reference) of the same distributions, in nats, summed over the vocabulary; None without a
            reference.
        reference_logprobs: as `logprobs`, of the reference; without gradient.
    """

    logprobs: Tensor | None = None
    values: Tensor | None = None
    entropy: Tensor | None = None
    kl: Tensor | None = None
    reference_logprobs: Tensor | None = None


def rescore(model, rollout, *, with_entropy=False, reference=None, values_only=False):
    """Score the rollout's tokens under this model, over the tokens that each draw chose among; differentiable.

    With the model that made the rollout, the log-probabilities and values are those in it (in float32 within 1e-5, or
    1e-6 * max |logit| / temperature where that is more). With any other, exp(logprobs - rollout.logprobs) is 1 in the
    mean, within its error. Dropout is off, whatever mode the model is in; gradient checkpointing stays as it is.

    The model is called once, in its DistributedDataParallel. Any other than `GPT2ValueModel` and `GPT2LMHeadModel`, or
    one whose forward was replaced or hooked, gives its logits `[B, T, vocabulary]`. Of GPT-2, logits are kept for the
    backward pass up to 256 MiB, and above computed a second time, 64 MiB at a time.

    Args:
        model: any causal language model of transformers with the rollout's vocabulary.
        rollout: a `Rollout` of B rows and T response columns.
        with_entropy: also give the entropy of the sampling distribution at each token.
        reference: a second model; also give the KL divergence to it at each token. It receives no gradient. Or
            "disable_adapter": the model is a PeftModel, whose base is run with the adapter off (for all threads).
        values_only: give the values and nothing else, without running the output layer.

    Returns `Rescored`. Raises TypeError or ValueError if the rollout contradicts itself or does not fit the model, or
    logits are not finite, and `SelfCheckError` where a row has other numbers alone than in the batch, under the model
    or a reference that is another model (see `rollout`).
    """
    vocabulary = vocabulary_of(model)
    check_rollout(rollout, vocabulary)
    check_tokens(model, rollout.sequences, rollout.attention_mask)
    if rollout.kept is None and rollout.sampling.cuts_off(vocabulary):
        raise ValueError(
            f"{rollout.sampling} cuts tokens off, and the rollout does not say which (`kept` is None). "
            "Pass sampler_audit.rollout_from_tokens(kept=...), or sampler_audit.find_kept_sets(model, rollout)."
        )
    if values_only and (with_entropy or reference is not None):
        raise ValueError("values_only=True runs no output layer; entropy and KL need it: ask for them in another call.")
    rollout = rollout.to(device_of(model))
    mask, T = rollout.attention_mask, rollout.responses.shape[1]
    tokens = rollout.sequences.masked_fill(mask == 0, 0)  # padding may be any number
    other = (None, None) if reference is None else _reference_inputs(model, reference, vocabulary, tokens, mask, T)
    score = partial(_scores, rollout, vocabulary, other, with_entropy, values_only)
    scores, values = call_with(model, tokens, mask, T, score)
    values = None if values is None else values.where(rollout.response_mask, 0)
    if values_only:
        if values is None:
            raise ValueError(f"a {type(model).__name__} gives no values; expected a model with a value head.")
        return Rescored(values=values)
    logprobs, entropy, kl, theirs = scores.unbind(-1)  # [B, T] each
    of_reference = () if reference is None else (kl, theirs.detach())
    scored = Rescored(logprobs, values, entropy if with_entropy else None, *of_reference)
    check_finite(logprobs + kl)
    check_itself("rescore", model, replace(rollout, logprobs=logprobs))
    if reference is not None and reference != "disable_adapter":
        check_itself("reference's score", reference, replace(rollout, logprobs=theirs).to(device_of(reference)))
    return scored


def _scores(rollout, vocabulary, other, with_entropy, values_only, head, inputs):
    """What `_score_chunk` gives for the logits `head(inputs [B, T, ...])`, as `[B, T, 4]`; 0 where masked.

    `call_with` calls it inside a call of the model, where FSDP2 and DistributedDataParallel expect the output layer.
    `other` is the reference's inputs `[B, T, ...]` and output layer, or (None, None).
    """
    drawn = rollout.response_mask
    if values_only:
        return inputs
    other_inputs, other_head = other
    score = partial(_score_chunk, rollout.sampling, with_entropy, head, other_head)
    rows, steps = drawn.cpu().nonzero(as_tuple=True)  # [n] each; the CPU's indices fit tensors of all devices
    if vocabulary * len(rows) > KEPT:
        # Nothing in it is random, and the caller may be in a checkpoint of its own.
        score = partial(checkpoint, score, use_reentrant=False, preserve_rng_state=False)
    columns = inputs, rollout.responses, rollout.kept, other_inputs  # [B, T, ...] each, or None
    size = max(1, CHUNK // vocabulary)
    scores = torch.cat(  # [n, 4]
        [
            score(t, *[None if column is None else column[b, t] for column in columns])
            for b, t in zip(rows.split(size), steps.split(size))
        ]
    )
    return scores.new_zeros(*drawn.shape, 4).masked_scatter(drawn[..., None], scores)


def _score_chunk(sampling, with_entropy, head, other_head, steps, inputs, tokens, kept, other):
    """Log-probability, entropy, KL and the reference's log-probability of n tokens, `[n, 4]`; 0 if not asked for.

    They were drawn at these `steps [n]`, from a model with the logits `head(inputs [n, ...])`.
    """
    scaled = sampling_distribution(head(inputs), sampling, steps=steps, kept=kept)  # [n, V]
    logprobs = scaled.log_softmax(-1)  # [n, V]
    logprob = logprobs.gather(-1, tokens[..., None]).squeeze(-1)
    entropy = kl = their_logprob = torch.zeros_like(logprob)
    if with_entropy or other_head is not None:
        probs, impossible = logprobs.exp(), scaled == -math.inf
        logprobs = logprobs.masked_fill(impossible, 0.0)
        entropy = -(probs * logprobs).sum(-1)
    if other_head is not None:
        with torch.no_grad(), torch.autocast(other.device.type, enabled=False):  # the model's is not for it
            theirs = other_head(other).to(scaled.device)
            theirs = sampling_distribution(theirs, sampling, steps=steps, kept=kept).log_softmax(-1)
        kl = (probs * (logprobs - theirs.masked_fill(impossible, 0.0))).sum(-1)
        their_logprob = theirs.gather(-1, tokens[..., None]).squeeze(-1)
    return torch.stack([logprob, entropy, kl, their_logprob], -1)


def _reference_inputs(model, reference, vocabulary, tokens, mask, T):
    """The inputs of the reference's output layer, `[B, T, ...]`, and that layer."""
    models, switched_off = wrapped(model), contextlib.nullcontext()
    if isinstance(reference, str):
        adapters = [wrapper for wrapper in models if hasattr(wrapper, "disable_adapter")]
        if reference != "disable_adapter" or not adapters:
            raise ValueError(
                f'{reference=}; expected a model, or "disable_adapter" with a PeftModel, as rescore(peft_model, ...).'
            )
        reference, switched_off = model, adapters[0].disable_adapter()
    elif hasattr(models[-1], "peft_config") and unwrapped(reference) is models[-1]:
        raise ValueError('the reference is the model itself, whose KL is 0; pass reference="disable_adapter".')
    if check_tokens(reference, tokens, mask) != vocabulary:
        raise ValueError(
            f"the reference has another vocabulary than the model, {vocabulary} tokens; expected the same."
        )
    device = device_of(reference)
    with torch.no_grad(), switched_off:
        return inputs_and_head(reference, tokens.to(device), mask.to(device), T)


# A rollout and a score check themselves: one row, the most likely to be wrong, is computed again by the model's own
# call. That holds for every model and every version of a library, and needs no list of what is known to work.

EVERY = 16  # calls: one row alone costs 6% of a rollout of 16 rows, so 0.4% in the mean
# Of each model, by situation: how many calls it passed. A model that is gone is forgotten.
_calls: WeakKeyDictionary = WeakKeyDictionary()


class SelfCheckError(RuntimeError):
    """A model gives a row other log-probabilities in a batch than alone: what was drawn is not what would be scored."""


def check_itself(what, model, rollout):
    """Raise SelfCheckError where a row alone has other log-probabilities than `rollout` says, if a check is due.

    Calls are counted for each model and situation: its class, config, dtype and mode, top-k and top-p, whether rows
    are padded and end at different times, and how many rows and columns there are, to the next power of two. Of
    each situation the 1st, 17th, 33rd call is checked. (Libraries cannot change within a process.)

    The row has drawn tokens, and padding if any such row has; of these, the product of both is largest: a recurrent
    model runs on over padding, and a wrong cache shows in long rows. All its logits are held, up to three times.
    """
    inner, T = unwrapped(model), rollout.responses.shape[1]
    lengths, padding = rollout.response_mask.sum(1), (rollout.attention_mask[:, :-T] == 0).sum(1)  # [B]
    # Under FSDP2 the processes have other rows and sizes, and have to make the same calls.
    shape = is_spread(model) or (
        bool(padding.any()),
        len(lengths.unique()) > 1,
        *map(int.bit_length, (*rollout.sequences.shape, T)),
    )
    situation = (
        f"{what} {type(inner)} {vars(inner.config)} {inner.dtype} {inner.training} {rollout.sampling.top_k} "
        f"{rollout.sampling.top_p} {shape}"
    )
    calls = _calls.setdefault(inner, collections.Counter())
    if calls[situation] % EVERY == 0:
        off = _off_alone(model, rollout, int((lengths * (T * padding + 1)).argmax()))
        if off != 0:
            raise SelfCheckError(
                f"a {type(inner).__name__} gives rows of this {what} log-probabilities {off:.3g} nats from those "
                f"that they have alone, without padding or cache (transformers {transformers.__version__}). What is "
                "drawn so cannot be trusted. Pass prompts of one length, a call for each length (recurrent models run "
                "on over padding), and eos_token_id=None; or remove what changes the model's call."
            )
    calls[situation] += 1  # not after an error: the next call is checked again


def _off_alone(model, rollout, row):
    """How far the log-probabilities of a row are from those that it has alone, at most; 0.0 within the bound.

        bound = (sqrt(eps) + c eps |logit|) / temperature        the root mean square of difference / bound must be <= 1

    sqrt(eps) is room for roundings that layers enlarge, up to half of the digits. c eps |logit| is for the rounding of
    a logit itself: c is 64 for float32, which sums thousands of products, and 2 for 16 bits, which sum them in float32
    and round once. eps is float32's, or bfloat16's where anything has fewer bits than float32: weights,
    logits (which autocast rounds), or products (TF32). The mean over the row of honest models stays below a half; a
    wrong cache, position or padding, or dropout left on, is off by 0.5 to 17 nats. In bfloat16 a logit of 100 is
    rounded to halves, so the bound is 1.7 nats there, and less than that can pass.
    """
    seen, sampling = rollout.attention_mask[row].bool(), rollout.sampling
    tokens = rollout.sequences[row][seen]  # [n], without padding
    steps = rollout.response_mask[row].nonzero().squeeze(-1)  # [columns]
    # [columns], where in `tokens` they are. Columns of the response are counted from the end, as the prompt is before.
    places = seen.cumsum(0)[steps - rollout.responses.shape[1]] - 1
    logits = logits_alone(model, tokens)[places - 1]  # [columns, V], those before each
    drawn, kept = tokens[places], None if rollout.kept is None else rollout.kept[row, steps]
    alone = _score_chunk(sampling, False, nn.Identity(), None, steps, logits, drawn, kept, None)[:, 0]
    difference = (rollout.logprobs.detach()[row, steps] - alone).abs()  # [columns]

    try:
        coarse = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # by torch 2.9's settings for each device, of which it does not tell
        coarse = True
    coarse |= any(weight.element_size() < 4 for weight in model.parameters()) or any(
        torch.equal(logits, logits.to(dtype).to(logits)) for dtype in (torch.bfloat16, torch.float16)
    )
    eps = torch.finfo(torch.bfloat16 if coarse else torch.float32).eps
    logit = logits.amax(-1).abs() + sampling.temperature * alone.abs()  # [columns], at least the drawn token's size
    bound = (math.sqrt(eps) + (2 if coarse else 64) * eps * logit) / sampling.temperature
    # Where the model gives NaN, the mean is not within the bound either.
    return float(difference.max()) if len(steps) and not (difference / bound).square().mean() <= 1 else 0.0


# What a caller passes


def check_rollout(rollout, vocabulary):
    """Raise TypeError or ValueError where this is no `Rollout`, or its parts contradict each other or `vocabulary`."""
    # By name: a package's own class is another one than the checkout's. 0.1.0's had no `sampling`.
    kinds = type(rollout).__name__, type(getattr(rollout, "sampling", None)).__name__
    if kinds != ("Rollout", "Sampling"):
        raise TypeError(f"got a {kinds[0]} with a {kinds[1]}; expected the Rollout of this version, with its Sampling.")
    # B rows, N = P + T columns, T responses, K = ceil(V / 8): the first part that has a dimension says its size.
    sizes: dict = {}
    for name, dtype, dims in (
        ("sequences", torch.int64, "BN"),
        ("attention_mask", torch.int64, "BN"),
        ("responses", torch.int64, "BT"),
        ("response_mask", torch.bool, "BT"),
        ("kept", torch.uint8, "BTK"),
    ):
        part = getattr(rollout, name)
        found = getattr(part, "dtype", type(part)), [*getattr(part, "shape", ())]
        sizes = dict(zip(dims, found[1])) | sizes
        if found != (dtype, [sizes.get(dim) for dim in dims]) and (part is not None or name != "kept"):
            raise TypeError(f"the rollout's {name} is {found}; expected {dtype} {[*dims]}, with {sizes}.")
    replace(rollout.sampling).check_vocabulary(vocabulary)  # checked again: a file may hold any settings
    if 8 * sizes.get("K", 0) > vocabulary + 7:
        raise ValueError(f"the rollout's kept sets are not of this model's vocabulary of {vocabulary} tokens.")
    mask, drawn, T = rollout.attention_mask, rollout.response_mask, sizes["T"]
    if not 0 < T < sizes["N"]:
        raise TypeError(f"the rollout has no prompts or no responses: {sizes}; expected columns of both in sequences.")
    unseen = (mask[:, -T:] & mask[:, -T - 1 : -1]) == 0  # [B, T], this column or the one before it
    wrong = {
        "an attention_mask with other numbers than 0 and 1": (mask != 0) & (mask != 1),
        "a response that is not the one in sequences": (rollout.responses != rollout.sequences[:, -T:]) & drawn,
        "a drawn token that attention_mask leaves out, or the token before": unseen & drawn,
    }
    for problem, where in wrong.items():  # the first, if there is any
        for row, column in where.nonzero().tolist():
            raise ValueError(f"the rollout has {problem} (row {row}, column {column}); was it changed?")


def check_finite(logprobs):
    """Raise ValueError where logits were not finite, and so these `logprobs [B, T]` are not."""
    for step, row in (~logprobs.isfinite()).T.nonzero().tolist():
        raise ValueError(
            f"the logits of row {row} at step {step} are NaN or infinite, here or in the reference, or the rollout's "
            "kept set lacks it. Check the weights (a diverged training step?), or use bfloat16 instead of float16."
        )
