"""Write a complete package, all or nothing.

Imports the standard library, torch, transformers, the remote code, and of hub_tools `card`, `model`, `record`, `probe`,
`replace_folder`, `sharded`, `target` and what these import.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from configuration_gpt2_value import GPT2ValueConfig
from modeling_gpt2_value import GPT2ValueModel

from .. import layout
from ..errors import (
    MissingHeadError,
    TokenizerMismatchError,
    UnsavableModelError,
    as_ours,
)
from . import config as config_fields
from .card import CardFacts, load_lines, render_card
from .probe import measure
from .record import PROBE_TEXT, Record, probe, releases, versions_of
from .replace import check_target, staging_folder, writing_to
from .sharded import State, in_first_process
from .weights import not_finite


@dataclass(frozen=True)
class SavedPackage:
    """A package that was written to the disk."""

    folder: Path
    files: dict[str, int]  # name -> bytes
    parameters: int
    replaced: bool  # whether there was a package at this place before
    load_lines: str  # the lines that load it, in any Python that has torch and transformers

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())


@dataclass(frozen=True)
class SaveOptions:
    """How a package is saved; see `save_package`."""

    base_model: str | None
    license: str | None
    tags: Sequence[str]
    repo_id: str | None
    max_shard_size: int | str
    overwrite: bool = True
    handler: bool = False


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
    handler: bool = False,
) -> SavedPackage:
    """Write a complete package: weights, config, code, tokenizer, card, and a record to verify it by.

    The package is prepared beside `folder` and then put in its place in one step (see `replace_folder`). A process
    killed at any moment leaves the old package or this one. The next save removes what such a process left beside
    `folder`. Nothing of a replaced package stays, not even a card that was edited by hand. A reader that opens files
    one after the other during the replacement can see files of both packages.

    The model is not changed: mode, config, device, hooks, gradients and random state stay as they are. Its weights are
    not copied, unless they are on a GPU. The package gets this installed version's code, even if the model itself was
    loaded from a package with other code.

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
        handler: also write `handler.py`, by which an Inference Endpoint answers requests: code of ours that runs there
            and nowhere else. It needs the tokenizer.

    Raises:
        UnsavableModelError, MissingHeadError: not a value-head model, or wrapped in something.
        UnsavableModelError: a sharded model, and another process did not call this within 30 s.
        UnsavableModelError: a model that could not be loaded
            again.
        TokenizerMismatchError: a tokenizer with ids that the model does not have, or that brings code; or none, and
            a handler.
        OptionsError: see `render_card`.
        FolderRefusedError: `folder` holds something else, or cannot be replaced in one step.
        SaveFailedError: the system refused a write. What was in `folder` is untouched.
    """
    options = SaveOptions(base_model, license, tags, repo_id, max_shard_size, overwrite, handler)
    return in_first_process(model, lambda state: write_package(model, state, folder, tokenizer, options))


def write_package(
    model: nn.Module, state: State | None, folder: str | os.PathLike[str], tokenizer: Any, options: SaveOptions
) -> SavedPackage:
    """What `save_package` does in the process that writes; `state` as `in_first_process` gives it."""
    target = save_target(folder, overwrite=options.overwrite)
    installed = installed_copy(model, state)
    if tokenizer is not None:
        _check_tokenizer(tokenizer, installed.config.vocab_size)
    elif options.handler:
        raise TokenizerMismatchError(
            "a handler, and no tokenizer: an Inference Endpoint is sent texts",
            next_step="pass the tokenizer as well: save_package(model, FOLDER, tokenizer, handler=True)",
        )
    card = render_card(
        _facts(installed, tokenizer, options.handler),
        base_model=options.base_model,
        license=options.license,
        tags=options.tags,
        repo_id=options.repo_id,
    )
    with writing_to(target), staging_folder(target) as staging:
        if options.handler:
            shutil.copyfile(layout.written_code()[layout.HANDLER], staging.package / layout.HANDLER)
        _write(staging.package, installed, tokenizer, card, options.max_shard_size)
        files = {path.name: path.stat().st_size for path in sorted(staging.package.iterdir())}
        save_target(folder, overwrite=options.overwrite)  # writing may have taken minutes: look again
        replaced = staging.commit()
    return SavedPackage(
        folder=target,
        files=files,
        parameters=_parameters(installed),
        replaced=replaced,
        load_lines=load_lines(str(target), tokenizer=tokenizer is not None),
    )


def save_target(folder: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The folder that `save_package` would write, with links resolved.

    Raises:
        FolderRefusedError: it holds something else, or cannot be replaced in one step.
    """

    def may_replace(name: str) -> bool:
        if name == layout.HANDLER:  # many write their own
            path = Path(folder, name)
            return path.is_file() and bool(versions_of(name, layout.sha256_of(path), releases()))
        return layout.written_by_save(name)

    return check_target(
        folder, overwrite=overwrite, what="a package", model_type=layout.MODEL_TYPE, may_replace=may_replace
    )


