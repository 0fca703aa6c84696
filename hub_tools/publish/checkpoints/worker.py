"""Save, verify and push one checkpoint, in a process that gives way to training.

Imports the standard library, huggingface_hub, and of hub_tools `errors`, `files`, `layout`, `hub`, `package` and
`publish`; and torch and transformers, by way of `save` and `snapshot`.
It is a process of its own because a thread would share the training loop's interpreter lock and torch's cores.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import sys
from operator import attrgetter
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from ... import layout
from ...errors import GPT2ValueHubError
from ...files import read_safetensors_header
from ...hub.repository import Hub
from ...package.inspection import inspect_package
from ...package.record import read_record
from ...package.save import save_package
from ...package.verify import refusals, verify_package
from ..push import PushOptions, push
from ..upload_set import Package
from .job import RESULT, Best, BestRule, Job, PushedCheckpoint, Result, failure_to_json, metrics_in
from .snapshot import read_model, read_tokenizer

TASK = "text-generation"
SCORE = attrgetter("score")
VERIFY_TIMEOUT = 24 * 3600.0  # seconds: it gets the time that training leaves


def push_checkpoint(job: Job, folder: Path) -> Result:
    """Push the model whose snapshot is in `folder` as one commit.

    Raises:
        Everything that `push_to_hub` raises.
    """
    where, package_folder = job.destination, folder / "package"
    hub = Hub(where.repo_id, token=where.token, patience=where.patience)
    hub.check_token()
    shutil.rmtree(package_folder, ignore_errors=True)  # of an earlier attempt; a replaced package would be there twice
    save_package(
        read_model(folder),
        package_folder,
        read_tokenizer(folder),
        base_model=job.package.base_model,
        license=job.package.license,
        tags=job.package.tags,
        repo_id=hub.repo_id,
        max_shard_size=job.package.max_shard_size,
    )
    _write_metrics(job, hub.repo_id, package_folder / layout.CARD)
    package = Package.read(package_folder)
    package.refuse_secrets(hub, job.title)
    verified = _verify(package_folder, job.verified)
    options = PushOptions(branch=where.branch, private=where.private, message=job.title, note=job.note)
    report = push(package, hub, options)
    assert report.commit is not None
    assert report.url is not None
    best = None if job.rule is None else _tag_best(job, job.rule, hub, report.commit)
    is_best = best is not None and best.commit == report.commit
    pushed = PushedCheckpoint(job.step, job.metrics, report.commit, report.url, report.committed, is_best)
    return Result(pushed, verified, best)


def _write_metrics(job: Job, repo_id: str, path: Path) -> None:
    """Put the metrics in the card's `model-index`. It is there also without metrics: the card on the Hub keeps
    what a push does not replace, and an older checkpoint's metrics would be untrue of this one."""
    card = ModelCard.load(path)
    card.data.model_name = repo_id.rsplit("/", 1)[-1]
    card.data.eval_results = [
        EvalResult(
            task_type=TASK,
            dataset_type=job.dataset,
            dataset_name=job.dataset,
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in job.metrics.items()
        if math.isfinite(value)
    ]
    path.write_text(str(card), encoding="utf-8")


def _verify(folder: Path, verified: str | None) -> str:
    """Verify in full where anything but the values of the weights is new; otherwise inspect, and trust that the same
    code loads the same shapes. (The save has checked that the weights are finite and whole.) Return the fingerprint.
    """
    hashes = read_record(folder).sha256
    facts = {name: digest for name, digest in hashes.items() if layout.kind_of(name) != "weights"}
    headers = {name: read_safetensors_header(folder, name) for name in hashes if name.endswith(".safetensors")}
    fingerprint = hashlib.sha256(repr((sorted(facts.items()), sorted(headers.items()))).encode()).hexdigest()
    by_an_earlier_attempt = folder.with_name(f"verified-{fingerprint}")
    if fingerprint != verified and not by_an_earlier_attempt.exists():
        verify_package(folder, timeout=VERIFY_TIMEOUT)
        by_an_earlier_attempt.touch()
    else:
        for refusal in refusals(inspect_package(folder)):
            raise refusal
    return fingerprint


def _tag_best(job: Job, rule: BestRule, hub: Hub, commit: str) -> Best:
    """Make sure that the best checkpoint has the tag, and return it."""
    try:
        known = job.best if job.best is not None else _best_on_the_hub(job, rule, hub)
        best = max(known, rule.rate(commit, job.metrics), key=SCORE)  # where they are equal, the earlier
        if best.commit is not None and best != job.best:
            hub.move_tag(rule.tag, commit=best.commit)
    except GPT2ValueHubError as error:
        raise type(error)(
            f"the commit {commit} did land; whether it is the best is not known, or not tagged: {error.found}",
            expected=error.expected,
            next_step=error.next_step,
        ) from error
    return best


def _best_on_the_hub(job: Job, rule: BestRule, hub: Hub) -> Best:
    """The best of the commit that has the tag and all on the branch. The tag alone does not tell: a run that is killed
    after a commit and before its tag leaves the tag on an older one, or on none."""
    commits = list(reversed(hub.commits(job.destination.branch)))
    tagged = hub.tagged(rule.tag)
    if tagged is not None and all(found.commit_id != tagged for found in commits):
        commits.insert(0, hub.commits(tagged)[0])
    rated = (rule.rate(found.commit_id, metrics_in(found.message)) for found in commits)
    return max(rated, key=SCORE, default=Best())


def main(folder: Path) -> None:
    """Read a job from the standard input, do it, and write the result or the error to `result.json` in the folder."""
    line = sys.stdin.readline()
    if not line.endswith("\n"):  # the parent died before the snapshot was whole
        return
    try:
        result = push_checkpoint(Job.from_json(line), folder).to_json()
    except GPT2ValueHubError as error:
        result = failure_to_json(error)
    scratch = folder / f"{RESULT}.new"
    scratch.write_text(result, encoding="utf-8")
    scratch.rename(folder / RESULT)
