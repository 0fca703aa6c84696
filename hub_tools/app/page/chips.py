"""Responses as HTML: a chip for each token, coloured, with all about it on hover and on keyboard focus.

Imports the standard library and of these pages `palettes`, `records` and `token_text`. There is no script: the page's
own style sheet (`page.css`) shows one colouring or another. All text is escaped. What is shown is rounded; the exact
numbers are attributes of the chips.
"""

from __future__ import annotations

import html
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import palettes
from .palettes import Scale, ink_on
from .records import Response, Token
from .token_text import visible
from .value_lines import value_lines

STYLE = Path(__file__).with_name("page.css")


@dataclass(frozen=True)
class Colouring:
    """One way to colour tokens."""

    name: str  # in the style sheet
    title: str
    legend: str  # what the ends of the scale mean, with the unit
    number: Callable[[Token], float | None]
    scale: Scale
    ends: tuple[str, str]  # the numbers at the ends of the scale


def colourings(responses: Sequence[Response], *, other: str | None = None) -> list[Colouring]:
    """The ways to colour these tokens that have something to show, on scales that hold all of them.

    Args:
        other: name of the second model, where there is one.
    """
    tokens = [token for response in responses for token in (*response.prompt, *response.tokens)]

    def limit(number: Callable[[Token], float | None]) -> float:
        return palettes.limit_of(found for found in map(number, tokens) if found is not None)

    value, entropy, ratio = limit(state_value), limit(_entropy), limit(_log_ratio)
    found = [
        Colouring(
            "value",
            "value",
            "return that the model expects once the token stands (before it, while tokens are drawn)",
            state_value,
            palettes.by_value(value),
            (f"-{value:g}", f"+{value:g}"),
        ),
        Colouring(
            "logprob",
            "log-probability",
            "nats, of the distribution that the token was drawn from; the darker the less likely",
            _logprob,
            palettes.by_logprob(),
            (f"{palettes.UNLIKELY:g} or less", "0"),
        ),
        Colouring(
            "entropy",
            "entropy",
            "nats, of the choice that the token was drawn from; the darker the more open",
            _entropy,
            palettes.by_entropy(entropy),
            ("0", f"{entropy:g}"),
        ),
        Colouring(
            "ratio",
            "log-ratio",
            f"nats, log-probability less that of {other}: red where {other} finds the token likelier",
            _log_ratio,
            palettes.by_log_ratio(ratio),
            (f"-{ratio:g}", f"+{ratio:g}"),
        ),
    ]
    return [colouring for colouring in found if any(_is_number(colouring.number(token)) for token in tokens)]


def view(responses: Sequence[Response], *, names: tuple[str, str | None] = ("the model", None)) -> str:
    """A fragment of HTML that shows responses: what to colour by, a legend, and for each its chips and its values.

    Args:
        names: of the model, and of the second one where there is one.
    """
    mine, other = names
    by = colourings(responses, other=other)
    group = f"gv-{uuid.uuid4().hex[:12]}"  # of this fragment's radio buttons
    choices = "".join(
        f'<label><input type="radio" name="{group}" class="gv-by-{one.name}" value="{one.name}"'
        f"{' checked' if place == 0 else ''}> {one.title}</label>"
        for place, one in enumerate(by)
    )
    parts = [
        '<div class="gv">',
        f'<fieldset class="gv-choices"><legend>Colour by</legend>{choices}'
        '<label class="gv-toggle"><input type="checkbox" class="gv-numbers"> numbers</label></fieldset>',
        *(_legend(one) for one in by),
    ]
    for number, response in enumerate(responses, 1):
        parts.append(_response(number, response, by, mine, other))
    parts.append("</div>")
    return "".join(parts)


def state_value(token: Token) -> float | None:
    """The value once the token stands or, while that is not known yet, before it."""
    return token.value_before if token.value_after is None else token.value_after


def _logprob(token: Token) -> float | None:
    return token.logprob


def _entropy(token: Token) -> float | None:
    return token.entropy


def _log_ratio(token: Token) -> float | None:
    return token.log_ratio


def _is_number(number: float | None) -> bool:
    return number is not None and math.isfinite(number)


def _legend(one: Colouring) -> str:
    colours = ", ".join(one.scale.colours[::8])
    low, high = one.ends
    return (
        f'<div class="gv-legend gv-for-{one.name}"><span class="gv-end">{low}</span>'
        f'<span class="gv-bar" style="background:linear-gradient(to right, {colours})"></span>'
        f'<span class="gv-end">{high}</span> <b>{one.title}</b>: {html.escape(one.legend)}</div>'
    )


