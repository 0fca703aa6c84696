"""What a worker does for one checkpoint, done here without a process: what is verified, the metrics, the best's tag."""

import shutil
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from conftest import make_tiny_model
from support.hub_server import Fault

from hub_tools.errors import AuthenticationError, UnsavableModelError
from hub_tools.hub.repository import Hub
from hub_tools.publish.checkpoints import snapshot, worker
from hub_tools.publish.checkpoints.job import BestRule, Destination, Job, PackageOptions, Success, as_numbers
from hub_tools.publish.checkpoints.snapshot import Snapshot

REPO = "alice/value"
HEAD = "v_head.summary.bias"
JOB = Job(
    step=1,
    metrics={},
    dataset="imdb",
    destination=Destination(REPO, "main", None, None, 5.0),
    package=PackageOptions(None, None, (), "5GB"),
    rule=BestRule("loss", False, "best"),
)


@pytest.fixture(autouse=True)
def verified(monkeypatch):
    """The folders that were verified in full, which takes an interpreter's start and is not done here."""
    folders = []
    monkeypatch.setattr(worker, "verify_package", lambda folder, **_: folders.append(folder))
    return folders


@pytest.fixture
def do(tmp_path, server):
    """Do a job here, as a worker would; returns the answer to it."""

    def do(model, job=JOB, *, tokenizer=None, **fields):
        folder = tmp_path / "job"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        job = Job.from_json(replace(job, **fields).to_json())
        Snapshot.of(model, tokenizer, step=job.step, metrics=job.metrics).write(folder)
        hub = Hub(job.destination.repo_id, patience=job.destination.patience)
        hub.check_token()
        package, fingerprint = worker.prepare(job, hub, folder)
        return Success(worker.push_checkpoint(job, hub, package), fingerprint, processor_seconds=0.0)

    return do


def test_what_is_new_but_the_weights_is_verified_in_full(server, do, verified, tiny_model, tiny_tokenizer):
    known = do(tiny_model).verified
    known = do(make_tiny_model(seed=1), step=2, verified=known).verified
    assert len(verified) == 1
    known = do(tiny_model, step=3, tokenizer=tiny_tokenizer, verified=known).verified
    assert len(verified) == 2
    assert "tokenizer.json" in server.files(REPO)
    tiny_model.generation_config.max_new_tokens = 7
    known = do(tiny_model, step=4, verified=known).verified
    do(make_tiny_model(n_layer=1), step=5, verified=known)
    assert len(verified) == 4


def test_metrics_reach_the_model_index(server, do):
    metrics = as_numbers({"reward": 0.9, "kl": float("nan"), "loss": torch.tensor(2.0)})
    do(make_tiny_model(seed=2), step=10, metrics=metrics)
    assert server.history(REPO)[0].title == "Step 10: reward=0.9, kl=nan, loss=2"
    data = huggingface_hub.ModelCard(server.files(REPO)["README.md"].decode()).data
    assert data.model_name == "value"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {"reward": 0.9, "loss": 2.0}
    assert {result.dataset_name for result in data.eval_results} == {"imdb"}
    do(make_tiny_model(seed=3), step=11)
    data = huggingface_hub.ModelCard(server.files(REPO)["README.md"].decode()).data
    assert data.eval_results == [], "an older checkpoint's metrics are not this one's"


@pytest.mark.parametrize(
    ("greater_is_better", "values", "best"),
    [(True, (5.0, 7.0, 6.0, float("nan"), 7.0), 1), (False, (5.0, 7.0, 4.0, 4.0), 2)],
)
def test_the_tag_is_on_the_best(server, do, greater_is_better, values, best):
    """Of equals the older one; and each was the best when it came, or was not."""
    job = replace(JOB, rule=BestRule("reward", greater_is_better, "top"))
    pushed = [
        do(make_tiny_model(seed=step), job, metrics={"reward": value}).pushed for step, value in enumerate(values)
    ]
    assert [step for step, checkpoint in enumerate(pushed) if checkpoint.best] == [0, best]
    assert server.repos[REPO].refs["refs/tags/top"] == pushed[best].commit


