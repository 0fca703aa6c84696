"""The process beside a training run that saves, verifies and pushes its checkpoints, one after the other.

Imports the standard library, huggingface_hub, PyYAML (which comes with it) and of hub_tools `errors`, `hub`,
`contents`, `inspection`, `layout`, `push`, `verify`; and torch, transformers, `save` and `snapshot` when the first
checkpoint arrives.
A process of its own, because Python's threads would share the training loop's interpreter lock, and torch's its
cores. It runs while a core is idle, on one, without a GPU, and ends when its parent does.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import queue
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import yaml
from huggingface_hub import EvalResult, ModelCard

from ... import layout
from ...errors import GPT2ValueHubError, RemoteNotFoundError, TokenizerMismatchError
from ...hub.repository import Hub
from ...package.inspection import inspect_package
from ...package.verify import problems, verify_package
from ..push import MAIN, push
from ..upload_set import Package

if TYPE_CHECKING:
    from .snapshot import Place

TASK = "text-generation"
_VANISHING = threading.Lock()  # by whichever thread is the first to see that the parent is gone
VERIFY_TIMEOUT = 24 * 3600.0  # seconds: it gets the time that training leaves


@dataclass(frozen=True)
class Settings:
    """What holds for every checkpoint of a run; see `CheckpointPusher`."""

    repo_id: str
    token: str | None = field(repr=False)
    revision: str | None
    private: bool | None
    metric_for_best_model: str | None
    greater_is_better: bool
    best_tag: str
    dataset: str
    base_model: str | None
    license: str | None
    tags: tuple[str, ...]
    max_shard_size: int | str
    patience: float


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on its way: everything of the model but its weights, which are in the file `snapshot`."""

    step: int
    metrics: dict[str, float]
    places: tuple[Place, ...]
    config: dict[str, Any]
    generation_config: Any
    tokenizer: bytes | None  # pickled: it was copied when the snapshot was taken
    snapshot: Path | None = None

    @property
    def message(self) -> str:
        """The commit's title: the step and the metrics."""
        metrics = ", ".join(f"{name}={value:.6g}" for name, value in self.metrics.items())
        return f"Step {self.step}: {metrics}" if metrics else f"Step {self.step}"


@dataclass(frozen=True)
class PushedCheckpoint:
    """A checkpoint that is on the Hub."""

    step: int
    metrics: dict[str, float]
    commit: str
    url: str
    committed: bool  # False where the branch held exactly this already
    best: bool  # whether it is the best so far, and carries the tag


@dataclass(frozen=True)
class Failure:
    """A `GPT2ValueHubError` in a form that travels between processes."""

    kind: str
    found: str
    expected: str
    next_step: str

    @classmethod
    def of(cls, error: GPT2ValueHubError) -> Failure:
        return cls(type(error).__name__, error.found, error.expected, error.next_step)


