"""What was found, as files to take along: JSON with every number, and a PNG.

Imports the standard library, and of these pages `chips`, `desk`, `palettes`, `picture`, `records` and `token_text`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import palettes, picture
from .chips import state_value
from .desk import Found
from .records import Response, Token, as_json
from .token_text import visible

LONGEST = 60  # characters of a token in the picture


def write_json(found: Found, file: Path) -> None:
    """Write all that is known about each token, in the settings that it was drawn with."""
    mine, other = found.names
    told = {"model": mine, "second_model": other, "settings": found.settings}
    whole = {**told, "responses": [as_json(response) for response in found.responses]}
    file.write_text(json.dumps(whole, indent=1, allow_nan=False), encoding="utf-8")


def write_picture(found: Found, file: Path) -> None:
    """Draw the tokens by value, and by log-ratio where there is a second model, else by log-probability."""
    mine, other = found.names
    answers = [_as_drawn(response) for response in found.responses]
    tokens = [token for answer in answers for token in answer]
    limit = palettes.limit_of(token.value for token in tokens if token.value is not None)
    right = picture.BY_LOGPROB
    if other is not None:
        ratios = palettes.limit_of(token.log_ratio for token in tokens if token.log_ratio is not None)
        right = picture.by_log_ratio(_short(other), limit=ratios)
    columns = picture.by_value(f"value, by {_short(mine)}", limit=limit), right
    picture.draw_responses(answers, file, title=f"Responses of {_short(mine)}", columns=columns)


def table(found: Found) -> tuple[list[str], list[list[Any]]]:
    """Headers, and for each response a row of what it comes to; the second model's columns where there is one.

    A log-ratio summed over a response that was drawn from the first model is the KL divergence by this draw.
    """
    headers = ["#", "tokens", "log-prob.", "mean entropy", "value at start", "at end"]
    two = found.names[1] is not None
    if two:
        headers += ["KL, this draw", "KL, exact", "second: log-prob.", "second: value at start", "second: at end"]
    headers += ["prompt", "text"]
    rows = []
    for number, response in enumerate(found.responses, 1):
        tokens = response.tokens
        row: list[Any] = [number, len(tokens), _sum(token.logprob for token in tokens)]
        total = _sum(token.entropy for token in tokens)
        row.append(None if total is None else round(total / len(tokens), 4))
        row += _ends([token.value_before for token in tokens], [token.value_after for token in tokens])
        if two:
            row += [
                _sum(t.log_ratio for t in tokens),
                _sum(t.kl for t in tokens),
                _sum(t.other_logprob for t in tokens),
            ]
            row += _ends([t.other_value_before for t in tokens], [t.other_value_after for t in tokens])
        rows.append([*row, _text(response.prompt), _text(tokens)])
    return headers, rows


def _as_drawn(response: Response) -> list[picture.Token]:
    drawn = [picture.Token(_drawable(token.text), state_value(token)) for token in response.prompt]
    for token in response.tokens:
        numbers = state_value(token), token.value_before, token.logprob, token.log_ratio
        drawn.append(picture.Token(_drawable(token.text), *numbers))
    return drawn


def _drawable(text: str) -> str:
    """Spaces as they are, since the picture parts words by them; signs for all else that cannot be seen."""
    return _short("".join(piece.replace("·", " ") if is_sign else piece for piece, is_sign in visible(text)))


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _text(tokens: Sequence[Token]) -> str:
    whole = "".join(piece.replace("·", " ") if sign else piece for t in tokens for piece, sign in visible(t.text))
    return _short(whole.strip())


def _sum(numbers: Any) -> float | None:
    """The sum of those that are known, to be shown; None where there are none."""
    known = [number for number in numbers if number is not None]
    return round(sum(known), 4) if known else None


def _ends(before: Sequence[float | None], after: Sequence[float | None]) -> list[float | None]:
    """The value after the prompt and at the end."""
    ends = before[0] if before else None, after[-1] if after else None
    return [None if value is None else round(value, 4) for value in ends]
