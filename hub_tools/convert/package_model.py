"""The model and the tokenizer of a package, by this installation's code, from a private copy.

Imports torch, the model, and of hub_tools `inspection`, `stage` and `tokenizer`. None of the package's code is run, so
nobody needs to have reviewed it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from modeling_gpt2_value import GPT2ValueModel

from ..errors import LoadError, NonFiniteWeightsError
from ..files import AGAIN
from ..library_errors import as_ours
from ..package.inspection import inspect_stage, local_folder
from ..package.stage import make_loadable, stage_package
from ..package.tokenizer import load_tokenizer


@dataclass(frozen=True)
class PackageModel:
    """What `package_model` read."""

    model: GPT2ValueModel  # in evaluation mode, on the CPU
    tokenizer: PreTrainedTokenizerBase | None


def package_model(source: str | os.PathLike[str], *, with_tokenizer: bool = False) -> PackageModel:
    """Load a package's weights into this installation's model; a package that has no head gets a new one.

    Args:
        source: a package's folder.
        with_tokenizer: load its tokenizer too, where it has one.

    Raises:
        LoadError: transformers cannot load it.
        NonFiniteWeightsError: NaN or infinity among the weights.
        And what `inspect_package` raises.
    """
    name = os.fspath(source)
    with stage_package(local_folder(source)) as copy:
        report = inspect_stage(copy, name)
        stored = max(report.dtypes, key=lambda dtype: report.dtypes[dtype])  # the body's: a head may differ
        loadable = make_loadable(copy, ())
        with as_ours(lambda gist: _does_not_load(name, gist)):
            model = GPT2ValueModel.from_pretrained(
                loadable,
                init_value_head=report.head is None,
                dtype=getattr(torch, stored),
                local_files_only=True,
                use_safetensors=True,
            )
        tokenizer = None
        if with_tokenizer and report.tokenizer is not None:
            tokenizer = load_tokenizer(loadable, name, config=model.config)
    for key, weight in model.state_dict().items():
        if not bool(weight.isfinite().all()):
            raise NonFiniteWeightsError(
                f"NaN or infinite values in {key} of {name}", expected="finite weights", next_step=AGAIN
            )
    return PackageModel(model.eval(), tokenizer)


def _does_not_load(name: str, gist: str) -> LoadError:
    return LoadError(
        f"{name} does not load, because of its weights: {gist}",
        expected="a package that this version of transformers can load",
        next_step=AGAIN,
    )
