"""What there is to know about each token of a rollout, as plain records.

Imports torch, the remote code, and of these pages `token_text`. Log-probabilities, values, entropies and KL are those
of `rescore`; what that does not give (ranks, the likeliest tokens, the value after the last token) is read from one
forward pass of each row, by the same `sampling_distribution`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from decoding_gpt2_value import run
from generation_gpt2_value import Rescored, Rollout, rescore
from sampling_gpt2_value import Sampling, sampling_distribution

from .token_text import TokenTexts

LIKELIEST = 5


@dataclass(frozen=True)
class Alternative:
    """A token that could have stood there. Its probability is 0 where the settings cut it off."""

    id: int
    text: str
    probability: float


@dataclass(frozen=True)
class Token:
    """One token. Of a prompt's, which nobody drew, only id, text and the value after it are known.

    Log-probabilities and entropies are in nats, of the distribution that the token was drawn from or, of a text that
    is only read, of the model's own. `other_...` is the second model's, over the same tokens.
    """

    id: int
    text: str
    value_after: float | None = None  # of the state once the token stands
    value_before: float | None = None  # of the state that it was drawn in
    logprob: float | None = None
    entropy: float | None = None
    rank: int | None = None  # 1 for the model's likeliest token, whatever is cut off
    kept: bool | None = None  # whether it is among the tokens that the settings leave
    choices: int | None = None  # how many tokens they leave
    likeliest: tuple[Alternative, ...] = ()  # the likeliest first, whatever is cut off
    other_logprob: float | None = None
    other_value_before: float | None = None
    other_value_after: float | None = None
    kl: float | None = None  # KL(model || second model) of the two distributions

    @property
    def log_ratio(self) -> float | None:
        """Log-probability of the token less the second model's: above 0 where the first finds it likelier."""
        return None if self.logprob is None or self.other_logprob is None else self.logprob - self.other_logprob


@dataclass(frozen=True)
class Response:
    """A prompt, and the tokens that follow it."""

    prompt: tuple[Token, ...]
    tokens: tuple[Token, ...]
    truncated: bool  # it ran out of tokens before an end-of-text token was drawn


@torch.no_grad()
def records(model: Any, tokenizer: Any, rollout: Rollout, *, other: Any = None) -> list[Response]:
    """All about each token of a rollout, one `Response` for each row.

    Args:
        model: the model that drew the tokens, or that reads them.
        tokenizer: for the tokens' texts.
        other: a second model with the same vocabulary, which scores the same tokens.

    Raises:
        TypeError, ValueError: what `rescore` raises, as where the vocabularies differ.
    """
    scored = rescore(model, rollout, with_entropy=True, reference=other)
    theirs = None if other is None else rescore(other, rollout)
    texts = TokenTexts(tokenizer)
    return [_response(model, texts, rollout, row, scored, other, theirs) for row in range(len(rollout))]


def drawn_so_far(tokenizer: Any, rollout: Rollout) -> list[Response]:
    """What a rollout says of itself, without running a model: text, log-probability, and value before each token."""
    texts = TokenTexts(tokenizer)
    found = []
    for row in range(len(rollout)):
        prompt, ids = _ids(rollout, row)
        logprobs, values = (
            [None] * len(ids) if column is None else column[row, : len(ids)].tolist()
            for column in (rollout.logprobs, rollout.values)
        )
        tokens = [
            Token(id, texts[id], value_before=value, logprob=logprob)
            for id, value, logprob in zip(ids, values, logprobs, strict=True)
        ]
        given = tuple(Token(id, texts[id]) for id in prompt)
        found.append(Response(given, tuple(tokens), bool(rollout.truncated[row])))
    return found


def as_read(texts: list[torch.Tensor]) -> Rollout:
    """Texts as if a model had drawn them, by its own distribution: the first token is given, all others are scored.

    Args:
        texts: 1-D tensors of token ids, each with one token at least.

    The log-probabilities of the result are NaN: only `rescore` knows them.
    """
    B = len(texts)
    columns = max(1, max(len(ids) for ids in texts) - 1)
    responses = pad_sequence([*(ids[1:] for ids in texts), torch.zeros(columns, dtype=torch.long)], batch_first=True)[
        :B
    ]
    lengths = torch.tensor([len(ids) - 1 for ids in texts])
    mask = torch.arange(columns) < lengths[:, None]
    first = torch.stack([ids[:1] for ids in texts])
    return Rollout(
        sequences=torch.cat([first, responses], 1),
        attention_mask=torch.cat([torch.ones_like(first), mask.long()], 1),
        responses=responses,
        response_mask=mask,
        logprobs=torch.full(responses.shape, math.nan),
        values=None,
        truncated=torch.ones(B, dtype=torch.bool),
        kept=None,
        sampling=Sampling(),
    )


