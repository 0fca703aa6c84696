"""The figure of a PPO run: its curves, and what the model wrote before and after.

Imports matplotlib alone.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

BLUE = "#2a78b5"
PANELS = (
    ("reward", "mean reward"),
    ("kl", "KL to the reference, nats a response"),
    ("explained_variance", "explained variance of the values"),
    ("response_length", "tokens a response"),
    ("clip_fraction", "fraction of ratios that were clipped"),
)
WIDTH, LINES = 72, 5  # letters of a line of a sample, and lines at most


def draw_run(metrics: Sequence[dict[str, Any]], samples: Sequence[tuple[str, str]], file: Path) -> None:
    """Write a PNG: a panel for each curve; beside them, texts before and after training, in pairs."""
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    curves, words = figure.subfigures(1, 2, width_ratios=[1, 1.25])
    iterations = [line["iteration"] for line in metrics]
    for axes, (name, title) in zip(curves.subplots(len(PANELS), 1, sharex=True), PANELS, strict=True):
        axes.plot(iterations, [line[name] for line in metrics], color=BLUE)
        axes.set_title(title, fontsize=9, loc="left")
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=8)
    axes.set_xlabel("iteration", fontsize=9)
    page = words.subplots()
    page.axis("off")
    for number, pair in enumerate(samples):
        for row, (title, text) in enumerate(zip(("before", "after"), pair, strict=True)):
            top = 1 - (number + row / 2) / len(samples)
            page.text(0, top, title, weight="bold", fontsize=9, va="top", color=BLUE if row else "0.4")
            page.text(0.1, top, shortened(text), fontsize=9, va="top", family="monospace", parse_math=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def shortened(text: str) -> str:
    """The text in lines, cut off after the last that has room."""
    text = "".join(letter for letter in text if letter.isprintable() or letter.isspace())
    return "\n".join(textwrap.wrap(text, WIDTH, max_lines=LINES, placeholder=" …")) or "(nothing)"
