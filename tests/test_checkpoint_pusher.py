"""Checkpoints leave while training goes on: in order, never torn, the last one always, and no failure in silence."""

import gc
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from conftest import make_tiny_model
from safetensors.torch import load
from slow.fault_sweep import serving
from support.hub_server import Fault, HubServer

from hub_tools import CheckpointPusher, CheckpointPusherCallback
from hub_tools.errors import (
    AuthenticationError,
    CheckpointPushError,
    HubUnavailableError,
    PusherClosedError,
)
from hub_tools.publish.checkpoints import pusher as checkpoint_pusher
from hub_tools.publish.checkpoints import snapshot, worker_process
from hub_tools.publish.checkpoints.snapshot import Snapshot
from hub_tools.publish.checkpoints.trainer_callback import metrics_at

HERE = Path(__file__).parent
REPO = "alice/value"
HEAD = "v_head.summary.bias"
GIVE_WAY = worker_process.give_way


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """The system's folder for temporary files, for this module alone."""
    folder = tmp_path_factory.mktemp("temporary")
    with mock.patch.object(tempfile, "tempdir", str(folder)):
        yield folder


def start(server, temporary, how):
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": server.token,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "TMPDIR": str(temporary),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }
    command = [sys.executable, str(HERE / "support" / "trains_and_pushes.py"), f"alice/{how}", how]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Training processes: two that are killed and one that fails. They run while the other tests do; one is killed
    as soon as it has pushed two checkpoints and has another on its way."""
    with HubServer() as server:
        server.faults += [Fault(every=29, status=503), Fault(route="lfs_upload", delay=0.3)]
        places = {how: tmp_path_factory.mktemp("temporary") for how in ("killed", "idle", "fails")}
        processes = {how: start(server, place, how) for how, place in places.items()}

        def kill_one():
            repo_id, place = "alice/killed", places["killed"]
            wait_for(lambda: repo_id in server.repos and len(server.history(repo_id)) >= 3 and [*place.iterdir()], 280)
            processes["killed"].kill()

        threading.Thread(target=kill_one, daemon=True).start()
        yield server, processes, places
        for process in processes.values():
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def running(temporary, runs):
    """A server and a pusher, for many tests. Its workers, which take seconds to start, do not give way to other tests,
    except the first."""
    environment = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "TMPDIR": str(temporary)}
    with (
        serving(xet=False) as server,
        mock.patch.dict(os.environ, environment),
        mock.patch.object(worker_process, "give_way"),
        mock.patch.object(worker_process, "SHARE", 1e9),  # nor do they rest
        mock.patch.object(checkpoint_pusher, "PAUSE", 0.1),
    ):
        with CheckpointPusher("value", metric_for_best_model="reward", patience=1.0, dataset="imdb") as pusher:
            yield server, pusher
        assert not list(temporary.iterdir()), "the disk is clean"


@pytest.fixture
def server(running):
    yield running[0]
    running[0].faults.clear()


@pytest.fixture
def pusher(running):
    return running[1]


def head_of(commit):
    """The bias of the value head in a commit: which step it was made at."""
    return load(commit.files["model.safetensors"].content)[HEAD].item()


def set_head(model, value):
    with torch.no_grad():
        model.v_head.summary.bias.fill_(value)


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this never happened"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def first_workers(running):
    """What is known of the first worker, which is killed, and of its successor."""
    _, pusher = running
    with mock.patch.object(worker_process, "give_way", GIVE_WAY):
        pusher.push(make_tiny_model(), step=0)
        wait_for(lambda: pusher._worker)
    first = pusher._worker.pid
    facts = {"policy": os.sched_getscheduler(first) if sys.platform == "linux" else None}
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: pusher._worker.pid != first)
    second = pusher._worker.pid
    facts["session"] = os.getsid(second)
    wait_for(lambda: os.getpgid(second) == second)
    pusher.flush()
    return facts


def test_a_process_that_died_is_replaced(first_workers, pusher):
    assert pusher.pushed[0].step == 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks about Linux's scheduler")
def test_the_worker_takes_only_what_is_left_of_the_cores(first_workers):
    """In a session of its own it would get half of a busy core, at any priority (sched(7), autogroups). It has a
    process group of its own, since a terminal's Ctrl-C is not for it."""
    assert first_workers == {"policy": os.SCHED_IDLE, "session": os.getsid(0)}


