"""What there is to know about each token of a rollout: its text, and the numbers of one or two models.

Imports torch and the remote code. How GPT-2 writes bytes as characters of its vocabulary: `bytes_to_unicode` in
https://github.com/openai/gpt-2/blob/master/src/encoder.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from decoding_gpt2_value import check_tokens, run, without_dropout
from generation_gpt2_value import Rollout
from sampling_gpt2_value import Sampling, sampling_distribution
from scoring_gpt2_value import check_rollout

LIKELIEST = 5
LONGEST = 100  # characters of a token that are shown: a stranger's vocabulary may have one of millions

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + place): byte for place, byte in enumerate(_OTHERS)}
_SIGNS = {" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"}


class TokenTexts:
    """The texts of a tokenizer's tokens, cut at `LONGEST` characters; each is found once.

    They are read from the vocabulary. The tokenizer's own decoder, which can make any amount of text of one token, is
    not run.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._pieces = tokenizer, dict[int, bytes]()
        self._added = {int(id): str(token) for id, token in tokenizer.added_tokens_decoder.items()}
        unknown = (None, getattr(tokenizer, "unk_token_id", None))
        self._of_bytes = any(tokenizer.convert_tokens_to_ids(letter) not in unknown for letter in "ĠĊ")

    def __getitem__(self, id: int) -> str:
        """The token's text; a part of a character as its bytes, as in `\\xf0\\x9f`."""
        return self._piece(id).decode("utf-8", errors="backslashreplace")

    def join(self, ids: list[int]) -> str:
        """The text of tokens that follow each other."""
        return b"".join(map(self._piece, ids)).decode("utf-8", errors="replace")

    def _piece(self, id: int) -> bytes:
        if id not in self._pieces:
            self._pieces[id] = self._read(id)
        return self._pieces[id]

    def _read(self, id: int) -> bytes:
        name = self._added.get(id) or self._tokenizer.convert_ids_to_tokens(id)
        if name is None:  # the vocabulary of the model is larger than the tokenizer's
            return f"<token {id}>".encode()
        if len(name) > LONGEST:
            name = f"{name[:LONGEST]}... ({len(name):,} characters)"
        elif self._of_bytes and id not in self._added and all(char in _BYTES for char in name):
            return bytes(_BYTES[char] for char in name)
        return str(name).replace("▁", " ").encode("utf-8", errors="backslashreplace")


def visible(text: str, signs: dict[str, str] = _SIGNS) -> str:
    """`text` with a sign or an escape, as `\\u202e`, for each character that has no shape or reorders what is shown."""
    return "".join(signs.get(char) or (char if char.isprintable() else repr(char)[1:-1]) for char in text)


@dataclass(frozen=True)
class Scores:
    """What one model says of one row: of each state's value and of each drawn token, in nats; None where unknown."""

    values: list[float | None]  # [n + 1] of the states before each drawn token, and after the last
    given: list[float | None]  # [p - 1] of the states inside the prompt
    logprobs: list[float | None]  # [n]
    logits: torch.Tensor | None = None  # [n, V], before any setting is applied


@dataclass(frozen=True)
class Token:
    """One token. Log-probabilities, entropy and KL are in nats; None is unknown. `their_...` is the second model's."""

    text: str
    id: int
    drawn: bool
    after: float | None = None  # value of the state once the token stands
    before: float | None = None  # value of the state that it was drawn in
    logprob: float | None = None
    entropy: float | None = None
    rank: int | None = None  # 1 for the likeliest token that could be drawn
    choices: int | None = None  # how many tokens could be drawn
    likeliest: tuple[tuple[str, float], ...] = ()  # text and probability, which is 0 where the settings cut it off
    their_logprob: float | None = None
    their_before: float | None = None
    their_after: float | None = None
    kl: float | None = None  # KL(model || second model)

    @property
    def log_ratio(self) -> float | None:
        return None if self.logprob is None or self.their_logprob is None else self.logprob - self.their_logprob


