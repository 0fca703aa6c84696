"""What a sampler claims: which tokens it drew, and by which settings. The input of `audit_sampler`, checked.

Imports torch and the remote code. A claim about a `Rollout` is read off it; about other tokens, it is what the caller
says.
"""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from decoding_gpt2_value import are_ids
from sampling_gpt2_value import Sampling


@dataclasses.dataclass(frozen=True, eq=False)
class Claim:
    """`tokens [B, P+T]`, and for each of them what is said about it.

    Attributes:
        tokens: `[B, P+T]` int64; 0 where the model may not see one.
        attention_mask: `[B, P+T]` int64, 1 where the model may see the token.
        drawn: `[B, P+T]` bool, the token is claimed as drawn.
        early: `[B, P+T]` bool, an end-of-text token cannot be drawn here.
        kept: `[B, T, K]` of the last T columns, which tokens each draw chose among, as in `Rollout`; None where that
            is for the settings to say.
        sampling: the settings.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    drawn: torch.Tensor
    early: torch.Tensor
    kept: torch.Tensor | None
    sampling: Sampling

    @property
    def columns(self) -> int:
        """The last columns that hold all drawn tokens; 1 at least."""
        columns = self.drawn.any(0).nonzero()
        return self.drawn.shape[1] - int(columns[0]) if len(columns) else 1

    def to(self, device: torch.device) -> Claim:
        """The same claim with its tensors on another device."""
        fields: dict[str, Any] = dict(vars(self))
        moved = {name: value.to(device) for name, value in fields.items() if isinstance(value, torch.Tensor)}
        return Claim(**{**fields, **moved})


def read_claim(
    sequences: Any,
    vocabulary: int,
    *,
    prompt_length: Any,
    attention_mask: torch.Tensor | None,
    response_mask: torch.Tensor | None,
    **settings: Any,
) -> Claim:
    """The claim that these arguments of `audit_sampler` make; settings that are None were not given.

    Raises:
        TypeError, ValueError: it is unclear, contradicts itself, or is not about tokens of this vocabulary.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if type(sequences).__name__ == "Rollout":  # by name: a package's own class is another one than the checkout's
        masks = {"prompt_length": prompt_length, "attention_mask": attention_mask, "response_mask": response_mask}
        beside = [name for name, value in {**masks, **given}.items() if value is not None]
        if beside:
            raise TypeError(
                f"got a Rollout together with {', '.join(beside)}; a Rollout brings its own. Leave these out, or pass "
                "rollout.sequences with prompt_length to audit it under another claim."
            )
        if not hasattr(sequences, "sampling"):
            raise TypeError(
                "this Rollout is one of version 0.1.0, which did not keep what it drew from; pass rollout.sequences "
                "with attention_mask, response_mask and the settings."
            )
        sampling = Sampling(
            **{field.name: getattr(sequences.sampling, field.name) for field in dataclasses.fields(Sampling)}
        )
        tokens, mask, kept = sequences.sequences, sequences.attention_mask.bool(), sequences.kept
        P = tokens.shape[1] - sequences.responses.shape[1]
        drawn, starts = pad(sequences.response_mask, (P, 0)), torch.full_like(tokens[:, 0], P)
    else:
        sampling, kept = Sampling(**given), None
        tokens, mask, exists = _rows(sequences, attention_mask, prompt_length)
        drawn, starts = _drawn(tokens, exists, prompt_length, response_mask, sampling.eos_token_id)
    sampling.check_vocabulary(vocabulary, kept)
    _check_claim(tokens, mask, drawn, vocabulary)
    tokens = tokens.long()
    places = torch.arange(tokens.shape[1], device=tokens.device)
    early = places < (starts + sampling.min_new_tokens).unsqueeze(-1)
    early &= places >= starts.unsqueeze(-1)
    return Claim(tokens.masked_fill(~mask, 0), mask.long(), drawn, early, kept, sampling)


