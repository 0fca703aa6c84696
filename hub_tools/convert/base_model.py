"""A GPT-2 to begin with, of somebody else's: what `gpt2-value create` and the merging of an adapter read.

Imports torch, huggingface_hub, the model, and of hub_tools `formats` and the modules that read files. transformers is
not pointed at the folder: it would load an adapter that lies in it, and follow what its fields name.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import PreTrainedTokenizerBase

from modeling_gpt2_value import GPT2ValueModel

from ..errors import GPT2ValueHubError, MissingFileError, MissingHeadError, SourceError
from ..files import file_in, read_json
from ..layout import CONFIG, GENERATION_CONFIG, MODEL_TYPE, TOKENIZER, WEIGHTS, WEIGHTS_INDEX
from .companions import carried_generation_config, carried_tokenizer
from .formats import Translation, translate
from .package_model import package_model
from .weight_files import MODEL_WEIGHTS, PICKLED_WEIGHTS, read_state_dict


@dataclass(frozen=True)
class BaseModel:
    """A model with a value head, in memory, and the tokenizer that lies beside it."""

    model: GPT2ValueModel  # in evaluation mode, on the CPU
    tokenizer: PreTrainedTokenizerBase | None


def read_base(
    source: str, *, revision: str | None = None, dtype: torch.dtype | None = None, with_tokenizer: bool = True
) -> BaseModel:
    """A GPT-2, or a package, as a model with a value head: its own head where it has one, and a new one otherwise.

    Args:
        source: a folder, or the id of a repository on the Hub.
        revision: branch, tag or commit of the repository.
        dtype: of the body; by default the checkpoint's.
        with_tokenizer: read its tokenizer too.

    Raises:
        SourceError: there is no such model, or it cannot be read; `__cause__` says more.
    """
    try:
        folder = Path(source) if os.path.isdir(source) else fetch(source, revision)
        if read_json(folder, CONFIG).get("model_type") == MODEL_TYPE:
            model = package_model(folder).model
        else:
            model = _plain_model(folder)
        if dtype is not None:
            model.to(dtype)
            model.v_head.float()
        tokenizer = None
        if with_tokenizer:
            tokenizer = carried_tokenizer(None, [folder], vocab_size=model.config.vocab_size)
    except GPT2ValueHubError as err:
        at = f" at revision {revision}" if revision else ""
        raise SourceError(
            f"{source}{at} does not load: {err.found}",
            expected=err.expected or "a GPT-2 model, in a folder or on the Hub",
            next_step=err.next_step,
        ) from err
    return BaseModel(model.eval(), tokenizer)


def model_of(found: Translation) -> GPT2ValueModel:
    """The model that a translated checkpoint is."""
    model = GPT2ValueModel(found.config)
    model.to(found.dtype)
    model.v_head.float()
    # strict: every tensor of the model is replaced, and nothing is left over
    model.load_state_dict({"lm_head.weight": found.state["transformer.wte.weight"], **found.state})
    return model.eval()


def fetch(name: str, revision: str | None) -> Path:
    """The folder in the Hub's cache with a model of somebody else's: pickles only where there is nothing better.

    Raises:
        MissingFileError: the Hub does not have it, or does not give it.
    """
    beside = [CONFIG, GENERATION_CONFIG, *sorted(TOKENIZER)]
    safe = [WEIGHTS, WEIGHTS_INDEX, "model-*-of-*.safetensors"]
    try:
        home = Path(snapshot_download(name, revision=revision, allow_patterns=[*beside, *safe]))
        if not any((home / file).is_file() for file in (WEIGHTS, WEIGHTS_INDEX)):
            pickles = [PICKLED_WEIGHTS, f"{PICKLED_WEIGHTS}.index.json", "pytorch_model-*-of-*.bin"]
            home = Path(snapshot_download(name, revision=revision, allow_patterns=[*beside, *pickles]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as err:
        raise MissingFileError(
            f"{name[:200]!r} is no folder here, and was not found on the Hub: {str(err).splitlines()[0]}",
            next_step="check the name, the revision, and for a private repository the login: hf auth login",
        ) from err
    return home


def _plain_model(folder: Path) -> GPT2ValueModel:
    """A GPT-2 that is no package, with the head that it has, or with a new one."""
    # transformers' own order: safetensors, then pickles
    names = [name for name in MODEL_WEIGHTS if os.path.lexists(folder / name)]
    if not names:
        raise MissingFileError(
            f"{folder} holds no weights under a name of transformers'",
            expected=" or ".join(MODEL_WEIGHTS),
            next_step="name the folder of a GPT-2, or convert the file: gpt2-value convert",
        )
    weights = file_in(folder, names[0])
    state, fields = read_state_dict(weights), read_json(folder, CONFIG)
    try:
        found = translate(str(weights), state, fields)
    except MissingHeadError:
        found = translate(str(weights), state, fields, init_value_head=True)
    model = model_of(found)
    generation_config = carried_generation_config([folder])
    if generation_config is not None:
        model.generation_config = generation_config
    return model