def _check_tokenizer(tokenizer: Any, vocab_size: int) -> None:
    if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
        raise TokenizerMismatchError(
            f"the tokenizer is a {type(tokenizer).__name__}",
            expected="a transformers tokenizer",
            next_step="AutoTokenizer.from_pretrained(...); PreTrainedTokenizerFast wraps one of tokenizers",
        )
    vocabulary = tokenizer.get_vocab()
    if set(vocabulary) <= set(tokenizer.all_special_tokens):
        raise TokenizerMismatchError(
            f"the tokenizer has {len(vocabulary)} tokens, none of them an ordinary one",
            expected="a tokenizer that can read text; transformers 5 makes an empty one where it finds no files",
            next_step="load it from where its files are, or save without a tokenizer",
        )
    largest = max(vocabulary.values())
    if largest >= vocab_size:
        raise TokenizerMismatchError(
            f"the tokenizer has the id {largest}, and the model's vocabulary ends at {vocab_size - 1}",
            expected="no id that the model has no embedding for",
            next_step=f"model.resize_token_embeddings({largest + 1}), or remove the tokens that were added",
        )


def _facts(model: GPT2ValueModel, tokenizer: Any, handler: bool) -> CardFacts:
    config = model.config
    return CardFacts(
        parameters=_parameters(model),
        dtype=str(model.dtype).removeprefix("torch."),
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        n_head=config.n_head,
        n_positions=config.n_positions,
        vocab_size=config.vocab_size,
        has_tokenizer=tokenizer is not None,
        versions=_versions(),
        has_handler=handler,
    )


def _parameters(model: GPT2ValueModel) -> int:
    return sum(weight.numel() for weight in model.parameters())  # a tied weight is one parameter


