"""Push checkpoints during training: a copy in memory between two training steps, and the rest in a worker process.

A thread would share the interpreter lock, torch's threads and its random numbers with the training loop.
"""

from __future__ import annotations

import atexit
import copy
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import errors
from ..errors import (
    CheckpointPushError,
    ConcurrentPushError,
    GPT2ValueHubError,
    HubUnavailableError,
    OptionsError,
    SaveFailedError,
    as_ours,
)
from ..hub.ask import Hub, Passing
from ..package.save import installed_copy, save_package
from ..package.sharded import Gathered, in_first_process, is_sharded
from .push import MAIN, Push, writable_id
from .worker import CALL, push_checkpoint, tag_best

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "hub_tools.publish.worker")
# What a Trainer logs besides metrics: counters, and how long things took.
BOOKKEEPING = re.compile(r"step|epoch|total_flos|.*_(runtime|per_second)|num_input_tokens_seen")

_Call = partial[dict[str, Any]]  # of `push_checkpoint`, with a copy of a model that training cannot change


@dataclass(frozen=True)
class PushedCheckpoint:
    """A checkpoint that is on the Hub."""

    step: int
    metrics: dict[str, float]
    commit: str
    url: str
    best: bool  # whether it is the best so far, and carries the tag


class CheckpointPusher:
    """Pushes checkpoints of a `GPT2ValueModel` to one branch in the background, each as one verified commit.

        with CheckpointPusher("me/model", metric_for_best_model="reward", dataset="imdb") as pusher:
            for step in range(steps):
                if step % 500 == 0:
                    pusher.push(model, step=step, metrics={"reward": reward, "kl": kl}, tokenizer=tokenizer)

    `push` copies the weights and returns, so the next training step cannot change them. A worker process then saves,
    verifies and pushes, without a GPU, on one core at the lowest priority. If checkpoints come faster than that, only
    the newest waits, and those that it replaced are `skipped`; never the last, for which `flush` and `close` wait.

    Main memory holds at most two copies of the weights, one that waits and one that is being pushed (and while a model
    on a GPU is copied, a third), and the worker about 0.5 GB of torch. The disk holds at most three, the snapshot and
    its package, twice, in the system's folder for temporary files (`TMPDIR`). If training is killed, the worker ends
    what it has begun, and removes them.

    After temporary failures (5xx, timeouts, no connection) the worker repeats the push for five minutes. Then the
    failure is logged, and the checkpoint waits: the next `push` brings a newer one, and `flush` and `close` try it once
    more. So it does if somebody else pushed at the same time. All other failures (401, 403, 404, a full disk, a worker
    that was killed) are logged, and raised once, by any next call.

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
        metric_for_best_model: the metric by which checkpoints are compared, as in transformers' TrainingArguments. One
            that beats the checkpoint with `best_tag` gets the tag. A checkpoint without this metric, or with a NaN,
            never does.
        greater_is_better: default, as in TrainingArguments: True unless the metric's name ends in "loss".
        best_tag: a tag of the repository that is moved from one best checkpoint to the next.
        dataset: what the metrics were measured on, for the card: a dataset's id on the Hub, or a description.
        base_model, license, tags, max_shard_size: as in `save_package`.

    Raises:
        AuthenticationError: the token is refused. (If the Hub does not answer, training starts anyway.)
        OptionsError: `repo_id` cannot be a repository's id, or `greater_is_better` without a metric.
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
        best_tag: str = "best",
        dataset: str = "the training run",
        base_model: str | None = None,
        license: str | None = None,
        tags: Sequence[str] = (),
        max_shard_size: int | str = "5GB",
    ) -> None:
        if metric_for_best_model is None and greater_is_better is not None:
            raise OptionsError(
                f"greater_is_better={greater_is_better} without metric_for_best_model",
                next_step="name the metric, or leave this out",
            )
        if greater_is_better is None:
            greater_is_better = not (metric_for_best_model or "").endswith("loss")
        hub, self.repo_id = Hub(token), repo_id
        try:
            self.repo_id = writable_id(hub, repo_id)
        except Passing as failure:
            logger.warning("training starts without the Hub's consent: %s", failure)
        self._environment = {
            # the worker then imports the same modules as this process, wherever the training script is
            "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),
            "HF_ENDPOINT": hub.api.endpoint,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            **({} if token is None else {"HF_TOKEN": token}),
        }
        self._push_checkpoint = partial(
            push_checkpoint,
            dataset=dataset,
            save=partial(
                save_package, base_model=base_model, license=license, tags=tags, max_shard_size=max_shard_size
            ),
            push=partial(Push, self.repo_id, revision or MAIN, private),
            tag=partial(tag_best, metric=metric_for_best_model, sign=1 if greater_is_better else -1, tag=best_tag),
        )
        self._owner = os.getpid()
        self._lock = threading.Lock()
        # All of these are written while holding the lock.
        self._waiting: _Call | None = None
        self._thread: threading.Thread | None = None  # only while something is being pushed
        self._worker: subprocess.Popen[bytes] | None = None
        self.pushed: list[PushedCheckpoint] = []
        self.skipped: list[int] = []
        self._failure: CheckpointPushError | None = None  # the last one; earlier ones are in the log
        self._closed = False
        atexit.register(self.close)

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
            UnsavableModelError and others: what `save_package` refuses, too.
            CheckpointPushError: an earlier checkpoint did not reach the Hub; or the pusher is closed, or belongs to the
                process from which this one was forked.
        """
        in_first_process(self._accept)(model, step, metrics or {}, tokenizer)

    def _accept(self, model: nn.Module | Gathered, step: int, metrics: Mapping[str, float], tokenizer: Any) -> None:
        """What `push` does in the process that pushes."""
        self._check_usable()
        with as_ours(lambda gist: OptionsError(f"the metrics {dict(metrics)}: {gist}", next_step="pass numbers")):
            numbers = {str(name): float(value) for name, value in metrics.items()}
        copied = installed_copy(model)  # which shares its weights with a model in main memory
        with self._lock:
            self._skip(self._waiting)
            self._waiting = None  # before the copy is made, so that memory does not hold a third one
            copied = copy.deepcopy(copied)
            self._waiting = partial(
                self._push_checkpoint, model=copied, tokenizer=copy.deepcopy(tokenizer), step=step, metrics=numbers
            )
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="CheckpointPusher", daemon=True)
                self._thread.start()
        self.check()

    def check(self) -> None:
        """Raise the last failure since the previous call, if there was one.

        Raises:
            CheckpointPushError: with the original error as its cause.
        """
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def flush(self) -> None:
        """Wait until everything that was handed to `push` is on the Hub, or has failed.

        Raises:
            CheckpointPushError: the last checkpoint, or an earlier one, did not reach the Hub; and see `push`.
        """
        self._check_usable()
        if (thread := self._thread) is not None:
            thread.join()
        self._run(is_last=True)
        self.check()

    def close(self) -> None:
        """`flush`, and accept no more checkpoints. A second call does nothing.

        An interrupt (Ctrl-C) ends the waiting. The log then says so.

        Raises:
            CheckpointPushError: as `flush`. The pusher is closed nevertheless.
        """
        if self._closed or os.getpid() != self._owner:
            return
        if self._thread is not None:
            logger.warning("waiting until the last checkpoint is on %s; Ctrl-C gives it up", self.repo_id)
        try:
            self.flush()
        except KeyboardInterrupt:
            logger.error("interrupted: the last checkpoint is not on %s", self.repo_id)
            raise
        finally:
            atexit.unregister(self.close)
            with self._lock:
                self._closed = True
                if self._worker is not None:
                    self._worker.kill()
            if (thread := self._thread) is not None:
                thread.join()

    def __enter__(self) -> CheckpointPusher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_usable(self) -> None:
        # the process first: a fork may have copied the lock while somebody held it
        if os.getpid() != self._owner or self._closed:
            raise CheckpointPushError(
                "this CheckpointPusher is closed, or belongs to the process from which this one was forked",
                next_step="make a new one: CheckpointPusher(repo_id)",
            )

    def _skip(self, call: _Call | None) -> None:
        if call is not None:
            logger.info("step %d is skipped: a newer checkpoint is there already", _step(call))
            self.skipped.append(_step(call))

    def _run(self, *, is_last: bool = False) -> None:
        """Push what waits, until nothing does. If the Hub is not available, or somebody else pushed, the newest waits
        for the next call, and in the `is_last` attempt fails."""
        while True:
            with self._lock:
                call, self._waiting = self._waiting, None
                if call is None:
                    self._thread = None
                    return
            try:
                pushed = self._work(call)
            except GPT2ValueHubError as error:
                found = f"the checkpoint of step {_step(call)} is not on {self.repo_id}: {error.found}"
                if isinstance(error, (ConcurrentPushError, HubUnavailableError)) and not is_last:
                    logger.warning("%s; the next call tries it again, or a newer one", found)
                    with self._lock:
                        if self._waiting is None:
                            self._waiting, self._thread = call, None
                            return
                        self._skip(call)
                    continue
                failure = CheckpointPushError(
                    found, expected=error.expected, next_step=error.next_step, step=_step(call)
                )
                failure.__cause__ = error
                logger.error("%s", failure)
                self._failure = failure
            else:
                self.pushed.append(pushed)
                logger.info("step %d is on %s: %s", pushed.step, self.repo_id, pushed.url)

    def _work(self, call: _Call) -> PushedCheckpoint:
        """Let a worker make a call, and return what it returns.

        Raises:
            CheckpointPushError: it ended without an answer.
            What the call raises.
        """
        with (
            as_ours(lambda gist: SaveFailedError(gist, next_step="correct what this error names")),
            tempfile.TemporaryDirectory(prefix="gpt2-value-checkpoint-", ignore_cleanup_errors=True) as home,
        ):
            torch.save(call, Path(home, CALL))
            environment = {**os.environ, **self._environment, "TMPDIR": home, "TEMP": home}
            with self._lock:
                self._check_usable()
                self._worker = worker = subprocess.Popen(
                    [*COMMAND, home],
                    stdout=subprocess.PIPE,
                    cwd=home,
                    env=environment,
                    start_new_session=True,  # a Ctrl-C is for the training loop, which then ends this process
                )
            with suppress(OSError, AttributeError):  # a sandbox forbids it; Windows has no such thing
                os.setpriority(os.PRIO_PROCESS, worker.pid, 19)
            printed, _ = worker.communicate()
        if worker.returncode:
            raise CheckpointPushError(
                f"the worker that pushes checkpoints ended with exit status {worker.returncode}",
                next_step="read what it printed; make sure that there is enough memory",
            )
        found = json.loads(printed.splitlines()[-1])
        if "error" in found:
            kind: type[GPT2ValueHubError] = getattr(errors, found.pop("error"))
            raise kind(**found)
        return PushedCheckpoint(_step(call), call.keywords["metrics"], **found)


