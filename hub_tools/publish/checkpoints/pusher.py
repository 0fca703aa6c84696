"""Push checkpoints during training: a copy between two training steps, and everything else in a worker process.

Imports the standard library, huggingface_hub, torch, and of hub_tools `errors`, `hub`, `replace_folder`, `sharded`,
`job`, `snapshot`, `worker_process` and what these import. One thread, one worker and one folder on the disk exist while
a checkpoint is being pushed, and only then.
"""

from __future__ import annotations

import atexit
import logging
import os
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from torch import nn

from ...errors import (
    CheckpointPushError,
    HubUnavailableError,
    OptionsError,
    PusherClosedError,
    WorkerDiedError,
)
from ...hub.repository import Hub
from ...package.replace import discard, left_behind, locked_folder
from ...package.sharded import State, in_first_process
from ..push import MAIN, PATIENCE
from .job import BestRule, Destination, Job, PackageOptions, PushedCheckpoint, as_numbers, push_error, read_answer
from .snapshot import Snapshot
from .worker_process import Worker, rest_after

logger = logging.getLogger(__name__)

BEST = "best"  # the tag of the best checkpoint
FIRST_LOOK = 5.0  # seconds to wait for the Hub at the start; after that, training starts without its answer
PAUSE = 10.0  # seconds between two attempts while the Hub does not answer; `push`, `flush` and `close` end the pause
WORKERS = 3  # the most workers for one checkpoint, if they die
FOLDER = "gpt2-value-checkpoints-"  # prefix of this module's folders in the system's folder for temporary files


