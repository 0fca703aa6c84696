"""examples/space: three files that are a Space by themselves, within bounds."""

import ast
import re
import runpy
from pathlib import Path

import pytest
import yaml
from conftest import make_tiny_model

from hub_tools import save_package

SPACE = Path(__file__).parent.parent / "examples" / "space"


@pytest.fixture
def space(tiny_tokenizer, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="the oldest versions are tested without the app")
    save_package(make_tiny_model(), tmp_path / "package", tiny_tokenizer)
    monkeypatch.setenv("MODEL", str(tmp_path / "package"))
    return runpy.run_path(str(SPACE / "app.py"))


def test_it_draws_and_shows_what_it_drew_as_text(space):
    shown = space["sample"]("<b>ab", 2, 9, 1.0)
    assert shown.count("<p ") == 2
    assert shown.count("<span") >= 2
    assert "&lt;b&gt;ab" in shown
    assert re.search(r"value before [+-][\d.]+, log-probability -[\d.]+", shown)
    assert "\\u202e" in space["chip"]("\u202e<", -1.0, 0.5, 1.0)


@pytest.mark.parametrize(
    "given",
    [("", 1, 1, 1), ("x" * 2001, 1, 1, 1), ("a" * 60, 1, 9, 1), ("a", 5, 1, 1), ("a", 1, 129, 1), (None, 1, 1, 1)],
    ids=lambda given: str(given)[:20],
)
def test_what_is_out_of_bounds_is_refused(space, given):
    with pytest.raises(Exception, match=r"characters|At most|leaves no room") as refused:
        space["sample"](*given)
    assert type(refused.value).__module__.startswith("gradio")


def test_its_requirements_are_all_that_it_imports():
    tree = ast.parse((SPACE / "app.py").read_text())
    imported = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    asked = set(re.findall(r"^\w+", (SPACE / "requirements.txt").read_text(), re.MULTILINE))
    assert imported - {"html", "math", "os"} == asked
    card = yaml.safe_load((SPACE / "README.md").read_text().split("---")[1])
    assert (card["sdk"], card["app_file"]) == ("gradio", "app.py")
    assert f"gradio=={card['sdk_version']}\n" in (SPACE / "requirements.txt").read_text()
