"""What happens when somebody clicks: each handler takes the page's fields, and returns what to show.

Imports gradio, and of these pages what it shows. A visitor's findings are in that visitor's own state; here is only
which visitors asked to stop.
"""

from __future__ import annotations

import base64
import html
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from sampler_audit import SamplerAudit
from sampling_gpt2_value import Sampling

from .audits import Draw, audit_rows, by_generate, by_rollout, drawn_rows, options_of
from .chips import view
from .desk import MAX_SEED, Desk, Found
from .exports import table, write_json, write_picture

EVERY = 0.1  # seconds between two looks at what is drawn
LONGEST_FILE = 1_000_000  # bytes of a file of texts
MOST_AUDITED = 100_000  # tokens
ALPHA = 1e-3
ROLLOUT, GENERATE = "rollout, by the claim", "generate(), with these options"
NOTHING = '<p class="gv gv-note">Draw something first, in the tab Sample.</p>'


class Handlers:
    """The handlers of a page for a desk."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._stops: dict[str, threading.Event] = {}
        self._global_draws = threading.Lock()  # `generate()` draws from torch's global generator
        self._files = tempfile.TemporaryDirectory(prefix="gpt2-value-app-")

    def sample(
        self,
        prompts: str,
        responses: float,
        max_new_tokens: float,
        min_new_tokens: float,
        temperature: float,
        top_k: float,
        top_p: float,
        seed: float | None,
        request: gr.Request,
    ) -> Iterator[tuple[str, Found | None]]:
        """What to show while responses are drawn, and at the end what was found."""
        visitor = str(request.session_hash)
        stop = self._stops[visitor] = threading.Event()
        shown = 0.0
        try:
            for found in self.desk.sample(
                [line for line in (prompts or "").splitlines() if line.strip()],
                responses=_whole("responses", responses),
                max_new_tokens=_whole("max_new_tokens", max_new_tokens),
                min_new_tokens=_whole("min_new_tokens", min_new_tokens),
                temperature=temperature,
                top_k=_whole("top_k", top_k),
                top_p=top_p,
                seed=None if seed is None else _whole("seed", seed),
                is_stopped=stop.is_set,
            ):
                if found.done:
                    yield _done(found), found
                elif time.monotonic() - shown > EVERY:
                    yield _so_far(found), None
                    shown = time.monotonic()
        except (TypeError, ValueError) as error:  # every argument is the visitor's
            yield _error(error), None
        finally:
            if self._stops.get(visitor) is stop:
                del self._stops[visitor]

    def stop(self, request: gr.Request) -> None:
        """Let this visitor's draw end with what it has."""
        stop = self._stops.get(str(request.session_hash))
        if stop is not None:
            stop.set()

    def read(self, text: str, file: str | None) -> str:
        """A visitor's own text, and the lines of a file."""
        try:
            return _done(self.desk.read([*([text] if text else []), *_lines(file)]))
        except (TypeError, ValueError, OSError) as error:
            return _error(error)

    def audit(
        self,
        prompts: str,
        tokens: float,
        sampler: str,
        options: str,
        temperature: float,
        top_k: float,
        top_p: float,
        min_new_tokens: float,
        score_padding: bool,
        seed: float | None,
    ) -> Iterator[str]:
        """How far the draws are, then what the audit of them found."""
        try:
            desk = self.desk
            claim = Sampling(
                temperature, _whole("top_k", top_k), top_p, _whole("min_new_tokens", min_new_tokens), desk.ends
            )
            wanted = _whole("tokens", tokens)
            if not 50 <= wanted <= MOST_AUDITED:
                raise ValueError(f"tokens={wanted}; expected 50 to {MOST_AUDITED:,}.")
            lines = [line for line in (prompts or "").splitlines() if line.strip()]
            start = desk.mine.model.config.bos_token_id
            queries = desk.encode(lines) if lines else [torch.tensor([start or 0])]
            generator = torch.Generator()
            if seed is None:
                generator.seed()
            else:
                generator.manual_seed(_whole("seed", seed) & MAX_SEED)
            draw = by_rollout(desk.mine.model, claim, generator)
            if sampler == GENERATE:
                draw = self._alone(by_generate(desk.mine.model, claim, options_of(options.split())), generator)
            yield _note("drawing")
            for rows in drawn_rows(queries, claim, draw, wanted):
                yield _note(f"{min(rows.tokens, wanted):,} of {wanted:,} tokens drawn")
            found = audit_rows(
                desk.mine.model, rows, claim, alpha=ALPHA, score_padding=score_padding, generator=generator
            )
            yield self._audited(found)
        except (TypeError, ValueError, AttributeError, KeyError, IndexError, RuntimeError) as error:
            yield _error(error)  # every argument is the visitor's, and `generate()` raises any of these for its own

    def _alone(self, draw: Draw, generator: torch.Generator) -> Draw:
        """The same draws, from a state of torch's global generator that nobody else sees."""

        def drawn(prompts: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            with self._global_draws, torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
                return draw(prompts, mask)

        return drawn

    def _audited(self, found: SamplerAudit) -> str:
        with tempfile.TemporaryDirectory(dir=self._files.name) as folder:
            found.plot(Path(folder, "audit.png"))
            picture = base64.b64encode(Path(folder, "audit.png").read_bytes()).decode()
        return _audit_said(found, picture)

    def compare(self, found: Found | None) -> tuple[Any, str]:
        """The table of what was found, and what it says."""
        if found is None:
            return None, NOTHING
        headers, rows = table(found)
        mine, other = found.names
        says = f"Responses drawn from {mine}"
        if other is not None:
            says += f" and scored by {other} too, over the same tokens"
        return {"headers": headers, "data": rows}, f'<p class="gv gv-note">{html.escape(says)}.</p>'

    def export_json(self, found: Found | None, request: gr.Request) -> str:
        return self._export(found, "responses.json", write_json, request)

    def export_picture(self, found: Found | None, request: gr.Request) -> str:
        return self._export(found, "responses.png", write_picture, request)

    def _export(self, found: Found | None, name: str, write: Callable[[Found, Path], None], request: gr.Request) -> str:
        if found is None:
            raise gr.Error("There is nothing to export yet: draw something first, in the tab Sample.")
        folder = Path(tempfile.mkdtemp(dir=self._files.name))
        write(found, folder / name)
        return str(folder / name)


def _so_far(found: Found) -> str:
    said = f"{found.drawn} tokens drawn; seed {found.settings['seed']}"
    return _note(said) + view(found.responses, names=found.names)


def _done(found: Found) -> str:
    told = ", ".join(f"{name}={value}" for name, value in found.settings.items())
    return _note(told) + view(found.responses, names=found.names)


def _audit_said(found: SamplerAudit, picture: str) -> str:
    """The verdict in words, the numbers, and the histogram (a PNG in base64)."""
    if found.honest:
        words = "These tokens pass for draws from the claimed distribution."
    elif found.impossible:
        words = f"{found.impossible:,} of these tokens cannot be drawn from the claimed distribution at all."
    else:
        words = f"These tokens are no draws from the claimed distribution: {' and '.join(found.failed)} tell."
    rows = [("p-value", f"{found.p_value:.3g}, dishonest below {found.alpha:g}"), ("tokens", f"{found.tokens:,}")]
    for name, test in found.tests.items():
        rows.append((name, f"p = {test.p_value:.3g}" if test.was_made else "too few tokens to test"))
    rows.append(("KL bias", f"{found.bias_nats:+.4f} ± {found.standard_error:.4f} nats per token"))
    facts = "".join(f"<span>{html.escape(name)}</span><span>{html.escape(fact)}</span>" for name, fact in rows)
    return (
        f'<div class="gv"><p role="status"><b>{found.verdict}</b>: {html.escape(words)}</p>'
        f'<div class="gv-facts-of">{facts}</div><img class="gv-histogram" src="data:image/png;base64,{picture}" '
        f'alt="Histogram of the transforms: flat if the sampler is honest"></div>'
    )


def _note(text: str) -> str:
    return f'<p class="gv gv-note" role="status">{html.escape(text)}</p>'


def _error(error: Exception) -> str:
    return f'<div class="gv"><p class="gv-error" role="alert">{html.escape(str(error))}</p></div>'


def _whole(name: str, number: float) -> int:
    """A field's number as an int; gradio hands over a float, or None of an empty field."""
    if number is None or int(number) != number:
        raise ValueError(f"{name}={number!r}; expected a whole number.")
    return int(number)


def _lines(file: str | None) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        ValueError: it is too large, or no text.
    """
    if file is None:
        return []
    size = Path(file).stat().st_size
    if size > LONGEST_FILE:
        raise ValueError(f"the file has {size:,} bytes; expected at most {LONGEST_FILE:,}.")
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"the file is no text in UTF-8: {error}") from error
    return [line for line in lines if line.strip()]
