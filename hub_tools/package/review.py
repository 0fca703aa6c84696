"""Show a person what loading a package would run: how its code differs from the installed version's.

Imports only the standard library, `layout`, `errors`, `files`, `record` and `stage`, and `hub` inside the function.
Nothing of the package is run, and it need not be a sound one.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .. import layout
from ..errors import visible
from ..files import open_in, sha256_in
from .record import releases, versions_of
from .stage import local_folder, repository_id

LONGEST = 200_000  # bytes of a file that are shown: the largest file of any release has a tenth
MOST = 32  # files that are shown
MOST_PATHS = 10_000  # that are looked at in folders inside the package
COOKIE = re.compile(rb"^[ \t\f]*#.*?coding[:=][ \t]*([-\w.]+)")  # PEP 263


def code_differences(source: str, *, revision: str | None = None) -> Iterator[str]:
    """Yield, line by line, what makes each file of a package's code another one than the installed version's.

    Every character that a terminal would obey, or that has no shape, is an escape. Lines that begin with `DANGER` name
    what a reader cannot judge: compiled files, other encodings, hidden line breaks, files too large to be read. There
    is no line where all code is this version's.

    Args:
        source: a folder, or the id of a repository on the Hub.
        revision: branch, tag or commit of the repository.

    Raises:
        NotAPackageError: there is no such folder.
        PackageError: a file of code is a link that leads out of the folder, or no regular file.
        And what `fetch_outline` raises.
    """
    repo_id = repository_id(source, revision=revision, token=None, cache_dir=None, local_files_only=False)
    if repo_id is None:
        yield from _differences(local_folder(source))
        return
    from ..hub.download import fetch_outline

    with tempfile.TemporaryDirectory(prefix="gpt2-value-inspect-") as outline:
        fetch_outline(repo_id, Path(outline), revision=revision)
        yield from _differences(Path(outline))


def _differences(folder: Path) -> Iterator[str]:
    installed, known = layout.installed_code(), releases()
    names = [
        name for name in sorted(os.listdir(folder)) if name.endswith(layout.CODE_SUFFIXES) and name != layout.HANDLER
    ]
    hashes = {name: sha256_in(folder, name) for name in names}
    differing = [name for name in names if hashes[name] != layout.installed_hashes().get(name)]
    for name in differing[:MOST]:
        shown = _on_one_line(name)
        yield f"{shown}  sha256 {hashes[name]}"
        if versions := versions_of(name, hashes[name], known):
            yield f"as in version {', '.join(versions)}"
        with open_in(folder, name) as file:
            data = file.read(LONGEST + 1)
        if len(data) > LONGEST:
            yield f"DANGER: more than {LONGEST:,} bytes, which are not shown here; no release has such a file"
        elif not name.endswith(".py"):
            yield "DANGER: compiled code, which nobody can read; it is not shown here"
        else:
            text, dangers = _as_read(data)
            yield from dangers
            ours = installed[name].read_text(encoding="utf-8") if name in installed else ""
            before, after = (code.removesuffix("\n").split("\n") for code in (ours, text))
            for line in difflib.unified_diff(before, after, f"installed/{shown}", f"package/{shown}", lineterm=""):
                yield _on_one_line(line)
    if len(differing) > MOST:
        yield f"DANGER: {len(differing) - MOST} more files, which are not shown here; no release has so many"
    if lost := [name for name in installed if name not in names]:
        yield f"missing: {', '.join(lost)}"
    inner = (path for path in itertools.islice(folder.rglob("*"), MOST_PATHS) if path.parent != folder)
    if deeper := sorted(
        _on_one_line(str(path.relative_to(folder))) for path in inner if path.suffix in (".py", ".pyc")
    ):
        yield f"DANGER: code in folders, where no package has any: {', '.join(deeper[:8])}"


def _on_one_line(text: str) -> str:
    """Text as it is shown, without a way to look like the next line."""
    return visible(text).replace("\n", "\\n")


def _as_read(data: bytes) -> tuple[str, list[str]]:
    """A file of Python as text, whose lines end where a reader sees them end, and what makes it another text to Python.

    Only `\\n` ends a line here; whatever else Python takes for a line break is shown as an escape.
    """
    dangers = []
    for number, line in enumerate(re.split(rb"\r\n?|\n", data.removeprefix(b"\xef\xbb\xbf"))[:2], 1):
        cookie = COOKIE.match(line)
        if cookie and cookie[1].lower() not in (b"utf-8", b"utf8"):
            dangers.append(f"DANGER: line {number} declares an encoding, by which Python reads other lines than these")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("utf-8", errors="backslashreplace")
        dangers.append("DANGER: not UTF-8")
    text = text.replace("\r\n", "\n")
    hidden = [number for number, line in enumerate(text.split("\n"), 1) if visible(line) != line]
    if hidden:
        lines = ", ".join(map(str, hidden[:8])) + (" ..." if len(hidden) > 8 else "")
        dangers.append(f"DANGER: characters that are not what they look like, as escapes below, in lines {lines}")
    return text, dangers
