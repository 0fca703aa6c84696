"""The tree in CONTRIBUTING.md is the one that is there."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def load_tree():
    spec = importlib.util.spec_from_file_location("tree", ROOT / "docs" / "tree.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tree_in_contributing_is_up_to_date():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert load_tree().page(text) == text, "run: make tree"


def test_every_file_that_is_drawn_says_what_it_is():
    bare = [line for line in load_tree().tree().splitlines() if ".py" in line and len(line.split()) == 1]
    assert bare == []
