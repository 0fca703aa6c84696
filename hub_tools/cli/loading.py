"""How the `gpt2-value` command loads models and tokenizers: quietly, and with errors that a user can act on.

Imports typer and, inside the functions that need them, torch, transformers and huggingface_hub.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from ..errors import SourceError


def load_model(source: str, *, revision: str | None, dtype: str = "auto") -> Any:
    """A model by this installation's code, whatever code comes with it."""
    from modeling_gpt2_value import GPT2ValueModel

    with _translated(source, revision):
        return GPT2ValueModel.from_pretrained(source, dtype=dtype, **at(source, revision)).eval()


def load_tokenizer(source: str, *, revision: str | None) -> Any:
    """A tokenizer; raises SourceError where there is none."""
    from transformers import AutoTokenizer

    hint = "if it has none, leave it out of the package: create --no-tokenizer"
    # transformers 4.57 tries one kind of tokenizer after the other, and fails by what the last of them lacks
    also = (ImportError, TypeError, AttributeError)
    with _translated(source, revision, what="a tokenizer", hint=hint, also=also):
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **at(source, revision))
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers 5 makes where there are no files
        raise SourceError(f"{source} has no tokenizer", expected="a tokenizer's files", next_step=hint)
    return tokenizer


def at(source: str, revision: str | None) -> dict[str, str]:
    """`revision` as transformers takes it; a folder has none."""
    if revision is not None and Path(source).is_dir():
        raise typer.BadParameter(f"{source} is a folder, which has no revisions: leave --revision out")
    return {} if revision is None else {"revision": revision}


def quiet_transformers() -> None:
    """No progress bars or warnings of transformers' among the command's own output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def _translated(
    source: str,
    revision: str | None,
    what: str = "a GPT-2 model",
    hint: str = "",
    also: tuple[type[Exception], ...] = (),
) -> Iterator[None]:
    """What transformers says when it cannot load something, as an error of ours, without a traceback."""
    import pickle

    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError

    quiet_transformers()
    known: tuple[type[Exception], ...] = (OSError, ValueError, RuntimeError, EOFError, HfHubHTTPError, SafetensorError)
    known += (pickle.UnpicklingError, *also)
    try:
        yield
    except known as error:
        at = f" at revision {revision}" if revision else ""
        raise SourceError(
            f"{source}{at} does not load: {' '.join(str(error).split()) or type(error).__name__}",
            expected=f"{what}, in a folder or on the Hub",
            next_step=hint or "check the name, the revision, and for a private repository the login: hf auth login",
        ) from error
