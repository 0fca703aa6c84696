"""Checkpoints leave while training goes on: in order, never torn, the last one always, and no failure in silence."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import make_tiny_model, plain_twin
from safetensors.torch import load
from support.hub_server import Fault

from hub_tools import CheckpointPusher, CheckpointPusherCallback, load_package, push_package, save_package
from hub_tools.errors import (
    AuthenticationError,
    CheckpointPushError,
    HubUnavailableError,
    MissingHeadError,
    OptionsError,
    UnsavableModelError,
)
from hub_tools.hub import ask
from hub_tools.publish import checkpoints
from hub_tools.publish import push as push_module

HERE = Path(__file__).parent
REPO = "alice/value"
HEAD = "v_head.summary.bias"


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The system's folder for temporary files, for one test alone."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def wait_for(condition):
    end = time.monotonic() + 200  # which nothing takes, on a busy machine either
    while not condition():
        assert time.monotonic() < end, "this never happened"
        time.sleep(0.02)


def set_head(model, value):
    with torch.no_grad():
        model.v_head.summary.bias.fill_(value)


def head_of(commit):
    """The bias of the value head in a commit: which step it was made at."""
    return load(commit.files["model.safetensors"])[HEAD].item()


@pytest.fixture
def training(server, temporary):
    """Start a training process that talks to this server."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HUB_OFFLINE": "0",
        "TMPDIR": str(temporary),
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]),
    }
    return partial(subprocess.Popen, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# With the real worker


def test_a_killed_run_loses_nothing_that_was_begun_and_the_worker_gives_way(server, temporary, training):
    code = (
        "import os, time, conftest, hub_tools\npusher = hub_tools.CheckpointPusher('alice/value')\n"
        "model = conftest.make_tiny_model()\nmodel.v_head.summary.bias.data.fill_(2)\npusher.push(model, step=2)\n"
        "while not pusher._worker: time.sleep(0.01)\n"
        "while os.getpriority(os.PRIO_PROCESS, pusher._worker.pid) < 19: time.sleep(0.01)\n"
        "print('begun', flush=True)\ntime.sleep(1000)"
    )
    with training([sys.executable, "-c", code]) as killed:
        try:
            assert killed.stdout.readline() == b"begun\n"
        finally:
            killed.kill()
    wait_for(lambda: REPO in server.repos and len(server.history(REPO)) == 2)
    wait_for(lambda: not list(temporary.glob("gpt2-value-*")))
    commit = server.history(REPO)[0]
    assert (commit.title, head_of(commit)) == ("Step 2", 2)


def test_an_uncaught_exception_leaves_the_last_checkpoint_pushed(temporary, workers, training):
    """Without a `with` block."""
    code = (
        "import conftest, hub_tools\nfrom hub_tools.publish import checkpoints\n"
        f"checkpoints.COMMAND = {checkpoints.COMMAND!r}\n"
        "hub_tools.CheckpointPusher('alice/value').push(conftest.make_tiny_model(), step=1)\n"
        "raise RuntimeError('training failed')"
    )
    with training([sys.executable, "-c", code]) as failed:
        assert b"RuntimeError: training failed" in failed.communicate()[1]
    assert workers.began() == 1
    assert not list(temporary.glob("gpt2-value-*"))


@pytest.fixture
def verified(monkeypatch):
    """The packages that were verified, which takes an interpreter's start and is not done here."""
    folders = []
    monkeypatch.setattr(push_module, "verify_package", lambda folder, **_: folders.append(folder))
    return folders


@pytest.fixture
def do(server, tmp_path, verified, monkeypatch):
    """Push a checkpoint without a process of its own; returns its `PushedCheckpoint`."""

    def work(self, call):
        answer = call(Path(tempfile.mkdtemp(dir=tmp_path), "package"))
        return checkpoints.PushedCheckpoint(call.keywords["step"], call.keywords["metrics"], **answer)

    def do(model, *, step=1, metrics=None, tokenizer=None, **options):
        with CheckpointPusher(REPO, dataset="imdb", metric_for_best_model="loss", **options) as pusher:
            pusher.push(model, step=step, metrics=metrics, tokenizer=tokenizer)
        return pusher.pushed[0]

    monkeypatch.setattr(CheckpointPusher, "_work", work)
    return do


def test_a_checkpoint_is_verified_and_bit_equal_in_every_dtype(server, do, verified, tiny_tokenizer):
    for step, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        model = make_tiny_model(seed=step).to(dtype)
        do(model, step=step, tokenizer=tiny_tokenizer if step == 0 else None)
        found, state = load(server.files(REPO)["model.safetensors"]), model.state_dict()
        assert all(torch.equal(found[name], state[name]) for name in found)
        assert ("tokenizer.json" in server.files(REPO)) == (step == 0), "the next has none, and so has the repository"
    assert len(verified) == 3


def test_metrics_reach_the_model_index(server, do):
    do(make_tiny_model(), step=10, metrics={"reward": 0.9, "kl": float("nan"), "loss": torch.tensor(2.0)})
    assert server.history(REPO)[0].title == "Step 10: reward=0.9, kl=nan, loss=2"
    data = huggingface_hub.ModelCard(server.files(REPO)["README.md"].decode()).data
    assert data.model_name == "value"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {"reward": 0.9, "loss": 2.0}
    assert {result.dataset_name for result in data.eval_results} == {"imdb"}
    do(make_tiny_model(seed=3), step=11)
    data = huggingface_hub.ModelCard(server.files(REPO)["README.md"].decode()).data
    assert data.eval_results == [], "an older checkpoint's metrics are not this one's"


@pytest.mark.parametrize(
    ("greater", "values", "best"),
    [(True, (5.0, 7.0, 6.0, float("nan"), 7.0), [0, 1]), (None, (5.0, 7.0, 4.0, 4.0), [0, 2])],
)
def test_the_tag_goes_to_a_checkpoint_that_beats_the_tagged_one(server, do, greater, values, best):
    """Also of an earlier run, or on another branch; of equals the older one keeps it. A loss is better if smaller."""
    server.create(REPO)
    answers = []
    for step, value in enumerate(values):
        revision = "other" if step == 0 else None
        model = make_tiny_model(seed=step)
        answers.append(do(model, step=step, metrics={"loss": value}, greater_is_better=greater, revision=revision))
    assert [step for step, answer in enumerate(answers) if answer.best] == best
    assert server.repos[REPO].refs["refs/tags/best"] == answers[best[-1]].commit


def test_what_is_the_best_loads_whatever_stood_there_before(server, do, tmp_path, tiny_tokenizer):
    save_package(make_tiny_model(), tmp_path / "package", tiny_tokenizer)
    push_package(tmp_path / "package", REPO)
    answer = do(make_tiny_model(seed=1), metrics={"loss": 1.0})
    for revision in ("main", "best", answer.commit):
        loaded = load_package(REPO, revision=revision, cache_dir=tmp_path / "cache")
        assert (loaded.commit, loaded.tokenizer) == (answer.commit, None)


def test_somebody_elses_push_in_between_is_kept_and_ours_is_on_top(server, do, monkeypatch):
    monkeypatch.setattr(ask, "FIRST_PAUSE", 0.01)
    theirs = partial(server.commit, server.create(REPO), "refs/heads/main", "theirs", {"notes.txt": b"theirs"})
    server.faults.append(Fault(route="lfs_upload", meanwhile=theirs))
    do(make_tiny_model(), step=51)
    assert [commit.title for commit in server.history(REPO)][:2] == ["Step 51", "theirs"]
    assert "notes.txt" in server.files(REPO)


def test_a_checkpoint_that_could_not_be_tagged_is_not_called_missing(server, do):
    server.faults.append(Fault(route="create_tag", status=403))
    with pytest.raises(CheckpointPushError, match=r"is on the Hub, but the tag 'best'") as refused:
        do(make_tiny_model(), metrics={"loss": 1.0})
    assert server.history(REPO)[0].oid in str(refused.value)


# With workers that run other code, and start in no time

WORKER = """
import json, os, sys, time
assert os.path.exists(sys.argv[-1] + "/call.pt")
with open({log!r}, "a") as file: print("began", file=file)
answer = {{"commit": "0" * 40, "url": "url", "best": False}}
{then}
print(json.dumps(answer))
"""


@pytest.fixture
def workers(monkeypatch, tmp_path):
    """Workers that note that they began, do what `run` was told, and answer that they have pushed."""
    log = tmp_path / "jobs"
    log.touch()

    def run(then):
        code = WORKER.format(log=str(log), then=then)
        monkeypatch.setattr(checkpoints, "COMMAND", (sys.executable, "-S", "-c", code))

    run("")
    return SimpleNamespace(run=run, began=lambda: log.read_text().count("began"))


@pytest.fixture
def pusher(server, temporary, workers):
    with CheckpointPusher(REPO) as pusher:
        yield pusher
    assert not list(temporary.glob("gpt2-value-*")), "the disk is clean"
    assert not [thread for thread in threading.enumerate() if thread.name == "CheckpointPusher"]


def push_and_flush(pusher, step):
    """Either of them raises what went wrong: `push` where the worker has failed by then."""
    pusher.push(make_tiny_model(), step=step)
    pusher.flush()


def steps_of(pusher):
    return [checkpoint.step for checkpoint in pusher.pushed]


def test_the_newest_waits_and_the_last_is_never_lost(pusher, workers, tmp_path):
    """Training is faster than the worker, and goes on in place right after `push` has returned."""
    workers.run(f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.01)")
    model = make_tiny_model()
    for step in range(6):
        set_head(model, step)
        pusher.push(model, step=step, metrics={"reward": step})
        set_head(model, -1)
        if step == 0:
            wait_for(workers.began)
        else:
            assert pusher._waiting.keywords["model"].v_head.summary.bias == step
    (tmp_path / "go").touch()
    pusher.flush()
    assert steps_of(pusher) == [0, 5]
    assert pusher.pushed[1].metrics == {"reward": 5.0}
    assert pusher.skipped == [1, 2, 3, 4]
    assert workers.began() == 2
    assert pusher._worker.poll() is not None


def test_a_worker_that_dies_is_a_failure_and_no_silence(pusher, workers):
    workers.run("raise SystemExit(7)")
    with pytest.raises(CheckpointPushError, match=r"step 1 .*exit status 7") as failed:
        push_and_flush(pusher, 1)
    assert failed.value.step == 1


UNAVAILABLE = (
    'answer = {"error": "HubUnavailableError", "found": "the Hub is down", "expected": "", "next_step": "wait"}'
)


def test_a_hub_that_is_down_never_stops_training_and_the_newest_lands_once_it_is_back(pusher, workers, caplog):
    workers.run(UNAVAILABLE)
    model = make_tiny_model()
    pusher.push(model, step=1)
    wait_for(lambda: "tries it again" in caplog.text)
    pusher.push(model, step=2)
    wait_for(lambda: pusher.skipped == [1])
    pusher.check()
    with pytest.raises(CheckpointPushError, match=r"step 2 .*the Hub is down") as failed:
        pusher.flush()
    assert isinstance(failed.value.__cause__, HubUnavailableError)
    pusher.flush()  # told once
    workers.run("")
    push_and_flush(pusher, 3)
    assert steps_of(pusher) == [3]


def test_what_waiting_does_not_mend_is_raised_by_the_next_call_which_loses_nothing(pusher, workers):
    workers.run(UNAVAILABLE.replace("HubUnavailableError", "AuthenticationError"))
    pusher.push(make_tiny_model(), step=40)
    wait_for(lambda: pusher._failure)
    workers.run("")
    with pytest.raises(CheckpointPushError, match="step 40") as failed:
        pusher.push(make_tiny_model(), step=41)
    assert isinstance(failed.value.__cause__, AuthenticationError)
    pusher.flush()
    assert steps_of(pusher) == [41]


def test_what_the_system_refuses_is_a_failure_and_no_silence(pusher, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", refuse)
        with pytest.raises(CheckpointPushError, match=r"step 2.*No space left"):
            push_and_flush(pusher, 2)
    push_and_flush(pusher, 3)
    assert steps_of(pusher) == [3]


def test_an_interrupt_while_closing_gives_up_what_is_on_its_way_and_says_so(pusher, workers, monkeypatch, caplog):
    workers.run("time.sleep(1000)")
    pusher.push(make_tiny_model(), step=1)
    wait_for(workers.began)
    process, join, interrupts = pusher._worker, pusher._thread.join, iter([KeyboardInterrupt])

    def interrupted():
        for interrupt in interrupts:  # the first time
            raise interrupt
        join()

    monkeypatch.setattr(pusher._thread, "join", interrupted)
    pusher.push(make_tiny_model(), step=2)
    with pytest.raises(KeyboardInterrupt):
        pusher.close()
    assert "interrupted: the last checkpoint is not on alice/value" in caplog.text
    assert all(f"the checkpoint of step {step} is not on" in caplog.text for step in (1, 2))
    assert process.poll() == -signal.SIGKILL
    with pytest.raises(CheckpointPushError, match="closed"):
        pusher.push(make_tiny_model(), step=3)


def test_what_cannot_be_a_checkpoint_is_refused_at_once_and_stops_nothing(pusher, tiny_model):
    with pytest.raises(MissingHeadError):
        pusher.push(plain_twin(tiny_model), step=0)
    with pytest.raises(OptionsError, match="'kl': 'low'"):
        pusher.push(tiny_model, step=0, metrics={"kl": "low"})
    set_head(tiny_model, float("nan"))
    with pytest.raises(UnsavableModelError, match=HEAD):
        pusher.push(tiny_model, step=0)
    pusher.flush()
    assert pusher.pushed == pusher.skipped == []


def test_what_cannot_be_right_is_refused_before_training_starts_and_a_silent_hub_is_no_reason(server, caplog):
    with pytest.raises(AuthenticationError):
        CheckpointPusher(REPO, token="hf_wrong")
    with pytest.raises(OptionsError, match="without metric_for_best_model"):
        CheckpointPusher(REPO, greater_is_better=True)
    server.faults.append(Fault(route="whoami", status=503))
    pusher = CheckpointPusher(REPO)
    assert "without the Hub's consent" in caplog.text
    pusher.close()
    pusher.close()


def test_a_forked_process_cannot_use_it_and_does_not_disturb_it(pusher):
    child = os.fork()
    if child == 0:
        try:
            pusher.push(make_tiny_model(), step=0)
        except CheckpointPushError:
            pusher.close()
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    push_and_flush(pusher, 53)
    assert steps_of(pusher) == [53]


def test_a_trainer_pushes_what_it_saves_and_ends_with_what_it_holds(pusher, workers, tmp_path):
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
    callback = CheckpointPusherCallback(pusher)
    trainer = Trainer(model, arguments, train_dataset=data, eval_dataset=data[:2], callbacks=[callback])
    trainer.train()
    assert set(steps_of(pusher)) <= {2, 4}
    assert pusher.pushed[-1].step == trainer.state.best_global_step == 2
    assert {"loss", "eval_loss", "learning_rate"} <= set(pusher.pushed[-1].metrics)
    assert not {"step", "epoch", "eval_runtime", "eval_samples_per_second"} & set(pusher.pushed[-1].metrics)