def _step(call: _Call) -> int:
    step: int = call.keywords["step"]
    return step


class CheckpointPusherCallback(TrainerCallback):
    """Push the model to the Hub each time a Trainer saves, and once more at the end of training.

        pusher = CheckpointPusher("me/model", metric_for_best_model="eval_loss")
        Trainer(..., callbacks=[CheckpointPusherCallback(pusher)])

    The metrics of a checkpoint are what the Trainer logged at its step (training loss, learning rate, `eval_` metrics),
    under the Trainer's names. The Trainer's `processing_class` is pushed too, if it is a tokenizer. The end of training
    waits until everything is on the Hub, or raises `CheckpointPushError`. The branch then holds the final
    `trainer.model`; with `load_best_model_at_end` this is the best model, under the number of its step. A failure that
    is not temporary (see `CheckpointPusher`) is raised at the next step.

    In a run of several processes, only the main one pushes, also a model that FSDP2 shards; one that FSDP1 or DeepSpeed
    ZeRO-3 shards is refused. The pusher stays open for further training; it is closed when Python exits.

    Args:
        pusher: where checkpoints go. Pass it in every process; only the main one uses it.
    """

    def __init__(self, pusher: CheckpointPusher) -> None:
        self._pusher = pusher
        self._last: int | None = None  # the step that was pushed last

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._pusher.check()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._push(state, state.global_step, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        restored = args.load_best_model_at_end and state.best_model_checkpoint is not None
        step = state.best_global_step if restored else state.global_step
        if step != self._last:
            self._push(state, step, kwargs)
        if state.is_world_process_zero:
            self._pusher.flush()
        self._last = None  # another training may end at the same step

    def _push(self, state: TrainerState, step: int, kwargs: dict[str, Any]) -> None:
        if not (state.is_world_process_zero or is_sharded(kwargs["model"])):
            return
        tokenizer = kwargs.get("processing_class")
        logged = [item for entry in state.log_history if entry.get("step") == step for item in entry.items()]
        self._last = step
        self._pusher.push(
            kwargs["model"],
            step=step,
            metrics={n: v for n, v in logged if not BOOKKEEPING.fullmatch(n) and isinstance(v, (int, float))},
            tokenizer=tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None,
        )
