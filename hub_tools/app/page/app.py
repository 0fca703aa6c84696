"""The app as it looks in a browser: a page on Gradio, thin over `desk`.

Imports gradio, and of these pages what it shows. Every visitor's findings are in that visitor's own state.
"""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from .chips import STYLE
from .desk import MOST_ROWS, Desk
from .handlers import GENERATE, MOST_AUDITED, NOTHING, ROLLOUT, Handlers

AT_A_TIME = 4  # visitors who are served at once; others wait in line
# Fonts of the visitor's own system: the default theme asks a server on the internet for others.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
WAITING = '<p class="gv gv-note">Nothing yet.</p>'


def build(desk: Desk) -> gr.Blocks:
    """The whole page for a desk."""
    pages = Handlers(desk)
    mine, other = desk.names
    with gr.Blocks(title=f"gpt2-value: {mine}", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(_head(desk))
        found = gr.State(None)
        with gr.Tab("Sample"):
            _sample_tab(pages, desk, found)
        with gr.Tab("Compare" if other else "Table"):
            _compare_tab(pages, found)
        with gr.Tab("Audit"):
            _audit_tab(pages)
        with gr.Tab("Your texts"):
            _texts_tab(pages)
    page.queue(default_concurrency_limit=AT_A_TIME)
    return page


def launch(page: gr.Blocks, **where: Any) -> Any:
    """Serve the page, without sharing it; `where` is gradio's (`server_name`, `server_port`, ...)."""
    style = STYLE.read_text(encoding="utf-8")
    theme = gr.themes.Default(**FONTS)  # type: ignore[arg-type]  # gradio takes names of fonts too
    return page.launch(share=False, theme=theme, head=f"<style>{style}</style>", quiet=True, **where)


def _sample_tab(pages: Handlers, desk: Desk, found: gr.State) -> None:
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


def _compare_tab(pages: Handlers, found: gr.State) -> None:
    says = gr.HTML(NOTHING, elem_id="says")
    rows = gr.Dataframe(
        interactive=False, wrap=True, elem_id="table", label="All responses; the menu (⋮) of a heading sorts"
    )
    with gr.Row():
        as_json = gr.Button("Export JSON", elem_id="export-json")
        as_picture = gr.Button("Export PNG", elem_id="export-png")
        file = gr.File(label="The file", interactive=False, height=90, elem_id="file")
    found.change(pages.compare, found, [rows, says], api_name="compare")
    as_json.click(pages.export_json, found, file, api_name="export_json")
    as_picture.click(pages.export_picture, found, file, api_name="export_picture")


def _audit_tab(pages: Handlers) -> None:
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            prompts = gr.Textbox(label="Prompts, one a line; none: the start of a text", lines=2)
            with gr.Row():
                tokens = gr.Number(4000, label="Tokens to draw", precision=0, minimum=50, maximum=MOST_AUDITED)
                seed = gr.Number(None, label="Seed", precision=0, minimum=0)
            sampler = gr.Radio([ROLLOUT, GENERATE], value=ROLLOUT, label="Draw with")
            options = gr.Textbox(label="Options of generate(), as in top_k=0 max_new_tokens=20")
            gr.HTML('<p class="gv gv-note">The claim, by which the tokens would be scored:</p>')
            with gr.Row():
                temperature = gr.Number(1.0, label="Temperature")
                top_k = gr.Number(0, label="Top-k (0 is off)", precision=0, minimum=0)
                top_p = gr.Number(1.0, label="Top-p (1 is off)")
                shortest = gr.Number(0, label="Tokens at least", precision=0, minimum=0)
            padding = gr.Checkbox(False, label="What follows a first end-of-text was drawn too")
            run = gr.Button("Audit", variant="primary", elem_id="audit")
        with gr.Column(scale=3, min_width=320):
            shown = gr.HTML(WAITING, elem_id="audited")
    claim = [temperature, top_k, top_p, shortest, padding]
    run.click(pages.audit, [prompts, tokens, sampler, options, *claim, seed], shown, api_name="audit")


def _texts_tab(pages: Handlers) -> None:
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
