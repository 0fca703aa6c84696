"""Sampling that is honest: a rollout's tokens are draws from the very distribution whose log-probabilities it reports.

Remote code, which imports only torch and its siblings. It works with any causal language model of transformers, and
reads nothing of the model's `generation_config`.
"""

import dataclasses
import math
import warnings
from typing import Optional

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

try:
    from .decoding_gpt2_value import are_ids, check_tokens, decoder_for, unwrapped
    from .sampling_gpt2_value import Sampling, compact, draw, kept_set, sampling_distribution, whole_number
    from .scoring_gpt2_value import Rescored, check_finite, rescore
except ImportError:  # a checkout or a wheel, where these files are top-level modules
    from decoding_gpt2_value import are_ids, check_tokens, decoder_for, unwrapped
    from sampling_gpt2_value import Sampling, compact, draw, kept_set, sampling_distribution, whole_number
    from scoring_gpt2_value import Rescored, check_finite, rescore

__all__ = ["Rescored", "Rollout", "Sampling", "rescore", "respond_to_batch", "rollout"]


@dataclasses.dataclass
class Rollout:
    """B rows of P columns with prompts, padded at the left, and T columns with the responses drawn for them.

    Attributes:
        sequences: `[B, P+T]` int64, prompts and responses.
        attention_mask: `[B, P+T]` int64, 1 for the prompt's tokens and for those drawn from the model.
        responses: `[B, T]` int64; padding after a row's first end-of-text token.
        response_mask: `[B, T]` bool, this token was drawn from the model (a row's first end-of-text token was).
        logprobs: `[B, T]` float32 (float64 from a float64 model), natural logarithm, of the drawn tokens under the
            sampling distribution; 0 where masked. None where another engine gave none.
        values: as `logprobs`, the value of the state before each token; None without a value head.
        truncated: `[B]` bool, no end-of-text token was drawn in the row.
        kept: which tokens each draw chose among, as `compact` stores them: `[B, T, K]` int32 ids, -1 in unused
            places, or `[B, T, ceil(V / 8)]` uint8 bits, whichever is smaller; None where nothing was cut off.
        sampling: the `Sampling` that it was drawn by.
    """

    sequences: torch.Tensor
    attention_mask: torch.Tensor
    responses: torch.Tensor
    response_mask: torch.Tensor
    logprobs: Optional[torch.Tensor]
    values: Optional[torch.Tensor]
    truncated: torch.Tensor
    kept: Optional[torch.Tensor]
    sampling: Sampling

    def __len__(self):
        return self.sequences.shape[0]

    def __getitem__(self, rows):
        """The given rows (a slice, a list, a 1-D tensor of indices or a mask) as a `Rollout`."""
        if not isinstance(rows, (slice, list)) and getattr(rows, "ndim", 0) != 1:
            raise TypeError(f"rollout[{rows}]: select rows with a slice, a list or a tensor, as in rollout[{rows}:].")
        return self._map(lambda tensor: tensor[rows])

    def repeat(self, times):
        """All rows so many times, one copy after the other."""
        return self[torch.arange(len(self)).repeat(times)]

    def to(self, device):
        """The same rollout with its tensors on another device."""
        return self._map(lambda tensor: tensor.to(device=device))

    def _map(self, function):
        tensors = {name: function(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **tensors)


torch.serialization.add_safe_globals([Rollout, Sampling])  # so that torch.load(weights_only=True) takes a rollout


@torch.inference_mode(False)
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

    Dropout is off, whatever mode the model is in. One that FSDP2 shards is run until the rows of all processes end.

    Args:
        model: any causal language model of transformers; `values` are reported where its output has a `value`.
        queries: `[B, P]` int64, or a list of 1-D tensors of any lengths.
        attention_mask: `[B, P]`, 0 for padding, on either side; needed where `queries` is padded.
        max_new_tokens: T, columns of the response.
        min_new_tokens, temperature, top_k, top_p, eos_token_id: as in `Sampling`; without the last, no row ends early.
        pad_token_id: what fills a row after its end; default: the first `eos_token_id`, else 0.
        num_return_sequences: responses for each prompt; rows of one prompt stand together.
        generator: where the random numbers come from; default: torch's global generator of the model's device.

    Returns a `Rollout`. Raises TypeError or ValueError for bad input, before any compute, and for logits not finite.
    """
    sampling = Sampling(temperature, top_k, top_p, min_new_tokens, eos_token_id)
    T = whole_number("max_new_tokens", max_new_tokens, 1)
    copies = whole_number("num_return_sequences", num_return_sequences, 1)
    if sampling.min_new_tokens > T:
        raise ValueError(f"min_new_tokens={min_new_tokens}; expected 0 to max_new_tokens={T}.")
    pad = whole_number("pad_token_id", (*sampling.eos_token_id, 0)[0] if pad_token_id is None else pad_token_id, 0)
    prompts, prompt_mask = _aligned("queries", queries, attention_mask, pad=pad)
    vocabulary = check_tokens(model, prompts, prompt_mask, T)
    sampling.check_vocabulary(vocabulary)
    if pad >= vocabulary:
        raise ValueError(f"pad_token_id={pad} is not in the vocabulary of {vocabulary} tokens; pass an id below that.")
    if not isinstance(generator, (torch.Generator, type(None))):
        raise TypeError(f"generator is a {type(generator).__name__}; expected torch.Generator().manual_seed(...).")
    device = unwrapped(model)[-1].device
    prompts, prompt_mask = (x.to(device).repeat_interleave(copies, 0) for x in (prompts, prompt_mask))
    B, P = prompts.shape
    tokens, mask = nn.functional.pad(prompts, (0, T), value=pad), nn.functional.pad(prompt_mask, (0, T))  # [B, P+T]
    # float64, so that rare tokens are drawn as often as they should.
    where = device if generator is None else generator.device
    uniforms = torch.rand((T, B), generator=generator, device=where, dtype=torch.float64).to(device)
    ends = torch.tensor(sampling.eos_token_id, dtype=torch.long, device=device)
    early = torch.arange(T, device=device) < sampling.min_new_tokens
    running = torch.ones_like(mask[:, 0], dtype=torch.bool)
    found = {}  # logprobs, values and kept, [B, T, ...]
    decoder = decoder_for(model, tokens, mask)
    for t in range(T):
        rows, now = decoder.rows, running[decoder.rows]  # [b], those that are still computed, and that have not ended
        logits, value = decoder.logits_and_values(P + t)  # [b, V], [b]
        step = sampling_distribution(logits, sampling, early=early[t])
        drawn, logprob = draw(step, uniforms[t, rows])
        logprob = logprob.masked_fill(~logits.detach().isfinite().all(-1), math.nan)
        tokens[rows, P + t], mask[rows, P + t] = torch.where(now, drawn, pad), now.long()
        for name, column in (("logprobs", logprob), ("values", value), ("kept", kept_set(step, sampling))):
            if column is not None:
                if t == 0:
                    found[name] = column.new_zeros((B, T, *column.shape[1:]))
                found[name][rows, t] = column.where(now.view(-1, *[1] * (column.dim() - 1)), 0)
        running[rows] = now & ~torch.isin(drawn, ends)
        # Checking a value forces the CPU to wait for the GPU, so there check only every 16 steps.
        if device.type == "cpu" or t % 16 == 15 or t == T - 1:
            check_finite(found["logprobs"])
            left = running[rows].nonzero().squeeze(-1)
            if len(left) == 0:
                break
            if 2 * len(left) <= len(rows):
                decoder.keep(left)
    decoder.keep_pace(ended=True)
    kept = compact(found["kept"], vocabulary) if "kept" in found else None
    drawn = tokens[:, P:], mask[:, P:].bool(), found["logprobs"], found.get("values")
    return Rollout(tokens, mask, *drawn, truncated=running, kept=kept, sampling=sampling)


def respond_to_batch(model, queries, txt_len=20, top_k=0, top_p=1.0):
    """The seed notebook's helper: `[batch, txt_len]` tokens drawn after the prompts `queries [batch, tokens]`."""
    return rollout(model, queries, max_new_tokens=txt_len, top_k=top_k, top_p=top_p).responses


def _aligned(name, rows, attention_mask=None, *, pad=0, right=False):
    """Token ids `[B, P]`, padded at the left (or `right`), and their mask, from a tensor or from ragged 1-D tensors."""
    if not isinstance(rows, torch.Tensor):
        if attention_mask is not None:
            raise ValueError(f"attention_mask goes with a [batch, tokens] tensor of {name}; a list needs none.")
        try:
            rows = [torch.as_tensor(row) for row in rows]
        except (TypeError, ValueError, RuntimeError) as error:  # texts, None, lists of lists
            raise TypeError(f"{name} holds no token ids ({error}); expected tensors of ids, not texts.") from error
        if not rows:
            raise ValueError(f"{name} is empty; expected at least one prompt.")
        for row, ids in enumerate(rows):
            if ids.dim() != 1 or (len(ids) and not are_ids(ids)):  # torch makes an empty list a float tensor
                what = f"{name}[{row}] has the shape {[*ids.shape]} and is {ids.dtype}"
                raise TypeError(f"{what}; expected token ids, 1-D and of an integer dtype: try .long().")
        attention_mask = pad_sequence([torch.ones_like(ids).long() for ids in rows], batch_first=True)
        rows = pad_sequence([ids.long() for ids in rows], batch_first=True)
    if rows.dim() != 2:
        raise ValueError(f"{name} has shape {list(rows.shape)}; expected [batch, tokens]: try {name}[None].")
    if not are_ids(rows):
        raise TypeError(f"{name} is {rows.dtype}; expected token ids, an integer dtype: try .long().")
    if attention_mask is None and any(e.any() and not e.all() for e in (rows[:, :1] == pad, rows[:, -1:] == pad)):
        warnings.warn(f"{pad} begins or ends some rows of {name}; if it is padding, pass attention_mask", stacklevel=3)
    mask = torch.ones_like(rows, dtype=torch.long) if attention_mask is None else torch.as_tensor(attention_mask)
    if mask.shape != rows.shape:
        raise ValueError(f"attention_mask has shape {[*mask.shape]}, {name} {[*rows.shape]}; expected the same.")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("attention_mask holds other numbers than 0 and 1; expected 1 for a token, 0 for padding.")
    mask, rows = mask.long().to(rows.device), rows.long()
    order = mask.argsort(dim=1, stable=True, descending=right)  # tokens stay in their order
    return rows.masked_fill(mask == 0, pad).gather(1, order), mask.gather(1, order)
