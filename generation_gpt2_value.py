"""Sampling that is honest, and scoring: a rollout's tokens are draws from exactly the distribution it reports.

Remote code: this file is copied into every package, so it imports only torch and its siblings. It works with any
causal language model of transformers.
"""

import dataclasses
import functools
import math
from typing import Optional

import torch

try:
    from .decoding_gpt2_value import as_scored, decoder_for, last_states
    from .sampling_gpt2_value import draw, is_one_of, sampling_distribution
    from .scoring_gpt2_value import finite, score, score_in_chunks
except ImportError:  # a checkout or a wheel, where these files are top-level modules
    from decoding_gpt2_value import as_scored, decoder_for, last_states
    from sampling_gpt2_value import draw, is_one_of, sampling_distribution
    from scoring_gpt2_value import finite, score, score_in_chunks


@dataclasses.dataclass
class Rollout:
    """A batch of prompts with the responses that were drawn for them, B rows, P prompt and T response columns.

    Prompts stand at the right of their columns (left padding). `rollout[rows]` selects rows, for minibatches.

    Attributes:
        sequences: `[B, P+T]` int64, prompts and responses.
        attention_mask: `[B, P+T]` int64, 1 for the prompt's tokens and for those drawn from the model.
        responses: `[B, T]` int64; `pad_token_id` after a row's first end-of-text token.
        response_mask: `[B, T]` bool, this token was drawn from the model (a row's first end-of-text token was).
        logprobs: `[B, T]` float32, natural logarithm, of the drawn tokens under the sampling distribution; 0 where
            masked.
        values: `[B, T]` float32, the value of the state before each token; 0 where masked; None without a head.
        truncated: `[B]` bool, the row ran out of `max_new_tokens` before an end-of-text token was drawn.
        support: `[B, T]` int64, how many tokens `top_p` left to draw from; None when `top_p` is 1. Rounding decides
            about tokens on the edge, and scoring must decide as sampling did.
        temperature, top_k, top_p, min_new_tokens, eos_token_id (a tuple), pad_token_id: the sampling settings.
    """

    sequences: torch.Tensor
    attention_mask: torch.Tensor
    responses: torch.Tensor
    response_mask: torch.Tensor
    logprobs: torch.Tensor
    values: Optional[torch.Tensor]
    truncated: torch.Tensor
    support: Optional[torch.Tensor]
    temperature: float
    top_k: int
    top_p: float
    min_new_tokens: int
    eos_token_id: tuple
    pad_token_id: int

    def __len__(self):
        return self.sequences.shape[0]

    def __getitem__(self, rows):
        """The given rows (a slice, a list, a 1-D tensor of indices or a mask) as a `Rollout`."""
        if isinstance(rows, int):
            raise TypeError(f"rollout[{rows}]: select rows with a slice, a list or a tensor, as in rollout[{rows}:].")
        return self._map(lambda tensor: tensor[rows])

    def to(self, device):
        """The same rollout with its tensors on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function):
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


@dataclasses.dataclass
class Rescored:
    """The tokens of a rollout under a model. All `[B, T]` float32 (but float64 from a float64 model), 0 where masked.

    Attributes:
        logprobs: of the tokens; -inf for one that this model's truncation (top-k, top-p) excludes.
        values: of the state before each token; None for a model without a value head.
        entropy: of the sampling distribution, in nats; None unless asked for.
        kl: KL(model || reference) of the two sampling distributions, in nats, summed over the vocabulary; None without
            a reference. Infinite where truncation leaves the reference no room for what the model draws.
    """

    logprobs: torch.Tensor
    values: Optional[torch.Tensor]
    entropy: Optional[torch.Tensor]
    kl: Optional[torch.Tensor]


@torch.no_grad()
def rollout(
    model,
    queries,
    *,
    attention_mask=None,
    max_new_tokens=20,
    min_new_tokens=0,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    eos_token_id=None,
    pad_token_id=None,
    num_return_sequences=1,
    generator=None,
):
    """Draw responses to prompts, with the log-probability of each token and the value of the state before it.

    Dropout is off, whatever mode the model is in; nothing of the model's `generation_config` is read.

    Args:
        model: any causal language model of transformers; `values` are reported where its output has a `value`.
        queries: `[B, P]` int64, or a list of 1-D tensors of any lengths.
        attention_mask: `[B, P]`, 0 for padding, on either side; needed where `queries` is padded.
        max_new_tokens: T, columns of the response.
        min_new_tokens: end-of-text tokens cannot be drawn before so many others were.
        temperature: > 0, divides the logits.
        top_k: draw among the k most probable tokens; 0 means off.
        top_p: draw among the most probable tokens that together have this probability; 1.0 means off.
        eos_token_id: an id, or several, that end a response; None: every response has T tokens.
        pad_token_id: what fills a row after its end; default: the first `eos_token_id`, else 0.
        num_return_sequences: responses for each prompt; rows of one prompt stand together.
        generator: where the random numbers come from; default: torch's global generator of the model's device.

    Returns:
        `Rollout`.

    Raises:
        TypeError, ValueError: bad input (before any compute), or NaN or infinite logits (naming row and step).
    """
    eos = _as_tuple(eos_token_id)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    _check_settings(**settings, min_new_tokens=min_new_tokens, max_new_tokens=max_new_tokens, eos=eos)
    if num_return_sequences < 1:
        raise ValueError(f"num_return_sequences={num_return_sequences}; expected at least 1.")
    vocabulary = _vocabulary(model)
    pad = pad_token_id if pad_token_id is not None else eos[0] if eos else 0
    for name, token in [("eos_token_id", token) for token in eos] + [("pad_token_id", pad)]:
        if not 0 <= token < vocabulary:
            raise ValueError(f"{name}={token} is not in the vocabulary of {vocabulary} tokens; pass an id below that.")
    prompts, prompt_mask = _left_pad(queries, attention_mask, pad)
    _check_prompts(model, prompts, prompt_mask, max_new_tokens)

    prompts = prompts.to(model.device).repeat_interleave(num_return_sequences, 0)
    (B, P), T, device = prompts.shape, max_new_tokens, prompts.device
    tokens = torch.cat([prompts, torch.full((B, T), pad, device=device)], 1)
    mask = torch.zeros((B, P + T), dtype=torch.long, device=device)
    mask[:, :P] = prompt_mask.to(device).repeat_interleave(num_return_sequences, 0)
    uniforms = _uniforms(T, B, generator, device)
    is_eos = is_one_of(eos, vocabulary, device)
    logprobs = torch.zeros((B, T), device=device)
    values = torch.zeros((B, T), device=device)
    support = torch.zeros((B, T), dtype=torch.long, device=device) if top_p < 1.0 else None
    running = torch.ones(B, dtype=torch.bool, device=device)
    bad = torch.zeros((B, T), dtype=torch.bool, device=device)
    rows = torch.arange(B, device=device)  # those that are still computed
    value = None

    with as_scored(model, caching=True):
        decoder = decoder_for(model, tokens, mask)
        for t in range(T):
            logits, value = decoder.logits_and_values(P + t)  # [b, V], [b]
            step = sampling_distribution(logits, suppress=is_eos if t < min_new_tokens else None, **settings)
            index, normaliser = draw(step.logits, uniforms[t, rows])
            logprob = step.logits.gather(-1, index.unsqueeze(-1)).squeeze(-1) - normaliser
            drawn = index if step.tokens is None else step.tokens.gather(-1, index.unsqueeze(-1)).squeeze(-1)
            now = running[rows]
            bad[rows, t] = now & ~finite(logits)
            tokens[rows, P + t] = torch.where(now, drawn, pad)
            mask[rows, P + t] = now.long()
            logprobs[rows, t] = torch.where(now, logprob.float(), 0.0)
            if value is not None:
                values[rows, t] = torch.where(now, value, 0.0)
            if support is not None:
                support[rows, t] = step.support
            running[rows] = now & ~is_eos[drawn]
            # To look at a number is to wait for the GPU: there only now and then.
            if device.type == "cpu" or t % 16 == 15 or t == T - 1:
                if bad.any():
                    raise _not_finite(*bad.nonzero()[0].tolist())
                left = running[rows].nonzero().squeeze(-1)
                if len(left) == 0:
                    break
                if 2 * len(left) <= len(rows) and decoder.keep(left):
                    rows = rows[left]

    return Rollout(
        sequences=tokens,
        attention_mask=mask,
        responses=tokens[:, P:],
        response_mask=mask[:, P:].bool(),
        logprobs=logprobs,
        values=None if value is None else values,
        truncated=running,
        support=support,
        min_new_tokens=min_new_tokens,
        eos_token_id=eos,
        pad_token_id=pad,
        **settings,
    )


def rescore(model, rollout, *, with_entropy=False, reference=None):
    """The rollout's tokens under this model, by the rollout's own sampling settings; differentiable.

    With the model that made the rollout, the log-probabilities and values are those in it (float32: within 1e-5).
    Dropout is off, whatever mode the model is in; gradient checkpointing stays as it is. With a GPT-2 no tensor of
    `[B, T, vocabulary]` is ever held: the hidden states of drawn tokens go through the output layer in chunks, and
    the backward pass computes each chunk again (Chen et al., 2016, arXiv:1604.06174).

    Args:
        model: any causal language model of transformers with the rollout's vocabulary.
        rollout: a `Rollout` of B rows and T response columns.
        with_entropy: also give the entropy of the sampling distribution at each token.
        reference: a second model; also give the KL divergence to it at each token. It receives no gradient.

    Returns:
        `Rescored`.

    Raises:
        TypeError, ValueError: the rollout does not fit the model, or its logits are NaN or infinite.
    """
    if type(rollout).__name__ != "Rollout":  # by name: a package's own class is another one than the checkout's
        raise TypeError(f"rescore() got a {type(rollout).__name__}; expected the Rollout that rollout() returned.")
    for scorer in [model] if reference is None else [model, reference]:
        _check_prompts(scorer, rollout.sequences, rollout.attention_mask, 0)
    rollout = rollout.to(model.device)
    drawn, T = rollout.response_mask, rollout.response_mask.shape[1]
    states = last_states(model, rollout.sequences, rollout.attention_mask, T)
    others = {"tokens": rollout.responses, "support": rollout.support}
    if rollout.min_new_tokens:
        others["early"] = (torch.arange(T, device=drawn.device) < rollout.min_new_tokens).expand_as(drawn)
    reference_head = None
    if reference is not None:
        with torch.no_grad():
            elsewhere = rollout.to(reference.device)
            others["reference_inputs"], reference_head, _ = last_states(
                reference, elsewhere.sequences, elsewhere.attention_mask, T
            )
    others = {name: tensor[drawn.to(tensor.device)] for name, tensor in others.items() if tensor is not None}
    scores = functools.partial(score, rollout=rollout, with_entropy=with_entropy, reference_head=reference_head)
    logprobs, entropy, kl, finite_logits = score_in_chunks(
        scores, states.head, states.inputs[drawn], others, _vocabulary(model)
    )
    if not finite_logits.all():
        raise _not_finite(*drawn.nonzero()[~finite_logits][0].tolist())

    def spread(column):
        return torch.zeros(drawn.shape, dtype=column.dtype, device=drawn.device).masked_scatter(drawn, column)

    return Rescored(
        logprobs=spread(logprobs),
        values=None if states.values is None else torch.where(drawn, states.values, 0.0),
        entropy=spread(entropy) if with_entropy else None,
        kl=spread(kl) if reference is not None else None,
    )


def respond_to_batch(model, queries, txt_len=20, top_k=0, top_p=1.0):
    """The seed notebook's helper: `[batch, txt_len]` tokens drawn after the prompts `queries [batch, tokens]`."""
    return rollout(model, queries, max_new_tokens=txt_len, top_k=top_k, top_p=top_p).responses


