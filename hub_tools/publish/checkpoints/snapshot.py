"""A model as it was between two training steps: copied in memory, written to a folder, read by another process.

Imports the standard library, torch, transformers, the remote code, and of hub_tools `errors`, `save` and `sharded`.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig

from configuration_gpt2_value import GPT2ValueConfig
from modeling_gpt2_value import GPT2ValueModel

from ...errors import SaveFailedError, TokenizerMismatchError
from ...package.save import installed_shell
from ...package.sharded import State

WEIGHTS = "weights.pt"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Snapshot:
    """A copy of a model, which training cannot change."""

    step: int
    metrics: dict[str, float]
    config: Any
    generation_config: Any
    tokenizer: Any
    weights: dict[str, torch.Tensor]  # in main memory; tied tensors share their copy

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        step: int,
        metrics: dict[str, float],
        gathered: State | None = None,
    ) -> Snapshot:
        """Copy a model, also from a GPU; or take the weights that were `gathered` of one that is sharded.

        Raises:
            UnsavableModelError, MissingHeadError: see `save_package`.
            TokenizerMismatchError: a tokenizer that cannot be copied.
        """
        shell, state = installed_shell(model, gathered)  # its configs are copies
        try:
            tokenizer = copy.deepcopy(tokenizer)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TokenizerMismatchError(
                f"the tokenizer, a {type(tokenizer).__name__}, cannot be copied: {error}",
                expected="a tokenizer of transformers' own, without code",
                next_step="load one with AutoTokenizer.from_pretrained(...)",
            ) from error
        weights = _copied(state) if gathered is None else state
        return cls(step, metrics, shell.config, shell.generation_config, tokenizer, weights)

    def write(self, folder: Path) -> None:
        """Write the snapshot to a folder, with the weights in one file.

        Uses `torch.save`, because it makes no second copy of the weights, and does not hold the interpreter lock, for
        which a training step would wait. It also keeps tied tensors tied. Reading the file runs no code
        (`weights_only`).

        Raises:
            SaveFailedError: the system refused, the disk is full.
            TypeError, ValueError: a field of a config that JSON cannot hold.
        """
        try:
            (folder / "config.json").write_text(self.config.to_json_string(use_diff=False), encoding="utf-8")
            if self.generation_config is not None:
                self.generation_config.save_pretrained(folder)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(folder / TOKENIZER)
            with open(folder / WEIGHTS, "wb") as file:
                torch.save(self.weights, file)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError if the disk is full
            raise SaveFailedError(
                f"writing the snapshot to {folder} failed: {error}",
                expected="space for two copies of the model in the folder for temporary files",
                next_step="free some space there, or set TMPDIR to another folder, and start again",
            ) from error


def read_model(folder: Path) -> GPT2ValueModel:
    """The model of a snapshot. Its weights are mapped from the file, so the file must stay while it is used."""
    config = GPT2ValueConfig.from_json_file(folder / "config.json")
    model = GPT2ValueModel(config)
    model.load_state_dict(torch.load(folder / WEIGHTS, mmap=True, weights_only=True), assign=True)
    has_one = (folder / "generation_config.json").exists()
    model.generation_config = GenerationConfig.from_pretrained(folder) if has_one else None
    return model


def read_tokenizer(folder: Path) -> Any:
    """The tokenizer of a snapshot; None if it has none."""
    if not (folder / TOKENIZER).exists():
        return None
    try:
        return AutoTokenizer.from_pretrained(folder / TOKENIZER, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError, TypeError, AttributeError) as error:
        raise TokenizerMismatchError(
            f"the tokenizer cannot be loaded again: {error}",
            expected="a tokenizer of transformers' own, without code",
            next_step="load one with AutoTokenizer.from_pretrained(...)",
        ) from error


def _copied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in main memory; tensors that share their memory share their copy."""
    copies: dict[object, torch.Tensor] = {}
    weights = {}
    for name, tensor in state.items():
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in copies:
            copies[place] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
        weights[name] = copies[place]
    return weights
