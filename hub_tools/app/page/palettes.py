"""Colours for numbers, and the ink that can be read on them.

Imports the standard library. The colours are ColorBrewer's PuOr, RdBu, Blues and Greens (https://colorbrewer2.org),
which people with any of the common colour-vision deficiencies can tell apart. The outermost of each are left out: the
darkest hardly differ from black, and the lightest from the page.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

INK = "#1b1f24"
UNLIKELY = -6.0  # one in four hundred; log-probabilities below it share a colour

_ROUND = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10, 12)  # times a power of ten
_PUOR = "7f3b08 b35806 e08214 fdb863 fee0b6 f7f7f7 d8daeb b2abd2 8073ac 542788 2d004b"
_RDBU = "67001f b2182b d6604d f4a582 fddbc7 f7f7f7 d1e5f0 92c5de 4393c3 2166ac 053061"
_BLUES = "08306b 08519c 2171b5 4292c6 6baed6 9ecae1 c6dbef deebf7 f7fbff"
_GREENS = "f7fcf5 e5f5e0 c7e9c0 a1d99b 74c476 41ab5d 238b45 006d2c 00441b"


@dataclass(frozen=True)
class Scale:
    """Numbers from `low` to `high` as colours; what is beyond has the outermost colour."""

    low: float
    high: float
    colours: tuple[str, ...]  # "#rrggbb", evenly spaced

    def colour(self, number: float) -> str:
        """`#rrggbb` of a finite number, interpolated between the two nearest colours."""
        place = (number - self.low) / (self.high - self.low)
        place = min(1.0, max(0.0, place)) * (len(self.colours) - 1)
        first = min(int(place), len(self.colours) - 2)
        return _mixed(self.colours[first], self.colours[first + 1], place - first)


def by_value(limit: float = 1.0) -> Scale:
    """Orange below zero, purple above, the strongest from -limit and limit on."""
    return Scale(-limit, limit, _PURPLE_AND_ORANGE)


def by_logprob() -> Scale:
    """Blue, the darker the less likely."""
    return Scale(UNLIKELY, 0.0, _BLUE)


def by_entropy(limit: float) -> Scale:
    """Green, the darker the more open the choice was."""
    return Scale(0.0, limit, _GREEN)


def by_log_ratio(limit: float) -> Scale:
    """Red where the second model finds a token likelier, blue where the first does."""
    return Scale(-limit, limit, _RED_AND_BLUE)


def limit_of(numbers: Iterable[float]) -> float:
    """A round number that none of the numbers exceeds in size, and by little; 1 if all are 0."""
    largest = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0)
    if largest == 0.0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return float(next(f"{factor * power:.2g}" for factor in _ROUND if factor * power >= largest))


def ink_on(colour: str) -> str:
    """The colour of text, dark or white, that has more contrast on `#rrggbb` (by relative luminance, as in WCAG 2)."""
    red, green, blue = (part / 255 for part in _parts(colour))
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return INK if luminance > 0.208 else "#ffffff"


def _parts(colour: str) -> tuple[int, int, int]:
    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    return red, green, blue


def _mixed(colour: str, other: str, share: float) -> str:
    parts = zip(_parts(colour), _parts(other), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in parts)


def _between(colours: str, low: float, high: float) -> tuple[str, ...]:
    """65 colours of a palette, from the share `low` of it to `high`."""
    whole = Scale(0.0, 1.0, tuple(f"#{colour}" for colour in colours.split()))
    return tuple(whole.colour(low + (high - low) * step / 64) for step in range(65))


_PURPLE_AND_ORANGE = _between(_PUOR, 1 / 16, 15 / 16)
_RED_AND_BLUE = _between(_RDBU, 1 / 16, 15 / 16)
_BLUE = _between(_BLUES, 1 / 16, 7 / 8)
_GREEN = _between(_GREENS, 1 / 8, 15 / 16)
