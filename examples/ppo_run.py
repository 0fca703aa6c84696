"""What of a PPO run is on the disk: one line of metrics an iteration, and a checkpoint from which it goes on.

Imports torch. A kill at any moment leaves the old checkpoint or the new one, and metrics at least as new.
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from ppo_task import SettingsError

if TYPE_CHECKING:
    from ppo import Trainer


class Run:
    """The folder of a run. Only the main process writes."""

    def __init__(self, trainer: "Trainer") -> None:
        self.trainer, folder = trainer, trainer.settings.out
        self.checkpoint, self.metrics = folder / "checkpoint.pt", folder / "metrics.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    def resume(self) -> int:
        """Load the last checkpoint, if there is one, and drop metrics that are newer; returns the next iteration.

        Raises:
            SettingsError: the folder holds a run with other settings.
        """
        trainer, state = self.trainer, {"iteration": 0}
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            for name, value in trainer.settings.plain().items():
                if state["settings"].get(name) != value:
                    raise SettingsError(
                        f"{self.checkpoint.parent} holds a run with {name}={state['settings'].get(name)!r}, and got "
                        f"{value!r}. Give the same settings to continue it, or another --out."
                    )
            with torch.no_grad():
                for name, weight in self._trained():
                    weight.copy_(state["model"][name])
            trainer.optimizer.load_state_dict(state["optimizer"])
            trainer.controller.value = state["kl_coef"]
        if trainer.accelerator.is_main_process and self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            _replace(self.metrics, lambda file: file.write_text("".join(lines[: state["iteration"]]), encoding="utf-8"))
        trainer.accelerator.wait_for_everyone()
        return state["iteration"]

    def record(self, metrics: dict[str, float]) -> bool:
        """Write one more line of metrics, and where it is due a checkpoint after it; returns whether it was."""
        done, trainer = metrics["iteration"] + 1, self.trainer
        trainer.accelerator.log({name: value for name, value in metrics.items() if name != "iteration"}, step=done - 1)
        is_due = done % trainer.settings.save_every == 0 or done == trainer.settings.iterations
        if not trainer.accelerator.is_main_process:
            return is_due
        with self.metrics.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(metrics) + "\n")
            lines.flush()
            os.fsync(lines.fileno())  # on the disk before the checkpoint that counts on it
        if is_due:
            state = {
                "settings": trainer.settings.plain(),
                "iteration": done,
                "model": {name: weight.detach() for name, weight in self._trained()},
                "optimizer": trainer.optimizer.state_dict(),
                "kl_coef": trainer.controller.value,
            }
            _replace(self.checkpoint, lambda file: torch.save(state, file))
        return is_due

    def read(self) -> list[dict[str, float]]:
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        return ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)


def _replace(file: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all."""
    draft = file.with_name(file.name + ".draft")
    write(draft)
    with draft.open("rb+") as written:
        os.fsync(written.fileno())
    draft.replace(file)