class Worker:
    """Saves, proves and pushes checkpoints; remembers what it has proven, and which one was the best."""

    def __init__(self, settings: Settings, home: Path) -> None:
        self._settings = settings
        self._home = home
        self._hub: Hub | None = None
        self._proven: object = None  # all but the weights of the package that was verified last
        self._best: float | None = None
        self._best_is_known = False

    def push(self, checkpoint: Checkpoint) -> PushedCheckpoint:
        """Bring one checkpoint to the Hub, in one commit.

        Raises:
            Everything that `push_to_hub` raises.
        """
        settings, folder = self._settings, self._home / "package"
        if self._hub is None:
            hub = Hub(settings.repo_id, token=settings.token, patience=settings.patience)
            hub.check_token()
            self._hub = hub
        hub = self._hub
        shutil.rmtree(folder, ignore_errors=True)  # the one before; a replaced package would be there twice
        self._save(checkpoint, folder)
        self._write_metrics(checkpoint, folder / layout.CARD)
        package = Package.read(folder)
        package.refuse_secrets(hub, checkpoint.message)
        self._prove(checkpoint, folder)
        report = push(
            package,
            hub,
            branch=settings.revision or MAIN,
            private=settings.private,
            create_pr=False,
            tag=None,
            message=checkpoint.message,
            dry_run=False,
        )
        assert report.commit is not None
        assert report.url is not None
        best = self._tag_if_best(checkpoint, report.commit)
        return PushedCheckpoint(
            checkpoint.step, checkpoint.metrics, report.commit, report.url, committed=report.committed, best=best
        )

    def _save(self, checkpoint: Checkpoint, folder: Path) -> None:
        from configuration_gpt2_value import GPT2ValueConfig
        from modeling_gpt2_value import GPT2ValueModel

        from ...package.save import save_package
        from .snapshot import map_snapshot

        settings = self._settings
        assert checkpoint.snapshot is not None
        model = GPT2ValueModel(GPT2ValueConfig.from_dict(checkpoint.config))
        model.load_state_dict(map_snapshot(checkpoint.snapshot, checkpoint.places), assign=True)
        model.generation_config = checkpoint.generation_config
        save_package(
            model,
            folder,
            _tokenizer(checkpoint.tokenizer),
            base_model=settings.base_model,
            license=settings.license,
            tags=settings.tags,
            repo_id=settings.repo_id,
            max_shard_size=settings.max_shard_size,
        )

    def _write_metrics(self, checkpoint: Checkpoint, path: Path) -> None:
        """Put the metrics in the card's `model-index`. It is there also without metrics: the card on the Hub keeps
        what a push does not replace, and an older checkpoint's metrics would be untrue of this one."""
        card = ModelCard.load(path)
        card.data.model_name = self._settings.repo_id.rsplit("/", 1)[-1]
        card.data.eval_results = [
            EvalResult(
                task_type=TASK,
                dataset_type=self._settings.dataset,
                dataset_name=self._settings.dataset,
                metric_type=name,
                metric_name=name,
                metric_value=value,
            )
            for name, value in checkpoint.metrics.items()
            if math.isfinite(value)
        ]
        path.write_text(str(card), encoding="utf-8")

    def _prove(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Verify in full where anything but the values of the weights is new; otherwise inspect, and trust that
        the same code loads the same shapes. (That the weights are finite and whole, the save has seen.)"""
        generation = None if checkpoint.generation_config is None else checkpoint.generation_config.to_dict()
        facts = (checkpoint.places, json.dumps([checkpoint.config, generation], default=str), checkpoint.tokenizer)
        if facts != self._proven:
            verify_package(folder, timeout=VERIFY_TIMEOUT)
            self._proven = facts
            return
        for problem in problems(inspect_package(folder)):
            raise problem

    def _tag_if_best(self, checkpoint: Checkpoint, commit: str) -> bool:
        settings, hub = self._settings, self._hub
        metric = settings.metric_for_best_model
        if metric is None or hub is None:
            return False
        value = checkpoint.metrics.get(metric, math.nan)
        if not math.isfinite(value):
            return False
        try:
            if not self._best_is_known:
                self._best = self._best_on_the_hub(hub, metric)
                self._best_is_known = True
            if self._best is not None and not (
                value > self._best if settings.greater_is_better else value < self._best
            ):
                return False
            hub.move_tag(settings.best_tag, commit=commit)
        except GPT2ValueHubError as error:
            raise type(error)(
                f"the commit {commit} did land; whether it is the best is not known, or not tagged: {error.found}",
                expected=error.expected,
                next_step=error.next_step,
            ) from error
        self._best = value
        return True

    def _best_on_the_hub(self, hub: Hub, metric: str) -> float | None:
        """The metric of the tagged commit, by its card: a run that is resumed goes on where the last one was."""
        commit = hub.tagged(self._settings.best_tag)
        if commit is None:
            return None
        try:
            text = hub.read(layout.CARD, commit=commit, folder=self._home / "cache").decode("utf-8", "replace")
            results = getattr(ModelCard(text, ignore_metadata_errors=True).data, "eval_results", None) or []
        except (RemoteNotFoundError, ValueError, yaml.YAMLError):  # no card, or not one of ours
            return None
        values = (result.metric_value for result in results if result.metric_type == metric)
        return next((float(value) for value in values if isinstance(value, (int, float))), None)


def _tokenizer(pickled: bytes | None) -> Any:
    if pickled is None:
        return None
    try:
        return pickle.loads(pickled)  # made by our parent
    except (AttributeError, ImportError) as error:
        raise TokenizerMismatchError(
            f"the tokenizer cannot be rebuilt in another process: {error}",
            expected="a tokenizer of transformers' own, without code",
            next_step="load one with AutoTokenizer.from_pretrained(...)",
        ) from error


def main() -> None:
    """Read (parent's process id, home, Settings) from the standard input, and then one `Checkpoint` after the other;
    answer each with a `PushedCheckpoint` or a `Failure` on the standard output. All of it is pickled."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training loop, which then closes us
    if hasattr(signal, "SIGTTOU"):  # a terminal under `stty tostop` stops whoever writes to it from the background
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    _give_way()
    jobs, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    parent, home, settings = pickle.load(jobs)
    threading.Thread(target=_end_with, args=(parent, home), daemon=True).start()
    inbox: queue.SimpleQueue[Checkpoint | None] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(jobs, inbox, home), daemon=True).start()
    worker = Worker(settings, home)
    while (checkpoint := inbox.get()) is not None:
        try:
            answer: PushedCheckpoint | Failure = worker.push(checkpoint)
        except GPT2ValueHubError as error:
            answer = Failure.of(error)
        try:
            pickle.dump(answer, answers)
            answers.flush()
        except BrokenPipeError:
            _vanish(home)


def _give_way() -> None:
    """Run only while a core has nothing else to do.

    On Linux by SCHED_IDLE (sched(7)), which leaves a core at once when somebody needs it. The lowest nice value, as
    elsewhere, keeps it for some milliseconds, for which all threads of a training step wait.
    """
    if hasattr(os, "nice"):
        os.nice(19)
    if sys.platform == "linux":
        with suppress(OSError):  # sandboxes refuse it, some as if it did not exist
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _receive(jobs: BinaryIO, inbox: queue.SimpleQueue[Checkpoint | None], home: Path) -> None:
    """Hand on what arrives, until None. Where the pipe ends without it, the parent has died."""
    try:
        while (checkpoint := pickle.load(jobs)) is not None:
            inbox.put(checkpoint)
    except (EOFError, pickle.UnpicklingError):  # in the middle of a checkpoint, too
        _vanish(home)
    finally:
        inbox.put(None)  # where unpickling fails in another way, too: we end then, and the parent hears of it


def _end_with(parent: int, home: Path) -> None:
    """End when the parent is gone: where it forked, its children hold our pipe open."""
    while os.name != "posix" or os.getppid() == parent:
        time.sleep(0.5)
    _vanish(home)


def _vanish(home: Path) -> None:
    """Remove `home` and end, with the interpreter that verifies, if there is one. Both that and our main thread may
    still be writing there, so what was removed can be there again."""
    with _VANISHING:
        for _ in range(100):
            shutil.rmtree(home, ignore_errors=True)
            if not home.exists():
                break
            time.sleep(0.05)
        if hasattr(os, "killpg") and os.getpgrp() == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)
