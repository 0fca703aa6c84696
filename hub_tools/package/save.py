"""Write a complete package, all or nothing, of a model that is what its weights and its config say."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from configuration_gpt2_value import GPT2ValueConfig
from modeling_gpt2_value import GPT2ValueModel

from .. import layout
from ..errors import MissingHeadError, PackageError, UnsavableModelError, as_ours, gist
from . import config as config_fields
from .card import load_lines, render_card
from .probe import measure
from .record import PROBE_TEXT, Record, probe
from .replace import check_target, replacing
from .sharded import Gathered, computed, in_first_process
from .tokenizer import check_tokenizer, write_tokenizer
from .weights import build_model, not_finite

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Of the largest number, how far the copy's numbers may be from the model's: the same operations on the same machine
# round alike in float32; half precision, and weights that are gathered from several devices, are computed otherwise.
CLOSE, COARSE = 1e-5, 2e-2


@dataclass(frozen=True)
class SavedPackage:
    """A package that was written to the disk. It prints as a summary, with the lines that load it."""

    folder: Path
    files: dict[str, int]  # name -> bytes
    parameters: int
    load_lines: str  # the lines that load it, in any Python that has torch and transformers

    def __str__(self) -> str:
        summary = f"{self.parameters:,} parameters, {len(self.files)} files, {sum(self.files.values()) / 1e6:,.1f} MB"
        return f"{self.folder} written: {summary}\n{self.load_lines}"


@in_first_process
def save_package(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    overwrite: bool = True,
    base_model: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    repo_id: str | None = None,
    max_shard_size: int | str = "5GB",
) -> SavedPackage:
    """Write a complete package: weights, config, code, tokenizer, card, and a record to verify it by.

    The package is prepared beside `folder` and then put in its place in one step (see `replace`). A process killed at
    any moment leaves the old package or this one. The next save removes what such a process left beside `folder`.
    Nothing of a replaced package stays, not even a card that was edited by hand. A reader that opens files one after
    the other during the replacement can see files of both packages.

    What the package computes is what the model computes: a copy made of its weights and config is compared with it on a
    probe, and where they differ the save is refused. The model is not changed: mode, config, device, hooks, gradients
    and random state stay as they are. Its weights are not copied, unless they are on a GPU. The package gets this
    installed version's code, even if the model itself was loaded from a package with other code.

    A model that FSDP2 shards is saved in all processes by the same call: the first gathers the weights in main
    memory and writes the package, and all return, or raise, what it does. Any other model is saved where this is
    called, so in a run of several processes call it in one (`accelerator.is_main_process`).

    Args:
        model: a `GPT2ValueModel` (or a subclass without weights of its own), unwrapped, in float32, float16
            or bfloat16.
        folder: where to. It may be absent, empty, or a package; a link to such a folder stays a link.
        tokenizer: a transformers tokenizer, to travel with the model.
        overwrite: replace a package that is there; if False, refuse any folder that is not empty.
        base_model: Hub id of the model that this one was made from, for the card. Never a local path.
        license: license identifier for the card, as `apache-2.0`. Left out if not given.
        tags: more tags for the card.
        repo_id: where the package will live on the Hub, for the lines in the card that load it.
        max_shard_size: the weights are split into files of at most this size (bytes, or a string like
            `"5GB"`).

    Raises:
        UnsavableModelError, MissingHeadError: not a value-head model, or wrapped in something.
        UnsavableModelError: a sharded model, and another process did not call this within 30 s.
        UnsavableModelError: a model that could not be loaded again, or that computes other numbers than its weights
            give: another forward, an activation set in memory, a hook.
        TokenizerMismatchError: a tokenizer with ids that the model does not have, or that brings code.
        OptionsError: see `render_card`.
        FolderRefusedError: `folder` holds something else.
        SaveFailedError: the system refused a write. What was in `folder` is untouched.
    """
    target = check_target(folder, overwrite=overwrite)
    whole = installed_copy(model)
    has_tokenizer = tokenizer is not None
    if has_tokenizer:
        check_tokenizer(tokenizer, whole.config.vocab_size)
    versions = {"gpt2-value": layout.__version__, **{name: version(name) for name in ("torch", "transformers")}}
    card = render_card(
        whole, versions, tokenizer=has_tokenizer, base_model=base_model, license=license, tags=tags, repo_id=repo_id
    )
    with replacing(target) as package:
        whole.save_pretrained(package, max_shard_size=max_shard_size)  # config, weights, this installation's code
        if has_tokenizer:
            write_tokenizer(package, tokenizer)
        (package / layout.CARD).write_text(f"{card}\n", encoding="utf-8")
        for path in package.iterdir():  # safetensors writes files that only their owner can read
            shutil.copymode(package / layout.CARD, path)
        _write_record(package, whole, tokenizer, versions)
        files = {path.name: path.stat().st_size for path in sorted(package.iterdir())}
        check_target(folder, overwrite=overwrite)  # writing may have taken minutes: look again
    return SavedPackage(target, files, whole.num_parameters(), load_lines(str(target), tokenizer=has_tokenizer))


def _write_record(folder: Path, model: GPT2ValueModel, tokenizer: Any, versions: dict[str, str]) -> None:
    token_ids, logit_ids = probe(model.config)
    in_float32 = model if all(w.dtype == torch.float32 for w in model.parameters()) else copy.deepcopy(model).float()
    record = Record(
        token_ids,
        logit_ids,
        **measure(in_float32, token_ids, logit_ids),
        tokenizer_ids=None if tokenizer is None else tokenizer(PROBE_TEXT)["input_ids"],
        versions=versions,
        sha256={path.name: layout.sha256_of(path) for path in sorted(folder.iterdir()) if path.name != layout.CARD},
    )
    with as_ours(
        lambda gist: _unsavable(f"it gives NaN or infinity, though no weight is: some are too large ({gist})")
    ):
        text = json.dumps(vars(record), allow_nan=False, sort_keys=True)
    (folder / layout.RECORD).write_text(f"{text}\n", encoding="utf-8")


# From the model that was passed to a copy of this installed version's class


def _unsavable(found: str) -> UnsavableModelError:
    return UnsavableModelError(
        f"the model cannot be saved: {found}",
        expected="a GPT2ValueModel itself, in memory, whose weights and config say all that it computes",
        next_step="pass the model inside a wrapper (model.module, model._orig_mod), merge adapters "
        "(copy.deepcopy(model).merge_and_unload()), remove hooks and other forwards, set in model.config what differs "
        "from it, convert with model.float(), resize with model.resize_token_embeddings; after NaN, go back to an "
        "earlier checkpoint",
    )


@as_ours(_unsavable)
def installed_copy(model: nn.Module | Gathered) -> GPT2ValueModel:
    """Return a model of this installed version's class, in eval mode on the CPU, that computes what `model` computes.

    It shares the model's weights where they are on the CPU, has copies of its configs, and is what a package can hold.

    Raises:
        UnsavableModelError, MissingHeadError: see `save_package`.
    """
    given: Any = model.model if isinstance(model, Gathered) else model
    if not isinstance(given, transformers.PreTrainedModel):
        raise _unsavable(f"it is a {type(given).__name__}")
    if not hasattr(given, "v_head"):
        raise MissingHeadError(
            f"a {type(given).__name__} without a value head",
            expected="a GPT2ValueModel",
            next_step="model.save_pretrained(FOLDER); GPT2ValueModel.from_pretrained(FOLDER, init_value_head=True)",
        )
    held = model.weights if isinstance(model, Gathered) else given.state_dict()
    weights = {name: tensor.detach() for name, tensor in held.items()}
    for name, weight in weights.items():
        if weight.is_meta or weight.dtype not in FLOATS:
            raise _unsavable(f"{name} is {weight.dtype} on the device {weight.device}; only {FLOATS} can be saved")
    if damaged := not_finite(weights):
        raise _unsavable(f"NaN or infinite values in {damaged}")
    config: Any = GPT2ValueConfig.from_dict(given.config.to_dict())
    try:
        config_fields.checked_config(json.loads(config.to_json_string()))  # what could be written, but not loaded again
        twin: Any = build_model(config, weights)
    except PackageError as error:
        raise _unsavable(error.found) from error
    twin.set_attn_implementation(given.config._attn_implementation)
    if given.generation_config is not None:
        twin.generation_config = copy.deepcopy(given.generation_config)
        twin.generation_config.validate(strict=True)
        config_fields.reduce(layout.GENERATION_CONFIG, json.loads(twin.generation_config.to_json_string()))
    found = model.numbers if isinstance(model, Gathered) else computed(given)
    exact = given is model and all(weight.dtype == torch.float32 for weight in twin.parameters())
    for name, expected in computed(twin).items():
        most = max(1.0, float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max())) * (CLOSE if exact else COARSE)
        try:
            torch.testing.assert_close(found[name], expected, rtol=0.0, atol=most, equal_nan=True)
        except AssertionError as error:
            why = gist(error) + _suspects(given, twin)
            raise _unsavable(f"its {name} differ from what its weights and config give: {why}") from error
    return twin.cpu()


def _suspects(model: nn.Module, twin: nn.Module) -> str:
    """Name the modules that may make a model compute otherwise than its copy."""
    kinds = {path: type(part).__name__ for path, part in twin.named_modules()}
    found = [
        f"{path or 'the model'} ({type(part).__name__})"
        for path, part in model.named_modules()
        if type(part).__name__.removeprefix("FSDP") != kinds.get(path)
        or "forward" in vars(part)
        or part._forward_hooks
        or part._forward_pre_hooks
    ]
    return f", maybe because of the class, the hooks or the forward of {', '.join(found[:5])}" if found else ""
