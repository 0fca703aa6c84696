"""How a subcommand is declared, the options that several have, and what they load. hub_tools inside the functions."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from inspect import cleandoc
from pathlib import Path
from typing import Any

from ..errors import NotAPackageError, OptionsError, SourceError, as_ours

Command = Callable[..., "int | None"]
Option = tuple[tuple[str, ...], dict[str, Any]]

parser = argparse.ArgumentParser("gpt2-value", formatter_class=argparse.RawDescriptionHelpFormatter)
_commands = parser.add_subparsers(metavar="COMMAND", required=True, help="each has its own --help")


def option(*names: str, **settings: Any) -> Option:
    """An option, or an argument without dashes, as `argparse.add_argument` takes it."""
    return names, settings


def flag(*names: str, help: str) -> Option:
    return option(*names, action="store_true", help=help)


SHARED = {
    "package": option("package", help="a package: a folder, or an id on the Hub"),
    "out": option(
        "folder", metavar="OUT", type=Path, help="folder to write to: new, empty, or one that this command wrote"
    ),
    "overwrite": option(
        "--overwrite",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,  # the function's own
        help="replace what this command wrote there before",
    ),
    "revision": option("--revision", help="branch, tag or commit on the Hub"),
    "seed": option("--seed", type=int, help="makes the draw repeatable"),
    "temperature": option("--temperature", type=float, default=1.0, help="below 1 sharper, above 1 flatter"),
    "top_k": option("--top-k", type=int, default=0, help="the k most probable tokens alone; 0 is off"),
    "top_p": option("--top-p", type=float, default=1.0, help="the most probable tokens of this mass alone; 1 is off"),
    "json": flag("--json", help="print one JSON object on stdout, and nothing else"),
    "trust": flag("--trust-remote-code", help="run the package's code though it is not this installation's"),
    "reviewed": option(
        "--reviewed",
        action="append",
        default=[],
        metavar="NAME=SHA256",
        help="a file of the package's code that you have read; repeat it for others",
    ),
}


def command(*options: str | Option) -> Callable[[Command], Command]:
    """Make a function the subcommand of its name, with options that are shared, by name, or its own.

    The function gets them by keyword, and returns the exit status, None for 0. Its docstring is the help.
    """

    def register(function: Command) -> Command:
        text = cleandoc(function.__doc__ or "")
        added = _commands.add_parser(
            function.__name__,
            help=text.splitlines()[0],
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        for each in options:
            names, settings = SHARED[each] if isinstance(each, str) else each
            added.add_argument(*names, **settings)
        added.set_defaults(function=function)
        return function

    return register


def wrong(found: str) -> OptionsError:
    return OptionsError(found, next_step="correct the command; gpt2-value COMMAND --help lists its options")


def load(
    source: str,
    revision: str | None = None,
    reviewed: Sequence[str] = (),
    *,
    seed: int | None = None,
    plain: bool = False,
) -> Any:
    """Load a package, and seed the draws: its code runs only if it is a released version's, or if the user has read it.

    Args:
        reviewed: `NAME=SHA256` for each file of code that the user has read.
        plain: load a GPT-2 without a head too, with a new one.

    Returns:
        A record with the `model`, in evaluation mode, and its `tokenizer`, None where it has none.

    Raises:
        What `load_package` and `load_checkpoint` raise.
    """
    import torch

    from ..package.load import load_package

    with as_ours(wrong):
        torch.manual_seed(torch.seed() if seed is None else seed)
    hashes = dict(pair.rpartition("=")[::2] for pair in reviewed)
    if "" in hashes:
        raise wrong("--reviewed: expected NAME=SHA256, as gpt2-value inspect prints them")
    try:
        return load_package(source, revision=revision, reviewed_sha256=hashes or None)
    except NotAPackageError:
        if not plain:
            raise
        from ..convert.convert import load_checkpoint

        found = load_checkpoint(source, revision=revision)
        found.model.name_or_path = source
        return found


def encode(loaded: Any, prompts: list[str], source: str, new_tokens: int) -> list[Any]:
    """Return each prompt's token ids, `[P]`.

    Raises:
        SourceError: there is no tokenizer.
        OptionsError: a prompt without tokens, or one that leaves no room for `new_tokens`.
    """
    import torch

    from decoding_gpt2_value import check_tokens

    if loaded.tokenizer is None:
        raise SourceError(
            f"{source} has no tokenizer",
            expected="a tokenizer's files beside the model",
            next_step="use it from Python, with token ids: load_package(...).model.rollout(...)",
        )
    with as_ours(wrong):
        queries = [torch.tensor(loaded.tokenizer(prompt)["input_ids"], dtype=torch.long) for prompt in prompts]
        for query in queries:
            check_tokens(loaded.model, query[None], torch.ones_like(query)[None], new_tokens)
    return queries
