"""A rollout as HTML: in a notebook, as a page without a server, and in the app. No script, and nothing is loaded.

`tokens` says what there is to know about each token, `html` how it looks (with `style.css`). Imports the standard
library, torch and the remote code.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from .html import cut, document, fragment
from .tokens import TokenTexts, read, visible

if TYPE_CHECKING:
    from generation_gpt2_value import Rollout

__all__ = ["Page", "TokenTexts", "labels", "show", "visible"]


class Page:
    """What `show` returns. A notebook shows it by itself; `save` writes it as a file for a browser.

    Attributes:
        html: a fragment with its style, to put into another page.
    """

    def __init__(self, title: str, note: str, html: str) -> None:
        self.title, self.note, self.html = title, note, html

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one file that any browser shows, without a server or a network; return its path."""
        page = document(self.title, self.note, self.html)
        Path(path).write_text(page, encoding="utf-8", errors="backslashreplace")
        return Path(path)

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f'<Page "{cut(self.title, 200)}"; .save("page.html") writes it>'


def show(rollout: Rollout, tokenizer: Any, model: Any = None, compare: Any = None) -> Page:
    """Show each token of a rollout, coloured by value, log-probability, entropy or log-ratio; its numbers on hover.

    Args:
        rollout: a `Rollout`; for texts that nobody drew, `rollout_from_tokens([[eos]] * B, texts)`.
        tokenizer: for the tokens' texts.
        model: scores the tokens again: all numbers are its own, with entropies, ranks and the likeliest alternatives.
            Without it, the numbers are those in the rollout.
        compare: a second model with the same vocabulary, whose log-probabilities and values stand beside these.

    Raises:
        TypeError, ValueError: the tokens or the settings do not fit a model, or the two vocabularies differ.
    """
    if type(rollout).__name__ != "Rollout":  # by name: a package's own class is another one
        raise TypeError(f"show() got a {type(rollout).__name__}; expected a Rollout, as in show(rollout, tokenizer).")
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        raise TypeError(f"show() got a {type(tokenizer).__name__} as tokenizer; expected a tokenizer of transformers.")
    name, other = labels(_name(model, "the model"), _name(compare, "the other model"))
    responses = read(rollout, tokenizer, model, compare)
    drawn = rollout.logprobs is not None
    settings = ", ".join(f"{key}={value}" for key, value in dataclasses.asdict(rollout.sampling).items())
    title = f"{'Responses of' if drawn else 'Texts read by'} {name}" + (f", compared with {other}" if compare else "")
    note = f"Drawn with {settings}." if drawn else "Nobody drew these tokens; each is scored after those before it."
    return Page(title, note, fragment(responses, name, other, drawn=drawn))


def labels(first: str, second: str) -> tuple[str, str]:
    """Short names of two models: the last part of a path, its folder before it or a letter where these are equal."""
    for parts in (1, 2):
        short = [cut("/".join(PurePath(name).parts[-parts:]) or name, 32) for name in (first, second)]
        if short[0] != short[1]:
            return short[0], short[1]
    return cut(PurePath(first).name, 28) + " (A)", cut(PurePath(second).name, 28) + " (B)"


def _name(model: Any, default: str) -> str:
    return str(getattr(model, "name_or_path", "") or default)
