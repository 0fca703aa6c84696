"""A process killed at any moment of a save leaves the old package or the new one, never a mixture."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=["exchange", "renames"])
def deaths(request, tmp_path_factory):
    """What was on the disk after each death: (how folders are replaced, the two packages, one entry per death)."""
    done = subprocess.run(
        [
            sys.executable,
            str(HERE / "support" / "saver_that_dies.py"),
            str(tmp_path_factory.mktemp("deaths")),
            request.param,
        ],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    packages, *attempts = map(json.loads, done.stdout.splitlines())
    # the sweep is one: it went on until a save came through
    assert sum(attempt["killed"] for attempt in attempts) > 10
    assert packages["old"] != packages["new"]
    return request.param, packages, attempts


def test_a_killed_save_leaves_the_old_package_or_the_new_one(deaths):
    how, packages, attempts = deaths
    seen = set()
    for attempt in attempts:
        allowed = [packages["old"], packages["new"]]
        if (
            how == "renames"
        ):  # between the two renames nothing has this name, and the old package lies next to it, whole
            allowed.append(None)
        assert attempt["left"] in allowed, attempt["step"]
        seen.add(allowed.index(attempt["left"]))
    assert seen == set(range(len(allowed)))  # the sweep saw every state that there is


def test_the_next_save_first_puts_back_what_was_moved_away(deaths):
    _, packages, attempts = deaths
    for attempt in attempts:
        assert attempt["recovered"] in (packages["old"], packages["new"]), attempt["step"]
        if attempt["left"] is None:
            assert attempt["recovered"] == packages["old"], attempt["step"]


def test_the_next_save_leaves_no_litter(deaths):
    _, packages, attempts = deaths
    assert any(len(attempt["beside"]) > 1 for attempt in attempts)  # killed saves do leave files behind
    for attempt in attempts:
        assert attempt["cleaned"] == ["package"], attempt["step"]
        if attempt["step"] == "timer":
            assert attempt["beside_next"] == ["package"]
            assert attempt["after_next"] == packages["new"]
