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
    from .push import Push, PushReport

NOTE = "gpt2-value-checkpoint: "  # a line in a commit's description: the step and its metrics, as JSON
VERIFY_TIMEOUT = 24 * 3600.0  # seconds; long, because other work goes first
TRIES = 3  # of a push, if others push at the same time


def main(folder: Path) -> None:
    """Do the job that a line of the standard input names, and leave the answer in the folder. If the parent has died,
    nobody reads it, and the folder is removed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the training loop, which then ends this process
    with suppress(OSError, AttributeError):  # a sandbox forbids it; Windows has no such thing
        os.nice(19)
    from . import checkpoints  # the imports take most of the time, also while the snapshot is being written

    line = sys.stdin.readline()
    job = json.loads(line) if line.endswith("\n") else None
    if job is not None:
        from ..errors import GPT2ValueHubError

        try:
            answer = do(job, folder)
        except GPT2ValueHubError as error:
            answer = {"error": type(error).__name__, **vars(error)}
        partial = folder / "partial"
        partial.write_text(json.dumps(answer))
        partial.replace(folder / checkpoints.ANSWER)
    if job is None or os.getppid() != job["parent"]:
        shutil.rmtree(folder, ignore_errors=True)


def do(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Push the snapshot in a folder as one commit; tag it if it is the best; return a PushedCheckpoint's other fields.

    Raises:
        Everything that `save_package` and `push_package` raise.
    """
    from .. import layout
    from ..errors import ConcurrentPushError
    from ..package.save import save_package
    from .push import Push, after_commit

    metrics = job["metrics"]
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    title = f"Step {job['step']}"
    if metrics:
        title += ": " + ", ".join(f"{name}={value:.6g}" for name, value in metrics.items())
    note = NOTE + json.dumps({"step": job["step"], "metrics": finite})
    package, report = folder / "package", None
    for attempt in range(1, TRIES + 1):
        push = Push(**job["push"], message=title, note=note)
        save_package(*_read(folder), **job["save"], repo_id=push.repo_id)
        _write_metrics(finite, job["dataset"], push.repo_id, package / layout.CARD)
        try:
            report = push.run(package, timeout=VERIFY_TIMEOUT)
            break
        except ConcurrentPushError:
            if attempt == TRIES:
                raise
    assert report is not None
    assert report.commit is not None
    with after_commit(report.commit, but="the tag of the best checkpoint may be missing or on another"):
        best = push.hub.patiently("find the best checkpoint", lambda: tag_best(job["best"], metrics, push, report))
    return {"commit": report.commit, "url": report.url, "best": best}


def _read(folder: Path) -> tuple[Any, Path, Any]:
    """Return a snapshot's model, with its weights mapped from the file, where its package goes, and its tokenizer."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    from configuration_gpt2_value import GPT2ValueConfig
    from modeling_gpt2_value import GPT2ValueModel

    from .checkpoints import TOKENIZER, WEIGHTS

    model = GPT2ValueModel(GPT2ValueConfig.from_json_file(folder / "config.json"))
    model.load_state_dict(torch.load(folder / WEIGHTS, mmap=True, weights_only=True), assign=True)
    has_one = (folder / "generation_config.json").exists()
    model.generation_config = GenerationConfig.from_pretrained(folder) if has_one else None
    tokenizer = None
    if (folder / TOKENIZER).exists():
        tokenizer = AutoTokenizer.from_pretrained(folder / TOKENIZER, trust_remote_code=False, local_files_only=True)
    return model, folder / "package", tokenizer


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


def tag_best(rule: dict[str, Any], metrics: dict[str, float], push: Push, report: PushReport) -> bool:
    """Give the tag to this checkpoint if it beats the one that has it; return whether it has it now."""

    def score(found: dict[str, float]) -> float:
        value = found.get(rule["metric"], math.nan)
        return rule["sign"] * value if math.isfinite(value) else -math.inf

    commit, tagged = str(report.commit), push.tagged(rule["tag"])
    if tagged != commit and score(metrics) > -math.inf:
        best = -math.inf if tagged is None else score(metrics_in(push.descriptions(tagged).get(tagged, "")))
        if score(metrics) > best:
            push.set_tag(rule["tag"], commit, move=True)
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
    main(Path(sys.argv[1]))
