"""The notebook of examples/, run from top to bottom on a model that was trained for a moment."""

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "notebook.ipynb"
QUICK = """
import functools, fit_value_head, train_small_gpt2
body = {"n_positions": 256, "n_embd": 32, "n_layer": 1, "n_head": 2}
recipe = train_small_gpt2.Recipe(400, **body, steps=12, batch_size=8, threads=1)
train_small_gpt2.small_gpt2 = functools.partial(train_small_gpt2.small_gpt2, recipe)
fit_value_head.own_reviews = functools.partial(fit_value_head.own_reviews, batches=4, batch_size=8)
"""


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_stored_with_its_outputs(stored):
    cells = [cell for cell in stored.cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("gv-chip" in output.get("data", {}).get("text/html", "") for output in outputs) == 1
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert NOTEBOOK.stat().st_size < 400_000


@pytest.mark.own_interpreter
def test_it_runs_from_top_to_bottom(stored, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", f"{NOTEBOOK.parent.parent}:{NOTEBOOK.parent}")
    notebook = stored.copy()
    notebook.cells = [nbformat.v4.new_code_cell(QUICK), *stored.cells]
    done = nbclient.execute(
        notebook, cwd=str(tmp_path), timeout=120, kernel_name="python3"
    )  # raises what a cell raises
    last = done.cells[-1].outputs[0]["text"].splitlines()
    assert last[0].startswith("rollout:           honest")
