"""Fresh draws for an audit, by `rollout` or by `generate()`, and the audit of these draws.

Imports torch, `sampler_audit` and the remote code.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from generation_gpt2_value import rollout
from sampler_audit import SamplerAudit, audit_sampler
from sampling_gpt2_value import Sampling

BATCH = 64  # rows drawn at a time
NEW_TOKENS = 32  # of a response, where nothing else is said

# Prompts `[B, P]`, padded on the left, and their mask, to sequences `[copies * B, P+T]`.
Draw = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Rows:
    """Prompts with the responses that were drawn for them, without the prompts' padding, and the prompts' lengths."""

    rows: list[torch.Tensor] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    tokens: int = 0  # that were drawn, padding after an end not counted


def by_rollout(model: Any, claim: Sampling, generator: torch.Generator | None = None) -> Draw:
    """Draw with this project's own rollout, by the claim."""
    settings = {**asdict(claim), "max_new_tokens": NEW_TOKENS, "generator": generator}
    return lambda prompts, mask: rollout(model, prompts, attention_mask=mask, **settings).sequences


def by_generate(model: Any, claim: Sampling, options: dict[str, Any]) -> Draw:
    """Draw with transformers' `generate(**options)`, sampling unless the options say otherwise."""
    always = {"do_sample": True, "max_new_tokens": NEW_TOKENS, "pad_token_id": _pad(claim)}

    def draw(prompts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        output = model.generate(prompts, attention_mask=mask, **{**always, **options})
        return output if isinstance(output, torch.Tensor) else output.sequences

    return draw


def drawn_rows(queries: Sequence[torch.Tensor], claim: Sampling, draw: Draw, tokens: int) -> Iterator[Rows]:
    """Draw until there are so many tokens, and yield after each batch all rows so far (one object, which grows).

    Args:
        queries: prompts, 1-D tensors of token ids; each is used for as many rows as it takes.
    """
    longest = max(len(query) for query in queries)
    ends = torch.tensor(claim.eos_token_id, dtype=torch.long)
    batch = [queries[row % len(queries)] for row in range(max(BATCH, len(queries)))]
    prompts = pad_sequence(batch, batch_first=True, padding_value=_pad(claim), padding_side="left")
    mask = pad_sequence([torch.ones_like(query) for query in batch], batch_first=True, padding_side="left")
    found = Rows()
    while found.tokens < tokens:
        sequences = draw(prompts, mask)
        copies = len(sequences) // len(batch)
        for row, sequence in enumerate(sequences):
            length = len(batch[row // copies])
            found.rows.append(sequence[longest - length :])
            found.lengths.append(length)
        is_end = torch.isin(sequences[:, longest:], ends).long()
        found.tokens += int((is_end.cumsum(-1) - is_end == 0).sum())
        yield found


def audit_rows(
    model: Any,
    found: Rows,
    claim: Sampling,
    *,
    alpha: float,
    score_padding: bool = False,
    generator: torch.Generator | None = None,
) -> SamplerAudit:
    """Audit the rows against the claim. Errors as in `audit_sampler`.

    Args:
        score_padding: claim that what follows a first end-of-text token was drawn too.
    """
    asked: dict[str, Any] = {"prompt_length": found.lengths}
    if score_padding and claim.eos_token_id:  # with prompt_length, a response would end there
        is_response = [torch.arange(len(row)) >= n for row, n in zip(found.rows, found.lengths, strict=True)]
        asked = {"response_mask": pad_sequence(is_response, batch_first=True)}
    return audit_sampler(model, found.rows, alpha=alpha, generator=generator, **asked, **asdict(claim))


def options_of(pairs: Sequence[str]) -> dict[str, Any]:
    """`["top_k=50"]` as `{"top_k": 50}`, values read as JSON, or as text where they are none.

    Raises:
        ValueError: no KEY=VALUE, or a value written as Python does.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"{pair}: expected KEY=VALUE, as in top_k=50")
        try:
            options[name] = json.loads(value)
        except ValueError:
            if value in ("True", "False", "None"):
                raise ValueError(f"{pair}: write it as JSON does: true, false, null") from None
            options[name] = value
    return options


def _pad(claim: Sampling) -> int:
    return int((*claim.eos_token_id, 0)[0])
