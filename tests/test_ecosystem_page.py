"""The table in docs/ecosystem.md is the one that the tests give."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOOLS = ("PEFT", "Trainer", "Accelerate", "DistributedDataParallel, FSDP2", "torchao", "TRL", "verl, OpenRLHF, TRL")
TOOLS += ("torch.compile", "torch.export", "torch.save", "DataLoader", "TensorDict", "transformers")


def load_page():
    spec = importlib.util.spec_from_file_location("ecosystem", ROOT / "docs" / "ecosystem.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_up_to_date():
    page = load_page()
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.page(text) == text, "run: python docs/ecosystem.py"


def test_every_mark_in_the_tests_is_a_row_once():
    """The files are read by other means here, so that a mark in a place that is not read cannot go unseen."""
    found = [row[:2] for row in load_page().rows()]
    assert len(set(found)) == len(found)
    marked = sum(
        len(re.findall(r"^ *@pytest\.mark\.shows\(", path.read_text(encoding="utf-8"), re.MULTILINE))
        for path in (ROOT / "tests").rglob("*.py")
    )
    assert marked == sum("::" in where for _, _, where in load_page().rows())


def test_every_tool_that_is_promised_has_a_test():
    assert set(TOOLS) <= {tool for tool, _, _ in load_page().rows()}


def test_tests_outside_the_suite_are_run_by_a_target_that_the_row_names():
    """What pytest does not collect must be run by `make`, or by a test of the suite that runs the file."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    suite = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for tool, feature, where in load_page().rows():
        if not where.startswith("tests/test_"):
            target = re.search(r"`make ([a-z-]+)`", feature)
            assert f"\n{target[1]}:" in makefile if target else where.partition("::")[0] in suite, (
                tool,
                feature,
                where,
            )
