"""See a model in the browser: draw responses, compare with a second model, look at texts of one's own.

What is shown comes from `gpt2_value.view`; the page is Gradio's. Only its owner can use it: it listens on the loopback
address, every address in it begins with a secret, and requests that name another host or come from another page are
refused, as are all routes that the page itself does not need. Imports torch, gradio and uvicorn inside the functions.
"""

from __future__ import annotations

import html
import importlib.util
import os
import secrets
import signal
import socket
import sys
import tempfile
import webbrowser
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import MissingLibraryError, OptionsError, SourceError

if TYPE_CHECKING:
    import torch

HERE = "127.0.0.1"
# Looked at before anything is tokenised or drawn.
MOST_CHARACTERS, MOST_LINES, MOST_ROWS, MOST_TOKENS = 4_000, 8, 16, 256
MOST_BYTES = 64_000  # of a request
MOST_WAITING = 8  # draws in the queue
EXAMPLE = "My most favourite movie is"
MAX_SEED = (1 << 63) - 1  # torch's
# All that the page asks for.
ROUTES = {
    "GET": ("/", "/config", "/theme.css", "/gradio_api/queue/data", "/gradio_api/startup-events"),
    "POST": ("/gradio_api/queue/join",),
}
FOLDERS = ("/assets/", "/static/", "/gradio_api/heartbeat/")
HEADERS = {
    "content-security-policy": "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
}


def listen(port: int) -> socket.socket:
    """Take a port of this machine, before anything is loaded.

    Raises:
        MissingLibraryError: gradio is not installed.
        OptionsError: another program has the port.
    """
    if importlib.util.find_spec("gradio") is None:
        raise MissingLibraryError("gradio is not installed, and the app needs it", next_step="pip install gradio")
    taken = socket.socket()
    taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just given up is free
    try:
        taken.bind((HERE, port))
        taken.listen()
    except OSError as error:
        taken.close()
        raise OptionsError(
            f"port {port} cannot be used: {error.strerror}",
            expected="a port that no other program has",
            next_step="name another: --port NUMBER, or 0 for any that is free",
        ) from error
    return taken


def serve(place: socket.socket, model: Any, tokenizer: Any, compare: Any, *, say: Callable[[str], None]) -> None:
    """Serve the page until it is interrupted.

    Args:
        place: from `listen`.
        model, compare: in evaluation mode; `compare` may be None.
        say: told the address, which holds the secret.

    Raises:
        SourceError: there is no tokenizer, or the models' vocabularies differ.
    """
    sizes = [one.config.vocab_size for one in (model, compare) if one is not None]
    if tokenizer is None or len(set(sizes)) > 1:
        found = "no tokenizer" if tokenizer is None else " and ".join(map(str, sizes)) + " tokens"
        raise SourceError(
            f"the models have {found}",
            expected="a model with its tokenizer, compared with one that has the same tokens",
            next_step="name another model, or leave --compare out",
        )
    for name in ("SIGTERM", "SIGHUP"):  # a closed terminal and `kill` end it as Ctrl-C does, with its private folder
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), lambda *_: sys.exit())
    with tempfile.TemporaryDirectory(prefix="gpt2-value-app-") as folder:
        # Gradio's files, and nobody else's to read
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False"}
        import gradio
        import uvicorn
        from fastapi import FastAPI

        token, port = secrets.token_urlsafe(24), place.getsockname()[1]
        inner = FastAPI()
        fonts: dict[str, Any] = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
        gradio.mount_gradio_app(
            inner,
            _page(Desk(model, tokenizer, compare)),
            f"/{token}",
            server_name=HERE,
            server_port=port,
            footer_links=[],
            run_history=False,
            ssr_mode=False,
            theme=gradio.themes.Default(**fonts),
        )
        address = f"http://{HERE}:{port}/{token}/"
        # The address is secret, and what a browser is started with is not: that is a file which only we can read.
        way_in = Path(folder, "open.html")
        way_in.write_text(f'<meta http-equiv="refresh" content="0; url={address}">', encoding="utf-8")
        say(address)
        webbrowser.open(way_in.as_uri())
        config = uvicorn.Config(
            Gate(inner, token, port),
            log_level="critical",
            ws="none",
            proxy_headers=False,
            timeout_graceful_shutdown=1,  # second for which the end waits for open pages
        )
        uvicorn.Server(config).run(sockets=[place])


class Gate:
    """ASGI middleware that lets only the owner's page in. Everything else gets 403, and reaches no other code.

    Args:
        token: what every path has to begin with.
        port: that the page is served on.
    """

    def __init__(self, app: Any, token: str, port: int) -> None:
        self._app, self._prefix = app, f"/{token}"
        self._hosts = {f"{name}:{port}" for name in (HERE, "localhost")}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from starlette.responses import PlainTextResponse

        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http" or not self._may_pass(scope):
            refusal = PlainTextResponse("This is not your page.\n", 403)
            await refusal(scope, receive, send)
        else:

            async def send_with_headers(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], *((k.encode(), v.encode()) for k, v in HEADERS.items())]
                await send(message)

            await self._app(scope, receive, send_with_headers)

    def _may_pass(self, scope: Any) -> bool:
        from starlette.datastructures import Headers

        headers, path, end = Headers(scope=scope), scope["path"], len(self._prefix)
        start, rest = path[:end].encode(errors="replace"), path[end:]
        length = headers.get("content-length", "0" if scope["method"] == "GET" else "")
        return (
            secrets.compare_digest(start, self._prefix.encode())
            and len(headers.getlist("host")) == 1
            and headers["host"] in self._hosts
            and all(origin in {f"http://{host}" for host in self._hosts} for origin in headers.getlist("origin"))
            and headers.get("sec-fetch-site", "none") in ("none", "same-origin")
            and (rest in ROUTES.get(scope["method"], ()) or (scope["method"] == "GET" and rest.startswith(FOLDERS)))
            and ".." not in rest
            and "transfer-encoding" not in headers  # h11 believes it before the length
            and length.isdecimal()
            and len(length) < 9
            and int(length) <= MOST_BYTES
        )


