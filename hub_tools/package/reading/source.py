"""Decide whether a source is a local folder or a repository on the Hub.

Imports only the standard library and of hub_tools `errors` and `layout`.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from ... import layout
from ...errors import NotAPackageError, OptionsError


@dataclass(frozen=True)
class HubOptions:
    """Options for downloading a repository, named as in `download.fetch`. None of them applies to a folder."""

    revision: str | None = None  # branch, tag or commit
    token: str | None = None  # instead of the one that huggingface_hub knows
    cache_dir: Path | None = None  # instead of huggingface_hub's
    local_files_only: bool = False  # use only the cache, without the network


def repository_id(source: str | os.PathLike[str], options: HubOptions) -> str | None:
    """Return `source` if it has the form `owner/name` and is no local path; None for a folder.

    huggingface_hub checks the id further when it asks the Hub.

    Raises:
        OptionsError: one of the `options` is set, but `source` is a folder.
    """
    if isinstance(source, str) and not os.path.exists(source):
        parts = source.split("/")
        if len(parts) == 2 and not {"", ".", "..", "~"}.intersection(parts):
            return source
    for option in fields(options):
        value = getattr(options, option.name)
        if value:
            raise OptionsError(
                f"{option.name}={'...' if option.name == 'token' else value} for {os.fspath(source)!r}",
                expected="owner/name of a repository on the Hub: a folder has no use for it",
                next_step=f"leave {option.name} out",
            )
    return None


def local_folder(source: str | os.PathLike[str]) -> Path:
    """Return the folder that `source` names.

    Raises:
        NotAPackageError: there is none.
    """
    folder = Path(source)
    if os.path.isdir(folder):  # and not is_dir(), which fails on names that are too long
        return folder
    neighbour = _interrupted_save(folder)
    if neighbour is not None:
        raise NotAPackageError(
            f"{folder} is missing: a save was interrupted; the package that was there is in {neighbour}",
            next_step="save again, which puts it back first, or: "
            + shlex.join(["mv", str(neighbour / "previous"), str(folder)]),
        )
    raise NotAPackageError(
        f"{os.fspath(source)!r} is not a folder",
        expected="the folder of a value-head package",
        next_step="write one: gpt2-value create --base openai-community/gpt2 FOLDER",
    )


def _interrupted_save(folder: Path) -> Path | None:
    """Return the staging folder in which an interrupted save left the package that was at `folder`, if there is one."""
    try:
        real = Path(os.path.realpath(folder))
        pattern = layout.staging_name(real)
        found = sorted(beside for beside in real.parent.iterdir() if pattern.fullmatch(beside.name))
    except (OSError, ValueError):  # nothing can lie at such a place
        return None
    return next((beside for beside in found if (beside / "previous").is_dir()), None)