def _response(number: int, response: Response, by: Sequence[Colouring], mine: str, other: str | None) -> str:
    chips = [_chip(token, by, mine, other, given=True) for token in response.prompt]
    chips += [_chip(token, by, mine, other, given=False) for token in response.tokens]
    facts = [f"{len(response.tokens)} tokens"]
    scored = [token.logprob for token in response.tokens if token.logprob is not None]
    if scored:
        facts.append(f"log-probability {sum(scored):.3f} nats")
    kls = [token.kl for token in response.tokens if token.kl is not None]
    ratios = [token.log_ratio for token in response.tokens if token.log_ratio is not None]
    if kls:
        facts.append(f"KL to {other}: {sum(ratios):.3f} nats by these draws, {sum(kls):.3f} exact")
    return (
        f'<section class="gv-response" aria-label="Response {number}"><div class="gv-facts"><b>{number}</b> '
        f'{html.escape(", ".join(facts))}</div><div class="gv-tokens">{"".join(chips)}</div>'
        f"{value_lines(response, (mine, other))}</section>"
    )


def _chip(token: Token, by: Sequence[Colouring], mine: str, other: str | None, *, given: bool) -> str:
    style = []
    for one in by:
        number = one.number(token)
        if number is not None and math.isfinite(number):
            colour = one.scale.colour(number)
            shown = f"{number:+.2f}" if one.name in ("value", "ratio") else f"{number:.2f}"
            style.append(f"--{one.name}:{colour};--{one.name}-ink:{ink_on(colour)};--{one.name}-number:'{shown}'")
    exact = {
        "id": token.id,
        "value": token.value_before,
        "value-after": token.value_after,
        "logprob": token.logprob,
        "entropy": token.entropy,
        "rank": token.rank,
        "log-ratio": token.log_ratio,
        "kl": token.kl,
        "other-logprob": token.other_logprob,
        "other-value": token.other_value_before,
    }
    data = "".join(f' data-{name}="{number!r}"' for name, number in exact.items() if number is not None)
    breaks = "<br>" if token.text.endswith("\n") else ""
    kind = "gv-chip gv-given" if given else "gv-chip"
    return (
        f'<span class="{kind}" tabindex="0"{data} style="{";".join(style)}">'
        f'<bdi class="gv-text">{_shown(token.text)}</bdi>{_card(token, mine, other, given=given)}</span>{breaks}'
    )


def _shown(text: str) -> str:
    """A token's text in HTML, with signs for what cannot be seen."""
    pieces = []
    for piece, is_sign in visible(text) or [("(empty)", True)]:
        pieces.append(f'<i class="gv-sign">{html.escape(piece)}</i>' if is_sign else html.escape(piece))
    return "".join(pieces)


def _card(token: Token, mine: str, other: str | None, *, given: bool) -> str:
    """All about a token, shown when it is pointed at or has the focus."""
    rows: list[tuple[str, str]] = [("id", str(token.id))]
    if token.logprob is not None:
        rows.append(("log-probability", f"{token.logprob:.4f} nats ({math.exp(token.logprob):.2%})"))
    if token.value_before is not None:
        rows.append(("value before", f"{token.value_before:+.4f}"))
    if token.value_after is not None:
        rows.append(("value after", f"{token.value_after:+.4f}"))
    if token.rank is not None:
        rows.append(("rank", f"{token.rank:,}"))
    if token.entropy is not None:
        rows.append(("entropy", f"{token.entropy:.4f} nats"))
    if token.kept is not None:
        rows.append(("kept set", f"{'in' if token.kept else 'not in'}, of {token.choices:,} tokens"))
    if token.other_logprob is not None and token.log_ratio is not None:
        rows.append(("log-ratio", f"{token.log_ratio:+.4f} nats"))
        rows.append((f"log-probability, {other}", f"{token.other_logprob:.4f} nats"))
    if token.kl is not None:
        rows.append((f"KL to {other}", f"{token.kl:.4f} nats"))
    for when, value in (("before", token.other_value_before), ("after", token.other_value_after)):
        if value is not None:
            rows.append((f"value {when}, {other}", f"{value:+.4f}"))
    facts = "".join(f"<span>{html.escape(name)}</span><span>{html.escape(fact)}</span>" for name, fact in rows)
    table = "".join(
        f'<span class="gv-bar" style="--share:{entry.probability:.4f}"></span>'
        f"<span>{f'{entry.probability:.2%}' if entry.probability else 'cut off'}</span>"
        f'<bdi class="gv-text">{_shown(entry.text)}</bdi>'
        for entry in token.likeliest
    )
    likeliest = f'<span class="gv-head">likeliest</span><span class="gv-likeliest">{table}</span>' if table else ""
    what = "given, not drawn" if given else html.escape(mine)
    return (
        f'<span class="gv-card" role="tooltip"><span class="gv-head"><bdi class="gv-text">{_shown(token.text)}</bdi> '
        f'<small>{what}</small></span><span class="gv-facts-of">{facts}</span>{likeliest}</span>'
    )
