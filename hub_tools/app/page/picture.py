"""Draw responses as boxes of tokens in reading order, in two columns with a colouring each, as a PNG.

Imports matplotlib and of these pages `palettes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch

from . import palettes
from .palettes import INK, UNLIKELY, Scale, ink_on

FAINT = "#6b7480"
FONT = FontProperties(family="DejaVu Sans", size=10)  # comes with matplotlib

# inches
WIDTH, MARGIN, GUTTER = 12.0, 0.35, 0.5
COLUMN = (WIDTH - 2 * MARGIN - GUTTER) / 2
TOP, LINE, BOX, BETWEEN, BOTTOM = 1.05, 0.29, 0.23, 0.34, 0.75
PADDING, SPACE = 0.035, 0.045  # inside a box, between words


@dataclass(frozen=True)
class Token:
    """One token of a prompt or a response."""

    text: str
    value: float | None = None  # of the state once the token stands; None without a value head
    value_before: float | None = None  # of the state that it was drawn in; None in a prompt
    logprob: float | None = None  # None in a prompt, which nobody drew
    log_ratio: float | None = None  # to a second model


@dataclass(frozen=True)
class Column:
    """One half of the picture: what its boxes are coloured by."""

    heading: str
    explanation: str  # beside the heading
    label: str  # of the colour bar, with the unit
    number: Callable[[Token], float | None]
    scale: Scale
    ticks: Sequence[float]
    extend: str  # matplotlib's: the ends of the scale beyond which numbers share a colour


BY_LOGPROB = Column(
    "Log-probability",
    "how likely the token was (the framed prompt was given)",
    f"log-probability in nats (at or below {UNLIKELY:g}: the darkest)",
    lambda token: token.logprob,
    palettes.by_logprob(),
    range(int(UNLIKELY), 1),
    "min",
)


def by_value(label: str, *, limit: float = 1.0) -> Column:
    """The column of values, from -limit to limit; `label` says what they are."""
    return Column(
        "Value",
        "the return that the model expects once the token stands",
        label,
        lambda token: token.value,
        palettes.by_value(limit),
        [share * limit for share in (-1, -0.5, 0, 0.5, 1)],
        "both",
    )


def by_log_ratio(other: str, *, limit: float) -> Column:
    """The column of log-ratios to a second model of this name."""
    return Column(
        "Log-ratio",
        f"red: likelier for {other}",
        f"log-probability less that of {other}, in nats",
        lambda token: token.log_ratio,
        palettes.by_log_ratio(limit),
        [share * limit for share in (-1, -0.5, 0, 0.5, 1)],
        "neither",
    )


@dataclass(frozen=True)
class _Box:
    """Where a token goes: inches from a column's left edge, line, and width."""

    token: Token
    shown: str
    left: float
    line: int
    width: float


def draw_responses(
    answers: Sequence[Sequence[Token]], file: Path, *, title: str, columns: tuple[Column, Column], dpi: int = 110
) -> None:
    """Write a PNG with a block for each answer: its tokens at the left and again at the right, coloured differently.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(WIDTH, 4), dpi=dpi, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    blocks = [list(_set_in_lines(tokens, canvas)) for tokens in answers]
    heights = [(1 + max((box.line for box in boxes), default=0)) * LINE for boxes in blocks]
    height = TOP + sum(heights) + BETWEEN * (len(blocks) - 1) + BOTTOM
    figure.set_size_inches(WIDTH, height)
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    page.axis("off")

    placed = tuple(zip((MARGIN, MARGIN + COLUMN + GUTTER), columns, strict=True))
    page.text(MARGIN, 0.33, title, size=14, weight="bold", color=INK, va="center", parse_math=False)
    for x, column in placed:
        name = page.text(x, 0.77, column.heading, size=11, weight="bold", color=INK, va="center")
        after = x + name.get_window_extent(canvas.get_renderer()).width / dpi + 0.1
        page.text(after, 0.77, column.explanation, size=10, color=FAINT, va="center", parse_math=False)

    top = TOP
    for boxes, block in zip(blocks, heights, strict=True):
        page.plot((MARGIN, WIDTH - MARGIN), (top - 0.14, top - 0.14), color="#d5dae0", linewidth=0.8)
        for box in boxes:
            for x, column in placed:
                number = column.number(box.token)
                colour = "#ffffff" if number is None else column.scale.colour(number)
                _draw_box(page, box, x, top + box.line * LINE, colour)
        top += block + BETWEEN

    for x, column in placed:
        bar = figure.add_axes((x / WIDTH, 0.47 / height, COLUMN / WIDTH, 0.11 / height))
        colours = Normalize(column.scale.low, column.scale.high), ListedColormap(column.scale.colours)
        figure.colorbar(ScalarMappable(*colours), cax=bar, orientation="horizontal", extend=column.extend)
        bar.set_xticks(column.ticks)
        bar.tick_params(labelsize=8, length=2, color=FAINT, labelcolor=INK, pad=1.5)
        bar.set_xlabel(column.label, fontsize=8.5, color=FAINT, labelpad=1.5, parse_math=False)
        for spine in bar.spines.values():
            spine.set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=dpi)


def value_colour(value: float) -> str:
    """`#rrggbb`: orange below zero, purple above, the strongest from -1 and 1 on."""
    return palettes.by_value().colour(value)


def logprob_colour(logprob: float) -> str:
    """`#rrggbb`: the darker the less likely."""
    return palettes.by_logprob().colour(logprob)


def _set_in_lines(tokens: Sequence[Token], canvas: FigureCanvasAgg) -> Iterator[_Box]:
    """Line by line, as a text is set: tokens of one word touch, and a word stays whole unless it is a line long."""
    words: list[list[tuple[Token, str, float]]] = []
    renderer = canvas.get_renderer()
    for token in tokens:
        shown = token.text.strip(" ").replace("\n", "⏎") or "·"
        width = renderer.get_text_width_height_descent(shown, FONT, False)[0] / renderer.dpi + 2 * PADDING
        if not words or token.text[:1].isspace() or token.text.startswith("<|"):
            words.append([])
        words[-1].append((token, shown, width))
    x, line = 0.0, 0
    for word in words:
        if x > 0 and x + sum(width for _, _, width in word) > COLUMN:
            x, line = 0.0, line + 1
        for token, shown, width in word:
            if x > 0 and x + width > COLUMN:
                x, line = 0.0, line + 1
            yield _Box(token, shown, x, line, width)
            x += width
        x += SPACE


def _draw_box(page: Axes, box: _Box, column: float, y: float, colour: str) -> None:
    given = box.token.logprob is None
    page.add_patch(
        FancyBboxPatch(
            (column + box.left + 0.006, y),
            box.width - 0.012,
            BOX,
            boxstyle="round,pad=0,rounding_size=0.035",
            facecolor=colour,
            edgecolor=FAINT if given else "none",
            linewidth=0.8,
        )
    )
    page.text(
        column + box.left + box.width / 2,
        y + BOX / 2,
        box.shown,
        fontproperties=FONT,
        color=ink_on(colour),
        ha="center",
        va="center_baseline",
        parse_math=False,
    )
