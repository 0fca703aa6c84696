"""One page of HTML by itself: the chips of `chips`, without a server, a network or a script.

Imports the standard library and of these pages `chips` and `records`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from .chips import STYLE, view
from .records import Response

# Whatever is in a token, a browser runs no script in this page and loads nothing into it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
PAGE_STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 64rem; padding: 1.2rem; font: 15px/1.5 system-ui, sans-serif; background: #ffffff; }
h1 { font-size: 1.3rem; margin: 0; }
"""
# In the app gradio's class says that it is dark; here the system says it.
DARK = "@media (prefers-color-scheme: dark) { body { background: #12161b; } %s }"


def document(responses: Sequence[Response], *, title: str, facts: str, names: tuple[str, str | None]) -> str:
    """A whole page that shows responses.

    Args:
        title, facts: plain text, above them.
        names: of the model, and of the second one where there is one.
    """
    style = STYLE.read_text(encoding="utf-8")
    dark = [line.replace(".dark ", "") for line in style.splitlines() if line.startswith(".dark ")]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{PAGE_STYLE}{style}{DARK % ' '.join(dark)}</style></head>\n"
        f'<body><div class="gv"><h1>{html.escape(title)}</h1><p class="gv-note">{html.escape(facts)}</p></div>\n'
        f"{view(responses, names=names)}\n</body></html>\n"
    )
