"""Sampling that is honest, and scoring: a rollout's tokens are draws from exactly the distribution it reports.

Remote code: this file is copied into every package, so it imports only torch. It works with any causal language model
of transformers. One function, `sampling_distribution`, turns logits into the distribution that tokens are drawn from;
sampling and scoring both call it. Sampling is by inversion (Devroye, "Non-Uniform Random Variate Generation", 1986,
chapter III): one uniform number for each drawn token.
"""

import contextlib
import dataclasses
import inspect
import math
from typing import NamedTuple, Optional

import torch
from torch import nn

# Logits of the same token, computed with a cache and without, differ by float32 rounding: 1e-6 to 1e-5. Within this
# distance (in nats, and in probability mass for top_p) scoring takes the side that sampling took.
ROUNDING = 1e-3


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
    """The tokens of a rollout under a model. All `[B, T]` float32, 0 where `response_mask` is False.

    Attributes:
        logprobs: of the tokens; -inf for one that this model's truncation (top-k, top-p) excludes.
        values: of the state before each token; None for a model without a value head.
        entropy: of the sampling distribution, in nats; None unless asked for.
    """

    logprobs: torch.Tensor
    values: Optional[torch.Tensor]
    entropy: Optional[torch.Tensor]


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
    logits = logits.float()
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