def as_json(response: Response) -> dict[str, Any]:
    """The response as plain JSON values; what is not finite is None."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(entry) for name, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    fields: dict[str, Any] = plain(dataclasses.asdict(response))
    for entry, token in zip(fields["tokens"], response.tokens, strict=True):
        entry["log_ratio"] = plain(token.log_ratio)
    return fields


def _ids(rollout: Rollout, row: int) -> tuple[list[int], list[int]]:
    """The ids of a row's prompt and of what was drawn."""
    P = rollout.sequences.shape[1] - rollout.responses.shape[1]
    prompt = rollout.sequences[row, :P][rollout.attention_mask[row, :P].bool()]
    return prompt.tolist(), rollout.responses[row][rollout.response_mask[row]].tolist()


def _response(
    model: Any, texts: TokenTexts, rollout: Rollout, row: int, scored: Rescored, other: Any, theirs: Rescored | None
) -> Response:
    prompt, ids = _ids(rollout, row)
    p, n = len(prompt), len(ids)
    logits, values = _forward(model, prompt + ids, n + 1)
    columns: dict[str, list[Any]] = {
        "logprob": _column(scored.logprobs, row, n),
        "entropy": _column(scored.entropy, row, n),
        "value_before": _column(scored.values, row, n),
        "value_after": values[p:],
        "other_value_after": [None] * n,
    }
    if theirs is not None:
        columns["other_logprob"] = _column(theirs.logprobs, row, n)
        columns["other_value_before"] = _column(theirs.values, row, n)
        columns["other_value_after"] = _forward(other, prompt + ids, 1)[1][p:]
        columns["kl"] = _column(scored.kl, row, n)
    columns |= _among_others(logits[:n], ids, rollout, row, texts)
    rows = [dict(zip(columns, entries, strict=True)) for entries in zip(*columns.values(), strict=True)]
    tokens = [Token(id, texts[id], **fields) for id, fields in zip(ids, rows, strict=True)]
    given = [Token(id, texts[id], value_after=value) for id, value in zip(prompt, values[:p], strict=True)]
    return Response(tuple(given), tuple(tokens), bool(rollout.truncated[row]))


def _column(numbers: torch.Tensor | None, row: int, n: int) -> list[Any]:
    return [None] * n if numbers is None else numbers[row, :n].tolist()


def _forward(model: Any, ids: list[int], columns: int) -> tuple[torch.Tensor, list[Any]]:
    """Logits `[columns, V]` after the last tokens, and the value after each token, None where there is no head."""
    tokens = torch.tensor([ids], device=model.device)
    whole = slice(0, len(ids))
    output, values = run(model, tokens, torch.ones_like(tokens), whole, logits_to_keep=columns, use_cache=False)
    return output.logits[0, -columns:], [None] * len(ids) if values is None else values[0].tolist()


def _among_others(
    logits: torch.Tensor, ids: list[int], rollout: Rollout, row: int, texts: TokenTexts
) -> dict[str, list[Any]]:
    """Where each token stood among all others: `logits [n, V]` of the states that the tokens were drawn in."""
    sampling, n = rollout.sampling, len(ids)
    early = torch.arange(n, device=logits.device) < sampling.min_new_tokens
    kept = None if rollout.kept is None else rollout.kept[row, :n].to(logits.device)
    whole = dataclasses.replace(sampling, top_k=0, top_p=1.0)
    before_cut = sampling_distribution(logits, whole, early=early)  # [n, V]
    left = sampling_distribution(logits, sampling, early=early, kept=kept)
    drawn = torch.tensor(ids, dtype=torch.long, device=logits.device).unsqueeze(-1)  # [n, 1]
    probs = left.softmax(-1)
    likeliest = before_cut.topk(min(LIKELIEST, logits.shape[-1])).indices  # [n, 5]
    pairs = zip(likeliest.tolist(), probs.gather(-1, likeliest).tolist(), strict=True)
    return {
        "rank": (1 + (before_cut > before_cut.gather(-1, drawn)).sum(-1)).tolist(),
        "kept": (left.gather(-1, drawn).squeeze(-1) > -math.inf).tolist(),
        "choices": (left > -math.inf).sum(-1).tolist(),
        "likeliest": [
            tuple(Alternative(id, texts[id], chance) for id, chance in zip(*entry, strict=True)) for entry in pairs
        ],
    }
