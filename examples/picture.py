"""Draw responses as boxes of tokens in reading order, coloured by value and by log-probability.

Imports matplotlib only. Both colour maps can be read by the colour-blind: ColorBrewer's orange to purple around a white
zero, and its blues, which differ in lightness alone (https://colorbrewer2.org).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize, to_hex
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import FancyBboxPatch

INK, FAINT = "#1b1f24", "#6b7480"
FONT = FontProperties(family="DejaVu Sans", size=10)  # comes with matplotlib
UNLIKELY = -6.0  # one in four hundred; log-probabilities below it share a colour

# inches
WIDTH, MARGIN, GUTTER = 12.0, 0.35, 0.5
COLUMN = (WIDTH - 2 * MARGIN - GUTTER) / 2
TOP, LINE, BOX, BETWEEN, BOTTOM = 1.05, 0.29, 0.23, 0.34, 0.75
PADDING, SPACE = 0.035, 0.045  # inside a box, between words

# Without the maps' outermost colours: the darkest hardly differ from black, and a white box cannot be seen.
BY_VALUE = Normalize(-1, 1), ListedColormap(colormaps["PuOr"](range(16, 240)))
BY_LOGPROB = Normalize(UNLIKELY, 0), ListedColormap(colormaps["Blues_r"](range(16, 220)))


@dataclass(frozen=True)
class Token:
    """One token of a prompt or a response."""

    text: str
    value: float  # of the state once the token stands
    value_before: float | None = None  # of the state that it was drawn in; None in a prompt
    logprob: float | None = None  # None in a prompt, which nobody drew


@dataclass(frozen=True)
class _Box:
    """Where a token goes: inches from a column's left edge, line, and width."""

    token: Token
    shown: str
    left: float
    line: int
    width: float


def draw_responses(answers: Sequence[Sequence[Token]], file: Path, *, title: str, dpi: int = 110) -> None:
    """Write a PNG with a block for each answer: its tokens by value at the left, by log-probability at the right.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(WIDTH, 4), dpi=dpi, facecolor="white")
    canvas = FigureCanvasAgg(figure)
    blocks = [list(_set_in_lines(tokens, canvas)) for tokens in answers]
    heights = [(1 + max(box.line for box in boxes)) * LINE for boxes in blocks]
    height = TOP + sum(heights) + BETWEEN * (len(blocks) - 1) + BOTTOM
    figure.set_size_inches(WIDTH, height)
    page = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))
    page.axis("off")

    left, right = MARGIN, MARGIN + COLUMN + GUTTER
    page.text(MARGIN, 0.33, title, size=14, weight="bold", color=INK, va="center")
    for x, heading, what in (
        (left, "Value", "the return that the model expects once the token stands"),
        (right, "Log-probability", "how likely the token was (the framed prompt was given)"),
    ):
        name = page.text(x, 0.77, heading, size=11, weight="bold", color=INK, va="center")
        extent = name.get_window_extent(canvas.get_renderer())
        page.text(x + extent.width / dpi + 0.1, 0.77, what, size=10, color=FAINT, va="center")

    top = TOP
    for boxes, block in zip(blocks, heights, strict=True):
        page.plot((MARGIN, WIDTH - MARGIN), (top - 0.14, top - 0.14), color="#d5dae0", linewidth=0.8)
        for box in boxes:
            y = top + box.line * LINE
            _draw_box(page, box, left, y, value_colour(box.token.value))
            logprob = box.token.logprob
            _draw_box(page, box, right, y, "#ffffff" if logprob is None else logprob_colour(logprob))
        top += block + BETWEEN

    for x, colours, label in (
        (left, BY_VALUE, "value, in the judge's scores of finished texts: -1 complaint, 1 praise"),
        (right, BY_LOGPROB, f"log-probability in nats (at or below {UNLIKELY:g}: the darkest)"),
    ):
        bar = figure.add_axes((x / WIDTH, 0.47 / height, COLUMN / WIDTH, 0.11 / height))
        figure.colorbar(
            ScalarMappable(*colours), cax=bar, orientation="horizontal", extend="min" if x == right else "both"
        )
        bar.set_xticks((-1, -0.5, 0, 0.5, 1) if x == left else range(int(UNLIKELY), 1))
        bar.tick_params(labelsize=8, length=2, color=FAINT, labelcolor=INK, pad=1.5)
        bar.set_xlabel(label, fontsize=8.5, color=FAINT, labelpad=1.5)
        for spine in bar.spines.values():
            spine.set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=dpi)


def value_colour(value: float) -> str:
    """`#rrggbb`: orange below zero, purple above, the strongest from -1 and 1 on."""
    return _colour(value, *BY_VALUE)


def logprob_colour(logprob: float) -> str:
    """`#rrggbb`: the darker the less likely."""
    return _colour(logprob, *BY_LOGPROB)


def _colour(number: float, scale: Normalize, colours: Colormap) -> str:
    return to_hex(colours(float(scale(number))))


def ink_on(colour: str) -> str:
    """The colour of text, dark or white, that has more contrast on `#rrggbb` (by relative luminance, as in WCAG 2)."""
    red, green, blue = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return INK if luminance > 0.208 else "#ffffff"


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