def sampling_logprobs(logits, *, temperature=1.0, top_k=0, top_p=1.0, suppress=None):
    """Log-probabilities `[..., V]` float32 of every token of the vocabulary under `sampling_distribution`."""
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "suppress": suppress}
    distribution = sampling_distribution(logits, **settings)
    logprobs = distribution.logits.log_softmax(-1)
    if distribution.tokens is None:
        return logprobs
    return torch.full(logits.shape, -math.inf, device=logits.device).scatter(-1, distribution.tokens, logprobs)


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
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}; expected at least 1.")
    if num_return_sequences < 1:
        raise ValueError(f"num_return_sequences={num_return_sequences}; expected at least 1.")
    eos = (
        ()
        if eos_token_id is None
        else tuple(eos_token_id)
        if isinstance(eos_token_id, (list, tuple))
        else (int(eos_token_id),)
    )
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    _check_settings(**settings, min_new_tokens=min_new_tokens, max_new_tokens=max_new_tokens, eos=eos)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    pad = pad_token_id if pad_token_id is not None else eos[0] if eos else 0
    for name, token in [("eos_token_id", token) for token in eos] + [("pad_token_id", pad)]:
        if not 0 <= token < vocabulary:
            raise ValueError(f"{name}={token} is not in the vocabulary of {vocabulary} tokens; pass an id below that.")
    prompts, mask = _left_pad(queries, attention_mask, pad)
    _check_prompts(model, prompts, mask, vocabulary, max_new_tokens)

    prompts = prompts.to(model.device).repeat_interleave(num_return_sequences, 0)
    mask = mask.to(model.device).repeat_interleave(num_return_sequences, 0)
    (B, P), T, device = prompts.shape, max_new_tokens, prompts.device
    tokens = torch.cat([prompts, torch.full((B, T), pad, device=device)], 1)
    mask = torch.cat([mask, torch.zeros((B, T), dtype=torch.long, device=device)], 1)
    where = device if generator is None else generator.device
    uniforms = torch.rand((T, B), generator=generator, device=where, dtype=_wide(where)).to(device)
    is_eos = torch.zeros(vocabulary, dtype=torch.bool, device=device)
    is_eos[list(eos)] = True
    logprobs = torch.zeros((B, T), device=device)
    values = torch.zeros((B, T), device=device)
    support = torch.zeros((B, T), dtype=torch.long, device=device) if top_p < 1.0 else None
    running = torch.ones(B, dtype=torch.bool, device=device)
    has_head, cache = True, None

    with _as_scored(model, caching=True):
        for t in range(T):
            now = slice(0, P + t) if cache is None else slice(P + t - 1, P + t)
            output = _forward(model, tokens[:, now], mask[:, : P + t], now, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits = output.logits[:, -1]  # [B, V]
            _refuse_non_finite(logits, running, t)
            suppress = is_eos if t < min_new_tokens else None
            step = sampling_distribution(logits, suppress=suppress, **settings)
            drawn, normaliser = draw(step.logits, uniforms[t])
            logprob = step.logits.gather(-1, drawn.unsqueeze(-1)).squeeze(-1) - normaliser
            if step.tokens is not None:
                drawn = step.tokens.gather(-1, drawn.unsqueeze(-1)).squeeze(-1)
            tokens[:, P + t] = torch.where(running, drawn, pad)
            mask[:, P + t] = running
            logprobs[:, t] = torch.where(running, logprob, 0.0)
            has_head = getattr(output, "value", None) is not None
            if has_head:
                values[:, t] = torch.where(running, output.value[:, -1], 0.0)
            if support is not None:
                support[:, t] = step.support
            running = running & ~is_eos[drawn]
            if eos and not running.any():
                break

    return Rollout(
        sequences=tokens,
        attention_mask=mask,
        responses=tokens[:, P:],
        response_mask=mask[:, P:].bool(),
        logprobs=logprobs,
        values=values if has_head else None,
        truncated=running,
        support=support,
        min_new_tokens=min_new_tokens,
        eos_token_id=eos,
        pad_token_id=pad,
        **settings,
    )


def rescore(model, rollout, *, with_entropy=False):
    """The rollout's tokens under this model, by the rollout's own sampling settings; differentiable.

    With the model that made the rollout, the log-probabilities and values are those in it (float32: within 1e-5).
    Dropout is off, whatever mode the model is in; gradient checkpointing stays as it is.

    Args:
        model: any causal language model of transformers with the rollout's vocabulary.
        rollout: a `Rollout` of B rows and T response columns.
        with_entropy: also give the entropy of the sampling distribution at each token.

    Returns:
        `Rescored`.

    Raises:
        TypeError, ValueError: the rollout does not fit the model, or its logits are NaN or infinite.
    """
    if not isinstance(rollout, Rollout) and type(rollout).__name__ != "Rollout":
        raise TypeError(f"rescore() got a {type(rollout).__name__}; expected the Rollout that rollout() returned.")
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rollout = rollout.to(model.device)
    T, drawn = rollout.responses.shape[1], rollout.response_mask
    P = rollout.sequences.shape[1] - T
    _check_prompts(model, rollout.sequences, rollout.attention_mask, vocabulary, 0)
    with _as_scored(model, caching=False):
        now = slice(0, P + T - 1)
        output = _forward(model, rollout.sequences[:, now], rollout.attention_mask[:, now], now, use_cache=False)
    logits = output.logits[:, P - 1 :]  # [B, T, V]
    _refuse_non_finite(logits, drawn, None)
    is_eos = torch.zeros(vocabulary, dtype=torch.bool, device=logits.device)
    is_eos[list(rollout.eos_token_id)] = True
    early = torch.arange(T, device=logits.device) < rollout.min_new_tokens  # [T]
    suppress = (early[:, None] & is_eos) if rollout.min_new_tokens else None  # [T, V]
    settings = {"temperature": rollout.temperature, "top_k": rollout.top_k, "top_p": rollout.top_p}
    distribution = sampling_distribution(logits, suppress=suppress, support=rollout.support, **settings)
    logprobs = _logprob(distribution, logits, suppress, rollout)
    entropy = None
    if with_entropy:
        plogp = distribution.logits.log_softmax(-1)
        plogp = torch.where(plogp.isinf(), 0.0, plogp.exp() * plogp)
        entropy = torch.where(drawn, -plogp.sum(-1), 0.0)
    values = getattr(output, "value", None)
    values = None if values is None else torch.where(drawn, values[:, P - 1 :], 0.0)
    return Rescored(logprobs=torch.where(drawn, logprobs, 0.0), values=values, entropy=entropy)


def respond_to_batch(model, queries, txt_len=20, top_k=0, top_p=1.0):
    """The seed notebook's helper: `[batch, txt_len]` tokens drawn after the prompts `queries [batch, tokens]`."""
    return rollout(model, queries, max_new_tokens=txt_len, top_k=top_k, top_p=top_p).responses


def _logprob(distribution, logits, suppress, rollout):
    """Log-probabilities `[B, T]` of the rollout's responses."""
    normaliser = distribution.logits.logsumexp(-1)
    tokens = rollout.responses.unsqueeze(-1)
    own = logits.float() if suppress is None else logits.float().masked_fill(suppress, -math.inf)
    own = own.gather(-1, tokens).squeeze(-1) / rollout.temperature
    if distribution.tokens is None:
        return own - normaliser
    # A token is in if it is as probable as the last one kept. Where two are tied up to rounding, sampling may have
    # kept the one and this call the other; their probabilities are the same, and so is the normaliser.
    last = distribution.logits.gather(-1, (distribution.support - 1).unsqueeze(-1)).squeeze(-1)
    return torch.where(own >= last - ROUNDING, own - normaliser, -math.inf)


def _forward(model, input_ids, attention_mask, now, **kwargs):
    """The model's output for the columns `now` of sequences with this mask; positions count the admitted tokens."""
    forward = model.get_base_model().forward if hasattr(model, "get_base_model") else model.forward  # peft
    accepted = inspect.signature(forward).parameters
    if "position_ids" in accepted:
        kwargs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, now]
    if "logits_to_keep" in accepted and kwargs["use_cache"]:
        kwargs["logits_to_keep"] = 1
    return model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **kwargs)


