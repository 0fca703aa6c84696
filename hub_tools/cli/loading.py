"""Load models and tokenizers for the `gpt2-value` command: only reviewed code, from private copies, without other
output.

Imports typer, of hub_tools what loads, and, inside the functions that need them, transformers, safetensors and the
model.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Optional

import typer

from .. import layout, limits
from ..errors import NotAPackageError, SourceError, as_ours

MAX_SEED = (1 << 63) - 1  # torch's
# Options that several subcommands have.
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be added, changed and deleted; change nothing.")
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the package's code though it is not this installation's."),
]
Reviewed = Annotated[
    Optional[list[str]],
    typer.Option(metavar="NAME=SHA256", help="A file of the package's code that you have read; repeat it for others."),
]

PICKLED = "pytorch_model.bin"
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors calls them


class Loaded(NamedTuple):
    """A model in evaluation mode, and its tokenizer, where it has one and it was wanted."""

    model: Any
    tokenizer: Any


def load_reviewed(source: str, *, revision: str | None, reviewed: list[str] | None) -> Loaded:
    """Load a package as `load_package` does: its code runs only if it is a released version's or was reviewed.

    Args:
        reviewed: `NAME=SHA256` for each file of code that the user has read.

    Raises:
        What `load_package` raises.
    """
    from ..package.load import load_package

    quiet_transformers()
    hashes = {}
    for pair in reviewed or ():
        name, equals, digest = pair.rpartition("=")
        if not equals:
            raise typer.BadParameter(f"--reviewed {pair}: expected NAME=SHA256, as gpt2-value inspect prints them")
        hashes[name] = digest
    refuse_revision_of_a_folder(source, revision)
    loaded = load_package(source, revision=revision, reviewed_sha256=hashes or None)
    return Loaded(loaded.model, loaded.tokenizer)


def load_sampler(source: str, *, revision: str | None, reviewed: list[str] | None) -> Loaded:
    """Load a package as `load_reviewed` does, or a plain GPT-2, which has no code, as `load_base` does."""
    try:
        return load_reviewed(source, revision=revision, reviewed=reviewed)
    except NotAPackageError:
        return load_base(source, revision=revision, tokenizer=None)


def load_base(source: str, *, revision: str | None, dtype: str = "auto", tokenizer: bool | None = True) -> Loaded:
    """Load a GPT-2 checkpoint or a package from a private copy, by this installation's code. None of its own code is
    run.

    Args:
        tokenizer: True: there must be one. None: load it where there is one. False: leave it.

    Raises:
        SourceError: it cannot be found or read, or has no tokenizer.
        And what `stage` and `allowed_fields.reduce` raise.
    """
    from modeling_gpt2_value import GPT2ValueModel

    from ..files import read_json
    from ..package import config as allowed_fields
    from ..package.config import checked_config, count_numbers
    from ..package.stage import make_loadable, package_file_limit, stage
    from ..package.tokenizer import load_tokenizer

    quiet_transformers()
    refuse_revision_of_a_folder(source, revision)
    folder = _folder_of(source, revision)
    with as_ours(lambda gist: _does_not_load(source, revision, gist)):
        given = read_json(folder, layout.CONFIG)
        config = checked_config(given)
        numbers = count_numbers(config)
        vocabulary, weights = limits.vocabulary_bytes(config["vocab_size"]), limits.weight_bytes(numbers)

        def limit_of(name: str) -> int | None:
            if name == PICKLED:
                return weights
            if name.endswith(layout.CODE_SUFFIXES) or name == layout.RECORD:
                return None
            return package_file_limit(name, vocabulary=vocabulary, weights=weights)

        # GPT-2 checkpoints hold their causal masks too, so they may have twice the bytes of their numbers
        with stage(folder, limit_of=limit_of, total=2 * weights + 512 * limits.MIB) as copy:
            (copy.folder / layout.CONFIG).write_text(json.dumps(config), encoding="utf-8")
            _unpickle(copy.folder)
            _refuse_other_numbers(source, copy.folder)
            size = sum(path.stat().st_size for path in copy.folder.glob("*.safetensors"))
            if 2 * (numbers - config["n_embd"] - 1) > size:
                raise SourceError(
                    f"{source}: config.json calls for {numbers:,} numbers, and the weights have {size:,} bytes",
                    expected="weights as large as config.json says",
                    next_step="download the checkpoint again",
                )
            loadable = make_loadable(copy, [])
            model, info = GPT2ValueModel.from_pretrained(
                loadable, dtype=dtype, use_safetensors=True, output_loading_info=True
            )
            _refuse_made_up_weights(source, info)
            model.eval()
            model.name_or_path = model.config._name_or_path = source
            found = None
            has_tokenizer = any((loadable / name).exists() for name in layout.TOKENIZER)
            if tokenizer and not has_tokenizer:
                raise _no_tokenizer(source)
            if tokenizer is not False and has_tokenizer:
                found = load_tokenizer(loadable, source)
                if len(found) <= len(found.all_special_tokens):  # what transformers 5 makes of files that lack some
                    raise _no_tokenizer(source)
    unknown = allowed_fields.unknown_fields(layout.CONFIG, given)
    if unknown:
        typer.echo(f"not taken over from config.json: {', '.join(unknown)}", err=True)
    return Loaded(model, found)


def encode(tokenizer: Any, prompts: list[str], source: str) -> list[Any]:
    """Return each prompt's token ids, `[P]`.

    Raises:
        SourceError: there is no tokenizer.
        typer.BadParameter: a prompt without tokens.
    """
    import torch

    if tokenizer is None:
        raise SourceError(
            f"{source} has no tokenizer",
            expected="a tokenizer's files beside the model",
            next_step="use it from Python, with token ids: load_package(...).model.rollout(...)",
        )
    with as_ours(lambda gist: _does_not_load(source, None, f"its tokenizer cannot read the prompt: {gist}")):
        queries = [torch.tensor(tokenizer(prompt)["input_ids"], dtype=torch.long) for prompt in prompts]
    for prompt, query in zip(prompts, queries, strict=True):
        if not len(query):
            raise typer.BadParameter(f"the prompt {prompt!r} has no tokens: write something to go on from")
    return queries


def refuse_revision_of_a_folder(source: str, revision: str | None) -> None:
    if revision is not None and Path(source).is_dir():
        raise typer.BadParameter(f"{source} is a folder, which has no revisions: leave --revision out")


def quiet_transformers() -> None:
    """Keep transformers' progress bars and warnings out of the command's own output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _folder_of(source: str, revision: str | None) -> Path:
    """Return the folder that holds the checkpoint: `source` itself, or the snapshot in the Hub's cache."""
    if os.path.isdir(source):
        return Path(source)
    from ..hub.ask import is_repository_id
    from ..hub.download import fetch

    if not is_repository_id(source):
        raise _does_not_load(source, revision, "there is no such folder, and it is no name of a repository")
    return fetch(source, revision=revision).folder


