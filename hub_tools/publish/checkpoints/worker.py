"""Save, verify and push one checkpoint, in a process that gives way to training.

Imports the standard library, huggingface_hub, and of hub_tools `errors`, `files`, `layout`, `hub`, `package` and
`publish`; and torch and transformers, through `save` and `snapshot`. This is a separate process, because a thread would
share the interpreter lock and torch's threads with the training loop.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import sys
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard

from ... import layout
from ...errors import ConcurrentPushError, GPT2ValueHubError
from ...files import read_safetensors_header
from ...hub.repository import Hub
from ...package.inspect import inspect_package
from ...package.record import read_record
from ...package.save import save_package
from ...package.verify import refusals, verify_package
from ..push import PushOptions, after_commit, push
from ..upload_set import Package
from .job import BestRule, Job, PushedCheckpoint, Success, failure_to_json, metrics_in
from .snapshot import read_model, read_tokenizer
from .worker_process import ANSWER

logger = logging.getLogger(__name__)

TASK = "text-generation"
VERIFY_TIMEOUT = 24 * 3600.0  # seconds; long, because the worker runs only while training leaves a core idle
TRIES = 3  # of a push, if others push at the same time


def main(folder: Path) -> None:
    """Read a job from the standard input, do it, and print the answer. For each further line, try the push again."""
    line = sys.stdin.readline()
    if not line.endswith("\n"):  # the parent died before the snapshot was complete
        return
    job, prepared = Job.from_json(line), None
    while line:
        try:
            hub = Hub(job.destination.repo_id, token=job.destination.token, patience=job.destination.patience)
            hub.check_token()
            package, fingerprint = prepared = prepared or prepare(job, hub, folder)
            pushed = push_checkpoint(job, hub, package)
            answer = Success(pushed, fingerprint, processor_seconds=sum(os.times()[:4])).to_json()
        except GPT2ValueHubError as error:
            answer = failure_to_json(error)
        print(f"\n{ANSWER}{answer}", flush=True)  # on a line of its own, whatever a library has printed
        line = sys.stdin.readline()


def prepare(job: Job, hub: Hub, folder: Path) -> tuple[Package, str]:
    """Make a verified package of the snapshot in `folder`; return it with its fingerprint.

    Raises:
        Everything that `save_package` and `verify_package` raise, and what `push_package` raises without the Hub.
    """
    package_folder = folder / "package"
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
    fingerprint = fingerprint_of(package_folder)
    if fingerprint != job.verified:
        verify_package(package_folder, timeout=VERIFY_TIMEOUT)
    else:
        for refusal in refusals(inspect_package(package_folder)):
            raise refusal
    return package, fingerprint


def _write_metrics(job: Job, repo_id: str, path: Path) -> None:
    """Put the metrics in the card's `model-index`.

    It is written even without metrics. Otherwise the card on the Hub would keep the metrics of an older checkpoint.
    """
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


def fingerprint_of(folder: Path) -> str:
    """A hash of everything in a package except the values of the weights.

    Two packages with the same fingerprint have the same code, config and tokenizer, and tensors of the same names,
    shapes and dtypes. If one of them loads, so does the other. (The save has checked that the weights are finite and
    complete.)
    """
    hashes = read_record(folder).sha256
    others = {name: digest for name, digest in hashes.items() if layout.kind_of(name) != "weights"}
    headers = {name: read_safetensors_header(folder, name) for name in hashes if name.endswith(".safetensors")}
    return hashlib.sha256(repr((sorted(others.items()), sorted(headers.items()))).encode()).hexdigest()


def push_checkpoint(job: Job, hub: Hub, package: Package) -> PushedCheckpoint:
    """Push a verified package as one commit, and make sure that the best checkpoint has its tag.

    Raises:
        Everything that `push_package` raises.
    """
    options = PushOptions(job.destination.branch, job.destination.private, message=job.title, note=job.note)
    for attempt in itertools.count(1):
        try:
            report = push(package, hub, options)
            break
        except ConcurrentPushError as error:
            if attempt == TRIES:
                raise
            logger.warning("step %d is pushed again, on top of that: %s", job.step, error.found)
    assert report.commit is not None
    assert report.url is not None
    is_best = False
    if job.rule is not None:
        with after_commit(report.commit, but="the tag of the best checkpoint may be missing or on another"):
            is_best = report.commit == tag_best(job, job.rule, hub, report.commit)
    return PushedCheckpoint(job.step, job.metrics, report.commit, report.url, report.committed, is_best)


def tag_best(job: Job, rule: BestRule, hub: Hub, commit: str) -> str | None:
    """Give the tag to the best checkpoint, and return its commit; None if no checkpoint has the metric.

    Compares all commits on the branch, and the one that has the tag. The tag alone is not enough: a run that is killed
    between a commit and its tag leaves the tag on an older commit, or no tag.
    """
    commits = hub.commits(job.destination.branch)
    tagged = hub.tagged(rule.tag)
    if tagged is not None and all(found.commit_id != tagged for found in commits):
        commits.append(hub.commits(tagged)[0])
    scores = {found.commit_id: rule.score(metrics_in(found.message)) for found in reversed(commits)}
    scores[commit] = rule.score(job.metrics)
    best = max(scores, key=lambda found: scores[found])  # of equals, the oldest
    if scores[best] == -math.inf:
        return None
    hub.move_tag(rule.tag, commit=best)
    return best
