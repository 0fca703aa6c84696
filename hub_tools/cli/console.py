"""What the `gpt2-value` command prints. Results go to stdout, all else to stderr; text of strangers is escaped.

Imports typer.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import typer

from ..errors import GPT2ValueHubError
from ..errors import visible as visible_lines


def working(what: str) -> None:
    """Say on a terminal what takes a while."""
    if sys.stderr.isatty():
        typer.secho(f"{visible(what)} ...", err=True, dim=True)


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
    typer.echo(visible_lines(facts(value) if text is None else text))
    if next:
        typer.echo(f"next: {visible(shlex.join(map(str, next)))}")


def facts(value: Mapping[str, Any]) -> str:
    """Write a record for people: a line for each entry that says something."""
    return "\n".join(f"  {name.replace('_', ' '):<24}  {_plain(fact)}" for name, fact in value.items() if fact)


def _plain(fact: Any) -> str:
    if isinstance(fact, dict):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in fact.items())
    if isinstance(fact, (list, tuple)):
        return ", ".join(map(_plain, fact))
    return f"{fact:,}" if type(fact) is int else visible(str(fact))


def show_error(error: GPT2ValueHubError) -> None:
    """Print what was found, in red, then what was expected and what to do next."""
    typer.secho(f"error: {error.found}", err=True, fg="red")
    if error.expected:
        typer.echo(f"expected: {error.expected}", err=True)
    typer.echo(f"next: {error.next_step}", err=True)


def show_responses(responses: Sequence[dict[str, Any]]) -> None:
    """Print each response, and a row for each of its tokens: log-probability, and value of the state before it."""
    for response in responses:
        typer.secho(visible(response["prompt"]), bold=True, nl=False)
        typer.echo(visible(response["text"]))
        shown = [visible(token["text"]).replace(" ", "·") for token in response["tokens"]]
        width = min(24, max(map(len, ["token", *shown])))
        typer.secho(f"  {'token':<{width}}  {'log-prob':>8}  {'value':>8}", dim=True)
        for token, text in zip(response["tokens"], shown, strict=True):
            value = "-" if token["value"] is None else f"{token['value']:+.3f}"
            typer.echo(f"  {text:<{width}}  {token['logprob']:>8.3f}  {value:>8}")
        if response["truncated"]:
            typer.secho("  stopped at --max-new-tokens", dim=True)
        typer.echo()


def visible(text: str) -> str:
    """Return `text` as it may be printed on one line: what a terminal would obey is written as its escape."""
    return visible_lines(text).replace("\n", "\\n")