class Desk:
    """What the page does: each method takes its fields as a visitor sent them, and returns HTML."""

    def __init__(self, model: Any, tokenizer: Any, compare: Any) -> None:
        self.model, self.tokenizer, self.compare = model, tokenizer, compare

    def sample(
        self, prompts: Any, responses: Any, longest: Any, temperature: Any, top_k: Any, top_p: Any, seed: Any
    ) -> Iterator[str]:
        """Draw responses: yield what was drawn so far again and again, at the end with all about each token."""
        import torch

        from gpt2_value.view import show

        try:
            queries = self._encode(prompts, _whole("tokens at most", longest, 1, MOST_TOKENS))
            copies = _whole("responses to each", responses, 1, MOST_ROWS // len(queries))
            seed = secrets.randbelow(1 << 32) if seed is None else _whole("seed", seed, 0, MAX_SEED)
            drawn = 0
            while drawn < longest:
                # On a CPU a longer draw with the same seed begins with the same tokens.
                drawn = min(int(longest), drawn + max(1, drawn // 2))
                rollout = self.model.rollout(
                    queries,
                    max_new_tokens=drawn,
                    num_return_sequences=copies,
                    temperature=temperature,
                    top_k=_whole("top-k", top_k, 0, self.model.config.vocab_size),
                    top_p=top_p,
                    eos_token_id=self.tokenizer.eos_token_id,
                    generator=torch.Generator().manual_seed(seed),
                )
                yield show(rollout, self.tokenizer).html
                if not rollout.truncated.any():
                    break
            yield show(rollout, self.tokenizer, self.model, self.compare).html
        except (TypeError, ValueError) as error:
            yield _refusal(error)

    def read(self, texts: Any) -> str:
        """Show texts, one a line, as the model reads them after an end-of-text token."""
        from gpt2_value.view import show
        from sampler_audit import rollout_from_tokens

        try:
            queries, start = self._encode(texts, 1), [self.tokenizer.eos_token_id or 0]
            rollout = rollout_from_tokens([start] * len(queries), queries)
            return show(rollout, self.tokenizer, self.model, self.compare).html
        except (TypeError, ValueError) as error:
            return _refusal(error)

    def _encode(self, text: Any, more: int) -> list[torch.Tensor]:
        """Each line's token ids, `[P]`; ValueError where there are too many to leave room for `more`."""
        import torch

        from decoding_gpt2_value import check_tokens

        if (
            not isinstance(text, str)
            or not text.strip()
            or len(text) > MOST_CHARACTERS
            or text.count("\n") >= MOST_LINES
        ):
            raise ValueError(f"expected 1 to {MOST_LINES} lines, of {MOST_CHARACTERS:,} characters in all.")
        lines = [line for line in text.split("\n") if line.strip()]
        found = [torch.tensor(self.tokenizer(line)["input_ids"], dtype=torch.long) for line in lines]
        for ids in found:
            for model in (self.model, self.compare):
                if model is not None:
                    check_tokens(model, ids[None], torch.ones_like(ids)[None], more)
        return found


def _page(desk: Desk) -> Any:
    import gradio as gr

    title = Path(desk.model.name_or_path or "the model").name
    settings = {
        "Responses to each": 2,
        "Tokens at most": 32,
        "Temperature": 1.0,
        "Top-k (0: off)": 0,
        "Top-p (1: off)": 1.0,
        "Seed (empty: any)": None,
    }
    with gr.Blocks(title=f"gpt2-value: {title}", fill_width=True) as page:
        with gr.Tab("Draw"):
            with gr.Row(equal_height=True):
                prompts = gr.Textbox(EXAMPLE, label=f"Prompts for {title}, one a line", scale=5)
                draw = gr.Button("Draw", variant="primary", elem_id="draw", scale=0)
            with gr.Accordion("Settings", open=False), gr.Row():
                numbers = [gr.Number(value, label=label, min_width=110) for label, value in settings.items()]
            shown = gr.HTML(elem_id="responses", apply_default_css=False)
        with gr.Tab("Your texts"):
            with gr.Row(equal_height=True):
                texts = gr.Textbox(f"{EXAMPLE} this one.", label="Texts, one a line", lines=2, scale=5)
                read = gr.Button("Look", variant="primary", elem_id="read", scale=0)
            looked_at = gr.HTML(elem_id="texts", apply_default_css=False)
        hidden: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        gr.on([page.load, draw.click, prompts.submit], desk.sample, [prompts, *numbers], shown, **hidden)
        read.click(desk.read, texts, looked_at, **hidden)
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def _whole(name: str, value: Any, low: int, high: int) -> int:
    if not isinstance(value, (int, float)) or value != value // 1 or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected {low:,} to {high:,}.")
    return int(value)


def _refusal(error: Exception) -> str:
    return f'<p role="alert">{html.escape(str(error)[:500])}</p>'
