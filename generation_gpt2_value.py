"""Sampling that is honest: a rollout's tokens are draws from the very distribution whose log-probabilities it reports.

Remote code, which imports only torch and its siblings. It works with any causal language model of transformers, and
reads nothing of the model's `generation_config`.
"""

import dataclasses
import math
from typing import Optional

import torch
from torch import nn

try:
    from .decoding_gpt2_value import are_ids, check_tokens, decoder_for, device_of, keep_pace, unwrapped, vocabulary_of
    from .sampling_gpt2_value import (
        Sampling,
        are_finite,
        as_bits,
        as_mask,
        compact,
        draw,
        kept_set,
        sampling_distribution,
        warn,
        whole_number,
    )
    from .scoring_gpt2_value import Rescored, SelfCheckError, check_finite, check_itself, rescore
except ImportError:
    if __package__:  # in a package the siblings are there: it is transformers that lacks a name
        raise
    # In a checkout or a wheel these files are top-level modules.
    from decoding_gpt2_value import are_ids, check_tokens, decoder_for, device_of, keep_pace, unwrapped, vocabulary_of
    from sampling_gpt2_value import (
        Sampling,
        are_finite,
        as_bits,
        as_mask,
        compact,
        draw,
        kept_set,
        sampling_distribution,
        warn,
        whole_number,
    )
    from scoring_gpt2_value import Rescored, SelfCheckError, check_finite, check_itself, rescore

__all__ = ["Rescored", "Rollout", "Sampling", "SelfCheckError", "rescore", "respond_to_batch", "rollout"]

FROM_CONFIG = "config"  # the default of eos_token_id