def test_without_the_metric_nothing_is_the_best(server, do):
    assert not do(make_tiny_model(seed=20), metrics={"reward": 1.0}).pushed.best
    assert "refs/tags/best" not in server.repos[REPO].refs


def test_weights_that_are_not_finite_are_not_pushed(server, do, tiny_model):
    with torch.no_grad():
        tiny_model.v_head.summary.bias.fill_(float("nan"))
    with pytest.raises(UnsavableModelError, match=HEAD):
        do(tiny_model)
    assert REPO not in server.repos


def test_somebody_elses_push_in_between_is_kept_and_ours_is_on_top(server, do):
    class TheyPush(Fault):
        def strikes(self, request):
            if request.route == self.route and not self.hits:
                self.hits = 1
                server.commit(server.repos[REPO], "refs/heads/main", "theirs", {"verification.json": None})
            return False

    server.faults.append(TheyPush(route="lfs_upload"))
    do(make_tiny_model(seed=51), step=51)
    assert [commit.title for commit in server.history(REPO)][:2] == ["Step 51", "theirs"]
    assert "verification.json" in server.files(REPO)


def test_a_checkpoint_that_could_not_be_tagged_is_not_called_missing(server, do):
    server.faults.append(Fault(route="create_tag", status=403))
    with pytest.raises(AuthenticationError, match=r"is on the Hub, but the tag of the best") as refused:
        do(make_tiny_model(seed=52), metrics={"loss": 1.0})
    assert server.history(REPO)[0].oid in str(refused.value)


def test_a_run_that_is_resumed_knows_the_best_so_far(server, do):
    first = do(make_tiny_model(seed=1), metrics={"loss": 1.0}).pushed
    assert not do(make_tiny_model(seed=2), metrics={"loss": 2.0}).pushed.best
    assert server.repos[REPO].refs["refs/tags/best"] == first.commit
    assert do(make_tiny_model(seed=3), metrics={"loss": 0.5}).pushed.best


@pytest.mark.parametrize("left", ["the tag on an older one", "no tag"])
def test_a_run_that_was_killed_between_a_commit_and_its_tag_is_resumed_with_the_true_best(server, do, left):
    older = do(make_tiny_model(seed=1), metrics={"loss": 2.0}).pushed
    best = do(make_tiny_model(seed=2), metrics={"loss": 1.0}).pushed
    refs = server.repos[REPO].refs
    del refs["refs/tags/best"]
    if left != "no tag":
        refs["refs/tags/best"] = older.commit
    assert not do(make_tiny_model(seed=3), metrics={"loss": 1.5}).pushed.best
    assert refs["refs/tags/best"] == best.commit


def test_a_best_checkpoint_on_another_branch_keeps_its_tag(server, do):
    server.create(REPO)
    elsewhere = replace(JOB, destination=replace(JOB.destination, branch="other"))
    best = do(make_tiny_model(seed=1), elsewhere, metrics={"loss": 1.0}).pushed
    assert not do(make_tiny_model(seed=2), metrics={"loss": 2.0}).pushed.best
    assert server.repos[REPO].refs["refs/tags/best"] == best.commit


def test_a_snapshot_is_bit_equal_ties_included_in_every_dtype(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = make_tiny_model().to(dtype)
        Snapshot.of(model, step=1, metrics={}).write(tmp_path)
        found = snapshot.read_model(tmp_path).state_dict()
        state = model.state_dict()
        assert set(found) == set(state)
        assert all(torch.equal(found[name], state[name]) and found[name].dtype == state[name].dtype for name in state)
        assert found["lm_head.weight"].data_ptr() == found["transformer.wte.weight"].data_ptr()
