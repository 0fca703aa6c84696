"""What a sampler claims: which tokens it drew, and by which settings. The input of `sampler_audit`, checked.

Imports torch alone. A claim about a `Rollout` is read off it; about other tokens, it is what the caller says.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_new_tokens": 0}


@dataclasses.dataclass(frozen=True, eq=False)
class Claim:
    """`tokens [B, P+T]`, and for each of them what is said about it.

    Attributes:
        tokens: int64; 0 where the model may not see one.
        attention_mask: int64, 1 where the model may see the token.
        drawn: bool, the token is claimed as drawn.
        early: bool, an end-of-text token cannot be drawn here.
        support: int64, how many tokens top-p left, where a `Rollout` says so.
        settings: `temperature`, `top_k` and `top_p`.
        eos_token_id: the end-of-text tokens.
    """

    tokens: torch.Tensor
    attention_mask: torch.Tensor
    drawn: torch.Tensor
    early: torch.Tensor
    support: torch.Tensor | None
    settings: dict[str, Any]
    eos_token_id: tuple[int, ...]

    @property
    def columns(self) -> int:
        """The last columns that hold all drawn tokens; 1 at least."""
        columns = self.drawn.any(0).nonzero()
        return self.drawn.shape[1] - int(columns[0]) if len(columns) else 1

    def to(self, device: torch.device) -> Claim:
        """The same claim with its tensors on another device."""
        fields: dict[str, Any] = dict(vars(self))
        for name, value in fields.items():
            fields[name] = value.to(device) if isinstance(value, torch.Tensor) else value
        return Claim(**fields)


def read_claim(
    sequences, vocabulary, *, prompt_length, attention_mask, response_mask, eos_token_id, **settings
) -> Claim:
    """The claim that these arguments of `audit_sampler` make; settings that are None were not given.

    Raises:
        TypeError, ValueError: it is unclear, contradicts itself, or is not about tokens of this vocabulary.
    """
    if type(sequences).__name__ == "Rollout":  # by name: a package's own class is another one than the checkout's
        masks = {"prompt_length": prompt_length, "attention_mask": attention_mask, "response_mask": response_mask}
        others = {**masks, **settings, "eos_token_id": eos_token_id}
        given = [name for name, value in others.items() if value is not None]
        if given:
            raise TypeError(
                f"got a Rollout together with {', '.join(given)}; a Rollout brings its own. Leave these out, or pass "
                "rollout.sequences with prompt_length to audit it under another claim."
            )
        tokens, mask, P = sequences.sequences, sequences.attention_mask.bool(), _prompt_columns(sequences)
        drawn, starts = pad(sequences.response_mask, (P, 0)), torch.full_like(tokens[:, 0], P)
        support = None if sequences.support is None else pad(sequences.support, (P, 0))
        eos, settings = sequences.eos_token_id, {name: getattr(sequences, name) for name in DEFAULTS}
    else:
        eos = _ids(eos_token_id)
        tokens, mask, exists = _rows(sequences, attention_mask, prompt_length)
        drawn, starts = _drawn(tokens, exists, prompt_length, response_mask, eos)
        support = None
        settings = {name: default if settings[name] is None else settings[name] for name, default in DEFAULTS.items()}
    check_settings(**settings, eos=eos)
    _check_claim(tokens, mask, drawn, vocabulary, eos)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    early = places < (starts + settings.pop("min_new_tokens")).unsqueeze(-1)
    early &= places >= starts.unsqueeze(-1)
    return Claim(tokens.masked_fill(~mask, 0), mask.long(), drawn, early, support, settings, eos)


def _rows(sequences, attention_mask, prompt_length):
    """Token ids `[B, P+T]`, which of them the model may see, and which exist; lists are padded at the right."""
    if isinstance(sequences, torch.Tensor):
        if sequences.dim() != 2:
            raise ValueError(f"sequences has shape {list(sequences.shape)}; expected [batch, tokens].")
        exists = torch.ones_like(sequences, dtype=torch.bool)
        if attention_mask is None:
            return sequences, exists, exists
        if isinstance(prompt_length, int) and attention_mask.shape == (len(sequences), prompt_length):
            attention_mask = pad(attention_mask, (0, sequences.shape[1] - prompt_length), value=1)
        if attention_mask.shape != sequences.shape:
            raise ValueError(
                f"attention_mask has shape {list(attention_mask.shape)}, sequences {list(sequences.shape)}; expected "
                "the same, or the mask of the first prompt_length columns."
            )
        return sequences, attention_mask.to(sequences.device).bool(), exists
    if attention_mask is not None:
        raise ValueError("attention_mask goes with a [batch, tokens] tensor of sequences; a list needs none.")
    rows = [torch.as_tensor(row) for row in sequences]
    if not rows or any(row.dim() != 1 for row in rows):
        raise ValueError(
            "sequences: expected a [batch, tokens] tensor or a list of 1-D tensors, with at least one row."
        )
    padded = pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=padded.device)
    exists = torch.arange(padded.shape[1], device=padded.device) < lengths.unsqueeze(-1)
    return padded, exists, exists


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
        if response_mask.dim() != 2 or response_mask.shape[0] != B or response_mask.shape[1] > columns:
            raise ValueError(
                f"response_mask has shape {list(response_mask.shape)}, sequences {list(tokens.shape)}; expected the "
                "same, or as many rows and the last columns."
            )
        drawn = pad(response_mask.to(tokens.device).bool(), (columns - response_mask.shape[1], 0))
        return drawn, torch.where(drawn, places, columns).amin(-1)
    starts = torch.as_tensor(prompt_length, device=tokens.device)
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


def _check_claim(tokens, mask, drawn, vocabulary, eos):
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
    for token in eos:
        if not 0 <= token < vocabulary:
            raise ValueError(f"eos_token_id={token} is not in the vocabulary of {vocabulary} tokens.")


def check_tokens(tokens, mask, vocabulary):
    """Raises TypeError or ValueError where `tokens [...]` under `mask [...]` are not ids of the vocabulary."""
    if tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise TypeError(f"tokens are {tokens.dtype}; expected token ids, an integer dtype: try .long().")
    outside = mask & ((tokens < 0) | (tokens >= vocabulary))
    if outside.any():
        place = outside.nonzero()[0].tolist()
        raise ValueError(
            f"the id {int(tokens[tuple(place)])} at {place} is outside the vocabulary of {vocabulary} tokens; was it "
            "made with this model's tokenizer? Padding needs an attention_mask."
        )


def check_settings(*, temperature, top_k, top_p, min_new_tokens=0, eos=()):
    """Raises ValueError where settings are none that tokens can be drawn by."""
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature}; expected a finite number > 0: greedy decoding draws nothing.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}; expected a number in (0, 1], 1.0 for off.")
    if isinstance(top_k, float) or top_k < 0:
        raise ValueError(f"top_k={top_k}; expected an int >= 0, 0 for off.")
    if min_new_tokens < 0:
        raise ValueError(f"min_new_tokens={min_new_tokens}; expected an int >= 0, 0 for off.")
    if min_new_tokens and not eos:
        raise ValueError(f"min_new_tokens={min_new_tokens} has no effect without eos_token_id; pass both or neither.")


def _ids(eos_token_id):
    if eos_token_id is None:
        return ()
    return (eos_token_id,) if isinstance(eos_token_id, int) else tuple(eos_token_id)


def _prompt_columns(rollout):
    return rollout.sequences.shape[1] - rollout.responses.shape[1]