def _not_finite(row, step):
    return ValueError(
        f"the logits of row {row} at step {step} are NaN or infinite; nothing can be drawn or scored from them. Check "
        "the weights (a diverged training step?), or use bfloat16 instead of float16."
    )


def _uniforms(T, B, generator, device):
    """Numbers in [0, 1) `[T, B]`, float64 so that rare tokens are drawn as often as they should (MPS has none)."""
    where = device if generator is None else generator.device
    dtype = torch.float32 if where.type == "mps" else torch.float64
    return torch.rand((T, B), generator=generator, device=where, dtype=dtype).to(device)


def _as_tuple(eos_token_id):
    if eos_token_id is None:
        return ()
    return tuple(eos_token_id) if isinstance(eos_token_id, (list, tuple)) else (int(eos_token_id),)


def _vocabulary(model):
    if not hasattr(model, "get_input_embeddings"):
        raise TypeError(
            f"got a {type(model).__name__}; expected a causal language model of transformers. If this is a wrapper, "
            "pass the model inside it: model.module"
        )
    return model.get_input_embeddings().weight.shape[0]


def _left_pad(queries, attention_mask, pad):
    """Prompts `[B, P]` with their tokens at the right, and their mask, from a tensor or from ragged 1-D tensors."""
    if isinstance(queries, torch.Tensor):
        if queries.dim() != 2:
            raise ValueError(f"queries has shape {list(queries.shape)}; expected [batch, tokens]: try queries[None].")
        mask = torch.ones_like(queries, dtype=torch.long) if attention_mask is None else attention_mask
        if mask.shape != queries.shape:
            raise ValueError(
                f"attention_mask has shape {list(mask.shape)}, queries {list(queries.shape)}; expected the same."
            )
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("attention_mask holds other numbers than 0 and 1; expected 1 for a token, 0 for padding.")
        mask = mask.long().to(queries.device)
        order = mask.argsort(dim=1, stable=True)  # padding first; tokens stay in their order
        return queries.gather(1, order), mask.gather(1, order)
    if attention_mask is not None:
        raise ValueError("attention_mask goes with a [batch, tokens] tensor of queries; a list needs none.")
    rows = [torch.as_tensor(query) for query in queries]
    if not rows:
        raise ValueError("queries is empty; expected at least one prompt.")
    for row, query in enumerate(rows):
        if query.dim() != 1:
            raise ValueError(f"queries[{row}] has shape {list(query.shape)}; expected a 1-D tensor of token ids.")
        if query.dtype.is_floating_point and len(query):
            raise TypeError(f"queries[{row}] is {query.dtype}; expected token ids, an integer dtype: try .long().")
    longest = max(len(query) for query in rows)
    prompts = torch.full((len(rows), longest), pad, device=rows[0].device)
    mask = torch.zeros((len(rows), longest), dtype=torch.long, device=rows[0].device)
    for row, query in enumerate(rows):
        if len(query):
            prompts[row, -len(query) :] = query
            mask[row, -len(query) :] = 1
    return prompts, mask


