"""Checkpoints leave while training goes on: in order, never torn, the last one always, and no failure in silence."""

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import huggingface_hub
import pytest
import torch
from conftest import make_tiny_model, plain_twin
from safetensors.torch import load
from slow.fault_sweep import serving
from support.hub_server import Fault, HubServer

from hub_tools import CheckpointPusher, CheckpointPusherCallback
from hub_tools.errors import (
    AuthenticationError,
    CardMetadataError,
    CheckpointPushError,
    HubUnavailableError,
    MissingHeadError,
    NoAccessError,
    NonFiniteWeightsError,
    PusherClosedError,
    PushOptionsError,
    UnsavableConfigError,
)
from hub_tools.package.replace_folder import discard, locked_folder
from hub_tools.publish.checkpoints import pusher as checkpoint_pusher
from hub_tools.publish.checkpoints import snapshot, worker, worker_process
from hub_tools.publish.checkpoints.job import BestRule, Destination, Job, PackageOptions
from hub_tools.publish.checkpoints.snapshot import Snapshot
from hub_tools.publish.checkpoints.trainer_callback import metrics_at

HERE = Path(__file__).parent
REPO = "alice/value"
HEAD = "v_head.summary.bias"


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
    """Training processes: two that are killed and one that fails. They run while the other tests do."""
    with HubServer() as server:
        server.faults += [Fault(every=29, status=503), Fault(route="lfs_upload", delay=0.3)]
        places = {how: tmp_path_factory.mktemp("temporary") for how in ("killed", "idle", "fails")}
        processes = {how: start(server, place, how) for how, place in places.items()}
        yield server, processes, places
        for process in processes.values():
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def running(temporary, runs):
    """A server and a pusher, whose process takes seconds to start, for many tests."""
    environment = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "TMPDIR": str(temporary)}
    with serving(xet=False) as server, mock.patch.dict(os.environ, environment):
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