class CheckpointPusher:
    """Pushes checkpoints of a `GPT2ValueModel` to one branch in the background, each as one commit.

        with CheckpointPusher("me/model", metric_for_best_model="reward", dataset="imdb") as pusher:
            for step in range(steps):
                if step % 500 == 0:
                    pusher.push(model, step=step, metrics={"reward": reward, "kl": kl}, tokenizer=tokenizer)

    `push` copies the weights and returns, so the next training step cannot change them. A worker process then saves,
    verifies and pushes, without a GPU, on one core, at the lowest priority that there is. Over a long run, workers take
    at most 2.5% of one core, so that training loses less than 3% (docs/benchmarks.md): after one that took 5 seconds of
    processor time, the next starts 200 seconds later. If checkpoints come faster, only the newest waits, and those that
    it replaced are `skipped`, never the last: `flush` and `close` push it at once, at the normal priority.

    Memory holds at most two copies of the weights, one that waits and one that is being written to the disk, and the
    worker about 0.5 GB of torch. The disk holds at most two, the snapshot and its package, in the system's folder for
    temporary files (`TMPDIR`). After a `kill -9` the worker removes them within seconds; if it was killed too, the next
    CheckpointPusher does.

    The first checkpoint is verified as by `verify_package`, and so is each one whose config, generation config,
    tokenizer, or tensors' names, shapes or dtypes are new. The others are only checked to be complete and finite.

    Temporary failures (5xx, timeouts, no connection) are logged, and the push is retried until it succeeds or a newer
    checkpoint waits; only `flush` and `close` give up, after `patience`. All other failures (401, 403, 404, weights
    that are not finite, a full disk, a worker that keeps dying) are logged, and raised once, by any next call.

    `close` runs at the end of a `with` block, and otherwise at the interpreter's exit. After an uncaught exception,
    too, the last checkpoint is pushed, or an error in the log says that it is not.

    In a run of several processes, create it in the main process only; for a model that FSDP2 shards, create one in
    each, and call `push` in all: the first gathers the weights, in one more copy, and pushes. A forked process (a data
    loader's worker) cannot use it, and does not disturb it.

    Args:
        repo_id: `name` or `owner/name`; created with the first push if there is none.
        revision: the branch to push to (default: main).
        private: visibility of a repository that is created. For an existing one, pass its own visibility or None.
        token: a user access token; default is the one that huggingface_hub knows.
        metric_for_best_model: the metric by which checkpoints are compared, as in transformers' TrainingArguments.
            The best of all checkpoints on the branch, including those of earlier runs, gets `best_tag`. A checkpoint
            without this metric, or with a NaN, is never the best.
        greater_is_better: default, as in TrainingArguments: True unless the metric's name ends in "loss".
        best_tag: a tag of the repository that is moved from one best checkpoint to the next.
        dataset: what the metrics were measured on, for the card: a dataset's id on the Hub, or a description.
        base_model, license, tags, max_shard_size: as in `save_package`.
        patience: seconds for which one request may keep failing before it is logged (and before `close` gives up).

    Raises:
        AuthenticationError: the token is refused. (If the Hub does not answer, training starts anyway.)
        OptionsError: `repo_id` cannot be a repository's id, or `greater_is_better` or `best_tag` without a metric.
        HubUnavailableError: offline mode is on.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        revision: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        metric_for_best_model: str | None = None,
        greater_is_better: bool | None = None,
        best_tag: str = BEST,
        dataset: str = "the training run",
        base_model: str | None = None,
        license: str | None = None,
        tags: Sequence[str] = (),
        max_shard_size: int | str = "5GB",
        patience: float = PATIENCE,
    ) -> None:
        rule = None
        if metric_for_best_model is not None:
            if greater_is_better is None:
                greater_is_better = not metric_for_best_model.endswith("loss")
            rule = BestRule(metric_for_best_model, greater_is_better, best_tag)
        elif greater_is_better is not None or best_tag != BEST:
            raise OptionsError(
                f"greater_is_better={greater_is_better}, best_tag={best_tag!r} without metric_for_best_model",
                next_step="name the metric, or leave out these two",
            )
        hub = Hub(repo_id, token=token, patience=min(patience, FIRST_LOOK))
        try:
            hub.check_token()
        except HubUnavailableError as error:
            if constants.HF_HUB_OFFLINE:
                raise
            logger.warning("training starts without the Hub's consent: %s", error.found)
        self.repo_id = hub.repo_id
        self._endpoint = hub.api.endpoint
        self._new_job = partial(
            Job,
            dataset=dataset,
            destination=Destination(hub.repo_id, revision or MAIN, private, token, patience),
            package=PackageOptions(base_model, license, tuple(tags), max_shard_size),
            rule=rule,
        )
        for folder, lock in left_behind(Path(tempfile.gettempdir()).glob(f"{FOLDER}*")):
            discard(folder, lock)
        self._owner = os.getpid()
        self._changed = threading.Condition()
        # All of these are read and written while holding _changed.
        self._waiting: Snapshot | None = None
        self._current: Snapshot | None = None  # being pushed; without weights once it is on the disk
        self._thread: threading.Thread | None = None
        self._worker: Worker | None = None
        self._verified: str | None = None  # fingerprint of the last package; see `worker`
        self._next_start = 0.0  # when the next worker may start, by the monotonic clock
        self._pushed: list[PushedCheckpoint] = []
        self._skipped: list[int] = []
        self._failures: list[CheckpointPushError] = []
        self._flushes = 0  # calls of flush that wait
        self._closed = False
        atexit.register(self._close_and_log)

    def push(
        self, model: nn.Module, *, step: int, metrics: Mapping[str, float] | None = None, tokenizer: Any = None
    ) -> None:
        """Copy the weights, and return; they are pushed in the background.

        An earlier checkpoint's error is raised after the copy was taken: whoever catches it and goes on loses nothing.

        Args:
            model: a `GPT2ValueModel`, unwrapped, on any device. Its config, generation config and tokenizer are
                copied with the weights.
            step: the number of the training step, for the commit's title.
            metrics: name -> number; for the commit's title and, where finite, the card's `model-index`.
            tokenizer: a transformers tokenizer, to travel with the model.

        Raises:
            OptionsError: a metric that is no number.
            UnsavableModelError, TokenizerMismatchError and others: what `save_package` refuses, too.
            CheckpointPushError: an earlier checkpoint did not reach the Hub.
            PusherClosedError: after `close`, or in a forked process.
        """
        in_first_process(model, lambda gathered: self._accept(model, gathered, step, metrics or {}, tokenizer))

    def _accept(
        self, model: nn.Module, gathered: State | None, step: int, metrics: Mapping[str, float], tokenizer: Any
    ) -> None:
        """What `push` does in the process that pushes."""
        self._check_usable()
        numbers = as_numbers(metrics)
        with self._changed:
            if self._current is not None and self._current.weights:
                self._skip_waiting()  # before the copy is made, so that memory never holds more than two
            snapshot = Snapshot.of(model, tokenizer, step=step, metrics=numbers, gathered=gathered)
            self._skip_waiting()
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="CheckpointPusher", daemon=True)
                thread.start()  # it waits for our lock; if the system cannot start it, no snapshot is left waiting
                self._thread = thread
            self._waiting = snapshot
            self._changed.notify_all()
        self.check()

    def check(self) -> None:
        """Raise the last failure since the previous call, if there was one.

        Raises:
            CheckpointPushError: with the original error as its cause.
        """
        with self._changed:
            failures, self._failures = self._failures, []
        if failures:
            raise failures[-1] from failures[-1].__cause__  # earlier ones are in the log

    def flush(self) -> None:
        """Wait until everything that was handed to `push` is on the Hub, or has failed.

        Raises:
            CheckpointPushError: the last checkpoint, or an earlier one, did not reach the Hub.
            PusherClosedError: after `close`, or in a forked process.
        """
        self._check_usable()
        with self._changed:
            self._flushes += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._thread is None)
            finally:
                self._flushes -= 1
        self.check()

    def close(self) -> None:
        """`flush`, and accept no more checkpoints. A second call does nothing.

        An interrupt (Ctrl-C) ends the waiting. The log then names the checkpoints that were not pushed.

        Raises:
            CheckpointPushError: as `flush`. The pusher is closed nevertheless.
        """
        if os.getpid() != self._owner:
            return
        with self._changed:
            if self._closed:
                return
        try:
            self.flush()
        finally:
            atexit.unregister(self._close_and_log)
            with self._changed:
                self._closed = True
                unpushed = [str(snapshot.step) for snapshot in (self._current, self._waiting) if snapshot is not None]
                self._waiting, thread = None, self._thread
                self._changed.notify_all()
                if self._worker is not None:
                    self._worker.kill()
            if unpushed:
                logger.error("interrupted: not pushed to %s: step %s", self.repo_id, ", ".join(unpushed))
            if thread is not None:
                thread.join()

    @property
    def pushed(self) -> tuple[PushedCheckpoint, ...]:
        """The checkpoints that are on the Hub, in order."""
        with self._changed:
            return tuple(self._pushed)

    @property
    def skipped(self) -> tuple[int, ...]:
        """The steps of checkpoints that a newer one replaced before they were pushed."""
        with self._changed:
            return tuple(self._skipped)

    def __enter__(self) -> CheckpointPusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self._close_and_log()

    def _close_and_log(self) -> None:
        if os.getpid() != self._owner:
            return
        with self._changed:
            if self._thread is not None:
                logger.warning("waiting until the last checkpoint is on %s; Ctrl-C gives it up", self.repo_id)
        try:
            self.close()
        except CheckpointPushError as error:
            logger.error("%s", error)

    def _check_usable(self) -> None:
        advice = "make a new one: CheckpointPusher(repo_id)"
        if os.getpid() != self._owner:  # first: a fork may have copied the lock while somebody held it
            found = f"this CheckpointPusher belongs to process {self._owner}, from which this one was forked"
            raise PusherClosedError(found, next_step=advice)
        with self._changed:
            if self._closed:
                raise PusherClosedError("this CheckpointPusher is closed", next_step=advice)

    def _skip_waiting(self) -> None:
        """Drop the checkpoint that waits, if there is one, because a newer one takes its place."""
        if self._waiting is not None:
            logger.info("step %d is skipped: a newer checkpoint is there already", self._waiting.step)
            self._skipped.append(self._waiting.step)
            self._waiting = None

    # The thread

    def _run(self) -> None:
        """Push what waits, until nothing does."""
        while True:
            with self._changed:
                if self._waiting is not None:
                    rest = self._next_start - time.monotonic()
                    self._changed.wait_for(lambda: self._flushes > 0, timeout=max(rest, 0))
                self._current, self._waiting = self._waiting, None
                if self._current is None:
                    self._thread = None
                    self._changed.notify_all()
                    return
                snapshot = self._current
            try:
                self._push_in_folder(snapshot)
            except BaseException as error:  # a thread has no caller, so the next call of a method raises it
                with self._changed:
                    snapshot.weights.clear()  # the error's traceback would keep them in memory
                self._keep_failure(snapshot.step, error)

    def _push_in_folder(self, snapshot: Snapshot) -> None:
        """Push a checkpoint from a folder of its own; if a worker dies, start another."""
        folder, lock = locked_folder(FOLDER, Path(tempfile.gettempdir()))
        try:
            for number in range(1, WORKERS + 1):
                try:
                    return self._push_by_worker(snapshot, folder)
                except WorkerDiedError as error:
                    with self._changed:
                        if self._closed or number == WORKERS:
                            raise
                    logger.warning("step %d is not on %s yet, and tried again: %s", snapshot.step, self.repo_id, error)
        finally:
            with self._changed:
                worker, self._worker = self._worker, None
            if worker is not None and os.name == "nt":
                worker.end()  # Windows removes no file that is open
            discard(folder, lock)
            if worker is not None:
                worker.end()  # only now: if this process is killed before, the worker still removes the folder

    def _push_by_worker(self, snapshot: Snapshot, folder: Path) -> None:
        """Have a new worker push a checkpoint, and retry while the Hub does not answer.

        Raises:
            WorkerDiedError: the worker ended without an answer, or the pusher was closed.
            Everything that a job can fail with.
        """
        with self._changed:
            if self._closed:
                raise WorkerDiedError("the pusher was closed in the meantime", next_step="push before close()")
            # Started before the snapshot is written: if this process is killed, the worker removes the snapshot.
            # At the lowest priority, other work could hold up the worker for which `flush` waits.
            self._worker = worker = Worker(folder, self._endpoint, in_background=self._flushes == 0)
            started = time.monotonic()
            job = self._new_job(step=snapshot.step, metrics=snapshot.metrics, verified=self._verified)
        if snapshot.weights:  # not on the disk yet
            snapshot.write(folder)
            with self._changed:
                snapshot.weights.clear()
        while True:
            with self._changed:
                is_last = self._flushes > 0  # an attempt that starts during a `flush` is the last one
            try:
                success = read_answer(worker.ask(job.to_json()))
                break
            except HubUnavailableError as error:
                with self._changed:
                    if is_last or self._closed:
                        raise
                    if self._waiting is not None:
                        logger.warning("step %d is skipped: %s", snapshot.step, error.found)
                        self._skipped.append(snapshot.step)
                        return
                    logger.warning("step %d is not on %s yet, and tried again: %s", snapshot.step, self.repo_id, error)
                    self._changed.wait(PAUSE)
        with self._changed:
            self._verified = success.verified
            self._next_start = started + rest_after(success.processor_seconds)
            self._pushed.append(success.pushed)
            self._current = None
        logger.info("step %d is on %s: %s", snapshot.step, self.repo_id, success.pushed.url)

    def _keep_failure(self, step: int, cause: BaseException) -> None:
        """Keep a failure for the next call."""
        error = push_error(step, self.repo_id, cause)
        with self._changed:
            self._failures.append(error)
            closed = self._closed
        if not closed:  # `close` itself logs what an interrupt stopped
            logger.error("%s", error)