def _check_settings(*, temperature, top_k, top_p, min_new_tokens, max_new_tokens, eos):
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; expected at least 1.")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature}; expected a finite number > 0 (generate() decodes greedily).")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; expected a number in (0, 1], 1.0 for off.")
    if isinstance(top_k, float) or top_k < 0:
        raise ValueError(f"top_k={top_k}; expected an int >= 0, 0 for off.")
    if not 0 <= min_new_tokens <= max_new_tokens:
        raise ValueError(f"min_new_tokens={min_new_tokens}; expected 0 to max_new_tokens={max_new_tokens}.")
    if min_new_tokens and not eos:
        raise ValueError(f"min_new_tokens={min_new_tokens} has no effect without eos_token_id; pass both or neither.")


def _check_prompts(model, prompts, mask, new_tokens):
    vocabulary = _vocabulary(model)
    if prompts.dtype.is_floating_point or prompts.dtype == torch.bool:
        raise TypeError(f"queries are {prompts.dtype}; expected token ids, an integer dtype: try queries.long().")
    lengths = mask.sum(1)
    if prompts.shape[0] == 0 or (lengths == 0).any():
        row = int((lengths == 0).nonzero()[0]) if prompts.shape[0] else 0
        raise ValueError(f"prompt {row} is empty; expected at least one token, such as the end-of-text token.")
    outside = ((prompts < 0) | (prompts >= vocabulary)) & mask.bool()
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise ValueError(
            f"prompt {row} holds the id {int(prompts[row, column])}, outside the vocabulary of {vocabulary} tokens; "
            "was it made by this model's tokenizer?"
        )
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = int(lengths.max()) + new_tokens
    if positions is not None and longest > positions:
        raise ValueError(
            f"the longest prompt with its new tokens has {longest} tokens, this model's positions end at {positions}; "
            "shorten the prompts, or lower max_new_tokens."
        )
