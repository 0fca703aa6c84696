"""transformers' Trainer pushes its checkpoints in the background.

Imports the standard library, transformers, and of hub_tools `pusher`, `sharded` and what they import. The events of a
Trainer: https://huggingface.co/docs/transformers/main_classes/callback.
"""

from __future__ import annotations

import re
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...package.sharded import is_sharded
from .pusher import CheckpointPusher

# What a Trainer logs besides metrics: counters, and how long things took.
BOOKKEEPING = re.compile(r"step|epoch|total_flos|.*_(runtime|per_second)|num_input_tokens_seen")


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

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._last = None

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

    def _push(self, state: TrainerState, step: int, kwargs: dict[str, Any]) -> None:
        if not (state.is_world_process_zero or is_sharded(kwargs["model"])):
            return
        tokenizer = kwargs.get("processing_class")
        self._last = step
        self._pusher.push(
            kwargs["model"],
            step=step,
            metrics=metrics_at(step, state.log_history),
            tokenizer=tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None,
        )


def metrics_at(step: int, log_history: list[dict[str, Any]]) -> dict[str, float]:
    """The metrics that a Trainer logged at this step."""
    entries = [entry for entry in log_history if entry.get("step") == step]
    return {
        name: value
        for entry in entries
        for name, value in entry.items()
        if not BOOKKEEPING.fullmatch(name) and isinstance(value, (int, float))
    }
