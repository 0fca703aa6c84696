"""Write a complete package, all or nothing, of a model that is what its weights and its config say."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from configuration_gpt2_value import GPT2ValueConfig
from modeling_gpt2_value import GPT2ValueModel

from .. import layout
from ..errors import MissingHeadError, TokenizerMismatchError, UnsavableModelError, as_ours
from ..files import in_units
from . import config as config_fields
from .card import load_lines, render_card
from .probe import measure
from .record import PROBE_TEXT, Record, probe
from .replace import check_target, replacing
from .sharded import Gathered, Numbers, Weights, computed, in_first_process
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
    replaced: bool  # whether there was a package at this place before
    load_lines: str  # the lines that load it, in any Python that has torch and transformers

    def __str__(self) -> str:
        done = "replaced" if self.replaced else "written"
        summary = f"{self.parameters:,} parameters, {len(self.files)} files, {in_units(sum(self.files.values()))}"
        return f"{self.folder} {done}: {summary}\n{self.load_lines}"


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
    target = save_target(folder, overwrite=overwrite)
    replaced = (target / layout.CONFIG).exists()
    whole = installed_copy(model)
    has_tokenizer = tokenizer is not None
    if has_tokenizer:
        check_tokenizer(tokenizer, whole.config.vocab_size)
    versions = {
        "gpt2-value": layout.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }
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
        save_target(folder, overwrite=overwrite)  # writing may have taken minutes: look again
    lines = load_lines(str(target), tokenizer=has_tokenizer)
    return SavedPackage(target, files, whole.num_parameters(), replaced, lines)


def save_target(folder: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The folder that `save_package` would write, with links resolved.

    Raises:
        FolderRefusedError: it holds something else.
    """
    return check_target(folder, overwrite=overwrite, model_type=layout.MODEL_TYPE, may_replace=layout.written_by_save)


def _write_record(folder: Path, model: GPT2ValueModel, tokenizer: Any, versions: dict[str, str]) -> None:
    token_ids, logit_ids = probe(model.config)
    in_float32 = model if all(w.dtype == torch.float32 for w in model.parameters()) else copy.deepcopy(model).float()
    numbers = measure(in_float32, token_ids, logit_ids)
    if damaged := not_finite({name: torch.tensor(values) for name, values in numbers.items()}):
        raise UnsavableModelError(
            f"the model's {', '.join(damaged)} are NaN or infinite, though none of its weights is: some are too large",
            expected="a model that computes finite numbers in float32",
            next_step="go back to a checkpoint from before the run diverged; the folder is untouched",
        )
    tokenizer_ids = None
    if tokenizer is not None:
        with as_ours(_cannot_read):
            tokenizer_ids = tokenizer(PROBE_TEXT)["input_ids"]
    sha256 = {path.name: layout.sha256_of(path) for path in sorted(folder.iterdir()) if path.name != layout.CARD}
    record = Record(token_ids, logit_ids, **numbers, tokenizer_ids=tokenizer_ids, versions=versions, sha256=sha256)
    record.write(folder)


def _cannot_read(gist: str) -> TokenizerMismatchError:
    return TokenizerMismatchError(
        f"the tokenizer cannot read {PROBE_TEXT!r}: {gist}",
        expected="a tokenizer that reads any text",
        next_step="load it as the class that wrote its files, or save without a tokenizer",
    )


# From the model that was passed to a copy of this installed version's class


def _unsavable(gist: str) -> UnsavableModelError:
    return UnsavableModelError(
        f"the model could not be loaded again: {gist}",
        next_step="correct the field in model.config or model.generation_config, and save again",
    )


@as_ours(_unsavable)
def installed_copy(model: nn.Module | Gathered) -> GPT2ValueModel:
    """Return a model of this installed version's class, in eval mode on the CPU, that computes what `model` computes.

    It shares the model's weights where they are on the CPU, has copies of its configs, and is what a package can hold.

    Raises:
        UnsavableModelError, MissingHeadError: see `save_package`.
    """
    given: Any = model.model if isinstance(model, Gathered) else model
    _check_class(given)
    config: Any = GPT2ValueConfig.from_dict(given.config.to_dict())
    # refuse now what could be written but not loaded again
    fields = config_fields.checked_config(json.loads(config.to_json_string()))
    held = model.weights if isinstance(model, Gathered) else given.state_dict()
    weights = {name: tensor.detach() for name, tensor in held.items()}
    _check_weights(weights, fields)
    twin: Any = build_model(config, weights)
    twin.set_attn_implementation(given.config._attn_implementation)
    if given.generation_config is not None:
        twin.generation_config = copy.deepcopy(given.generation_config)
        twin.generation_config.validate(strict=True)
        config_fields.reduce(layout.GENERATION_CONFIG, json.loads(twin.generation_config.to_json_string()))
    if hasattr(twin.config, "validate"):  # transformers 5 validates the config when it writes it
        twin.config.validate()
    if isinstance(model, Gathered):
        _refuse_other_numbers(given, model.numbers, twin, COARSE)
    else:
        exact = all(weight.dtype == torch.float32 for weight in twin.parameters())
        _refuse_other_numbers(given, computed(given), twin, CLOSE if exact else COARSE)
    return twin.cpu()