def _rows(sequences, attention_mask, prompt_length):
    """Token ids `[B, P+T]`, which of them the model may see, and which exist; lists are padded at the right."""
    if isinstance(sequences, torch.Tensor):
        if sequences.dim() != 2:
            raise ValueError(f"sequences has shape {list(sequences.shape)}; expected [batch, tokens].")
        exists = torch.ones_like(sequences, dtype=torch.bool)
        if attention_mask is None:
            return sequences, exists, exists
        attention_mask = _mask("attention_mask", attention_mask)
        if isinstance(prompt_length, numbers.Integral) and attention_mask.shape == (len(sequences), prompt_length):
            attention_mask = pad(attention_mask, (0, sequences.shape[1] - int(prompt_length)), value=1)
        if attention_mask.shape != sequences.shape:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}, sequences {list(sequences.shape)}; expected "
                "the same, or the mask of the first prompt_length columns."
            )
        return sequences, attention_mask.to(sequences.device).bool(), exists
    if attention_mask is not None:
        raise ValueError("attention_mask goes with a [batch, tokens] tensor of sequences; a list needs none.")
    try:
        rows = [torch.as_tensor(row) for row in sequences]
    except (TypeError, ValueError, RuntimeError) as error:  # texts, None, lists of lists
        raise TypeError(f"sequences holds no token ids ({error}); expected tensors of ids, not texts.") from error
    if not rows or any(row.dim() != 1 for row in rows):
        raise ValueError(
            "sequences: expected a [batch, tokens] tensor or a list of 1-D tensors, with at least one row."
        )
    padded = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    exists = torch.arange(padded.shape[1], device=padded.device) < lengths.unsqueeze(-1)
    return padded, exists, exists


def _mask(name, mask):
    mask = torch.as_tensor(mask)
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{name} holds other numbers than 0 and 1; expected 1 for a token, 0 for none.")
    return mask


def _drawn(tokens, exists, prompt_length, response_mask, eos):
    """Which tokens are claimed as drawn, `[B, P+T]` bool, and the column where each row's response starts, `[B]`."""
    B, columns = tokens.shape
    if (prompt_length is None) == (response_mask is None):
        raise TypeError(
            f"got {'neither prompt_length nor' if prompt_length is None else 'both prompt_length and'} response_mask; "
            "pass one: it says which tokens are claimed as drawn."
        )
    places = torch.arange(columns, device=tokens.device)
    if response_mask is not None:
        response_mask = _mask("response_mask", response_mask)
        if response_mask.dim() != 2 or response_mask.shape[0] != B or response_mask.shape[1] > columns:
            raise ValueError(
                f"response_mask has shape {list(response_mask.shape)}, sequences {list(tokens.shape)}; expected the "
                "same, or as many rows and the last columns."
            )
        drawn = pad(response_mask.to(tokens.device).bool(), (columns - response_mask.shape[1], 0))
        return drawn, torch.where(drawn, places, columns).amin(-1)
    try:
        starts = torch.as_tensor(prompt_length, device=tokens.device)
    except (TypeError, ValueError, RuntimeError):  # no numbers: the next check names what came
        starts = torch.empty(0)
    if not are_ids(starts):
        raise TypeError(f"prompt_length={prompt_length!r}; expected a whole number of columns, or one for each row.")
    if starts.dim() > 1 or (starts.dim() == 1 and len(starts) != B):
        raise ValueError(
            f"prompt_length has shape {list(starts.shape)}; expected one number, or one for each of {B} rows."
        )
    starts = starts.expand(B)
    if (starts < 1).any() or (starts > columns).any():
        raise ValueError(
            f"prompt_length is {int(starts.min())} to {int(starts.max())}; expected 1 to {columns}: the first "
            "token has nothing to be drawn from."
        )
    drawn = exists & (places >= starts.unsqueeze(-1))
    if eos:
        ends = drawn & torch.isin(tokens, torch.tensor(eos, device=tokens.device))
        drawn &= ends.cumsum(-1) - ends.long() == 0  # no end before this one
    return drawn, starts


def _check_claim(tokens, mask, drawn, vocabulary):
    check_tokens(tokens, mask, vocabulary)
    hidden = drawn & ~mask
    if hidden.any():
        row, column = hidden.nonzero()[0].tolist()
        raise ValueError(
            f"row {row} claims column {column} as drawn, and its attention_mask is 0 there; a padding token was not "
            "drawn: leave it out of response_mask, or pass eos_token_id so that rows end there."
        )
    first = drawn & (mask.long().cumsum(-1) == 1)
    if first.any():
        row, column = first.nonzero()[0].tolist()
        raise ValueError(f"row {row} claims its first token (column {column}) as drawn; expected a prompt before it.")


def check_tokens(tokens, mask, vocabulary):
    """Raises TypeError or ValueError where `tokens [...]` under `mask [...]` are not ids of the vocabulary."""
    if not are_ids(tokens):
        raise TypeError(f"tokens are {tokens.dtype}; expected token ids, an integer dtype: try .long().")
    outside = mask & ((tokens < 0) | (tokens >= vocabulary))
    if outside.any():
        place = outside.nonzero()[0].tolist()
        raise ValueError(
            f"the id {int(tokens[tuple(place)])} at {place} is outside the vocabulary of {vocabulary} tokens; was it "
            "made with this model's tokenizer? Padding needs an attention_mask."
        )
