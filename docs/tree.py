"""Draws the tree of the project in CONTRIBUTING.md: each file and folder with the first sentence of its docstring.

    python docs/tree.py            # writes it into CONTRIBUTING.md; `make tree`

Imports the standard library. Files that say nothing of themselves, such as Markdown, are not drawn.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "CONTRIBUTING.md"
FOLDERS = ("sampler_audit", "hub_tools", "examples", "benchmarks", "tests", "docs")
START, END = "<!-- tree: make tree -->\n```\n", "```\n<!-- end of the tree -->"


def summary(path: Path) -> str:
    """The first sentence of a module's docstring, on one line; empty where there is none."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(docstring.split("\n\n")[0].split())
    return re.split(r"(?<=[.?])\s", first)[0].rstrip(".:")


def lines(folder: Path, depth: int) -> list[str]:
    """A folder's own line, and those of the files and folders in it."""
    opening = folder / "__init__.py"
    drawn = [_line(f"{folder.name}/", summary(opening) if opening.exists() else "", depth)]
    files = [path for path in sorted(folder.glob("*.py")) if path != opening]
    drawn += [_line(path.name, summary(path), depth + 1) for path in files]
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and any(path.rglob("*.py"))):
        drawn += lines(inner, depth + 1)
    return drawn


def _line(name: str, says: str, depth: int) -> str:
    return f"{'  ' * depth + name:<36}{says}".rstrip()


def tree() -> str:
    """The whole tree, one line for each file or folder."""
    drawn = [_line(path.name, summary(path), 0) for path in sorted(ROOT.glob("*_gpt2_value.py"))]
    for name in FOLDERS:
        drawn += lines(ROOT / name, 0)
    return "\n".join(drawn) + "\n"


def page(text: str) -> str:
    """The text of CONTRIBUTING.md with the tree as it is now."""
    before, rest = text.split(START)
    return before + START + tree() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