def test_a_worker_that_cannot_be_started_is_told_at_the_next_call_and_stops_nothing(server, pusher, monkeypatch):
    def refuse(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_pusher, "Worker", refuse)
        pusher.push(make_tiny_model(), step=3)
        with pytest.raises(CheckpointPushError, match="Cannot allocate memory") as failed:
            pusher.flush()
        assert failed.value.step == 3
        pusher.push(make_tiny_model(), step=4)
        wait_for(lambda: pusher._failures)
        with pytest.raises(CheckpointPushError, match="step 4"):
            pusher.push(make_tiny_model(), step=5)
        with pytest.raises(CheckpointPushError, match="step 5"):
            pusher.flush()
    pusher.push(make_tiny_model(seed=6), step=6)
    pusher.flush()
    assert pusher.pushed[-1].step == 6


def test_the_next_worker_waits_until_the_last_has_taken_no_more_than_its_share(server, pusher, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(worker_process, "SHARE", 1e-3)
        pusher.push(make_tiny_model(seed=7), step=7)
        pusher.flush()
    for step in (8, 9):
        pusher.push(make_tiny_model(seed=step), step=step)
        time.sleep(0.2)  # many times as long as a thread takes to start
        assert pusher._worker is None
    assert pusher.skipped[-1] == 8
    with mock.patch.object(worker_process, "give_way") as give_way:
        pusher.flush()  # at once, and at the normal priority: other work could hold it up for as long as it lasts
    assert not give_way.called
    assert [checkpoint.step for checkpoint in pusher.pushed[-2:]] == [7, 9]


def test_while_nothing_is_on_its_way_there_is_no_thread_no_process_and_no_file(server, pusher, temporary):
    pusher.flush()
    assert not [thread for thread in threading.enumerate() if thread.name == "CheckpointPusher"]
    assert pusher._worker is None
    assert not list(temporary.iterdir())


@pytest.fixture(scope="module")
def fast_training(running):
    """Training that is faster than the disk and the network, and goes on in place right after `push` has returned.

    Returns the steps, the weights that they had, and the most copies of the weights that were there at a time.
    """
    server, pusher = running
    server.faults.append(Fault(route="lfs_upload", delay=0.3))
    model, steps, counts, disk_is_free = make_tiny_model(), range(11, 18), [], threading.Event()
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    copy, write = snapshot._copied, Snapshot.write

    def copy_and_count(state):
        copies = copy(state)
        counts.append(1 + sum(type(found) is Snapshot and bool(found.weights) for found in gc.get_objects()))
        return copies

    def write_slowly(self, folder):
        disk_is_free.wait()
        write(self, folder)

    with mock.patch.object(snapshot, "_copied", copy_and_count), mock.patch.object(Snapshot, "write", write_slowly):
        for step in steps:
            model.load_state_dict(start)
            set_head(model, step)
            pusher.push(model, step=step, metrics={"reward": step / 10})
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(100.0)
            if step == 14:
                disk_is_free.set()
        pusher.flush()
    server.faults.clear()
    return list(steps), start, max(counts)


def test_checkpoints_arrive_in_order_whole_and_the_last_one_always(fast_training, server, pusher):
    numbers, start, _ = fast_training
    new = [checkpoint for checkpoint in pusher.pushed if checkpoint.step in numbers]
    steps = [checkpoint.step for checkpoint in new]
    assert steps == sorted(steps)
    assert steps[-1] == numbers[-1]
    skipped = [step for step in pusher.skipped if step in numbers]
    assert sorted([*steps, *skipped]) == numbers
    assert skipped
    commits = {commit.oid: commit for commit in server.history(REPO)}
    assert len(commits) == 1 + len(pusher.pushed)
    for checkpoint in new:
        commit = commits[checkpoint.commit]
        assert commit.title == f"Step {checkpoint.step}: reward={checkpoint.step / 10:g}"
        assert head_of(commit) == checkpoint.step
    assert new[-1].best
    assert server.repos[REPO].refs["refs/tags/best"] == new[-1].commit
    weights = load(commits[new[-1].commit].files["model.safetensors"].content)
    assert all(torch.equal(weights[name], start[name]) for name in weights if name != HEAD)


def test_there_are_never_more_than_two_copies_of_the_weights(fast_training):
    *_, most = fast_training
    assert most == 2


def test_a_hub_that_is_down_never_stops_training_and_the_newest_lands_once_it_is_back(server, pusher):
    server.faults.append(Fault(route="commit", status=503))
    model = make_tiny_model()
    for step in (30, 31):
        set_head(model, step)
        pusher.push(model, step=step)
        wait_for(lambda step=step: pusher._current and pusher._current.step == step and pusher._worker)
        worker, before = pusher._worker.pid, server.routes().count("whoami")
        wait_for(lambda before=before: server.routes().count("whoami") > before + 1)
        assert pusher._worker.pid == worker, "tried again without starting and saving again"
    server.faults.clear()
    pusher.flush()
    assert pusher.skipped[-1] == 30
    assert pusher.pushed[-1].step == 31
    assert head_of(server.history(REPO)[0]) == 31


def test_only_flush_gives_up_on_a_hub_that_is_down(server, pusher):
    server.faults.append(Fault(route="commit", status=503))
    pusher.push(make_tiny_model(seed=33), step=33)
    with pytest.raises(CheckpointPushError, match="step 33") as failed:
        pusher.flush()
    assert isinstance(failed.value.__cause__, HubUnavailableError)
    assert failed.value.step == 33
    pusher.flush()  # told once


def test_what_waiting_does_not_mend_is_raised_by_the_next_call_which_loses_nothing(server, pusher):
    server.faults.append(Fault(route="commit", status=403, nth=1))
    pusher.push(make_tiny_model(seed=40), step=40)
    wait_for(lambda: server.faults[0].hits and pusher._failures)
    with pytest.raises(CheckpointPushError, match="step 40") as failed:
        pusher.push(make_tiny_model(seed=41), step=41)
    assert isinstance(failed.value.__cause__, AuthenticationError)
    assert "lfs_upload" in server.routes()
    pusher.flush()
    assert pusher.pushed[-1].step == 41


def test_a_forked_process_cannot_use_it_and_does_not_disturb_it(pusher):
    child = os.fork()
    if child == 0:
        try:
            pusher.push(make_tiny_model(), step=0)
        except PusherClosedError:
            pusher.close()
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    pusher.push(make_tiny_model(seed=53), step=53)
    pusher.flush()


@pytest.mark.shows("Trainer", "`CheckpointPusherCallback` pushes what it saves")
def test_a_trainer_pushes_what_it_saves_and_ends_with_what_it_holds(server, pusher, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = make_tiny_model().train()
    data = [{"input_ids": torch.arange(i, i + 8), "labels": torch.arange(i, i + 8)} for i in range(16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # the loss falls, so the first one is the "best", and is loaded at the end
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        label_names=["labels"],
    )
    before = len(pusher.pushed)
    callback = CheckpointPusherCallback(pusher)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2], callbacks=[callback])
    trainer.train()
    new = pusher.pushed[before:]
    assert {checkpoint.step for checkpoint in new} <= {2, 4}
    assert new[-1].step == trainer.state.best_global_step == 2
    assert {"loss", "eval_loss", "learning_rate"} <= set(new[-1].metrics)
    pushed = load(server.files(REPO)["model.safetensors"])
    trained = model.state_dict()
    assert all(torch.equal(pushed[name], trained[name]) for name in pushed)


def test_metrics_of_a_step_are_those_that_the_trainer_logged_at_it():
    history = [
        {"loss": 3.0, "epoch": 0.1, "step": 1},
        {"loss": 2.0, "learning_rate": 0.1, "epoch": 0.2, "step": 2},
        {"eval_loss": 2.5, "eval_runtime": 1.0, "eval_steps_per_second": 3.0, "epoch": 0.2, "step": 2},
    ]
    assert metrics_at(2, history) == {"loss": 2.0, "learning_rate": 0.1, "eval_loss": 2.5}
    assert metrics_at(3, history) == {}


# In processes of their own


def test_a_killed_run_leaves_the_repository_loadable_and_the_disk_clean(runs, tmp_path):
    server, processes, places = runs
    wait_for(lambda: processes["killed"].poll() == -signal.SIGKILL, 280)
    wait_for(lambda: not list(places["killed"].iterdir()))
    server.faults.clear()
    made = [commit for commit in server.history("alice/killed") if commit.title.startswith("Step")]
    assert all(set(commit.files) == set(made[0].files) for commit in made)
    assert [f"Step {head_of(commit):.0f}" for commit in made] == [commit.title for commit in made]
    script = (
        "from transformers import AutoModel\nimport torch\n"
        "model = AutoModel.from_pretrained('alice/killed', trust_remote_code=True)\n"
        "assert model(input_ids=torch.tensor([[1]])).value.isfinite()\n"
        "print(model.v_head.summary.bias.item())"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == head_of(made[0])


def test_a_run_that_is_killed_while_nothing_is_on_its_way_leaves_the_disk_clean(runs):
    server, processes, places = runs
    assert processes["idle"].stdout.readline() == "idle\n"
    processes["idle"].kill()
    wait_for(lambda: not list(places["idle"].iterdir()))
    assert [commit.title for commit in server.history("alice/idle")] == ["Step 1", "initial commit"]


def test_an_uncaught_exception_leaves_the_last_checkpoint_pushed_and_says_which_one_is_not(runs):
    server, processes, places = runs
    _, printed = processes["fails"].communicate(timeout=180)
    assert "RuntimeError: training failed" in printed
    assert [commit.title for commit in server.history("alice/fails")] == ["Step 3", "initial commit"]
    assert "the checkpoint of step 2 is not on alice/fails" in printed
    assert not list(places["fails"].iterdir())
