"""What a CheckpointPusher refuses, and what becomes of workers that die, are silent, or do not reach the Hub."""

import os
import sys
import tempfile
import time
from unittest import mock

import pytest
from conftest import make_tiny_model, plain_twin
from slow.fault_sweep import serving
from support.hub_server import Fault

from hub_tools import CheckpointPusher
from hub_tools.errors import (
    AuthenticationError,
    CheckpointPushError,
    HubUnavailableError,
    MissingHeadError,
    OptionsError,
    PusherClosedError,
    UnsavableModelError,
    WorkerDiedError,
)
from hub_tools.package.replace import discard, locked_folder
from hub_tools.publish.checkpoints import pusher as checkpoint_pusher
from hub_tools.publish.checkpoints import worker_process
from hub_tools.publish.checkpoints.job import failure_to_json

REPO = "alice/value"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The system's folder for temporary files, for one test alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def server(temporary):
    with serving(xet=False) as server:
        yield server


@pytest.fixture
def run_as_worker(monkeypatch):
    """Have workers run other code; they do not give way to the tests that run at the same time."""
    monkeypatch.setattr(worker_process, "give_way", lambda pid: None)
    return lambda code: monkeypatch.setattr(worker_process, "COMMAND", (sys.executable, "-c", code))


@pytest.fixture
def pusher(server, temporary, run_as_worker):
    """A pusher with workers that never answer."""
    run_as_worker("import sys; sys.stdin.read()")
    with CheckpointPusher(REPO, patience=1.0) as pusher:
        yield pusher
    assert not list(temporary.iterdir()), "the disk is clean"


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this never happened"
        time.sleep(0.02)


def test_a_worker_that_keeps_dying_is_told_with_its_last_words(pusher, run_as_worker, caplog):
    run_as_worker("raise SystemExit('no memory')")
    pusher.push(make_tiny_model(), step=1)
    with pytest.raises(CheckpointPushError, match=r"step 1 .*exit status 1: no memory") as failed:
        pusher.flush()
    assert isinstance(failed.value.__cause__, WorkerDiedError)
    assert caplog.text.count("and tried again") == checkpoint_pusher.WORKERS - 1


def test_between_two_attempts_is_a_pause_which_flush_ends(pusher, run_as_worker, monkeypatch, caplog):
    answer = worker_process.ANSWER + failure_to_json(HubUnavailableError("the Hub is down", next_step="wait"))
    run_as_worker(f"import sys\nfor line in sys.stdin: print({answer!r}, flush=True)")
    monkeypatch.setattr(checkpoint_pusher, "PAUSE", 1000.0)
    pusher.push(make_tiny_model(), step=1)
    wait_for(lambda: "and tried again" in caplog.text)
    time.sleep(0.3)
    assert caplog.text.count("and tried again") == 1
    with pytest.raises(CheckpointPushError, match=r"step 1 .*the Hub is down"):
        pusher.flush()


def test_an_interrupt_while_closing_gives_up_what_is_on_its_way_and_says_so(pusher, temporary, monkeypatch, caplog):
    def interrupted(condition):
        raise KeyboardInterrupt

    pusher.push(make_tiny_model(), step=1)
    wait_for(lambda: pusher._worker)
    worker = pusher._worker.pid
    pusher.push(make_tiny_model(), step=2)
    monkeypatch.setattr(pusher._changed, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pusher.close()
    assert "interrupted: not pushed to alice/value: step 1, 2" in caplog.text
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)
    assert not list(temporary.iterdir())
    with pytest.raises(PusherClosedError):
        pusher.push(make_tiny_model(), step=3)


def test_a_checkpoint_that_cannot_be_written_is_a_failure_and_no_silence(pusher, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_pusher.Snapshot, "write", full_disk)
        pusher.push(make_tiny_model(), step=2)
        with pytest.raises(CheckpointPushError, match=r"step 2.*No space left"):
            pusher.flush()


def test_a_config_that_could_not_be_saved_is_refused_at_once_and_stops_nothing(pusher):
    model = make_tiny_model()
    model.generation_config.made_of = object()  # JSON has no word for it
    with pytest.raises(UnsavableModelError):
        pusher.push(model, step=2)
    pusher.flush()
    assert pusher.pushed == pusher.skipped == ()


def test_what_cannot_be_right_is_refused_before_training_starts(server):
    with pytest.raises(AuthenticationError):
        CheckpointPusher(REPO, token="hf_wrong")
    with pytest.raises(OptionsError, match="without metric_for_best_model"):
        CheckpointPusher(REPO, greater_is_better=True)


def test_what_cannot_be_a_checkpoint_is_refused_at_once(pusher, tiny_model):
    with pytest.raises(MissingHeadError):
        pusher.push(plain_twin(tiny_model), step=0)
    with pytest.raises(OptionsError, match="'kl' is 'low'"):
        pusher.push(tiny_model, step=0, metrics={"kl": "low"})


def test_a_hub_that_does_not_answer_is_no_reason_not_to_start(server, tiny_model):
    server.faults.append(Fault(route="whoami", status=503))
    with mock.patch.object(checkpoint_pusher, "FIRST_LOOK", 0.1):
        pusher = CheckpointPusher(REPO)
    pusher.close()
    pusher.close()
    with pytest.raises(PusherClosedError):
        pusher.push(tiny_model, step=0)


def test_what_the_dead_left_on_the_disk_is_removed(server, temporary):
    dead = temporary / "gpt2-value-checkpoints-dead"
    dead.mkdir()
    (dead / "snapshot-1").write_bytes(b"weights")
    (dead / "lock").touch()
    living, lock = locked_folder(checkpoint_pusher.FOLDER, temporary)
    CheckpointPusher(REPO).close()
    assert not dead.exists()
    assert living.exists(), "those of the living stay"
    discard(living, lock)
