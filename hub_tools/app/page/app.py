"""The app as it looks in a browser: a page on Gradio, thin over `desk`.

Imports gradio, and of these pages what it shows. Every visitor's findings are in that visitor's own state.
"""

from __future__ import annotations

import html
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from .chips import STYLE, view
from .desk import MOST_ROWS, Desk, Found
from .exports import table, write_json, write_picture

EVERY = 0.1  # seconds between two looks at what is drawn
AT_A_TIME = 4  # visitors who are served at once; others wait in line
LONGEST_FILE = 1_000_000  # bytes of a file of texts
# Fonts of the visitor's own system: the default theme asks a server on the internet for others.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
WAITING = '<p class="gv gv-note">Nothing yet.</p>'


def build(desk: Desk) -> gr.Blocks:
    """The whole page for a desk."""
    pages = _Pages(desk)
    mine, other = desk.names
    with gr.Blocks(title=f"gpt2-value: {mine}", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(_head(desk))
        found = gr.State(None)
        with gr.Tab("Sample"):
            _sample_tab(pages, desk, found)
        with gr.Tab("Compare" if other else "Table"):
            _compare_tab(pages, found)
        with gr.Tab("Your texts"):
            _texts_tab(pages)
    page.queue(default_concurrency_limit=AT_A_TIME)
    return page


def launch(page: gr.Blocks, **where: Any) -> Any:
    """Serve the page, without sharing it; `where` is gradio's (`server_name`, `server_port`, ...)."""
    style = STYLE.read_text(encoding="utf-8")
    theme = gr.themes.Default(**FONTS)  # type: ignore[arg-type]  # gradio takes names of fonts too
    return page.launch(share=False, theme=theme, head=f"<style>{style}</style>", quiet=True, **where)


class _Pages:
    """The handlers, and which visitors asked to stop."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self._stops: dict[str, threading.Event] = {}
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

    def compare(self, found: Found | None) -> tuple[Any, str]:
        """The table of what was found, and what it says."""
        if found is None:
            return gr.update(value=[[]]), '<p class="gv gv-note">Draw something first, in the tab Sample.</p>'
        headers, rows = table(found)
        mine, other = found.names
        says = f"Responses drawn from {mine}"
        if other is not None:
            says += f" and scored by {other} too, over the same tokens"
        return gr.update(value=rows, headers=headers), f'<p class="gv gv-note">{html.escape(says)}.</p>'

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


def _sample_tab(pages: _Pages, desk: Desk, found: gr.State) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            prompts = gr.Textbox(label="Prompts, one a line", lines=3, value="My most favourite movie is")
            with gr.Row():
                responses = gr.Number(1, label="Responses to each", precision=0, minimum=1, maximum=MOST_ROWS)
                seed = gr.Number(None, label="Seed, for the same draw again", precision=0, minimum=0)
            with gr.Row():
                longest = gr.Number(20, label="Tokens at most", precision=0, minimum=1, maximum=desk.positions - 1)
                shortest = gr.Number(0, label="Tokens at least", precision=0, minimum=0, maximum=desk.positions - 1)
            with gr.Row():
                temperature = gr.Number(1.0, label="Temperature")
                top_k = gr.Number(0, label="Top-k (0 is off)", precision=0, minimum=0)
                top_p = gr.Number(1.0, label="Top-p (1 is off)")
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                stop = gr.Button("Stop", elem_id="stop")
        with gr.Column(scale=3, min_width=320):
            shown = gr.HTML(WAITING, elem_id="responses")
    settings = [prompts, responses, longest, shortest, temperature, top_k, top_p, seed]
    draw.click(pages.sample, settings, [shown, found], api_name="sample", show_progress="minimal")
    stop.click(pages.stop, None, None, api_name="stop", queue=False)


def _compare_tab(pages: _Pages, found: gr.State) -> None:
    says = gr.HTML('<p class="gv gv-note">Draw something first, in the tab Sample.</p>', elem_id="says")
    rows = gr.Dataframe(
        interactive=False, wrap=True, elem_id="table", label="All responses; a click on a heading sorts"
    )
    with gr.Row():
        as_json = gr.Button("Export JSON", elem_id="export-json")
        as_picture = gr.Button("Export PNG", elem_id="export-png")
        file = gr.File(label="The file", interactive=False, elem_id="file")
    found.change(pages.compare, found, [rows, says], api_name="compare")
    as_json.click(pages.export_json, found, file, api_name="export_json")
    as_picture.click(pages.export_picture, found, file, api_name="export_picture")


def _texts_tab(pages: _Pages) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            text = gr.Textbox(label="A text", lines=6)
            file = gr.File(label="And a file of texts, one a line", type="filepath", file_types=["text"])
            read = gr.Button("Read", variant="primary", elem_id="read")
        with gr.Column(scale=3, min_width=320):
            shown = gr.HTML(WAITING, elem_id="texts")
    read.click(pages.read, [text, file], shown, api_name="read")


def _head(desk: Desk) -> str:
    models = [desk.mine] if desk.other is None else [desk.mine, desk.other]
    named = " compared with ".join(f"<b>{html.escape(model.name)}</b>" for model in models)
    about = "; ".join(html.escape(f"{model.name}: {model.about}") for model in models if model.about)
    return f'<div class="gv"><h2>{named}</h2><p class="gv-note">{about} {html.escape(desk.bounds)}</p></div>'


def _so_far(found: Found) -> str:
    said = f"{found.drawn} tokens drawn; seed {found.settings['seed']}"
    return f'<p class="gv gv-note" role="status">{said}</p>{view(found.responses, names=found.names)}'


def _done(found: Found) -> str:
    told = ", ".join(f"{name}={value}" for name, value in found.settings.items())
    return f'<p class="gv gv-note" role="status">{html.escape(told)}</p>{view(found.responses, names=found.names)}'


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