def _refuse_other_numbers(model: nn.Module, found: Numbers, twin: GPT2ValueModel, tolerance: float) -> None:
    """Refuse a model that computes other numbers than a copy made of its weights and its config.

    Raises:
        UnsavableModelError: it names the modules that differ, and by how much the numbers do.
    """
    for name, expected in computed(twin).items():
        numbers = found[name]
        same_shape = numbers.shape == expected.shape
        most = tolerance * max(1.0, float(expected.nan_to_num(0.0, 0.0, 0.0).abs().max()))
        if same_shape and torch.allclose(numbers, expected, rtol=0.0, atol=most, equal_nan=True):
            continue
        difference = f"up to {(numbers - expected).abs().max():.3g}" if same_shape else "their shape"
        others = dict(twin.named_modules())
        suspects = [
            f"{path or 'the model'} ({type(module).__name__})"
            for path, module in model.named_modules()
            if type(module).__name__.removeprefix("FSDP") != type(others.get(path)).__name__
            or "forward" in vars(module)
            or module._forward_hooks
            or module._forward_pre_hooks
        ]
        why = f"; of another class, with hooks or with another forward: {', '.join(suspects[:5])}" if suspects else ""
        raise UnsavableModelError(
            f"the model's {name} differ by {difference} from those of a copy made of its weights and its config{why}",
            expected="a model whose numbers its weights and its config give: the package holds nothing else",
            next_step="set what differs in model.config (an activation, tie_word_embeddings), or in the weights, or "
            "remove it, and save again",
        )


def _check_class(model: Any) -> None:
    """Refuse wrappers and other models, with the way out."""
    model_type = model.config.model_type if isinstance(model, transformers.PreTrainedModel) else None
    if model_type not in (layout.MODEL_TYPE, "gpt2"):  # a plain GPT-2 lacks the weights of a head
        raise UnsavableModelError(
            f"a {type(model).__name__}",
            expected="a GPT2ValueModel itself, without a wrapper",
            next_step="pass the model inside it: model.module, or model._orig_mod where it is compiled; with adapters "
            "copy.deepcopy(model).merge_and_unload(); of TRL's, save_pretrained, then: gpt2-value convert FOLDER OUT",
        )


def _check_weights(weights: Weights, config: Mapping[str, Any]) -> None:
    """Refuse weights that are not exactly the model's, that are not here, or that are not finite."""
    expected = config_fields.expected_shapes(config)
    expected["lm_head.weight"] = expected["transformer.wte.weight"]
    missing, unknown = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or unknown:
        headless = any(name.startswith(layout.HEAD_PREFIX) for name in missing)
        kind = MissingHeadError if headless else UnsavableModelError
        raise kind(
            f"missing weights: {missing[:3]}; unknown weights: {unknown[:3]}",
            expected="exactly the weights of a GPT2ValueModel, whose code travels with them",
            next_step="remove what was added to the model, and merge adapters with PEFT's merge_and_unload(); give a "
            "GPT-2 a head: model.save_pretrained(FOLDER), GPT2ValueModel.from_pretrained(FOLDER, init_value_head=True)",
        )
    for name, tensor in weights.items():
        if tensor.is_meta or tuple(tensor.shape) != expected[name] or tensor.dtype not in FLOATS:
            where = " on the meta device, without data" if tensor.is_meta else ""
            raise UnsavableModelError(
                f"{name} is {tensor.dtype} of shape {list(tensor.shape)}{where}",
                expected=f"weights in memory, in one of {', '.join(map(str, FLOATS))}, of shape {list(expected[name])}",
                next_step="load the model without offloading; gather sharded weights (ZeRO-3); convert with "
                "model.float(); resize with model.resize_token_embeddings, which keeps the config in step",
            )
    for name, count in not_finite(weights).items():
        raise UnsavableModelError(
            f"{name} has {count:,} NaN or infinite values of {weights[name].numel():,}",
            expected="finite weights",
            next_step="go back to a checkpoint from before the run diverged; the folder is untouched",
        )