def _versions() -> dict[str, str]:
    return {
        "gpt2-value": layout.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def _write(folder: Path, model: GPT2ValueModel, tokenizer: Any, card: Any, max_shard_size: int | str) -> None:
    """Write every file of the package."""
    model.save_pretrained(folder, max_shard_size=max_shard_size)  # config, weights, this installation's code
    if tokenizer is not None:
        _write_tokenizer(folder, tokenizer)
    (folder / layout.CARD).write_text(f"{card}\n", encoding="utf-8")
    for path in folder.iterdir():  # safetensors writes files that only their owner can read
        shutil.copymode(folder / layout.CARD, path)
    token_ids, logit_ids = probe(vocab_size=model.config.vocab_size, n_positions=model.config.n_positions)
    tokenizer_ids = None
    if tokenizer is not None:
        with as_ours(_cannot_read):
            tokenizer_ids = tokenizer(PROBE_TEXT)["input_ids"]
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


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    """Write the tokenizer's files, so that both transformers 4 and 5 can read them.

    Version 5 renames two settings in `tokenizer_config.json`, and still reads the old names, so those are written. It
    also records how the tokenizer was loaded here, which is removed.
    """
    tokenizer.save_pretrained(folder)
    foreign = sorted(path.name for path in folder.iterdir() if not layout.written_by_save(path.name))
    if foreign:
        raise TokenizerMismatchError(
            f"the tokenizer wrote {foreign}, which have no place in a package",
            expected=f"some of {sorted(layout.TOKENIZER)}",
            next_step="use a tokenizer of transformers' own, without code; a fast one: use_fast=True",
        )
    path = folder / layout.TOKENIZER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    for name in ("backend", "is_local", "local_files_only", "name_or_path"):
        settings.pop(name, None)
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WRAPPED = "save the model inside the wrapper"
# Modules that PEFT puts into a model, or around it, by their last names.
PEFT_PARTS = {"base_model", "base_layer", "modules_to_save", "prompt_encoder", "token_adapter"}


def installed_shell(model: nn.Module, gathered: State | None = None) -> tuple[GPT2ValueModel, State]:
    """Return an empty model of this installed version's class, on the meta device, with the configs of `model`; and the
    weights of `model`, or those that were `gathered`, after checking that the empty model takes exactly these. (Whether
    they are finite is not checked.)

    Raises:
        UnsavableModelError, MissingHeadError: see `save_package`.
    """
    _check_class(model)
    with as_ours(_unsavable):
        given: Any = model.config
        config: Any = GPT2ValueConfig.from_dict(given.to_dict())
        generation_config = copy.deepcopy(getattr(model, "generation_config", None))
        # refuse now what could be written but not loaded again
        config_fields.reduce(layout.CONFIG, json.loads(config.to_json_string()))
        if generation_config is not None:
            generation_config.validate(strict=True)
            config_fields.reduce(layout.GENERATION_CONFIG, json.loads(generation_config.to_json_string()))
    state = model.state_dict() if gathered is None else gathered
    state = {name: tensor.detach() for name, tensor in state.items()}
    with torch.device("meta"), as_ours(_unsavable):
        installed = GPT2ValueModel(config)
        if hasattr(
            config, "validate"
        ):  # transformers 5 validates the config when it writes it, after the model has chosen its kernels
            config.validate()
    _check_state(state, installed)
    if generation_config is not None:
        installed.generation_config = generation_config
    return installed, state


def _unsavable(gist: str) -> UnsavableModelError:
    return UnsavableModelError(
        f"the model's config or generation_config is not valid: {gist}",
        next_step="correct the field in model.config or model.generation_config, and save again",
    )


def installed_copy(model: nn.Module, gathered: State | None) -> GPT2ValueModel:
    """Return a model of this installed version's class, in eval mode on the CPU, that holds the same weights (shared
    where they are on the CPU, else copied), after checking that they are complete and finite."""
    installed, state = installed_shell(model, gathered)
    body = {name: tensor.cpu() for name, tensor in state.items() if name != "lm_head.weight"}
    tied = installed.config.tie_word_embeddings
    body["lm_head.weight"] = body["transformer.wte.weight"] if tied else state["lm_head.weight"].cpu()
    for name, count in not_finite(body).items():
        raise UnsavableModelError(
            f"{name} has {count:,} NaN or infinite values of {body[name].numel():,}",
            expected="finite weights",
            next_step="go back to a checkpoint from before the run diverged; the folder is untouched",
        )
    installed.load_state_dict(body, assign=True)
    if tied:
        installed.tie_weights()
    # causal masks and the like, which are in no state dict
    found = dict(model.named_buffers())
    for name, _ in list(installed.named_buffers()):
        owner, _, attribute = name.rpartition(".")
        setattr(installed.get_submodule(owner), attribute, found[name].cpu())
    return installed.eval()


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


def _check_state(state: State, installed: GPT2ValueModel) -> None:
    """Refuse weights that are not exactly the model's, or that are not here."""
    expected = {name: tuple(tensor.shape) for name, tensor in installed.state_dict().items()}
    missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
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
    for name, tensor in state.items():
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
    head, embeddings = state["lm_head.weight"], state["transformer.wte.weight"]
    if installed.config.tie_word_embeddings and head.data_ptr() != embeddings.data_ptr() and not head.equal(embeddings):
        raise refuse(
            "lm_head.weight and transformer.wte.weight differ, and config.tie_word_embeddings is True",
            "equal weights, since loading would tie them",
            "set model.config.tie_word_embeddings = False to keep both, or model.tie_weights() to tie them",
        )
