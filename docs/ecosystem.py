"""Write the table in docs/ecosystem.md: which tool works with what, and the test that shows it.

    python docs/ecosystem.py            # writes the page; `make ecosystem` runs its tests first

Imports the standard library. A row stands beside the test that shows it, as `@pytest.mark.shows("tool", "feature")`;
a script that is no test has a list `SHOWS = [("tool", "feature")]`, and its docstring says how it is run. The files are
read and not imported.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "ecosystem.md"
START, END = "<!-- table: make ecosystem -->\n", "<!-- end of the table -->"


def rows() -> list[tuple[str, str, str]]:
    """Tool, feature, and where it is shown (`file::test`, or a file), in the order of tools, files and lines."""
    found = [row for path in sorted((ROOT / "tests").rglob("*.py")) for row in _rows_of(path)]
    return sorted(found, key=lambda row: row[0].lower())


def _rows_of(path: Path) -> list[tuple[str, str, str]]:
    where, found = str(path.relative_to(ROOT)), []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["SHOWS"]:
            found += [(tool, feature, where) for tool, feature in ast.literal_eval(node.value)]
        for decorator in getattr(node, "decorator_list", ()):
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.shows":
                tool, feature = map(ast.literal_eval, decorator.args)
                found.append((tool, feature, f"{where}::{node.name}"))
    return found


def table() -> str:
    """The rows as a table in Markdown; the name of a test leads to its file."""
    lines = ["| tool | what works | shown by |", "|---|---|---|"]
    for tool, feature, where in rows():
        file, _, test = where.partition("::")
        lines.append(f"| {tool} | {feature} | [{test or Path(file).name}](../{file}) |")
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The text of the page with the table as it is now."""
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
