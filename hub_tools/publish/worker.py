"""Save, verify and push one checkpoint: `python -m hub_tools.publish.worker FOLDER`, which `checkpoints` starts.

The folder holds a call of `push_checkpoint`. The answer is the last line on the standard output, as JSON.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard
from torch import nn

from .. import layout
from ..errors import GPT2ValueHubError
from .push import Push

CALL = "call.pt"  # in the worker's folder
VERIFY_TIMEOUT = 24 * 3600.0  # seconds; long, because other work goes first


def main(home: Path) -> None:
    """Make the call that is written in a folder, remove the folder, and print what the call returned or raised."""
    call = torch.load(home / CALL, mmap=True, weights_only=False)  # our own file
    try:
        answer = call(home / "package")
    except GPT2ValueHubError as error:
        answer = {"error": type(error).__name__, **vars(error)}
    finally:
        shutil.rmtree(home, ignore_errors=True)  # nobody else does it, if training has been killed meanwhile
    print(json.dumps(answer))


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
    shown = ", ".join(f"{name}={value:.6g}" for name, value in metrics.items())
    pushing = push(message=f"Step {step}{': ' if shown else ''}{shown}")
    save(model, folder, tokenizer)
    _write_metrics(metrics, dataset, pushing.repo_id, folder / layout.CARD)
    report = pushing.run(folder, timeout=VERIFY_TIMEOUT)
    return {"commit": report.commit, "url": report.url, "best": tag(pushing, str(report.commit), metrics)}


def tag_best(push: Push, commit: str, metrics: dict[str, float], *, metric: str | None, sign: int, tag: str) -> bool:
    """Give the tag to a commit if its metric beats that of the commit that has it; return whether it has it now."""
    if metric is None or not math.isfinite(metrics.get(metric, math.nan)):
        return False

    def beats(other: str) -> bool:
        title = push.ask("list the commits", push.hub.api.list_repo_commits, revision=other)[0].title
        found = re.search(rf"[ :]{re.escape(metric)}=(-?\d+(\.\d+)?(e[+-]\d+)?)", title)
        return found is None or sign * float(f"{metrics[metric]:.6g}") > sign * float(found[1])

    return push.set_tag(tag, commit, beats=beats)


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
        if math.isfinite(value)
    ]
    path.write_text(str(card), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