def ended(pid):
    """Whether a process, whoever has to reap it, has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this never happened"
        time.sleep(0.02)


def test_a_process_that_died_is_replaced(server, pusher):
    pusher.push(make_tiny_model(), step=0)
    wait_for(lambda: pusher._worker)
    os.kill(pusher._worker.pid, signal.SIGKILL)
    pusher.flush()
    assert [checkpoint.step for checkpoint in pusher.pushed] == [0]


@pytest.mark.skipif(sys.platform != "linux", reason="asks about Linux's scheduler")
def test_the_worker_takes_only_what_is_left_of_the_cores(server, pusher):
    """In a session of its own it would get half of a busy core, at any priority (sched(7), autogroups)."""
    server.faults.append(Fault(route="whoami", delay=0.5))
    pusher.push(make_tiny_model(seed=99), step=1)
    wait_for(lambda: pusher._worker)
    worker = pusher._worker.pid
    assert os.sched_getscheduler(worker) == os.SCHED_IDLE
    assert os.getsid(worker) == os.getsid(0)
    wait_for(lambda: os.getpgid(worker) == worker)  # a terminal's Ctrl-C is not for it
    pusher.flush()


def test_a_sandbox_that_refuses_the_idle_class_does_not_stop_the_worker():
    script = (
        "import os\nfrom hub_tools.publish.checkpoints.worker_process import give_way\n"
        "def refuse(*_): raise OSError(22, 'Invalid argument')\n"
        "os.sched_setscheduler = refuse\ngive_way(0)\nprint(os.nice(0))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=HERE.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "19\n"


def test_what_a_worker_started_ends_with_it():
    """An interpreter that verifies holds as much memory as the worker, for which there may not be enough."""
    script = (
        "import os, subprocess, sys\nos.setpgid(0, 0)\n"
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']).pid, flush=True)"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    started = int(process.stdout.readline())
    worker_process.kill(process)
    process.wait()
    wait_for(lambda: ended(started))


def test_a_checkpoint_that_cannot_be_written_is_a_failure_and_no_silence(server, pusher, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_pusher.Snapshot, "write", full_disk)
        pusher.push(make_tiny_model(), step=2)
        with pytest.raises(CheckpointPushError, match=r"step 2.*No space left"):
            pusher.flush()


def test_a_config_that_could_not_be_saved_is_refused_at_once_and_stops_nothing(server, pusher):
    model = make_tiny_model()
    model.generation_config.made_of = object()  # JSON has no word for it
    before = pusher.pushed
    with pytest.raises(UnsavableConfigError):
        pusher.push(model, step=2)
    pusher.flush()
    assert pusher.pushed == before


def test_a_worker_that_cannot_be_started_is_told_at_the_next_call_and_stops_nothing(server, pusher, monkeypatch):
    def refuse(*_):
        raise OSError(12, "Cannot allocate memory")

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint_pusher, "start", refuse)
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
    pusher.push(make_tiny_model(), step=6)
    pusher.flush()
    assert pusher.pushed[-1].step == 6


def test_while_nothing_is_on_its_way_there_is_no_thread_no_process_and_no_file(server, pusher, temporary):
    pusher.flush()
    assert not [thread for thread in threading.enumerate() if thread.name == "CheckpointPusher"]
    assert pusher._worker is None
    assert not list(temporary.iterdir())


def test_checkpoints_arrive_in_order_whole_and_the_last_one_always(server, pusher):
    """Also where training is faster than the network, and goes on in place right after `push` has returned."""
    server.faults.append(Fault(route="lfs_upload", delay=0.3))
    before, model, numbers = len(pusher.pushed), make_tiny_model(), list(range(1, 6))
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    for step in numbers:
        model.load_state_dict(start)
        set_head(model, step)
        pusher.push(model, step=step, metrics={"reward": step / 10})
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(100.0)
    pusher.flush()
    new = pusher.pushed[before:]
    steps = [checkpoint.step for checkpoint in new]
    assert steps == sorted(steps)
    assert steps[-1] == 5
    assert sorted([*steps, *pusher.skipped]) == numbers
    assert pusher.skipped
    commits = {commit.oid: commit for commit in server.history(REPO)}
    assert len(commits) == 1 + len(pusher.pushed)
    for checkpoint in new:
        commit = commits[checkpoint.commit]
        assert commit.title == f"Step {checkpoint.step}: reward={checkpoint.step / 10:g}"
        assert head_of(commit) == checkpoint.step
    weights = load(server.files(REPO)["model.safetensors"])
    assert all(torch.equal(weights[name], start[name]) for name in weights if name != HEAD)


def test_there_are_never_more_than_two_copies_of_the_weights(server, pusher):
    server.faults.append(Fault(route="lfs_upload", delay=0.5))
    for step in range(60, 66):
        pusher.push(make_tiny_model(seed=step), step=step)
        assert sum(type(found) is Snapshot and bool(found.weights) for found in gc.get_objects()) <= 2
        time.sleep(0.02)
    pusher.flush()


def test_metrics_reach_the_model_index(server, pusher):
    pusher.push(
        make_tiny_model(seed=2), step=10, metrics={"reward": 0.9, "kl": float("nan"), "loss": torch.tensor(2.0)}
    )
    pusher.flush()
    assert server.history(REPO)[0].title == "Step 10: reward=0.9, kl=nan, loss=2"
    data = huggingface_hub.ModelCard(server.files(REPO)["README.md"].decode()).data
    assert data.model_name == "value"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {"reward": 0.9, "loss": 2.0}
    assert {result.dataset_name for result in data.eval_results} == {"imdb"}
    pusher.push(make_tiny_model(seed=3), step=11)
    pusher.flush()
    data = huggingface_hub.ModelCard(server.files(REPO)["README.md"].decode()).data
    assert data.eval_results == [], "an older checkpoint's metrics are not this one's"


def test_the_tag_is_on_the_best(server, pusher):
    for step, reward in ((20, 5.0), (21, 7.0), (22, 6.0), (23, float("nan"))):
        pusher.push(make_tiny_model(seed=step), step=step, metrics={"reward": reward})
        pusher.flush()
    assert [checkpoint.best for checkpoint in pusher.pushed[-4:]] == [True, True, False, False]
    assert server.repos[REPO].refs["refs/tags/best"] == pusher.pushed[-3].commit


def test_a_hub_that_is_down_never_stops_training_and_the_newest_lands_once_it_is_back(server, pusher):
    server.faults.append(Fault(route="commit", status=503))
    model = make_tiny_model()
    for step in (30, 31, 32):
        set_head(model, step)
        pusher.push(model, step=step)
        before = server.routes().count("commit")
        wait_for(lambda before=before: server.routes().count("commit") > before + 1)
    server.faults.clear()
    pusher.flush()
    assert pusher.pushed[-1].step == 32
    assert head_of(server.history(REPO)[0]) == 32


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
    assert isinstance(failed.value.__cause__, NoAccessError)
    assert "lfs_upload" in server.routes()
    pusher.flush()
    assert pusher.pushed[-1].step == 41


def test_weights_that_are_not_finite_are_not_pushed(server, pusher):
    model, before = make_tiny_model(), server.history(REPO)[0].oid
    set_head(model, float("nan"))
    pusher.push(model, step=50)
    with pytest.raises(CheckpointPushError, match=HEAD) as failed:
        pusher.flush()
    assert isinstance(failed.value.__cause__, NonFiniteWeightsError)
    assert server.history(REPO)[0].oid == before


def test_somebody_elses_push_in_between_is_kept_and_ours_is_on_top(server, pusher):
    class TheyPush(Fault):
        def strikes(self, request):
            if request.route == self.route and not self.hits:
                self.hits = 1
                server.commit(server.repos[REPO], "refs/heads/main", "theirs", {"verification.json": None})
            return False

    server.faults.append(TheyPush(route="lfs_upload"))
    pusher.push(make_tiny_model(seed=51), step=51)
    pusher.flush()
    assert [commit.title for commit in server.history(REPO)][:2] == ["Step 51", "theirs"]
    assert "verification.json" in server.files(REPO)


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


# Without a worker process


def do(job, model, folder, *, tokenizer=None, **fields):
    """Do a job here, as a worker would; returns its result, which the next job knows."""
    folder.mkdir(exist_ok=True)
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    Snapshot.of(model, tokenizer).write(folder)
    return worker.push_checkpoint(Job.from_json(replace(job, **fields).to_json()), folder)


def after(job, result):
    return replace(job, verified=result.verified, best=result.best)


JOB = Job(
    step=1,
    metrics={},
    dataset="imdb",
    destination=Destination("alice/worker", "main", None, None, 5.0),
    package=PackageOptions(None, None, (), "5GB"),
    rule=BestRule("loss", False, "best"),
)


@pytest.fixture
def verified(monkeypatch):
    """The folders that were verified in full, which takes an interpreter's start and is not done here."""
    folders = []
    monkeypatch.setattr(worker, "verify_package", lambda folder, **_: folders.append(folder))
    return folders


