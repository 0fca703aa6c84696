"""Save, verify and push one checkpoint: `python -m hub_tools.publish.worker FOLDER`, which `checkpoints` starts.

The folder holds a call of `push_checkpoint`. The answer is the last line on the standard output, as JSON.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard
from torch import nn

from .. import layout
from ..errors import ConcurrentPushError, GPT2ValueHubError
from ..hub.download import download_file, read_repository
from .push import Push, after_commit

CALL = "call.pt"  # in the worker's folder
VERIFY_TIMEOUT = 24 * 3600.0  # seconds; long, because other work goes first
TRIES = 3  # of a push, if others push at the same time


def main(home: Path) -> None:
    """Make the call that is written in a folder, remove the folder, and print what the call returned or raised."""
    call = torch.load(home / CALL, mmap=True, weights_only=False)  # our own file
    try:
        answer = call(home / "package")
    except GPT2ValueHubError as error:
        answer = {"error": type(error).__name__, **vars(error)}
    finally:
        shutil.rmtree(home, ignore_errors=True)  # nobody else does it, if training has been killed meanwhile
    with suppress(BrokenPipeError):
        print(json.dumps(answer), flush=True)


def push_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    tokenizer: Any,
    step: int,
    metrics: dict[str, float],
    dataset: str,
    save: Callable[..., object],
    push: Callable[..., Push],
    tag: Callable[[Push, str, dict[str, float]], bool],
) -> dict[str, Any]:
    """Push a model as one commit, by way of a package in a new folder; tag it if it is the best; return what else a
    `PushedCheckpoint` says.

    Args:
        model, tokenizer, step, metrics, dataset: as for `CheckpointPusher` and its `push`.
        save: `save_package`, with its options.
        push: `Push`, with its arguments but the message.
        tag: `tag_best`, with its last arguments.

    Raises:
        Everything that `save_package` and `push_package` raise.
    """
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    title = ", ".join(f"{name}={value:.6g}" for name, value in metrics.items())
    title = f"Step {step}{': ' if title else ''}{title}"
    for tries_left in reversed(range(TRIES)):
        pushing = push(message=title)
        save(model, folder, tokenizer)
        _write_metrics(finite, dataset, pushing.repo_id, folder / layout.CARD)
        try:
            report = pushing.run(folder, timeout=VERIFY_TIMEOUT)
            break
        except ConcurrentPushError:
            if not tries_left:
                raise
    commit = str(report.commit)
    with after_commit(commit, but="the tag of the best checkpoint may be missing or on another"):
        best = pushing.hub.patiently("find the best checkpoint", lambda: tag(pushing, commit, finite))
    return {"commit": commit, "url": report.url, "best": best}


def tag_best(push: Push, commit: str, metrics: dict[str, float], *, metric: str | None, sign: int, tag: str) -> bool:
    """Give the tag to a commit if its metric beats that of the commit that has it; return whether it has it now."""
    if metric not in metrics:
        return False
    tagged = push.tagged(tag)
    best = None if tagged is None else _metrics_at(push, tagged).get(metric)
    if best is None or sign * metrics[metric] > sign * best:
        push.set_tag(tag, commit, move=True)
        return True
    return tagged == commit


def _write_metrics(metrics: dict[str, float], dataset: str, repo_id: str, path: Path) -> None:
    """Put the metrics in the card's `model-index`: also none, so that the card on the Hub does not keep an older
    checkpoint's."""
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


def _metrics_at(push: Push, commit: str) -> dict[str, float]:
    """Return the metrics in the card of a commit; none where there is no card, or none that can be read."""
    there = read_repository(push.hub, push.repo_id, commit)
    if layout.CARD not in there.files:
        return {}
    with tempfile.TemporaryDirectory(prefix="gpt2-value-card-") as cache:
        path = download_file(push.hub, there, layout.CARD, Path(cache))
        results = ModelCard.load(path, ignore_metadata_errors=True).data.eval_results or []
    return {result.metric_type: result.metric_value for result in results if isinstance(result.metric_value, float)}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
