"""Push checkpoints while training goes on: a snapshot between two steps, and all the rest in a process beside.

Imports the standard library, huggingface_hub, torch, and of hub_tools `checkpoint_process`, `errors`, `hub`, `save`,
`snapshot` and what these import. What happens to a checkpoint after it left this process is in `checkpoint_worker`.
"""

from __future__ import annotations

import atexit
import logging
import os
import pickle
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    SaveFailedError,
    TokenizerMismatchError,
    WorkerDiedError,
)
from ...hub.repository import Hub
from ...package.save import installed_shell
from ..push import PATIENCE
from .snapshot import Snapshot, places_of
from .worker import Checkpoint, PushedCheckpoint, Settings
from .worker_process import Home, WorkerProcess

logger = logging.getLogger(__name__)

BEST = "best"  # the tag of the best checkpoint
FIRST_LOOK = 5.0  # seconds that a Hub may take to answer before training starts without having asked it
# How often a checkpoint is tried again after what may pass; a Hub that does not answer is tried again for ever.
TRIES = {ConcurrentPushError: 5, WorkerDiedError: 2}


@dataclass(frozen=True)
class _Waiting:
    checkpoint: Checkpoint
    snapshot: Snapshot


class CheckpointPusher:
    """Pushes checkpoints of a `GPT2ValueModel` to one branch in the background, each as one commit.

        with CheckpointPusher("me/model", metric_for_best_model="reward", dataset="imdb") as pusher:
            for step in range(steps):
                ...
                if step % 500 == 0:
                    pusher.push(model, step=step, metrics={"reward": reward, "kl": kl}, tokenizer=tokenizer)

    `push` copies the weights and returns: the next training step cannot tear them. One process beside this one, without
    a GPU, saves, verifies and pushes, in order, on one core and (on Linux) only while that core is idle: where training
    leaves none idle, checkpoints take longer, and training does not. Where pushing is slower than training, only the
    newest checkpoint waits, and those that it replaced are `skipped`; the last one is never dropped.

    Memory and disk: this process holds at most two copies of the weights, one waiting and one being written to the
    disk, in main memory, and uses them again; the process beside maps its copy from the disk and needs about 0.5 GB
    for torch. On the disk there are at most two, the snapshot and its package, in the system's folder for temporary
    files (`TMPDIR`). They are removed at the end; after a `kill -9`, by the process beside, within a second, or where
    it was killed too by the next CheckpointPusher.

    Verified: the first checkpoint in full, as by `verify_package`, and so is each one whose config, generation config,
    tokenizer, or tensors' names, shapes or types are new. Of the others it is checked that they are complete, finite,
    and have this same code, but no fresh interpreter computes with them again.

    Failures: what may pass (5xx, timeouts, no connection, somebody else's push in between) never reaches the training
    loop: it is logged, and tried again until it works or a newer checkpoint waits; only `flush` and `close` give up,
    after `patience`. Everything else (401, 403, 404, weights that are not finite, a full disk) is logged when it
    happens, and raised by the next call of any method, once. `close` runs at the end of a `with` block, and at the
    interpreter's exit where nobody called it: also an uncaught exception in the loop leaves the last checkpoint
    pushed, or an error in the log which says that it is not. An exception on its way out of the `with` block is not
    replaced by ours, which is logged.

    In a run of several processes, make one in the main process only. A process forked from this one (a data loader's
    worker) cannot use it, and does not disturb it.

    Args:
        repo_id: `name` or `owner/name`; created with the first push if there is none.
        revision: the branch to push to (default: main).
        private: visibility of a repository that is created; for one that exists it must be as it is.
        token: a user access token; default is the one that huggingface_hub knows.
        metric_for_best_model: the metric by which checkpoints are compared, as in transformers' TrainingArguments.
            Each one that is better than all before carries `best_tag`. A checkpoint without this metric, with a NaN,
            or that was skipped is never the best. A run that is resumed compares with the commit that has the tag.
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
        if greater_is_better is None:
            greater_is_better = metric_for_best_model is None or not metric_for_best_model.endswith("loss")
        hub = Hub(repo_id, token=token, patience=min(patience, FIRST_LOOK))
        try:
            hub.check_token()
        except HubUnavailableError as error:
            if constants.HF_HUB_OFFLINE:
                raise
            logger.warning("training starts without the Hub's consent: %s", error.found)
        self.repo_id = hub.repo_id
        self._settings = Settings(
            repo_id=hub.repo_id,
            token=token,
            revision=revision,
            private=private,
            metric_for_best_model=metric_for_best_model,
            greater_is_better=greater_is_better,
            best_tag=best_tag,
            dataset=dataset,
            base_model=base_model,
            license=license,
            tags=tuple(tags),
            max_shard_size=max_shard_size,
            patience=patience,
        )
        self._owner = os.getpid()
        self._home = Home()
        self._process = WorkerProcess(self._home.folder, self._settings, hub.api.endpoint)
        self._changed = threading.Condition()
        # All of these are read and written while holding _changed.
        self._waiting: _Waiting | None = None
        self._on_its_way: int | None = None  # the step
        self._writing: Snapshot | None = None
        self._spare: Snapshot | None = None
        self._failures: list[CheckpointPushError] = []
        self._pushed: list[PushedCheckpoint] = []
        self._skipped: list[int] = []
        self._flushes = 0  # calls of flush that wait
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="CheckpointPusher", daemon=True)
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
        shell, state = installed_shell(model)
        checkpoint = Checkpoint(
            step=step,
            metrics=_numbers(metrics or {}),
            places=places_of(state),
            config=shell.config.to_dict(),
            generation_config=shell.generation_config,
            tokenizer=None if tokenizer is None else _pickled(tokenizer),
        )
        with self._changed:
            snapshot = self._room_for(checkpoint)
            snapshot.fill(state)
            if self._waiting is not None:
                self._skip(self._waiting)
            self._waiting = _Waiting(checkpoint, snapshot)
            if not self._thread.is_alive():
                self._thread.start()
            self._changed.notify_all()
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
            PusherClosedError: in a forked process.
        """
        self._check_usable()
        with self._changed:
            self._flushes += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._idle() or not self._thread.is_alive())
            finally:
                self._flushes -= 1
        self.check()

    def close(self) -> None:
        """`flush`, then end the process beside and remove what lies on the disk. Again: nothing.

        An interrupt (Ctrl-C) ends the waiting; what was not pushed by then is not, and the log says so.

        Raises:
            CheckpointPushError: as `flush`. The pusher is closed all the same.
        """
        if self._closed or os.getpid() != self._owner:
            return
        try:
            self.flush()
        finally:
            with self._changed:
                self._closed = True
                lost = [self._on_its_way] if self._on_its_way is not None else []
                lost += [self._waiting.checkpoint.step] if self._waiting is not None else []
                self._waiting = self._spare = None
                self._changed.notify_all()
            if lost:
                logger.error("interrupted: not pushed to %s: step %s", self.repo_id, ", ".join(map(str, lost)))
            try:
                self._process.end(at_once=bool(lost))
                if self._thread.is_alive():
                    self._thread.join()
            finally:
                self._home.remove()
                atexit.unregister(self._at_exit)

    @property
    def pushed(self) -> tuple[PushedCheckpoint, ...]:
        """The checkpoints that are on the Hub, in order."""
        return tuple(self._pushed)

    @property
    def skipped(self) -> tuple[int, ...]:
        """The steps of checkpoints that a newer one replaced before they left."""
        return tuple(self._skipped)

    def __enter__(self) -> CheckpointPusher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._close_and_log()

    def _at_exit(self) -> None:
        if os.getpid() == self._owner and not self._closed:
            self._close_and_log()

    def _close_and_log(self) -> None:
        if not self._idle():
            logger.warning("waiting until the last checkpoint is on %s; Ctrl-C gives it up", self.repo_id)
        try:
            self.close()
        except CheckpointPushError as error:
            logger.error("%s", error)

    def _idle(self) -> bool:
        return self._waiting is None and self._on_its_way is None

    def _check_usable(self) -> None:
        if self._closed or os.getpid() != self._owner:
            raise PusherClosedError(
                "this CheckpointPusher is closed"
                if self._closed
                else f"this CheckpointPusher belongs to process {self._owner}, from which this one was forked",
                next_step="make a new one: CheckpointPusher(repo_id)",
            )

    # The buffers

    def _room_for(self, checkpoint: Checkpoint) -> Snapshot:
        """A buffer to fill. There are never more than two."""
        spare, self._spare = self._spare, None
        if spare is None and self._waiting is not None and self._writing is not None:
            # One is being written, so the waiting one gives up its place, before and not after it is overwritten:
            # an interrupt in the middle must leave no torn one waiting.
            waiting, self._waiting = self._waiting, None
            self._skipped.append(waiting.checkpoint.step)
            spare = waiting.snapshot
        if spare is not None and spare.places == checkpoint.places:
            return spare
        del spare
        return Snapshot(checkpoint.places)

    def _skip(self, waiting: _Waiting) -> None:
        self._skipped.append(waiting.checkpoint.step)
        self._spare = waiting.snapshot
        logger.info("step %d is skipped: a newer checkpoint is there already", waiting.checkpoint.step)

    # The thread

    def _run(self) -> None:
        number = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closed)
                if self._waiting is None:
                    return
                waiting, self._waiting = self._waiting, None
                self._on_its_way, self._writing = waiting.checkpoint.step, waiting.snapshot
            number += 1
            path = self._home.folder / f"snapshot-{number}"
            try:
                self._handle(waiting, path)
            except GPT2ValueHubError as error:
                self._fail(waiting.checkpoint.step, error)
            finally:  # also where an error of ours ends this thread: nobody may wait for it then
                path.unlink(missing_ok=True)
                with self._changed:
                    self._on_its_way = None
                    self._changed.notify_all()

    def _handle(self, waiting: _Waiting, path: Path) -> None:
        try:
            waiting.snapshot.write(path)
        except OSError as error:
            raise SaveFailedError(
                f"writing the snapshot to {path} failed: {error}",
                expected="space for two copies of the model in the folder for temporary files",
                next_step="make room there, or set TMPDIR to another folder, and start again",
            ) from error
        finally:
            with self._changed:
                self._writing, self._spare = None, waiting.snapshot
        pushed = self._deliver(replace(waiting.checkpoint, snapshot=path))
        if pushed is None:
            return
        with self._changed:
            self._pushed.append(pushed)
        logger.info("step %d is on %s: %s", pushed.step, self.repo_id, pushed.url)

    def _deliver(self, checkpoint: Checkpoint) -> PushedCheckpoint | None:
        """Have it pushed; again, where it failed in a way that passes. None: a newer one took its place."""
        tries = dict.fromkeys(TRIES, 0)
        while True:
            try:
                return self._process.ask(checkpoint)
            except (HubUnavailableError, ConcurrentPushError, WorkerDiedError) as error:
                kind = type(error)
                with self._changed:
                    if self._closed:
                        raise
                    if kind in TRIES:
                        tries[kind] += 1
                        if tries[kind] >= TRIES[kind]:
                            raise
                    elif self._waiting is not None:
                        self._skipped.append(checkpoint.step)
                        logger.warning("step %d is skipped: %s", checkpoint.step, error.found)
                        return None
                    elif self._flushes:
                        raise
                logger.warning("step %d is not on %s yet, and tried again: %s", checkpoint.step, self.repo_id, error)

    def _fail(self, step: int, cause: GPT2ValueHubError) -> None:
        error = CheckpointPushError(
            f"the checkpoint of step {step} is not on {self.repo_id}: {cause.found}",
            expected=cause.expected,
            next_step=cause.next_step,
            step=step,
        )
        error.__cause__ = cause
        with self._changed:
            closed = self._closed
            self._failures.append(error)
        if not closed:  # what an interrupt stopped, `close` tells
            logger.error("%s", error)


def _pickled(tokenizer: Any) -> bytes:
    try:
        return pickle.dumps(tokenizer)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise TokenizerMismatchError(
            f"the tokenizer, a {type(tokenizer).__name__}, cannot be copied: {error}",
            expected="a tokenizer of transformers' own, without code",
            next_step="load one with AutoTokenizer.from_pretrained(...)",
        ) from error


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
