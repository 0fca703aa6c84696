"""Options that several subcommands have, and what they load. Imports typer, and hub_tools inside the functions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NamedTuple, Optional

import typer

from ..errors import LoadError, NotAPackageError, SourceError, as_ours

MAX_SEED = (1 << 63) - 1  # torch's
Package = Annotated[str, typer.Argument(help="A package: a folder, or an id on the Hub.")]
Out = Annotated[Path, typer.Argument(help="Folder to write to: new, empty, or one that this command wrote.")]
Revision = Annotated[Optional[str], typer.Option(help="Branch, tag or commit on the Hub.")]
Overwrite = Annotated[bool, typer.Option(help="Replace what this command wrote there before.")]
Seed = Annotated[Optional[int], typer.Option(min=0, max=MAX_SEED, help="Makes the draw repeatable.")]
Temperature = Annotated[float, typer.Option(help="Below 1 sharper, above 1 flatter; more than 0.")]
TopK = Annotated[int, typer.Option(min=0, help="The k most probable tokens alone; 0 is off.")]
TopP = Annotated[float, typer.Option(help="The most probable tokens of this mass alone; 1 is off.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the package's code though it is not this installation's.")
]
Reviewed = Annotated[
    Optional[list[str]],
    typer.Option(metavar="NAME=SHA256", help="A file of the package's code that you have read; repeat it for others."),
]


class Loaded(NamedTuple):
    """A model in evaluation mode, and its tokenizer, where it has one."""

    model: Any
    tokenizer: Any


def load(source: str, *, revision: str | None = None, reviewed: list[str] | None = None, plain: bool = False) -> Loaded:
    """Load a package: its code runs only if it is a released version's, or if the user has read it.

    Args:
        reviewed: `NAME=SHA256` for each file of code that the user has read.
        plain: load a GPT-2 without a head too, with a new one.

    Raises:
        What `load_package` and `load_checkpoint` raise.
    """
    from ..package.load import load_package

    quiet_transformers()
    pairs = [pair.rpartition("=") for pair in reviewed or ()]
    if not all(name for name, _, _ in pairs):
        raise typer.BadParameter("--reviewed: expected NAME=SHA256, as gpt2-value inspect prints them")
    refuse_revision_of_a_folder(source, revision)
    try:
        found: Any = load_package(
            source, revision=revision, reviewed_sha256={name: digest for name, _, digest in pairs} or None
        )
    except NotAPackageError:
        if not plain:
            raise
        from ..convert.convert import load_checkpoint

        found = load_checkpoint(source, revision=revision)
        found.model.name_or_path = source
    return Loaded(found.model, found.tokenizer)


def encode(loaded: Loaded, prompts: list[str], source: str, new_tokens: int) -> list[Any]:
    """Return each prompt's token ids, `[P]`.

    Raises:
        SourceError: there is no tokenizer.
        typer.BadParameter: a prompt without tokens, or one that leaves no room for `new_tokens`.
    """
    import torch

    from decoding_gpt2_value import check_tokens

    if loaded.tokenizer is None:
        raise SourceError(
            f"{source} has no tokenizer",
            expected="a tokenizer's files beside the model",
            next_step="use it from Python, with token ids: load_package(...).model.rollout(...)",
        )
    with as_ours(lambda gist: _cannot_read(source, gist)):
        queries = [torch.tensor(loaded.tokenizer(prompt)["input_ids"], dtype=torch.long) for prompt in prompts]
    for prompt, query in zip(prompts, queries, strict=True):
        if not len(query):
            raise typer.BadParameter(f"the prompt {prompt!r} has no tokens: write something to go on from")
        try:
            check_tokens(loaded.model, query[None], torch.ones_like(query)[None], new_tokens)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
    return queries


def nothing_drawn(package: str, gist: str) -> LoadError:
    return LoadError(
        f"nothing can be drawn from {package}: {gist}",
        expected="a model with finite logits",
        next_step=f"gpt2-value verify {package}",
    )


def refuse_revision_of_a_folder(source: str, revision: str | None) -> None:
    if revision is not None and Path(source).is_dir():
        raise typer.BadParameter(f"{source} is a folder, which has no revisions: leave --revision out")


def quiet_transformers() -> None:
    """Keep transformers' progress bars and warnings out of the command's own output."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _cannot_read(source: str, gist: str) -> LoadError:
    return LoadError(
        f"the tokenizer of {source} cannot read the prompt: {gist}", next_step=f"gpt2-value verify {source}"
    )