@contextlib.contextmanager
def _as_scored(model, *, caching):
    """Dropout off by p=0, restored as it was; `eval()` would switch gradient checkpointing off.

    With checkpointing, the backward pass runs the layers again, after this context: there too dropout must be off.
    With a cache, checkpointing itself is off: transformers' checkpointed layers silently ignore the cache.
    """
    changed = []
    for module in model.modules():
        if caching and getattr(module, "gradient_checkpointing", False):
            changed.append((module, "gradient_checkpointing", True))
        elif "_gradient_checkpointing_func" in vars(module):
            changed.append((module, "_gradient_checkpointing_func", module._gradient_checkpointing_func))
        changed += [(module, name, p) for name, p in _dropouts(module)]
    try:
        for module, name, value in changed:
            is_checkpoint = name == "_gradient_checkpointing_func"
            setattr(module, name, _without_dropout(module, value) if is_checkpoint else type(value)(0))
        yield
    finally:
        for module, name, value in changed:
            setattr(module, name, value)


def _dropouts(module):
    """Names and values of a module's own dropout probabilities: `nn.Dropout.p`, and numbers kept for `F.dropout`."""
    is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
    for name, value in vars(module).items():
        if type(value) in (int, float) and value > 0 and ("drop" in name or (is_dropout and name == "p")):
            yield name, value


def _without_dropout(layer, checkpoint):
    """A checkpoint function that runs the layer without dropout, now and when the backward pass runs it again."""

    def run(function, *args):
        def quietly(*args):
            found = [(module, name, p) for module in layer.modules() for name, p in _dropouts(module)]
            for module, name, _ in found:
                setattr(module, name, 0.0)
            try:
                return function(*args)
            finally:
                for module, name, p in found:
                    setattr(module, name, p)

        return checkpoint(quietly, *args)

    return run


def _wide(device):
    """The dtype of uniform numbers: float64, so that rare tokens are drawn as often as they should; MPS has none."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


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


def _check_prompts(model, prompts, mask, vocabulary, new_tokens):
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


def _refuse_non_finite(logits, drawn, step):
    """Refuse NaN or infinite logits where a token is drawn; the sum is finite exactly when all of them are."""
    bad = drawn & ~logits.detach().sum(-1, dtype=torch.float32).isfinite()
    if bad.any():
        place = bad.nonzero()[0].tolist()
        row, step = (place[0], step) if step is not None else place
        raise ValueError(
            f"the logits of row {row} at step {step} are NaN or infinite; nothing can be drawn or scored from them. "
            "Check the weights (a diverged training step?), or use bfloat16 instead of float16."
        )
