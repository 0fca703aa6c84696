"""The value along a response as a line, one for each model, in SVG.

Imports the standard library and of these pages `palettes` and `records`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from .palettes import limit_of
from .records import Response

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 150, 52, 12, 12, 34  # units of the drawing


def value_lines(response: Response, names: tuple[str, str | None]) -> str:
    """The values of the states between the tokens of a response, as an `<svg>`; empty where there are fewer than two.

    The first state is the end of the prompt, the last the end of the response. The second model's line is dashed.
    """
    mine = _states([token.value_before for token in response.tokens], [t.value_after for t in response.tokens])
    theirs = _states(
        [token.other_value_before for token in response.tokens], [t.other_value_after for t in response.tokens]
    )
    numbers = [number for number in (*mine, *theirs) if number is not None and math.isfinite(number)]
    if len(mine) < 2 or not numbers:
        return ""
    limit, states = limit_of(numbers), len(mine)

    def x(state: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * state / (states - 1)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (limit - value) / (2 * limit)

    def path(values: Sequence[float | None]) -> str:
        points = [
            f"{x(state):.1f},{y(value):.1f}"
            for state, value in enumerate(values)
            if value is not None and math.isfinite(value)
        ]
        return " ".join(points)

    parts = []
    for value in (limit, 0.0, -limit):
        parts.append(
            f'<line class="gv-grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{f"{value:+g}" if value else "0"}</text>'
        )
    named = []
    for kind, name, values in (("gv-mine", names[0], mine), ("gv-theirs", names[1], theirs)):
        if any(value is not None for value in values):
            parts.append(f'<polyline class="{kind}" points="{path(values)}"/>')
            named.append((kind, name or "", values))
    bottom = HEIGHT - 8
    parts.append(f'<text x="{LEFT}" y="{bottom}">prompt</text>')
    end = f"after {states - 1} tokens"
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{bottom}" text-anchor="end">{end}</text>')
    shown = " and ".join(
        f"{name}: {values[0]:+.3f} after the prompt, {values[-1]:+.3f} at the end"
        for _, name, values in named
        if values[0] is not None and values[-1] is not None
    )
    label = html.escape(f"Value along the response; {shown}")
    keys = "".join(
        f'<span><svg class="gv-key" viewBox="0 0 28 8" aria-hidden="true"><polyline class="{kind}" points="0,4 28,4"/>'
        f"</svg> value, {html.escape(name)}</span>"
        for kind, name, _ in named
    )
    return (
        f'<figure class="gv-lines"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg><figcaption>{keys}</figcaption></figure>"
    )


def _states(before: Sequence[float | None], after: Sequence[float | None]) -> list[float | None]:
    return [*before, *after[-1:]]
