"""Save, verify and push one checkpoint, in a process that gives way to training: `python -m hub_tools.publish.worker
FOLDER`.

Imports the rest only after it has given way: this takes seconds. The folder holds what `checkpoints` wrote.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .push import Push

NOTE = "gpt2-value-checkpoint: "  # a line in a commit's description: the step and its metrics, as JSON
VERIFY_TIMEOUT = 24 * 3600.0  # seconds; long, because other work goes first
TRIES = 3  # of a push, if others push at the same time


def main(folder: Path, parent: int) -> None:
    """Do the job in a folder when the standard input says so, and leave the answer there. If the parent has died,
    nobody reads it, and the folder is removed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the training loop, which then ends this process
    with suppress(OSError, AttributeError):  # a sandbox forbids it; Windows has no such thing
        os.nice(19)
    from ..errors import GPT2ValueHubError
    from .checkpoints import ANSWER, GO  # this import takes seconds, while the snapshot is being written

    if sys.stdin.buffer.read() == GO:
        try:
            answer = do(folder)
        except GPT2ValueHubError as error:
            answer = {"error": type(error).__name__, **vars(error)}
        Path(folder, ANSWER).write_text(json.dumps(answer))
    if os.getppid() != parent:
        shutil.rmtree(folder, ignore_errors=True)


def do(folder: Path) -> dict[str, Any]:
    """Push the snapshot in a folder as one commit; tag it if it is the best; return a PushedCheckpoint's other fields.

    Raises:
        Everything that `save_package` and `push_package` raise.
    """
    import torch

    from .. import layout
    from ..errors import ConcurrentPushError
    from ..package.save import save_package
    from .checkpoints import SNAPSHOT
    from .push import Push, after_commit

    model, tokenizer, job = torch.load(folder / SNAPSHOT, mmap=True, weights_only=False)  # our own file
    finite = {name: value for name, value in job["metrics"].items() if math.isfinite(value)}
    title = ", ".join(f"{name}={value:.6g}" for name, value in job["metrics"].items())
    title = f"Step {job['step']}{': ' if title else ''}{title}"
    note = NOTE + json.dumps({"step": job["step"], "metrics": finite})
    package = folder / "package"
    for tries_left in reversed(range(TRIES)):
        push = Push(**job["push"], message=title, note=note)
        save_package(model, package, tokenizer, **job["save"], repo_id=push.repo_id)
        _write_metrics(finite, job["dataset"], push.repo_id, package / layout.CARD)
        try:
            report = push.run(package, timeout=VERIFY_TIMEOUT)
            break
        except ConcurrentPushError:
            if not tries_left:
                raise
    commit = str(report.commit)
    with after_commit(commit, but="the tag of the best checkpoint may be missing or on another"):
        best = push.hub.patiently("find the best checkpoint", lambda: tag_best(push, commit, finite, *job["best"]))
    return {"commit": commit, "url": report.url, "best": best}


def _write_metrics(metrics: dict[str, float], dataset: str, repo_id: str, path: Path) -> None:
    """Put the metrics in the card's `model-index`: also none, so that the card on the Hub does not keep an older
    checkpoint's."""
    from huggingface_hub import EvalResult, ModelCard

    card = ModelCard.load(path)
    card.data.model_name = repo_id.rsplit("/", 1)[-1]
    card.data.eval_results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in metrics.items()
    ]
    path.write_text(str(card), encoding="utf-8")


def tag_best(push: Push, commit: str, metrics: dict[str, float], metric: str | None, sign: int, tag: str) -> bool:
    """Give the tag to a commit if its metric beats that of the commit that has it; return whether it has it now."""
    if metric not in metrics:
        return False
    tagged = push.tagged(tag)
    best = None if tagged is None else metrics_in(push.descriptions(tagged).get(tagged, "")).get(metric)
    if best is None or sign * metrics[metric] > sign * best:
        push.set_tag(tag, commit, move=True)
        return True
    return tagged == commit


def metrics_in(description: str) -> dict[str, float]:
    """Return the metrics in a commit's description; none if the commit is not a checkpoint."""
    for line in description.splitlines():
        if line.startswith(NOTE):
            try:
                return {name: float(value) for name, value in json.loads(line[len(NOTE) :])["metrics"].items()}
            except (ValueError, TypeError, LookupError, AttributeError):  # somebody edited it
                return {}
    return {}


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