def _unpickle(folder: Path) -> None:
    """Replace a pickle by safetensors. It is read without running what it asks for."""
    path = folder / PICKLED
    if not path.exists():
        return
    if not any(folder.glob("*.safetensors")):
        from safetensors.torch import save_file

        from ..convert.pickles import read_tensors

        state = {
            name: tensor.contiguous().clone()
            for name, tensor in read_tensors(path, limit=limits.WEIGHT_BYTES_AT_MOST).items()
        }
        save_file(state, folder / layout.WEIGHTS, metadata={"format": "pt"})
    path.unlink()


def _refuse_other_numbers(source: str, folder: Path) -> None:
    """Refuse weights of whole numbers, which transformers would take for numbers like any others. Masks may be such."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118  # it is no dict
        for name, dtype in dtypes.items():
            if dtype not in FLOATS and not name.endswith((".attn.bias", ".crossattention.bias")):
                raise SourceError(
                    f"{source}: {name[:120]} is {dtype}",
                    expected=f"one of {', '.join(FLOATS)}",
                    next_step="if it is quantised, dequantise it in its own library, and save it again",
                )


def _refuse_made_up_weights(source: str, info: dict[str, Any]) -> None:
    """Refuse a checkpoint that lacks weights of the body: transformers puts random numbers in their place."""
    lost = sorted(
        str(name) for name in info["missing_keys"] if not str(name).startswith((layout.HEAD_PREFIX, "lm_head."))
    )
    if lost:
        raise SourceError(
            f"{source} has no {', '.join(lost[:5])} ({len(lost)} missing)",
            expected="all the weights that config.json calls for",
            next_step="download the checkpoint again",
        )


def _no_tokenizer(source: str) -> SourceError:
    return SourceError(
        f"{source} has no tokenizer",
        expected="a tokenizer's files",
        next_step="if it has none, leave it out of the package: create --no-tokenizer",
    )


def _does_not_load(source: str, revision: str | None, gist: str) -> SourceError:
    where = f"{source} at revision {revision}" if revision else source
    return SourceError(
        f"{where} does not load: {gist}",
        expected="a GPT-2 model, in a folder or on the Hub",
        next_step="check the name, the revision, and for a private repository the login: hf auth login",
    )
