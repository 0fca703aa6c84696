"""What the `gpt2-value` command prints. Results go to stdout, all else to stderr; text of strangers is escaped."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import visible as visible_lines


def show(as_json: bool, value: dict[str, Any], text: str | None = None, *, made: Path | None = None) -> None:
    """Print a result: one JSON object, alone on stdout, for a script; else for people.

    Args:
        value: as JSON values, or what `str` writes.
        text: the same for people; by default its `facts`.
        made: the package that was written.
    """
    if as_json:
        print(json.dumps(value, indent=2, default=str))
        return
    print(visible_lines(facts(value) if text is None else text))
    if made is not None:
        print(f"next: {visible(shlex.join(['gpt2-value', 'verify', str(made)]))}")


def facts(value: Mapping[str, Any]) -> str:
    """Write a record for people: a line for each entry that says something."""
    lines = []
    for name, fact in value.items():
        if fact:
            shown = ", ".join(map(str, fact)) if isinstance(fact, (list, tuple)) else str(fact)
            lines += [f"  {name.replace('_', ' '):<24}  {visible(shown)}"]
    return "\n".join(lines)


def token_row(token: Mapping[str, Any]) -> str:
    """Write a drawn token, its log-probability, and the value of the state before it."""
    text = visible(token["text"]).replace(" ", "·")
    return f"  {text:<20}  {token['logprob']:>8.3f}  {token['value']:>+8.3f}"


def visible(text: str) -> str:
    """Return `text` as it may be printed on one line: what a terminal would obey is written as its escape."""
    return visible_lines(text).replace("\n", "\\n")
