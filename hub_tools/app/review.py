"""Code that nobody has read yet: which files, how they differ, and a page on which a person agrees to run them.

Imports the standard library, of hub_tools `inspection` and `releases`, and, inside the functions that need them, gradio
and the page's style. The page holds no model and runs nothing of the package.
"""

from __future__ import annotations

import difflib
import hashlib
import html
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import layout
from ..errors import PackageChangedError, visible
from ..package.reading.inspection import inspect_package
from ..package.releases import releases

AGREE = "I have read this code: run it"


@dataclass(frozen=True)
class Source:
    """A package or a plain GPT-2: a folder, or a repository on the Hub with a branch, tag or commit."""

    name: str
    revision: str | None = None

    @property
    def label(self) -> str:
        """What to call it: a folder's last part, or the id."""
        return Path(self.name).resolve().name if Path(self.name).is_dir() else self.name


@dataclass(frozen=True)
class UnreadFile:
    """A file of code that is no released version's."""

    name: str
    sha256: str
    difference: str  # from the installed file of this name, or the whole file where there is none


@dataclass(frozen=True)
class Unread:
    """A package's files that somebody has to read before they run, and what they are then agreed to by."""

    source: Source  # at a commit, where it is on the Hub: what was read is what is loaded
    files: tuple[UnreadFile, ...]

    @property
    def sha256(self) -> dict[str, str]:
        """What `load_package` takes as `reviewed_sha256`."""
        return {file.name: file.sha256 for file in self.files}


def unread_code(source: Source) -> Unread | None:
    """The package's code that is no released version's; None where all of it is known, and nothing needs reading.

    Raises:
        PackageChangedError: a file was written to while this looked at it.
        And everything that `inspect_package` raises.
    """
    package = inspect_package(source.name, revision=source.revision)
    code, installed = package.code_sha256, layout.written_hashes()
    if any(release.is_in(code) for release in releases()):
        return None
    files = []
    for name, digest in code.items():
        if digest != installed.get(name):
            data = (package.folder / name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise PackageChangedError(
                    f"{name} changed in {package.folder} while it was read; nothing of it was run",
                    next_step="run the same again once nothing writes to the folder",
                )
            files.append(UnreadFile(name, digest, _difference(name, data.decode("utf-8", errors="backslashreplace"))))
    return Unread(Source(source.name, package.commit), tuple(files)) if files else None


def review_page(unread: Sequence[Unread]) -> str:
    """The files, with their hashes and differences, as HTML; all of it escaped."""
    parts = ['<div class="gv"><h2>This code was not run</h2><p>It is no released version\'s. Read it first: once you ']
    parts.append("agree, it runs with your rights on this machine, and only as the very bytes shown here.</p>")
    for package in unread:
        at = f" at {package.source.revision}" if package.source.revision else ""
        parts.append(f"<h3>{html.escape(visible(package.source.name + at))}</h3>")
        for file in package.files:
            parts.append(f"<h4>{html.escape(visible(file.name))}</h4><p>sha256 <code>{file.sha256}</code></p>")
            parts.append(f'<pre class="gv-code" tabindex="0">{html.escape(visible(file.difference))}</pre>')
    return "".join(parts) + "</div>"


def ask(unread: Sequence[Unread], **where: Any) -> int:
    """Show the code in a browser until a person agrees to it; return the port that the page had.

    Args:
        where: gradio's `server_name`, `server_port` and so on.
    """
    import gradio as gr

    from .page.app import launch

    agreed = threading.Event()

    def agree(read: bool) -> str:
        if not read:
            return '<p class="gv gv-error" role="alert">Tick the box first: it says that you have read the code.</p>'
        agreed.set()
        return '<p class="gv" role="status">The model is loading. This page turns into the app by itself.</p>'

    with gr.Blocks(title="gpt2-value: unread code", analytics_enabled=False) as page:
        gr.HTML(review_page(unread))
        read = gr.Checkbox(label="I have read these files and agree to these hashes", elem_id="read")
        run = gr.Button(AGREE, variant="primary", elem_id="agree")
        says = gr.HTML(elem_id="says")
        run.click(agree, read, says, api_name="agree").then(None, read, None, js=_RELOAD)
    launch(page, prevent_thread_lock=True, **where)
    try:
        agreed.wait()
        time.sleep(1.0)  # until the answer to the click has been sent
    finally:
        page.close(verbose=False)
    return int(page.server_port)


# Asks for the page until it is another one: while the model loads, nobody answers.
_RELOAD = """(read) => {
  if (!read) return;
  const look = async () => {
    try {
      const page = await fetch(location.href, {cache: "no-store"});
      if (page.ok && !(await page.text()).includes("unread code")) return location.reload();
    } catch (error) {}
    setTimeout(look, 500);
  };
  setTimeout(look, 1500);
}"""


def _difference(name: str, text: str) -> str:
    known: Mapping[str, Any] = layout.written_code()
    if name not in known:
        return text
    ours = known[name].read_text(encoding="utf-8").splitlines()
    lines = difflib.unified_diff(ours, text.splitlines(), f"installed/{name}", f"package/{name}", lineterm="")
    return "\n".join(lines)
