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
from .card import CardFacts, load_lines, render_card
from .probe import measure
from .record import PROBE_TEXT, Record, probe
from .replace import check_target, staging_folder, writing_to
from .sharded import Numbers, State, Weights, computed, in_first_process
from .tokenizer import check_tokenizer, write_tokenizer
from .weights import build_model, not_finite

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Of the largest number, how far the copy's numbers may be from the model's: the same operations on the same machine
# round alike in float32; half precision, and weights that are gathered from several devices, are computed otherwise.
CLOSE, COARSE = 1e-5, 2e-2
WRAPPED = "save the model inside the wrapper"
# Modules that PEFT puts into a model, or around it, by their last names.
PEFT_PARTS = {"base_model", "base_layer", "modules_to_save", "prompt_encoder", "token_adapter"}


@dataclass(frozen=True)
class SavedPackage:
    """A package that was written to the disk. It prints as a summary, with the lines that load it."""

    folder: Path
    files: dict[str, int]  # name -> bytes
    parameters: int
    replaced: bool  # whether there was a package at this place before
    load_lines: str  # the lines that load it, in any Python that has torch and transformers

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def __str__(self) -> str:
        done = "replaced" if self.replaced else "written"
        summary = f"{self.parameters:,} parameters, {len(self.files)} files, {in_units(self.size)}"
        return f"{self.folder} {done}: {summary}\n{self.load_lines}"


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

    The package is prepared beside `folder` and then put in its place in one step (see `replace_folder`). A process
    killed at any moment leaves the old package or this one. The next save removes what such a process left beside
    `folder`. Nothing of a replaced package stays, not even a card that was edited by hand. A reader that opens files
    one after the other during the replacement can see files of both packages.

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
        FolderRefusedError: `folder` holds something else, or cannot be replaced in one step.
        SaveFailedError: the system refused a write. What was in `folder` is untouched.
    """
    return in_first_process(
        model,
        lambda state: write_package(
            model,
            state,
            folder,
            tokenizer,
            overwrite=overwrite,
            base_model=base_model,
            license=license,
            tags=tags,
            repo_id=repo_id,
            max_shard_size=max_shard_size,
        ),
    )


def write_package(
    model: nn.Module,
    state: State | None,
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
    """What `save_package` does in the process that writes; `state` as `in_first_process` gives it."""
    target = save_target(folder, overwrite=overwrite)
    installed = installed_copy(model, state)
    if tokenizer is not None:
        check_tokenizer(tokenizer, installed.config.vocab_size)
    facts = _facts(installed, has_tokenizer=tokenizer is not None)
    card = render_card(facts, base_model=base_model, license=license, tags=tags, repo_id=repo_id)
    with writing_to(target), staging_folder(target) as staging:
        _write(staging.package, installed, tokenizer, str(card), max_shard_size)
        files = {path.name: path.stat().st_size for path in sorted(staging.package.iterdir())}
        save_target(folder, overwrite=overwrite)  # writing may have taken minutes: look again
        replaced = staging.commit()
    return SavedPackage(
        folder=target,
        files=files,
        parameters=facts.parameters,
        replaced=replaced,
        load_lines=load_lines(str(target), tokenizer=tokenizer is not None),
    )


def save_target(folder: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The folder that `save_package` would write, with links resolved.

    Raises:
        FolderRefusedError: it holds something else, or cannot be replaced in one step.
    """
    return check_target(
        folder,
        overwrite=overwrite,
        what="a package",
        model_type=layout.MODEL_TYPE,
        may_replace=layout.written_by_save,
    )