def test_what_is_new_but_the_weights_is_verified_in_full(server, tmp_path, verified, tiny_model, tiny_tokenizer):
    job = after(JOB, do(JOB, tiny_model, tmp_path))
    job = after(job, do(job, make_tiny_model(seed=1), tmp_path, step=2))
    assert len(verified) == 1
    job = after(job, do(job, tiny_model, tmp_path, step=3, tokenizer=tiny_tokenizer))
    assert len(verified) == 2
    assert "tokenizer.json" in server.files("alice/worker")
    tiny_model.generation_config.max_new_tokens = 7
    job = after(job, do(job, tiny_model, tmp_path, step=4))
    do(job, make_tiny_model(n_layer=1), tmp_path, step=5)
    assert len(verified) == 4


def test_a_run_that_is_resumed_knows_the_best_so_far(server, tmp_path, verified):
    server.repos.pop("alice/worker", None)
    first = do(JOB, make_tiny_model(seed=1), tmp_path, metrics={"loss": 1.0}).pushed
    second = do(JOB, make_tiny_model(seed=2), tmp_path, metrics={"loss": 2.0})
    assert not second.pushed.best
    assert server.repos["alice/worker"].refs["refs/tags/best"] == first.commit
    assert do(after(JOB, second), make_tiny_model(seed=3), tmp_path, metrics={"loss": 0.5}).pushed.best


