"""The policy alone, or the critic alone, as a plain GPT-2 that any GPT-2 runtime loads.

Imports torch, transformers, the model, and of hub_tools what reads packages and what replaces folders.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2PreTrainedModel, PreTrainedTokenizerBase

from modeling_gpt2_value import GPT2ValueModel

from ..errors import LoadError, MissingHeadError, UnsavableModelError, as_ours
from ..files import AGAIN
from ..layout import HEAD_PREFIX, kind_of
from ..package.inspect import inspect_stage
from ..package.replace import check_target, staging_folder, writing_to
from ..package.stage import local_folder, make_loadable, stage_package
from ..package.tokenizer import load_tokenizer
from ..package.weights import not_finite

# Fields of a package's config.json that GPT-2's own does not have, or that say which class it is for.
NOT_GPT2 = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "detach_value_head",
    "id2label",
    "label2id",
    "model_type",
    "num_labels",
    "summary_last_dropout",
    "transformers_version",
    "value_head_initializer_range",
)


@dataclass(frozen=True)
class ExportedPolicy:
    """A plain GPT-2 that was written to the disk."""

    architecture: str  # its class
    folder: Path
    files: dict[str, int]  # name -> bytes
    parameters: int
    dtype: torch.dtype
    tokenizer: str | None  # its class

    def to_json(self) -> dict[str, Any]:
        """The record as plain JSON values."""
        return {**asdict(self), "folder": str(self.folder), "dtype": str(self.dtype).removeprefix("torch.")}


def export_policy(
    model: GPT2ValueModel | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
) -> ExportedPolicy:
    """Write the policy alone, as a `GPT2LMHeadModel` that any GPT-2 runtime loads: no head, and no code.

    The weights are unchanged, so the logits are equal bit for bit. As with `save_package`, a process that is killed
    leaves the old folder or the complete new one. The model is not changed.

    Args:
        model: a `GPT2ValueModel`, or the folder of a package (none of whose code is run).
        folder: where to: a new folder, or an empty one.
        tokenizer: travels with the model; for a package, by default, its own.
        overwrite: also replace a folder that holds a plain GPT-2 and nothing else.

    Raises:
        UnsavableModelError: `model` is not a value-head model.
        UnsavableModelError: the model's config or generation_config could not be loaded again.
        LoadError: the package, or its tokenizer, cannot be loaded.
        ResourceLimitError: opening its tokenizer takes more memory or time than a tokenizer needs.
        UnsavableModelError: NaN or infinity among the package's weights.
        FolderRefusedError: `folder` holds something that must not be lost.
        SaveFailedError: the system refused a write. What was in `folder` is untouched.
        And what `inspect_package` raises for a package that is not whole.
    """
    return write_plain(_plain_gpt2, model, folder, tokenizer=tokenizer, overwrite=overwrite, needs_head=False)


def write_plain(
    as_plain: Callable[[GPT2ValueModel], GPT2PreTrainedModel],
    model: GPT2ValueModel | str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    overwrite: bool,
    needs_head: bool,
) -> ExportedPolicy:
    """Write the model that `as_plain` returns, and the tokenizer; the rest is as in `export_policy`."""
    if isinstance(model, (str, os.PathLike)):
        model, its_tokenizer = _read_package(model, with_tokenizer=tokenizer is None, needs_head=needs_head)
        tokenizer = tokenizer or its_tokenizer
    if not isinstance(model, GPT2ValueModel):
        raise UnsavableModelError(
            f"a {type(model).__name__}",
            expected="a GPT2ValueModel, unwrapped, or the folder of a package",
            next_step="save it with save_package, and export that folder",
        )
    target = _target(folder, overwrite=overwrite)
    with as_ours(_not_savable):
        plain = as_plain(model)
        if hasattr(plain.config, "validate"):  # transformers 5, which does it when it writes
            plain.config.validate()
    with writing_to(target), staging_folder(target) as staging:
        plain.save_pretrained(staging.package)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging.package)
        files = {path.name: path.stat().st_size for path in sorted(staging.package.iterdir())}
        _target(folder, overwrite=overwrite)  # writing may have taken minutes: look again
        staging.commit()
    return ExportedPolicy(
        architecture=type(plain).__name__,
        folder=target,
        files=files,
        parameters=sum(weight.numel() for weight in plain.parameters()),
        dtype=plain.dtype,
        tokenizer=None if tokenizer is None else type(tokenizer).__name__,
    )


def _read_package(
    source: str | os.PathLike[str], *, with_tokenizer: bool, needs_head: bool
) -> tuple[GPT2ValueModel, PreTrainedTokenizerBase | None]:
    """Load a package's weights into this installation's model, and its tokenizer, from a private copy.

    The package's code is not run, so it needs no review.
    """
    name = os.fspath(source)
    with stage_package(local_folder(source)) as copy:
        report = inspect_stage(copy, name)
        if needs_head and report.head is None:
            raise MissingHeadError(
                f"{name} has no value head", expected=f"{HEAD_PREFIX}summary.weight and .bias", next_step=AGAIN
            )
        stored = max(report.dtypes, key=lambda dtype: report.dtypes[dtype])  # the body's: a head may differ
        loadable = make_loadable(copy, ())
        with as_ours(lambda gist: _does_not_load(name, gist)):
            model = GPT2ValueModel.from_pretrained(
                loadable,
                init_value_head=report.head is None,  # a package without its head still has its policy
                dtype=getattr(torch, stored),
                local_files_only=True,
                use_safetensors=True,
            )
        tokenizer = None
        if with_tokenizer and report.tokenizer is not None:
            tokenizer = load_tokenizer(loadable, name, config=model.config)
    damaged = list(not_finite(model.state_dict()))
    if damaged:
        raise UnsavableModelError(
            f"NaN or infinite values in {', '.join(damaged[:5])} of {name}", expected="finite weights", next_step=AGAIN
        )
    return model, tokenizer


def _does_not_load(name: str, gist: str) -> LoadError:
    return LoadError(
        f"{name} does not load, because of its weights: {gist}",
        expected="a package that this version of transformers can load",
        next_step=AGAIN,
    )


def gpt2_fields(model: GPT2ValueModel) -> dict[str, Any]:
    """The fields of the model's config that GPT-2's own has."""
    return {name: value for name, value in model.config.to_dict().items() if name not in NOT_GPT2}


def _plain_gpt2(model: GPT2ValueModel) -> GPT2LMHeadModel:
    """A `GPT2LMHeadModel` that shares the model's weights if they are on the CPU, or else has copies.

    It can only be saved, not run: buffers that are not in the state dict stay on the meta device.
    """
    with torch.device("meta"):
        plain = GPT2LMHeadModel(GPT2Config.from_dict(gpt2_fields(model)))
    state = {
        name: tensor.detach().cpu() for name, tensor in model.state_dict().items() if not name.startswith(HEAD_PREFIX)
    }
    plain.load_state_dict(state, assign=True)
    plain.tie_weights()
    if model.generation_config is not None:
        plain.generation_config = model.generation_config
        plain.generation_config.validate(strict=True)
    return plain


def _not_savable(gist: str) -> UnsavableModelError:
    return UnsavableModelError(
        f"the model's config or generation_config is not valid: {gist}",
        next_step="correct the field in model.config or model.generation_config, and export again",
    )


def _target(folder: str | os.PathLike[str], *, overwrite: bool) -> Path:
    return check_target(
        folder,
        overwrite=overwrite,
        what="a plain GPT-2",
        model_type=GPT2Config.model_type,
        may_replace=lambda name: kind_of(name) in ("config", "weights", "tokenizer"),
    )
