"""Open the app on this machine: review code that nobody has read, load, and serve on the loopback address only.

Imports of hub_tools `errors` and `review`, and, inside the functions, gradio through `page`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import MissingLibraryError, NotAPackageError, SourceError
from .page.desk import Desk, Named
from .review import Source, Unread, ask, unread_code

HERE = "127.0.0.1"


def open_app(
    sources: Sequence[Source],
    load: Callable[[Source, Mapping[str, str]], Named],
    *,
    port: int | None = None,
    in_browser: bool = True,
    say: Callable[[str], None],
    **where: Any,
) -> Any:
    """Serve the app for a model, or for two, until it is interrupted; nothing is shared, and nothing is reported.

    Args:
        sources: the model, and where wanted the second one.
        load: loads a source, given the hashes of the code that a person has agreed to.
        port: the port; None takes the first that is free from 7860 on.
        in_browser: open a browser's window.
        say: told in words what is going on.
        where: more of gradio's `launch()`.

    Raises:
        MissingLibraryError: gradio is not installed.
        SourceError: two models that cannot be compared, or one without a tokenizer.
        And what `load` and `unread_code` raise.
    """
    require_gradio()
    from .page.app import build, launch

    place = {"server_name": HERE, "server_port": port, "inbrowser": in_browser, **where}
    unread = {source: found for source in sources if (found := _unread(source)) is not None}
    if unread:
        say("there is code that nobody has read yet: read it in the browser, and agree to it there")
        place["server_port"] = ask(list(unread.values()), **place)
        place["inbrowser"] = False  # the window that is open shows the app next
    labels = [source.label for source in sources]
    if len(set(labels)) < len(labels):
        labels = [source.name for source in sources]
    models = []
    for source, label in zip(sources, labels, strict=True):
        say(f"loading {source.name}")
        found = unread.get(source)
        loaded = load(source if found is None else found.source, {} if found is None else found.sha256)
        models.append(replace(loaded, name=label))
    try:
        desk = Desk(*models)
    except ValueError as error:
        raise SourceError(str(error), next_step="name another model, or leave --compare out") from error
    page = build(desk)
    launch(page, prevent_thread_lock=True, **place)
    say(f"http://{HERE}:{page.server_port}  (Ctrl-C ends it)")
    return page


def require_gradio() -> None:
    """
    Raises:
        MissingLibraryError: gradio is not installed.
    """
    if importlib.util.find_spec("gradio") is None:
        raise MissingLibraryError(
            "gradio is not installed, and the app stands on it",
            next_step="pip install 'gpt2-value[app]'",
        )


def _unread(source: Source) -> Unread | None:
    try:
        return unread_code(source)
    except NotAPackageError:  # a plain GPT-2 has no code
        return None