@torch.inference_mode()
def read(rollout: Rollout, tokenizer: Any, model: Any = None, compare: Any = None) -> list[list[Token]]:
    """All about each token of a rollout, row by row: the prompt's tokens, then those that were drawn."""
    models = [one for one in (model, compare) if one is not None]
    sizes = [check_tokens(one, rollout.sequences, rollout.attention_mask) for one in models]
    if len(set(sizes)) > 1:
        raise ValueError(f"the models' vocabularies have {sizes[0]:,} and {sizes[1]:,} tokens; expected the same.")
    for size in sizes:
        check_rollout(rollout, size)
    model, compare = (None if one is None else without_dropout(one) for one in (model, compare))
    texts, P = TokenTexts(tokenizer), rollout.sequences.shape[1] - rollout.responses.shape[1]
    found = []
    for row in range(len(rollout)):
        prompt = rollout.sequences[row, :P][rollout.attention_mask[row, :P].bool()].tolist()
        drawn = rollout.responses[row][rollout.response_mask[row]].tolist()
        mine = _recorded(rollout, row, len(prompt)) if model is None else _scored(model, rollout, row, prompt, drawn)
        theirs = None if compare is None else _scored(compare, rollout, row, prompt, drawn)
        found.append(_tokens(texts, rollout, row, prompt, drawn, mine, theirs))
    return found


def _recorded(rollout: Rollout, row: int, p: int) -> Scores:
    """What the rollout says of itself: of the state after the last token nothing."""
    mask = rollout.response_mask[row]
    n = int(mask.sum())
    logprobs, values = (
        list[float | None]([None] * n) if column is None else column[row][mask].tolist()
        for column in (rollout.logprobs, rollout.values)
    )
    return Scores([*values, None], [None] * max(0, p - 1), logprobs)


def _scored(model: Any, rollout: Rollout, row: int, prompt: list[int], drawn: list[int]) -> Scores:
    tokens = torch.tensor([prompt + drawn], device=model.device)
    p, n = len(prompt), len(drawn)
    columns = slice(0, p + n)
    output, values = run(model, tokens, torch.ones_like(tokens), columns, logits_to_keep=n + 1, use_cache=False)
    logits = output.logits[0, -n - 1 : -1]  # [n, V]
    chosen = _distribution(logits, rollout, row).gather(-1, tokens[0, p:, None]).squeeze(-1)  # [n]
    found: list[float | None] = [None] * (p + n) if values is None else values[0].tolist()
    return Scores(found[p - 1 :], found[: p - 1], chosen.tolist(), logits)


def _distribution(logits: torch.Tensor, rollout: Rollout, row: int) -> torch.Tensor:
    """Log-probabilities `[n, V]` over the tokens that each draw chose among."""
    kept = None if rollout.kept is None else rollout.kept[row][rollout.response_mask[row]].to(logits.device)
    steps = torch.arange(len(logits))
    return sampling_distribution(logits, rollout.sampling, steps=steps, kept=kept).log_softmax(-1)


def _tokens(
    texts: TokenTexts,
    rollout: Rollout,
    row: int,
    prompt: list[int],
    drawn: list[int],
    mine: Scores,
    theirs: Scores | None,
) -> list[Token]:
    n = len(drawn)
    columns: dict[str, list[Any]] = {"before": mine.values[:-1], "after": mine.values[1:], "logprob": mine.logprobs}
    given = [*mine.given, *mine.values[:1]]
    if theirs is not None:
        columns |= {"their_before": theirs.values[:-1], "their_after": theirs.values[1:]}
        columns["their_logprob"] = theirs.logprobs
    if mine.logits is not None and n:
        logprobs = _distribution(mine.logits, rollout, row)  # [n, V]
        probs, possible = logprobs.exp(), logprobs > -math.inf
        columns["entropy"] = (-(probs * logprobs.where(possible, 0)).sum(-1)).tolist()
        if theirs is not None and theirs.logits is not None:
            other = _distribution(theirs.logits.to(logprobs.device), rollout, row)
            columns["kl"] = (probs * (logprobs - other).where(possible, 0)).sum(-1).tolist()
        whole = sampling_distribution(mine.logits, Sampling())
        ids = torch.tensor(drawn, device=whole.device)[:, None]
        top = whole.topk(min(LIKELIEST, whole.shape[-1])).indices  # [n, 5]
        pairs = zip(top.tolist(), probs.gather(-1, top).tolist(), strict=True)
        columns["likeliest"] = [tuple(zip((texts[id] for id in best), p, strict=True)) for best, p in pairs]
        columns["rank"] = (1 + (logprobs > logprobs.gather(-1, ids)).sum(-1)).tolist()
        columns["choices"] = possible.sum(-1).tolist()
    rows = zip(*columns.values(), strict=True)
    return [
        *(Token(texts[id], id, False, after=value) for id, value in zip(prompt, given, strict=True)),
        *(
            Token(texts[id], id, True, **dict(zip(columns, entries, strict=True)))
            for id, entries in zip(drawn, rows, strict=True)
        ),
    ]
