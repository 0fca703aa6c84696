"""examples/space: three files that are a Space by themselves, within bounds."""

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
    with pytest.raises(space["gr"].Error, match=r"characters|At most|leaves no room"):
        space["sample"](*given)


def test_its_requirements_are_all_that_it_imports():
    code, needed, card = ((SPACE / name).read_text() for name in ("app.py", "requirements.txt", "README.md"))
    imported = set(re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE))
    assert imported - {"html", "math", "os"} == set(re.findall(r"^\w+", needed, re.MULTILINE))
    settings = yaml.safe_load(card.split("---")[1])
    assert (settings["sdk"], settings["app_file"]) == ("gradio", "app.py")
    assert f"gradio=={settings['sdk_version']}\n" in needed
