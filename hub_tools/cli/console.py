"""What the `gpt2-value` command prints. Results go to stdout, all else to stderr; text of strangers is escaped.

Imports typer.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import typer

from ..errors import GPT2ValueHubError
from ..errors import visible as visible_lines

Row = tuple[str, object]


def working(what: str) -> None:
    """Say on a terminal what takes a while."""
    if sys.stderr.isatty():
        typer.secho(f"{visible(what)} ...", err=True, dim=True)


def show_json(value: Any) -> None:
    """Print a result for a script, alone on stdout."""
    print(json.dumps(value, indent=2))


def show_error(error: GPT2ValueHubError) -> None:
    """Print what was found, in red, then what was expected and what to do next."""
    typer.secho(f"error: {error.found}", err=True, fg="red")
    if error.expected:
        typer.echo(f"expected: {error.expected}", err=True)
    typer.echo(f"next: {error.next_step}", err=True)


def show(heading: str, rows: Iterable[Row] = (), *, lines: str = "", next: Sequence[object] = ()) -> None:
    """Print a heading, facts that have a value as a table, lines to copy, and the command to type next."""
    typer.secho(visible(heading), bold=True)
    for name, fact in rows:
        if fact:
            typer.echo(f"  {visible(name):<18}  {visible(str(fact))}")
    if lines:
        typer.secho(f"\n{visible_lines(lines)}", fg="cyan")
    if next:
        typer.echo(f"\nnext: {command(*next)}")


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


def versions(libraries: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in libraries.items())


def visible(text: str) -> str:
    """Return `text` as it may be printed on one line: what a terminal would obey is written as its escape."""
    return visible_lines(text).replace("\n", "\\n")


def command(*words: object) -> str:
    """Return a line to type into a shell, quoted whatever is in the words."""
    return visible(shlex.join(map(str, words)))
