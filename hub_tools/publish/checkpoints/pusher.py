"""Push checkpoints while training goes on: a copy between two steps, and all the rest in a worker process.

Imports the standard library, huggingface_hub, torch, and of hub_tools `errors`, `hub`, `replace_folder`, `job`,
`snapshot` and what these import. While a checkpoint is on its way there are one thread, one worker (see `worker`) and
one folder on the disk; while none is, there is nothing of these.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from huggingface_hub import constants
from torch import nn

from ...errors import (
    CardMetadataError,
    CheckpointPushError,
    ConcurrentPushError,
    GPT2ValueHubError,
    HubUnavailableError,
    PusherClosedError,
    PushOptionsError,
    WorkerDiedError,
)
from ...hub.repository import Hub
from ...package.replace_folder import discard, left_behind, locked_folder
from ..push import MAIN, PATIENCE
from .job import RESULT, BestRule, Destination, Job, PackageOptions, PushedCheckpoint, Result, result_from_json
from .snapshot import Snapshot
from .worker_process import kill, start

logger = logging.getLogger(__name__)

BEST = "best"  # the tag of the best checkpoint
FIRST_LOOK = 5.0  # seconds that a Hub may take to answer before training starts without having asked it
TRIES = 3  # of a checkpoint, where its worker dies or others push; where the Hub does not answer, there is no limit
FOLDER = "gpt2-value-checkpoints-"  # folders of this name in the system's folder for temporary files are ours


class CheckpointPusher:
    """Pushes checkpoints of a `GPT2ValueModel` to one branch in the background, each as one commit.

        with CheckpointPusher("me/model", metric_for_best_model="reward", dataset="imdb") as pusher:
            for step in range(steps):
                ...
                if step % 500 == 0:
                    pusher.push(model, step=step, metrics={"reward": reward, "kl": kl}, tokenizer=tokenizer)

    `push` copies the weights and returns: the next training step cannot change them. For each checkpoint one process,
    without a GPU, saves, verifies and pushes, on one core and (on Linux) only while that core is idle: where training
    leaves none idle, checkpoints take longer, and training does not. Where pushing is slower than training, only the
    newest checkpoint waits, and those that it replaced are `skipped`; the last one is never dropped.

    Memory and disk: this process holds at most two copies of the weights in main memory, one waiting and one being
    written to the disk; the worker maps its copy from the disk and needs about 0.5 GB for torch. On the disk there are
    at most two, the snapshot and its package, in the system's folder for temporary files (`TMPDIR`), and none while no
    checkpoint is on its way. After a `kill -9` the worker removes them within seconds, and ends; where it was killed
    too, the next CheckpointPusher does.

    Verified: in full, as by `verify_package`, is the first checkpoint and each whose config, generation config,
    tokenizer, or tensors' names, shapes or types are new. Of the others it is checked that they are complete, finite,
    and have this same code, but no fresh interpreter computes with them again.

    Failures: what may pass (5xx, timeouts, no connection, somebody else's push in between) is logged, and tried again
    until it works or a newer checkpoint waits; only `flush` and `close` give up, after `patience`. Everything else
    (401, 403, 404, weights that are not finite, a full disk, an error of ours) is logged when it happens, and raised
    by the next call of any method, once. `close` runs at the end of a `with` block, and at the interpreter's exit
    where nobody called it: also an uncaught exception in the loop leaves the last checkpoint pushed, or an error in
    the log which says that it is not. An exception on its way out of the `with` block is not replaced by ours, which
    is logged.

    In a run of several processes, make one in the main process only. A process forked from this one (a data loader's
    worker) cannot use it, and does not disturb it.

    Args:
        repo_id: `name` or `owner/name`; created with the first push if there is none.
        revision: the branch to push to (default: main).
        private: visibility of a repository that is created; for one that exists it must be as it is.
        token: a user access token; default is the one that huggingface_hub knows.
        metric_for_best_model: the metric by which checkpoints are compared, as in transformers' TrainingArguments.
            Each one that is better than all before carries `best_tag`. A checkpoint without this metric, with a NaN,
            or that was skipped is never the best. A run that is resumed compares with all checkpoints on the branch,
            and with the one that has the tag.
        greater_is_better: default, as there: unless the metric's name ends in "loss".
        best_tag: a tag of the repository that is moved from one best checkpoint to the next.
        dataset: what the metrics were measured on, for the card: a dataset's id on the Hub, or words.
        base_model, license, tags, max_shard_size: as in `save_package`.
        patience: seconds for which one request may keep failing before it is logged (and before `close` gives up).

    Raises:
        AuthenticationError, NoAccessError: the token, asked about before training starts. (A Hub that does not answer
            within some seconds is no reason not to start.)
        PushOptionsError: `repo_id` cannot be a repository's id, or `greater_is_better` or `best_tag` has no metric.
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
        if metric_for_best_model is None and (greater_is_better is not None or best_tag != BEST):
            raise PushOptionsError(
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
        rule = None
        if metric_for_best_model is not None:
            if greater_is_better is None:
                greater_is_better = not metric_for_best_model.endswith("loss")
            rule = BestRule(metric_for_best_model, greater_is_better, best_tag)
        self._owner = os.getpid()
        for folder, lock in left_behind(Path(tempfile.gettempdir()).glob(f"{FOLDER}*")):
            discard(folder, lock)
        self._changed = threading.Condition()
        # All of these are read and written while holding _changed.
        self._job = Job(  # what every checkpoint's job has in common, and what the last one found out
            step=0,
            metrics={},
            dataset=dataset,
            destination=Destination(hub.repo_id, revision or MAIN, private, token, patience),
            package=PackageOptions(base_model, license, tuple(tags), max_shard_size),
            rule=rule,
        )
        self._waiting: tuple[Job, Snapshot] | None = None
        self._on_its_way: int | None = None  # the step
        self._in_memory = False  # whether the snapshot on its way is not on the disk yet
        self._thread: threading.Thread | None = None
        self._worker: subprocess.Popen[str] | None = None
        self._failures: list[CheckpointPushError] = []
        self._pushed: list[PushedCheckpoint] = []
        self._skipped: list[int] = []
        self._flushes = 0  # calls of flush that wait
        self._closed = False
        atexit.register(self._at_exit)

    def push(
        self, model: nn.Module, *, step: int, metrics: Mapping[str, float] | None = None, tokenizer: Any = None
    ) -> None:
        """Copy the weights, and return; they are pushed in the background.

        An error of an earlier checkpoint is raised here after the copy was taken: who catches it and goes on loses
        nothing.

        Args:
            model: a `GPT2ValueModel`, unwrapped, on any device. Its config, generation config and tokenizer are
                copied with the weights.
            step: the number of the training step, for the commit's title.
            metrics: name -> number; for the commit's title and, where finite, the card's `model-index`.
            tokenizer: a transformers tokenizer, to travel with the model.

        Raises:
            WrongModelError, MissingHeadError, UnsavableWeightsError, UnsavableConfigError: see `save_package`.
            CardMetadataError: a metric that is no number.
            TokenizerMismatchError: a tokenizer that cannot be copied.
            CheckpointPushError: an earlier checkpoint did not reach the Hub.
            PusherClosedError: after `close`, or in a forked process.
        """
        self._check_usable()
        numbers = _numbers(metrics or {})
        with self._changed:
            if self._waiting is not None and self._in_memory:
                self._skip()  # before the copy and not after it: there are never more than two
            snapshot = Snapshot.of(model, tokenizer)
            if self._waiting is not None:
                self._skip()
            if self._thread is None:  # it begins when we let go of the lock; where it cannot be started, nothing waits
                thread = threading.Thread(target=self._run, name="CheckpointPusher", daemon=True)
                thread.start()
                self._thread = thread
            self._waiting = replace(self._job, step=step, metrics=numbers), snapshot
        self.check()

    def check(self) -> None:
        """Raise what went wrong since the last call, if anything did.

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
            try:
                self._changed.wait_for(lambda: self._thread is None)
            finally:
                self._flushes -= 1
        self.check()

    def close(self) -> None:
        """`flush`, and accept no more checkpoints. A second call does nothing.

        An interrupt (Ctrl-C) ends the waiting; what was not pushed by then is not, and the log says so.

        Raises:
            CheckpointPushError: as `flush`. The pusher is closed all the same.
        """
        if os.getpid() != self._owner:
            return
        with self._changed:
            if self._closed:
                return
        try:
            self.flush()
        finally:
            with self._changed:
                self._closed = True
                lost = [self._on_its_way] if self._on_its_way is not None else []
                lost += [self._waiting[0].step] if self._waiting is not None else []
                self._waiting = None
                thread = self._thread
                if self._worker is not None:
                    kill(self._worker)
            atexit.unregister(self._at_exit)
            if lost:
                logger.error("interrupted: not pushed to %s: step %s", self.repo_id, ", ".join(map(str, lost)))
            if thread is not None:
                thread.join()

    @property
    def pushed(self) -> tuple[PushedCheckpoint, ...]:
        """The checkpoints that are on the Hub, in order."""
        with self._changed:
            return tuple(self._pushed)

    @property
    def skipped(self) -> tuple[int, ...]:
        """The steps of checkpoints that a newer one replaced before they left."""
        with self._changed:
            return tuple(self._skipped)

    def __enter__(self) -> CheckpointPusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._close_and_log()

    def _at_exit(self) -> None:
        if os.getpid() == self._owner:
            self._close_and_log()

    def _close_and_log(self) -> None:
        with self._changed:
            idle = self._thread is None
        if not idle:
            logger.warning("waiting until the last checkpoint is on %s; Ctrl-C gives it up", self.repo_id)
        try:
            self.close()
        except CheckpointPushError as error:
            logger.error("%s", error)

    def _check_usable(self) -> None:
        found = None
        if os.getpid() != self._owner:  # first: a fork may have copied the lock while somebody held it
            found = f"this CheckpointPusher belongs to process {self._owner}, from which this one was forked"
        else:
            with self._changed:
                if self._closed:
                    found = "this CheckpointPusher is closed"
        if found:
            raise PusherClosedError(found, next_step="make a new one: CheckpointPusher(repo_id)")

    def _skip(self) -> None:
        """Let a newer checkpoint take the place of the one that waits."""
        assert self._waiting is not None
        step = self._waiting[0].step
        self._waiting = None
        self._skipped.append(step)
        logger.info("step %d is skipped: a newer checkpoint is there already", step)

    # The thread

    def _run(self) -> None:
        """Push what waits, until nothing does."""
        while True:
            with self._changed:
                if self._waiting is None:
                    self._thread = None
                    self._changed.notify_all()
                    return
                (job, snapshot), self._waiting = self._waiting, None
                job = replace(job, verified=self._job.verified, best=self._job.best)
                self._on_its_way, self._in_memory = job.step, True
            try:
                result = self._push(job, snapshot)
            except BaseException as error:  # a thread has no caller: whatever it is, the next call raises it
                self._fail(job.step, error)
            else:
                if result is not None:
                    with self._changed:
                        self._job = replace(self._job, verified=result.verified, best=result.best)
                        self._pushed.append(result.pushed)
                    logger.info("step %d is on %s: %s", job.step, self.repo_id, result.pushed.url)
            finally:
                snapshot.weights.clear()  # the traceback of an error would keep them
                with self._changed:
                    self._on_its_way, self._in_memory = None, False

    def _push(self, job: Job, snapshot: Snapshot) -> Result | None:
        """Have a checkpoint pushed; again, where it failed in a way that passes. None: a newer one took its place."""
        folder, lock = locked_folder(FOLDER, Path(tempfile.gettempdir()))
        with ExitStack() as workers:
            try:
                for attempt in itertools.count(1):
                    with self._changed:
                        flushing = self._flushes > 0  # an attempt that begins while somebody waits is the last
                    try:
                        return self._work(job, snapshot, folder, workers)
                    except (HubUnavailableError, ConcurrentPushError, WorkerDiedError) as error:
                        unreachable = isinstance(error, HubUnavailableError)
                        with self._changed:
                            if self._closed or (not unreachable and attempt == TRIES):
                                raise
                            if unreachable and self._waiting is not None:
                                self._skipped.append(job.step)
                                logger.warning("step %d is skipped: %s", job.step, error.found)
                                return None
                            if unreachable and flushing:
                                raise
                        logger.warning("step %d is not on %s yet, and tried again: %s", job.step, self.repo_id, error)
            finally:
                discard(folder, lock)
        raise AssertionError("unreachable")

    def _work(self, job: Job, snapshot: Snapshot, folder: Path, workers: ExitStack) -> Result:
        """Have one worker do the job, and leave it to `workers` to end it when the folder is gone.

        Should this process be killed, the worker removes the folder. So it is started before the snapshot is written,
        and one of an earlier attempt ends only when it is there.

        Raises:
            WorkerDiedError: the worker ended without a result.
            Everything that `push_checkpoint` raises.
        """
        result, last = folder / RESULT, "it printed nothing"
        result.unlink(missing_ok=True)  # of an earlier attempt
        with workers.pop_all():
            workers.enter_context(suppress(BrokenPipeError))  # closing the pipe to one that died
            worker = workers.enter_context(start(folder, self._endpoint))
            workers.callback(kill, worker)
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            with self._changed:
                if self._closed:
                    raise WorkerDiedError("the pusher was closed in the meantime", next_step="push before close()")
                self._worker = worker
            if snapshot.weights:
                snapshot.write(folder)
                snapshot.weights.clear()
                with self._changed:
                    self._in_memory = False
            with suppress(BrokenPipeError):  # it has died
                worker.stdin.write(f"{job.to_json()}\n")
                worker.stdin.close()
            for line in worker.stdout:
                last = line.strip() or last
                logger.warning("step %d: %s", job.step, line.rstrip())
        finally:
            with self._changed:
                self._worker = None
        if not result.exists():
            kill(worker)  # where it has ended, what it started may live on
            status = worker.wait()
            raise WorkerDiedError(
                "the process that pushes checkpoints ended with "
                f"{f'signal {-status}' if status < 0 else f'exit status {status}'}: {last[:500]}",
                next_step="read what it printed, in the log; make sure that there is enough memory",
            )
        return result_from_json(result.read_text(encoding="utf-8"))

    def _fail(self, step: int, cause: BaseException) -> None:
        """Keep a failure for the next call."""
        known = cause
        if not isinstance(known, GPT2ValueHubError):
            advice = "correct what this error names; the next checkpoint is tried all the same"
            known = GPT2ValueHubError(f"{type(cause).__name__}: {cause}", next_step=advice)
        error = CheckpointPushError(
            f"the checkpoint of step {step} is not on {self.repo_id}: {known.found}",
            expected=known.expected,
            next_step=known.next_step,
            step=step,
        )
        error.__cause__ = cause
        with self._changed:
            closed = self._closed
            self._failures.append(error)
        if not closed:  # what an interrupt stopped, `close` tells
            logger.error("%s", error)


def _numbers(metrics: Mapping[str, float]) -> dict[str, float]:
    numbers = {}
    for name, value in metrics.items():
        try:
            numbers[str(name)] = float(value)
        except (TypeError, ValueError) as error:
            raise CardMetadataError(
                f"the metric {name!r} is {value!r}", expected="a number", next_step="pass float(...) or leave it out"
            ) from error
    return numbers
