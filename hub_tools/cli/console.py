"""What the `gpt2-value` command prints. Results go to stdout, all else to stderr; text of strangers is escaped."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import visible as visible_lines


def show(as_json: bool, value: dict[str, Any], text: str | None = None, *, next: Sequence[object] = ()) -> None:
    """Print a result: one JSON object, alone on stdout, for a script; else for people.

    Args:
        value: as JSON values, or what `str` writes.
        text: the same for people; by default its `facts`.
        next: the command to type next.
    """
    if as_json:
        print(json.dumps(value, indent=2, default=str))
        return
    print(visible_lines(facts(value) if text is None else text))
    if next:
        print(f"next: {visible(shlex.join(map(str, next)))}")


def facts(value: Mapping[str, Any]) -> str:
    """Write a record for people: a line for each entry that says something."""
    return "\n".join(f"  {name.replace('_', ' '):<24}  {_plain(fact)}" for name, fact in value.items() if fact)


def _plain(fact: Any) -> str:
    if isinstance(fact, dict):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in fact.items())
    if isinstance(fact, (list, tuple)):
        return ", ".join(map(_plain, fact))
    return f"{fact:,}" if type(fact) is int else visible(str(fact))


def responses_as_text(responses: Sequence[dict[str, Any]]) -> str:
    """Write each response, and a row for each of its tokens: log-probability, and value of the state before it."""
    lines = []
    for response in responses:
        shown = [visible(token["text"]).replace(" ", "·") for token in response["tokens"]]
        width = min(24, max(map(len, ["token", *shown])))
        lines += [visible(response["prompt"] + response["text"])]
        lines += [f"  {'token':<{width}}  {'log-prob':>8}  {'value':>8}"]
        for token, text in zip(response["tokens"], shown, strict=True):
            value = "-" if token["value"] is None else f"{token['value']:+.3f}"
            lines += [f"  {text:<{width}}  {token['logprob']:>8.3f}  {value:>8}"]
        lines += ["  stopped at --max-new-tokens\n" if response["truncated"] else ""]
    return "\n".join(lines)


def visible(text: str) -> str:
    """Return `text` as it may be printed on one line: what a terminal would obey is written as its escape."""
    return visible_lines(text).replace("\n", "\\n")
