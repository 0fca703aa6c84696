"""Tokens as HTML: a chip for each, coloured, with all about it on hover and on keyboard focus; and values as lines.

Imports the standard library and `tokens`. A style sheet switches between the colourings, without a script. The colours
are ColorBrewer's PuOr, Blues, Greens and RdBu (https://colorbrewer2.org), which people with the common colour-vision
deficiencies can tell apart.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from .tokens import Token, visible

STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
# Whatever is in a token, a browser runs no script in a saved page and loads nothing into it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
DARK_INK, LIGHT_INK = "#1b1f24", "#ffffff"
UNLIKELY = -6.0  # one in four hundred; log-probabilities below it share a colour
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 150, 52, 12, 12, 34  # of the value lines, in units of the drawing


@dataclass(frozen=True)
class Colouring:
    """One way to colour tokens: numbers from `low` to `high` as colours, which are evenly spaced."""

    name: str  # in the style sheet
    title: str
    legend: str
    number: Callable[[Token], float | None]
    low: float
    high: float
    colours: str

    def colour(self, number: float) -> tuple[int, ...]:
        """Red, green and blue, interpolated between the two nearest colours."""
        colours = [bytes.fromhex(colour) for colour in self.colours.split()]
        place = min(1.0, max(0.0, (number - self.low) / (self.high - self.low))) * (len(colours) - 1)
        first = min(int(place), len(colours) - 2)
        pairs = zip(colours[first], colours[first + 1], strict=True)
        return tuple(round(a + (b - a) * (place - first)) for a, b in pairs)


def fragment(responses: Sequence[Sequence[Token]], name: str, other: str, *, drawn: bool) -> str:
    """HTML with its style: what to colour by, a legend, and for each response its chips and its values.

    Args:
        name, other: what to call the models.
        drawn: the tokens are draws of the first model, so that sums over them estimate a KL divergence.
    """
    by = _colourings([token for tokens in responses for token in tokens], other)
    group = f"gv-{uuid.uuid4().hex[:12]}"  # so that the radio buttons of two fragments are apart
    choices = "".join(
        f'<label><input type="radio" name="{group}" class="gv-by-{one.name}"{" checked" * (one is by[0])}> {one.title}'
        "</label>"
        for one in by
    )
    parts = [
        f'<style>{STYLE}</style><div class="gv"><fieldset class="gv-choices"><legend>Colour by</legend>{choices}'
        '<label class="gv-toggle"><input type="checkbox" class="gv-numbers"> numbers</label></fieldset>'
    ]
    parts += [_legend(one) for one in by]
    for number, tokens in enumerate(responses, 1):
        chips = "".join(_chip(token, by, name, other) for token in tokens)
        parts.append(
            f'<section class="gv-response" aria-label="Response {number}"><div class="gv-facts"><b>{number}</b> '
            f'{escape(_facts(tokens, other, drawn))}</div><div class="gv-tokens">{chips}</div>'
            f"{_value_lines(tokens, name, other)}</section>"
        )
    return "".join(parts) + "</div>"


def document(title: str, note: str, body: str) -> str:
    """A whole page around a fragment; `title` and `note` are plain text."""
    title = escape(visible(title, {" ": " "}))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title></head>\n<body class="gv-page">'
        f'<header class="gv"><h1>{title}</h1><p class="gv-facts">{escape(note)}</p></header>\n{body}\n</body></html>\n'
    )


def cut(text: str, longest: int) -> str:
    """`text` on one line, without its middle where it is longer than so many characters."""
    half = (longest - 3) // 2
    return visible(text if len(text) <= longest else f"{text[:half]}...{text[-half:]}", {" ": " "})


def _colourings(tokens: Sequence[Token], other: str) -> list[Colouring]:
    """The ways to colour these tokens that have something to show, on scales that hold all of them."""

    def largest(number: Callable[[Token], float | None]) -> float:
        found = [abs(one) for one in map(number, tokens) if one is not None and math.isfinite(one)]
        return max(found, default=0.0) or 1.0

    value, entropy, ratio = largest(_value), largest(_entropy), largest(_log_ratio)
    purple_orange = "b35806 f1a340 fee0b6 f7f7f7 d8daeb 998ec3 542788"
    red_blue = "b2182b ef8a62 fddbc7 f7f7f7 d1e5f0 67a9cf 2166ac"
    blues, greens = "08519c 3182bd 6baed6 bdd7e7 eff3ff", "f2faef bae4b3 74c476 31a354 006d2c"
    likely = "of the choice that the token was drawn from, in nats"
    found = [
        Colouring("value", "value", "return expected once the token stands", _value, -value, value, purple_orange),
        Colouring("logprob", "log-probability", "in nats; the darker the less likely", _logprob, UNLIKELY, 0.0, blues),
        Colouring("entropy", "entropy", f"{likely}; the darker the more open", _entropy, 0.0, entropy, greens),
        Colouring("ratio", "log-ratio", f"in nats; red: likelier to {other}", _log_ratio, -ratio, ratio, red_blue),
    ]
    return [one for one in found if any(one.number(token) is not None for token in tokens)]


def _value(token: Token) -> float | None:
    return token.after


def _logprob(token: Token) -> float | None:
    return token.logprob


def _entropy(token: Token) -> float | None:
    return token.entropy


def _log_ratio(token: Token) -> float | None:
    return token.log_ratio


def _legend(one: Colouring) -> str:
    colours = ", ".join(f"#{colour}" for colour in one.colours.split())
    low, high = (f"{end:+.2g}" if one.low < 0 < one.high else f"{end:.2g}" for end in (one.low, one.high))
    return (
        f'<div class="gv-legend gv-for-{one.name}"><span>{low}</span>'
        f'<span class="gv-bar" style="background:linear-gradient(to right, {colours})"></span><span>{high}</span> '
        f"<b>{one.title}</b> {escape(one.legend)}</div>"
    )


def _facts(tokens: Sequence[Token], other: str, drawn: bool) -> str:
    def total(numbers: Iterable[float | None]) -> float | None:
        found = [number for number in numbers if number is not None]
        return math.fsum(found) if found and all(map(math.isfinite, found)) else None

    facts = [f"{sum(token.drawn for token in tokens)} tokens"]
    if (logprob := total(token.logprob for token in tokens)) is not None:
        facts.append(f"log-probability {logprob:.2f} nats")
    if drawn and (ratio := total(token.log_ratio for token in tokens)) is not None:
        facts.append(f"KL to {other}: {ratio:.2f} nats by these draws")
        if (kl := total(token.kl for token in tokens)) is not None:
            facts.append(f"{kl:.2f} summed exactly")
    return ", ".join(facts)


def _chip(token: Token, by: Sequence[Colouring], name: str, other: str) -> str:
    style = []
    for one in by:
        number = one.number(token)
        if number is not None and math.isfinite(number):
            red, green, blue = one.colour(number)
            # relative luminance, as in WCAG 2: above this, dark ink has more contrast than white
            light = 0.2126 * (red / 255) ** 2.2 + 0.7152 * (green / 255) ** 2.2 + 0.0722 * (blue / 255) ** 2.2 > 0.208
            shown = f"{number:+.2f}" if one.low < 0 < one.high else f"{number:.2f}"
            style.append(f"--{one.name}:#{red:02x}{green:02x}{blue:02x};--{one.name}-number:'{shown}'")
            style.append(f"--{one.name}-ink:{DARK_INK if light else LIGHT_INK}")
    return (
        f'<span class="gv-chip{"" if token.drawn else " gv-given"}" tabindex="0" style="{";".join(style)}">'
        f"{_text(token.text)}{_card(token, name, other)}</span>{'<br>' * token.text.endswith(chr(10))}"
    )


def _text(text: str) -> str:
    return f'<bdi class="gv-text">{escape(visible(text)) or "(empty)"}</bdi>'


def _card(token: Token, name: str, other: str) -> str:
    """All about a token. It is `hidden` where the style sheet is missing."""
    chance = "" if token.logprob is None else f" ({math.exp(token.logprob):.2%})"
    rows = [
        ("log-probability", _nats(token.logprob) + chance),
        ("value before", _signed(token.before)),
        ("value after", _signed(token.after)),
        ("entropy", _nats(token.entropy)),
        ("rank", "" if token.rank is None else f"{token.rank:,}, of {token.choices:,} that could be drawn"),
        ("log-ratio", "" if token.log_ratio is None else f"{token.log_ratio:+.4f} nats"),
        (f"log-probability, {other}", _nats(token.their_logprob)),
        (f"value before, {other}", _signed(token.their_before)),
        (f"value after, {other}", _signed(token.their_after)),
        (f"KL to {other}", _nats(token.kl)),
    ]
    facts = "".join(f"<span>{escape(key)}</span><span>{fact}</span>" for key, fact in rows if fact)
    likeliest = "".join(
        f'<span class="gv-bar" style="--share:{probability:.4f}"></span>'
        f"<span>{f'{probability:.2%}' if probability else 'cut off'}</span>{_text(text)}"
        for text, probability in token.likeliest
    )
    what = f"<small>{token.id}, {escape(name) if token.drawn else 'given, not drawn'}</small>"
    return (
        f'<span class="gv-card" role="tooltip" hidden><span class="gv-head">{_text(token.text)} {what}'
        f'</span><span class="gv-table">{facts}</span><span class="gv-likeliest">{likeliest}</span></span>'
    )


def _nats(number: float | None) -> str:
    return "" if number is None else f"{number:.4f} nats"


def _signed(number: float | None) -> str:
    return "" if number is None else f"{number:+.4f}"


def _value_lines(tokens: Sequence[Token], name: str, other: str) -> str:
    """The values from the end of the prompt to the end of the response as lines, the second model's dashed."""
    drawn = [token for token in tokens if token.drawn]
    kinds = [
        ("gv-mine", name, [*(token.before for token in drawn), *(token.after for token in drawn[-1:])]),
        ("gv-theirs", other, [*(token.their_before for token in drawn), *(token.their_after for token in drawn[-1:])]),
    ]
    lines = {
        (kind, label): [(place, v) for place, v in enumerate(values) if v is not None and math.isfinite(v)]
        for kind, label, values in kinds
    }
    numbers = [value for points in lines.values() for _, value in points]
    if len(numbers) < 2:
        return ""
    limit = float(f"{max(map(abs, numbers)):.2g}") or 1.0

    def place_of(state: int, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * state / len(drawn)
        return f"{x:.1f},{TOP + (HEIGHT - TOP - BOTTOM) * (limit - value) / (2 * limit):.1f}"

    parts = [f'<text x="{LEFT}" y="{HEIGHT - 8}">after the prompt</text>']
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">after {len(drawn)} tokens</text>')
    for value in (limit, 0.0, -limit):
        y = float(place_of(0, value).split(",")[1])
        parts.append(f'<path class="gv-grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{f"{value:+g}" if value else "0"}</text>')
    keys, said = [], []
    for (kind, label), points in lines.items():
        if points:
            path = " ".join(place_of(*point) for point in points)
            parts.append(f'<polyline class="{kind}" points="{path}"/>')
            line = f'<svg class="gv-key" viewBox="0 0 28 8"><path class="{kind}" d="M0 4H28"/></svg>'
            keys.append(f"<span>{line} value, {escape(label)}</span>")
            said.append(f"{label}: from {points[0][1]:+.3f} to {points[-1][1]:+.3f}")
    return (
        f'<figure class="gv-lines"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape("Value along the response; " + "; ".join(said))}">{"".join(parts)}</svg>'
        f"<figcaption>{''.join(keys)}</figcaption></figure>"
    )
