"""Every code block of the README and of docs/ runs as it stands, and what the pages name is there.

The blocks of a page run in order, in one temporary folder, against the tests' Hub: Python in a fresh namespace for each
block, so that each can be pasted on its own, and `gpt2-value` by its function. Each page has a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_published_checkpoint
from support.hub_server import HubServer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ABOUT_PPO = ("ppo.md", "coming-from-trl.md")  # tests/test_docs_ppo.py runs their blocks, with a model that they need
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Commands that take minutes or need a network: of these only the target or the file is checked. What they run is tested
# by `.ci/run`, tests/test_demo.py, tests/test_generate_quirks.py, tests/test_libraries.py, and below.
NOT_RUN = ("make", "pip", "python", "accelerate")
RUN = """
import json, shlex, sys
from hub_tools.cli import main
for language, name, code in json.load(sys.stdin):
    print(code.strip(), flush=True)
    if language == "python":
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
        continue
    sys.argv = shlex.split(code)
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise
"""


def blocks(page):
    """(language, code, line) of each block; the code is moved down to its line of the page, for tracebacks."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        line = text[: found.start(2)].count("\n")
        yield found[1], "\n" * line + found[2]


def commands(code):
    """The lines of a bash block that hold a command, without comments."""
    lines = [line.split("#")[0].strip() for line in code.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(blocks(page)) and page.name not in ABOUT_PPO], ids=lambda page: page.name
)
def test_every_block_runs_as_it_stands(page, tmp_path, tiny_tokenizer):
    steps = [
        (language, page.name, step)
        for language, code in blocks(page)
        for step in ([code] if language == "python" else commands(code))
        if language == "python" or step.split()[0] not in NOT_RUN
    ]
    assert all(step.startswith("gpt2-value ") for language, _, step in steps if language == "bash")
    if not steps:
        return
    base = tmp_path / "gpt2"
    write_published_checkpoint(base, n_positions=256)
    tiny_tokenizer.save_pretrained(base)
    folder, home = tmp_path / "work", tmp_path / "user" / "home"
    folder.mkdir()
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    with HubServer({"hf_me": "me"}) as hub:
        hub.create("openai-community/gpt2", {path.name: path.read_bytes() for path in base.iterdir()})
        own = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_me", "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        done = subprocess.run(
            [sys.executable, "-c", RUN],
            input=json.dumps(steps),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            timeout=240,
            env={**inherited, **own, "OMP_NUM_THREADS": "1"},
        )
    assert done.returncode == 0, f"{page.name}: {done.stdout}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_not_run_is_there(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    text = page.read_text(encoding="utf-8")
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets
    for name in re.findall(r"\b(?:examples|benchmarks|tests)/[\w/]+\.py", text):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
    for link in links:
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_index_lists_every_page():
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    missing = [page.name for page in PAGES[1:] if page.name != "index.md" and f"]({page.name})" not in index]
    assert missing == []