def _facts(model: GPT2ValueModel, *, has_tokenizer: bool) -> CardFacts:
    config = model.config
    return CardFacts(
        parameters=sum(weight.numel() for weight in model.parameters()),  # a tied weight is one parameter
        dtype=str(model.dtype).removeprefix("torch."),
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        n_head=config.n_head,
        n_positions=config.n_positions,
        vocab_size=config.vocab_size,
        has_tokenizer=has_tokenizer,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {
        "gpt2-value": layout.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _write(folder: Path, model: GPT2ValueModel, tokenizer: Any, card: str, max_shard_size: int | str) -> None:
    """Write every file of the package."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)  # config, weights, this installation's code
    tokenizer_ids = None
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer)
        with as_ours(_cannot_read):
            tokenizer_ids = tokenizer(PROBE_TEXT)["input_ids"]
    (folder / layout.CARD).write_text(f"{card}\n", encoding="utf-8")
    for path in folder.iterdir():  # safetensors writes files that only their owner can read
        shutil.copymode(folder / layout.CARD, path)
    token_ids, logit_ids = probe(vocab_size=model.config.vocab_size, n_positions=model.config.n_positions)
    in_float32 = model if all(w.dtype == torch.float32 for w in model.parameters()) else copy.deepcopy(model).float()
    numbers = measure(in_float32, token_ids, logit_ids)
    for name, values in numbers.items():
        if not torch.tensor(values).isfinite().all():
            raise UnsavableModelError(
                f"the model's {name} are NaN or infinite, though none of its weights is: some of them are too large",
                expected="a model that computes finite numbers in float32",
                next_step="go back to a checkpoint from before the run diverged; the folder is untouched",
            )
    Record(
        token_ids=token_ids,
        logit_ids=logit_ids,
        **numbers,
        tokenizer_ids=tokenizer_ids,
        versions=_versions(),
        sha256={path.name: layout.sha256_of(path) for path in sorted(folder.iterdir()) if path.name != layout.CARD},
    ).write(folder)


def _cannot_read(gist: str) -> TokenizerMismatchError:
    return TokenizerMismatchError(
        f"the tokenizer cannot read {PROBE_TEXT!r}: {gist}",
        expected="a tokenizer that reads any text",
        next_step="load it as the class that wrote its files, or save without a tokenizer",
    )


# From the model that was passed to a copy of this installed version's class


def installed_copy(model: nn.Module, state: State | None) -> GPT2ValueModel:
    """Return a model of this installed version's class, in eval mode on the CPU, that computes what `model` computes.

    It shares the model's weights where they are on the CPU, has copies of its configs, and is what a package can hold.

    Args:
        model: the model.
        state: as `in_first_process` gives it: of a sharded model, what was gathered; else None.

    Raises:
        UnsavableModelError, MissingHeadError: see `save_package`.
    """
    _check_class(model)
    with as_ours(_unsavable):
        given: Any = model.config
        config: Any = GPT2ValueConfig.from_dict(given.to_dict())
        generation_config = copy.deepcopy(getattr(model, "generation_config", None))
        # refuse now what could be written but not loaded again
        fields = config_fields.checked_config(json.loads(config.to_json_string()))
        if generation_config is not None:
            generation_config.validate(strict=True)
            config_fields.reduce(layout.GENERATION_CONFIG, json.loads(generation_config.to_json_string()))
    held = model.state_dict() if state is None else state.weights
    weights = {name: tensor.detach() for name, tensor in held.items()}
    _check_weights(weights, fields)
    twin = build_model(config, weights)
    attention = getattr(given, "_attn_implementation", None)
    if attention is not None and hasattr(twin, "set_attn_implementation"):
        twin.set_attn_implementation(attention)
    if hasattr(twin.config, "validate"):  # transformers 5 validates the config when it writes it
        with as_ours(_unsavable):
            twin.config.validate()
    _refuse_other_numbers(model, computed(model) if state is None else state.numbers, twin, sharded=state is not None)
    if any(weight.device.type != "cpu" for weight in twin.parameters()):
        twin = build_model(config, {name: tensor.cpu() for name, tensor in weights.items()})
    if generation_config is not None:
        twin.generation_config = generation_config
    return twin


def _refuse_other_numbers(model: nn.Module, found: Numbers, twin: GPT2ValueModel, *, sharded: bool) -> None:
    """Refuse a model that computes other numbers than a copy made of its weights and its config.

    Raises:
        UnsavableModelError: it names the modules that differ, and by how much the numbers do.
    """
    with as_ours(_unsavable):
        copied = computed(twin)
    exact = not sharded and all(weight.dtype == torch.float32 for weight in twin.parameters())
    for name, numbers in found.items():
        same_shape = numbers.shape == copied[name].shape
        largest = max(1.0, float(copied[name].nan_to_num(0.0, 0.0, 0.0).abs().max()))
        tolerance = (CLOSE if exact else COARSE) * largest
        if same_shape and torch.allclose(numbers, copied[name], rtol=0.0, atol=tolerance, equal_nan=True):
            continue
        difference = f"up to {(numbers - copied[name]).abs().max():.3g}" if same_shape else "their shape"
        raise UnsavableModelError(
            f"the model's {name} differ by {difference} from those of a copy made of its weights and its config"
            + (f"; {reasons}" if (reasons := _reasons(model, twin)) else ""),
            expected="a model whose numbers its weights and its config give: the package holds nothing else",
            next_step="set what differs in model.config, or in the weights, or remove it, and save again",
        )


def _reasons(model: nn.Module, twin: nn.Module) -> str:
    """Name what may make a model compute otherwise than its copy."""
    found = []
    parts = dict(twin.named_modules())
    for name, module in model.named_modules():
        where, part = name or "the model", parts.get(name)
        if part is None or type(module).__name__.removeprefix("FSDP") != type(part).__name__:
            found.append(f"{where} is a {type(module).__name__}" + (f", not a {type(part).__name__}" if part else ""))
        elif "forward" in vars(module):
            found.append(f"the forward of {where} was replaced")
        if module._forward_hooks or module._forward_pre_hooks:
            found.append(f"{where} has hooks")
    return ", ".join(found[:5])


def _unsavable(gist: str) -> UnsavableModelError:
    return UnsavableModelError(
        f"the model's config or generation_config is not valid: {gist}",
        next_step="correct the field in model.config or model.generation_config, and save again",
    )


def _check_class(model: nn.Module) -> None:
    """Refuse wrappers, and other models, each with the way out."""

    def refuse(found: str, next_step: str) -> UnsavableModelError:
        return UnsavableModelError(found, expected="a GPT2ValueModel", next_step=next_step)

    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise refuse(f"a {name}", "pass the model itself")
    # Not by `peft_config` alone: PEFT 0.17 leaves that on a model in which it has merged everything.
    if (hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False)) and any(
        name.rpartition(".")[2] in PEFT_PARTS for name, _ in model.named_modules()
    ):
        way_out = "merge them into a copy: save_package(copy.deepcopy(peft_model).merge_and_unload(), ...)"
        if not hasattr(model, "merge_and_unload"):  # transformers' own add_adapter, which cannot merge
            way_out = (
                'merge them with PEFT: model.save_pretrained("adapter"); save_package(PeftModel.from_pretrained('
                'GPT2ValueModel.from_pretrained(BASE), "adapter").merge_and_unload(), ...)'
            )
        raise refuse(f"a {name} with PEFT adapters, which are not part of GPT-2's weights", way_out)
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise refuse(f"a compiled model ({name})", f"{WRAPPED}: save_package(model._orig_mod, ...)")
    if isinstance(getattr(model, "module", None), nn.Module):
        raise refuse(
            f"a wrapper ({name})",
            f"{WRAPPED}, in one process: save_package(model.module, ...) or accelerator.unwrap_model(model)",
        )
    if hasattr(model, "pretrained_model") and hasattr(model, "v_head"):
        raise refuse(f"TRL's {name}", "save it with its own save_pretrained, then: gpt2-value convert FOLDER OUT")
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type == "gpt2":
        raise MissingHeadError(
            f"a {name}, which has no value head",
            expected="a GPT2ValueModel",
            next_step="model.save_pretrained(FOLDER); GPT2ValueModel.from_pretrained(FOLDER) gives it a head",
        )
    if model_type != layout.MODEL_TYPE:
        raise refuse(f"a {name} of model type {model_type!r}", "pass a GPT2ValueModel")


def _check_weights(weights: Weights, config: Mapping[str, Any]) -> None:
    """Refuse weights that are not exactly the model's, that are not here, or that are not finite."""
    expected = config_fields.expected_shapes(config)
    expected["lm_head.weight"] = expected["transformer.wte.weight"]
    missing, unknown = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if any(name.startswith(layout.HEAD_PREFIX) for name in missing):
        raise MissingHeadError(
            f"the model has no {', '.join(missing[:2])}",
            expected="the value head that its config calls for",
            next_step="build it as GPT2ValueModel, which brings one, or load it with init_value_head=True",
        )

    def refuse(found: str, expected: str, next_step: str) -> UnsavableModelError:
        return UnsavableModelError(found, expected=expected, next_step=next_step)

    if missing or unknown:
        raise refuse(
            f"missing weights: {missing[:3]}; unknown weights: {unknown[:3]}",
            "exactly the weights of GPT2ValueModel, whose code travels with them",
            "remove what was added to the model (adapters, extra heads), and save again",
        )
    for name, tensor in weights.items():
        if tensor.is_meta:
            raise refuse(
                f"{name} is on the meta device, without data",
                "weights in memory",
                "load the model without device_map='auto' or offloading, and save again",
            )
        if tuple(tensor.shape) != expected[name]:
            raise refuse(
                f"{name} has shape {list(tensor.shape)}",
                f"shape {list(expected[name])}, as model.config says",
                "resize with model.resize_token_embeddings, which keeps the config in step; "
                "if the weights are sharded (ZeRO-3, FSDP), gather them first",
            )
        if tensor.dtype not in FLOATS:
            raise refuse(
                f"{name} is {tensor.dtype}",
                f"one of {', '.join(map(str, FLOATS))}",
                "convert it: model.float(); a quantised model must be dequantised first",
            )
    for name, count in not_finite(weights).items():
        raise refuse(
            f"{name} has {count:,} NaN or infinite values of {weights[name].numel():,}",
            "finite weights",
            "go back to a checkpoint from before the run diverged; the folder is untouched",
        )
    head, embeddings = weights["lm_head.weight"], weights["transformer.wte.weight"]
    if config_fields.tied(config) and head.data_ptr() != embeddings.data_ptr() and not head.equal(embeddings):
        raise refuse(
            "lm_head.weight and transformer.wte.weight differ, and config.tie_word_embeddings is True",
            "equal weights, since loading would tie them",
            "set model.config.tie_word_embeddings = False to keep both, or model.tie_weights() to tie them",
        )