def rollout(
    model,
    queries=None,
    *,
    attention_mask=None,
    max_new_tokens=20,
    min_new_tokens=0,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    eos_token_id=FROM_CONFIG,
    pad_token_id=None,
    num_return_sequences=1,
    generator=None,
    **unknown,
):
    """Draw responses to prompts, with the log-probability of each token and the value of the state before it.

    Dropout is off, whatever mode the model is in. One that FSDP2 shards is run until the rows of all processes end.

    Args:
        model: any causal language model of transformers; `values` are reported where its output has a `value`.
        queries: `[B, P]` int64, or a list of lists or 1-D tensors of ids, of any lengths, or what a tokenizer returns.
        attention_mask: of the shape of `queries`, 0 for padding, on either side; needed where `queries` is padded.
        max_new_tokens: T, columns of the response.
        min_new_tokens, temperature, top_k, top_p: as in `Sampling`.
        eos_token_id: an id, or several, that end a row; default: "config", those of the model's config. None: no row
            ends early.
        pad_token_id: what fills a row after its end; default: the first `eos_token_id`, else 0.
        num_return_sequences: responses for each prompt; rows of one prompt stand together.
        generator: where the random numbers come from; default: torch's global generator of the model's device.

    A rollout checks itself: one row is computed again by the model's own call, alone, without padding or cache, and
    compared with what was drawn by (`check_itself` says which row, `_bounds` how closely). So is the prompt with most
    padding, before anything is drawn. That is done at the first rollout of a model, again when its class, config,
    dtype, mode or padding has changed, and at every 16th rollout; it uses no random numbers, and changes no state.

    Returns a `Rollout`. Raises TypeError or ValueError for bad input, before any compute, and for logits not finite;
    `SelfCheckError` where the check fails.
    """
    if unknown:
        raise TypeError(
            f"rollout() got {', '.join(unknown)}; the prompts are `queries`, as in rollout(model, queries)."
        )
    vocabulary = vocabulary_of(model)
    device = device_of(model)
    if isinstance(eos_token_id, str) and eos_token_id == FROM_CONFIG:
        eos = getattr(unwrapped(model)[-1].config, "eos_token_id", None)
        ids = eos if isinstance(eos, (list, tuple)) else [eos]
        # Nobody can draw an id outside the vocabulary.
        eos_token_id = tuple(id for id in ids if id is not None and 0 <= id < vocabulary)
    sampling = Sampling(temperature, top_k, top_p, min_new_tokens, eos_token_id)
    T = whole_number("max_new_tokens", max_new_tokens, 1)
    copies = whole_number("num_return_sequences", num_return_sequences, 1)
    if sampling.min_new_tokens > T:
        raise ValueError(f"min_new_tokens={min_new_tokens}; expected 0 to max_new_tokens={T}.")
    pad = whole_number("pad_token_id", (*sampling.eos_token_id, 0)[0] if pad_token_id is None else pad_token_id, 0)
    prompts, prompt_mask = aligned("queries", queries, attention_mask, pad=pad)
    check_tokens(model, prompts, prompt_mask, T)
    sampling.check_vocabulary(vocabulary)
    if pad >= vocabulary:
        raise ValueError(f"pad_token_id={pad} is not in the vocabulary of {vocabulary} tokens; pass an id below that.")
    if not isinstance(generator, (torch.Generator, type(None))):
        raise TypeError(f"generator is a {type(generator).__name__}; expected torch.Generator().manual_seed(...).")
    with torch.inference_mode(False), torch.no_grad():
        prompts, prompt_mask = (x.to(device).repeat_interleave(copies, 0) for x in (prompts, prompt_mask))
        B, P = prompts.shape
        tokens = nn.functional.pad(prompts, (0, T), value=pad)  # [B, P+T]
        mask = nn.functional.pad(prompt_mask, (0, T))  # [B, P+T]
        decoder = decoder_for(model, tokens, mask)
        logits, value = decoder.logits_and_values(P)  # [B, V], [B]
        _check_prompt(model, prompts, prompt_mask, logits)

        # float64, so that rare tokens are drawn as often as they should.
        where = device if generator is None else generator.device
        uniforms = torch.rand((T, B), generator=generator, device=where, dtype=torch.float64).to(device)
        running = torch.ones(B, dtype=torch.bool, device=device)
        ends = torch.tensor(sampling.eos_token_id, dtype=torch.long, device=device)
        early = torch.arange(T, device=device) < sampling.min_new_tokens
        logprobs = logits.new_zeros((B, T), dtype=torch.promote_types(logits.dtype, torch.float32))
        values = None if value is None else value.new_zeros((B, T))
        bits = None
        if sampling.cuts_off(vocabulary):
            bits = tokens.new_zeros((B, T, -(-vocabulary // 8)), dtype=torch.uint8)
        for t in range(T):
            if t > 0:
                logits, value = decoder.logits_and_values(P + t)  # [b, V], [b]
            rows, now = decoder.rows, running[decoder.rows]  # [b], those still computed, and which have not ended
            step = sampling_distribution(logits, sampling, early=early[t])  # [b, V]
            token, logprob = draw(step, uniforms[t, rows])
            logprob = logprob.masked_fill(~are_finite(logits), math.nan)
            tokens[rows, P + t] = torch.where(now, token, pad)
            mask[rows, P + t] = now.long()
            logprobs[rows, t] = logprob.where(now, 0)
            if values is not None:
                values[rows, t] = value.where(now, 0)
            if bits is not None:
                bits[rows, t] = kept_set(step, sampling).where(now.unsqueeze(-1), 0)
            running[rows] = now & ~torch.isin(token, ends)
            # Checking a value forces the CPU to wait for the GPU, so there check only every 16 steps.
            if device.type == "cpu" or t % 16 == 15 or t == T - 1:
                check_finite(logprobs)
                left = running[rows].nonzero().squeeze(-1)
                if len(left) == 0:
                    break
                if 2 * len(left) <= len(rows):
                    decoder.keep(left)
        keep_pace(decoder.model, tokens, ended=True)
        kept = None if bits is None else compact(bits, vocabulary)
        drawn = Rollout(tokens, mask, tokens[:, P:], mask[:, P:].bool(), logprobs, values, running, kept, sampling)
        check_itself("rollout", model, drawn, logprobs)
        return drawn


def _check_prompt(model, prompts, mask, logits):
    """Check `logits [B, V]` after `prompts [B, P]`, before anything is drawn, by the most probable tokens."""
    top = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32)).max(-1, keepdim=True)
    one = torch.ones_like(top.indices)  # [B, 1]
    tokens, seen = torch.cat([prompts, top.indices], 1), torch.cat([mask, one], 1)
    drawn = Rollout(tokens, seen, top.indices, one > 0, top.values, None, one[:, 0] > 0, None, Sampling())
    check_itself("prompt", model, drawn, top.values)


def respond_to_batch(model, queries, txt_len=20, top_k=0, top_p=1.0):
    """The seed notebook's helper: `[batch, txt_len]` tokens after `queries [batch, tokens]`; no row ends early."""
    return rollout(model, queries, max_new_tokens=txt_len, top_k=top_k, top_p=top_p, eos_token_id=None).responses


@dataclasses.dataclass(repr=False)
class Rollout:
    """B rows of P columns with prompts, padded at the left, and T columns with the responses drawn for them.

    Attributes:
        sequences: `[B, P+T]` int64, prompts and responses.
        attention_mask: `[B, P+T]` int64, 1 for the prompt's tokens and for those drawn from the model.
        responses: `[B, T]` int64; padding after a row's first end-of-text token.
        response_mask: `[B, T]` bool, this token was drawn from the model (a row's first end-of-text token was).
        logprobs: `[B, T]` float32 (float64 from a float64 model), natural logarithm, of the drawn tokens under the
            sampling distribution; 0 where masked. None where another engine drew, and gave none.
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

    def __repr__(self):
        (B, N), T = self.sequences.shape, self.responses.shape[1]
        given = {"logprobs": self.logprobs, "values": self.values}
        means = [f"{name} {x[self.response_mask].mean():.4g}" for name, x in given.items() if x is not None]
        return (
            f"Rollout of {B} rows: {N - T} columns of prompts, {T} of responses\n  {self.sampling}\n  means: "
            f"{self.response_mask.sum() / max(B, 1):.4g} tokens a row, {self.truncated.float().mean():.0%} truncated"
            + "".join(f", {each}" for each in means)
        )

    def __getitem__(self, rows):
        """The given rows (a slice, a list, a 1-D tensor of indices or a mask) as a `Rollout`."""
        if not isinstance(rows, (slice, list)) and getattr(rows, "ndim", 0) != 1:
            wanted = [*rows] if isinstance(rows, (tuple, range)) else [rows]
            raise TypeError(
                f"rollout[{rows!r}] is a {type(rows).__name__}; rows are selected by a slice, a list or a 1-D tensor: "
                f"try rollout[{wanted}]."
            )
        return self._map(lambda tensor: tensor[rows])

    @classmethod
    def cat(cls, rollouts):
        """The rows of several rollouts with the same `sampling`, such as parts that were drawn one after the other.

        Shorter prompts are padded at the left, shorter responses at the right. Raises ValueError where the settings
        differ, or only some have log-probabilities or values.
        """
        rollouts = list(rollouts)
        if len({each.sampling for each in rollouts}) != 1:
            raise ValueError(
                "expected rollouts with the same sampling, one at least: their settings tell how to score."
            )
        sampling = rollouts[0].sampling
        pad = (*sampling.eos_token_id, 0)[0]
        T = max(each.responses.shape[1] for each in rollouts)
        P = max(each.sequences.shape[1] - each.responses.shape[1] for each in rollouts)

        def join(name, fill=0, whole=False):
            """A field's rows, with T columns, or P + T."""
            parts = [getattr(each, name) for each in rollouts]
            if all(part is None for part in parts):
                return None
            if any(part is None for part in parts):
                raise ValueError(f"some of these rollouts have {name} and others not; expected all, or none.")
            wide = []
            for each, part in zip(rollouts, _alike(parts) if name == "kept" else parts, strict=True):
                after = T - each.responses.shape[1]
                before = P + T - after - part.shape[1] if whole else 0
                wide.append(nn.functional.pad(part, (*(0, 0) * (part.dim() - 2), before, after), value=fill))
            return torch.cat(wide)

        return cls(
            join("sequences", pad, whole=True),
            join("attention_mask", whole=True),
            join("responses", pad),
            join("response_mask"),
            join("logprobs"),
            join("values"),
            torch.cat([each.truncated for each in rollouts]),
            join("kept"),
            sampling,
        )

    def repeat(self, times):
        """All rows so many times, one copy after the other."""
        return self[torch.arange(len(self)).repeat(times)]

    def to(self, device):
        """The same rollout with its tensors on another device."""
        return self._map(lambda tensor: tensor.to(device=device))

    def _map(self, function):
        tensors = {name: function(value) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return dataclasses.replace(self, **tensors)


# So that torch.load(weights_only=True) takes a rollout. torch has no other way to say so than for the whole process.
torch.serialization.add_safe_globals([Rollout, Sampling])


def _alike(sets):
    """Kept sets `[B, T, K]` of several rollouts as ids of one width, or all as bits."""
    packed = [each.shape[-1] for each in sets if each.dtype == torch.uint8]
    if packed:
        return [each if each.dtype == torch.uint8 else as_bits(as_mask(each, 8 * packed[0])) for each in sets]
    K = max(each.shape[-1] for each in sets)
    return [nn.functional.pad(each, (0, K - each.shape[-1]), value=-1) for each in sets]


# What a caller passes


def aligned(name, rows, attention_mask=None, *, pad=0, right=False):
    """Token ids `[B, P]`, padded at the left (or `right`), and their mask, from a tensor, lists, or a tokenizer's."""
    if hasattr(rows, "keys"):  # what a tokenizer returns
        if "input_ids" not in rows:
            raise TypeError(f"{name} has {sorted(rows)}; expected input_ids, as a tokenizer returns them.")
        attention_mask = rows.get("attention_mask") if attention_mask is None else attention_mask
        rows = rows["input_ids"]
    is_tensor = isinstance(rows, torch.Tensor)
    try:
        rows = [torch.as_tensor(row) for row in rows]
    except (TypeError, ValueError, RuntimeError) as error:  # texts, None, lists of lists
        raise TypeError(f"{name} holds no token ids ({error}); expected rows of ids, not texts.") from error
    if not rows:
        raise ValueError(f"{name} is empty, there are no rows; expected at least one prompt.")
    masks = [torch.ones_like(row) for row in rows] if attention_mask is None else attention_mask
    masks = [torch.as_tensor(mask, device=row.device) for mask, row in zip(masks, rows, strict=False)]
    if [mask.shape for mask in masks] != [row.shape for row in rows]:
        raise ValueError(f"attention_mask has another shape than {name}; expected the same.")
    columns = max(row.numel() for row in rows)
    tokens = rows[0].new_full((len(rows), columns), pad, dtype=torch.long)  # [B, P]
    seen = torch.zeros_like(tokens)
    for number, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        if row.dim() != 1 or (len(row) and not are_ids(row)):  # torch makes an empty list a float tensor
            raise TypeError(
                f"{name}[{number}] has the shape {[*row.shape]} and is {row.dtype}; expected token ids, 1-D and of an "
                "integer dtype: a row of ids for each prompt."
            )
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("attention_mask holds other numbers than 0 and 1; expected 1 for a token, 0 for padding.")
        ids = row[mask.bool()]
        place = slice(0, len(ids)) if right else slice(columns - len(ids), columns)
        tokens[number, place] = ids.long()
        seen[number, place] = 1
    if is_tensor and attention_mask is None and columns:
        for edge in (tokens[:, 0], tokens[:, -1]):
            if 0 < (edge == pad).sum() < len(rows):
                warn(f"{pad} begins or ends some rows of {name}; if it is padding, pass attention_mask")
    return tokens, seen
