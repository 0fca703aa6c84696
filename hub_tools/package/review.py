"""Show a person what loading a package would run: how its code differs from the installed version's.

Nothing of the package is run, and it need not be a sound one.
"""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .. import layout
from ..errors import visible
from ..files import open_in, sha256_in
from .inspect import disguises, is_code
from .record import versions_of
from .stage import local_folder, repository_id

LONGEST = 200_000  # bytes of a file that are shown: the largest file of any release has a tenth


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
    repo_id = repository_id(source, revision=revision)
    if repo_id is None:
        yield from _differences(local_folder(source))
        return
    from ..hub.download import fetch_outline

    with tempfile.TemporaryDirectory(prefix="gpt2-value-inspect-") as outline:
        fetch_outline(repo_id, Path(outline), revision=revision)
        yield from _differences(Path(outline))


def _differences(folder: Path) -> Iterator[str]:
    installed = layout.installed_code()
    names = sorted(filter(is_code, os.listdir(folder)))
    for name in names:
        digest, shown = sha256_in(folder, name), _on_one_line(name)
        versions = versions_of(name, digest)
        if layout.__version__ in versions:
            continue
        yield f"{shown}  sha256 {digest}"
        if versions:
            yield f"as in version {', '.join(versions)}"
        with open_in(folder, name) as file:
            code = file.read(LONGEST + 1)
        if len(code) > LONGEST:
            yield f"DANGER: more than {LONGEST:,} bytes, which are not shown here; no release has such a file"
        elif not name.endswith(".py"):
            yield "DANGER: compiled code, which nobody can read; it is not shown here"
        else:
            yield from (f"DANGER: {_on_one_line(reason)}" for reason in disguises(code))
            ours = installed[name].read_text(encoding="utf-8") if name in installed else ""
            theirs = code.decode("utf-8", errors="backslashreplace").replace("\r\n", "\n")
            before, after = (text.removesuffix("\n").split("\n") for text in (ours, theirs))
            for line in difflib.unified_diff(before, after, f"installed/{shown}", f"package/{shown}", lineterm=""):
                yield _on_one_line(line)
    if lost := [name for name in installed if name not in names]:
        yield f"missing: {', '.join(lost)}"
    if deeper := sorted(_on_one_line(str(path.relative_to(folder))) for path in folder.glob("*/*.py*")):
        yield f"DANGER: code in folders, where no package has any: {', '.join(deeper[:8])}"


def _on_one_line(text: str) -> str:
    """Text as it is shown, without a way to look like the next line."""
    return visible(text).replace("\n", "\\n")