@pytest.mark.parametrize("left", ["the tag on an older one", "no tag"])
def test_a_run_that_was_killed_between_a_commit_and_its_tag_is_resumed_with_the_true_best(
    server, tmp_path, verified, left
):
    server.repos.pop("alice/worker", None)
    older = do(JOB, make_tiny_model(seed=1), tmp_path, metrics={"loss": 2.0}).pushed
    best = do(JOB, make_tiny_model(seed=2), tmp_path, metrics={"loss": 1.0}).pushed
    refs = server.repos["alice/worker"].refs
    del refs["refs/tags/best"]
    if left != "no tag":
        refs["refs/tags/best"] = older.commit
    resumed = do(JOB, make_tiny_model(seed=3), tmp_path, metrics={"loss": 1.5})
    assert not resumed.pushed.best
    assert refs["refs/tags/best"] == best.commit
    assert resumed.best.commit == best.commit


def test_a_snapshot_is_bit_equal_ties_included_in_every_dtype(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = make_tiny_model().to(dtype)
        Snapshot.of(model).write(tmp_path)
        found = snapshot.read_model(tmp_path).state_dict()
        state = model.state_dict()
        assert set(found) == set(state)
        assert all(torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state)
        assert found["lm_head.weight"].data_ptr() == found["transformer.wte.weight"].data_ptr()


def test_what_cannot_be_right_is_refused_before_training_starts(running, tmp_path):
    with pytest.raises(AuthenticationError):
        CheckpointPusher(REPO, token="hf_wrong")
    with pytest.raises(PushOptionsError, match="without metric_for_best_model"):
        CheckpointPusher(REPO, greater_is_better=True)


def test_what_cannot_be_a_checkpoint_is_refused_at_once(pusher, tiny_model):
    with pytest.raises(MissingHeadError):
        pusher.push(plain_twin(tiny_model), step=0)
    with pytest.raises(CardMetadataError, match="'kl' is 'low'"):
        pusher.push(tiny_model, step=0, metrics={"kl": "low"})


def test_a_hub_that_does_not_answer_is_no_reason_not_to_start(server, tiny_model):
    server.faults.append(Fault(route="whoami", status=503))
    with (
        mock.patch("hub_tools.publish.checkpoints.pusher.FIRST_LOOK", 0.1),
    ):
        pusher = CheckpointPusher(REPO)
    pusher.close()
    pusher.close()
    with pytest.raises(PusherClosedError):
        pusher.push(tiny_model, step=0)


def test_what_the_dead_left_on_the_disk_is_removed(running, temporary):
    dead = temporary / "gpt2-value-checkpoints-dead"
    dead.mkdir()
    (dead / "snapshot-1").write_bytes(b"weights")
    (dead / "lock").touch()
    living, lock = locked_folder(checkpoint_pusher.FOLDER, temporary)
    CheckpointPusher(REPO).close()
    assert not dead.exists()
    assert living.exists(), "those of the living stay"
    discard(living, lock)


# In processes of their own


def test_a_killed_run_leaves_the_repository_loadable_and_the_disk_clean(runs, tmp_path):
    server, processes, places = runs
    wait_for(lambda: "alice/killed" in server.repos and len(server.history("alice/killed")) >= 3, 180)
    processes["killed"].kill()
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


def test_a_run_that_is_killed_when_its_worker_is_done_leaves_the_disk_clean(tmp_path):
    """The folder is the run's to remove, which it may not live to do."""
    folder = tmp_path / "folder"
    folder.mkdir()
    job = replace(JOB, destination=replace(JOB.destination, token="hf_any", patience=0.1))
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from hub_tools.publish.checkpoints.worker_process import start\n"
        "folder = Path(sys.argv[1])\nworker = start(folder, 'http://127.0.0.1:9')\n"
        "worker.stdin.write(sys.argv[2] + '\\n')\nworker.stdin.close()\n"
        "assert worker.stdout.read() == ''\nprint([file.name for file in folder.iterdir()], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", script, str(folder), job.to_json()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    assert "result.json" in done.stdout
    wait_for(lambda: not folder.exists())


def test_an_uncaught_exception_leaves_the_last_checkpoint_pushed_and_says_which_one_is_not(runs):
    server, processes, places = runs
    _, printed = processes["fails"].communicate(timeout=180)
    assert "RuntimeError: training failed" in printed
    assert [commit.title for commit in server.history("alice/fails")] == ["Step 3", "initial commit"]
    assert "the checkpoint of step 2 is not on alice/fails" in printed
    assert not list(places["fails"].iterdir())
