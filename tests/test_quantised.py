"""Runs tests/slow/quantised.py, where torchao is installed: in a folder of its own, beside the environment.

transformers imports torchao wherever it finds it, which prints four lines in every process, those of all other tests
included.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_models_with_quantised_weights_are_sampled_and_scored_as_they_are():
    folder = Path(sys.prefix) / "torchao"
    assert folder.is_dir(), "torchao is not installed: run make .venv/.done, or make .oldest/.done"
    command = [sys.executable, "-m", "pytest", "-q", "tests/slow/quantised.py"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
