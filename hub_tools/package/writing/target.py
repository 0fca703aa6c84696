"""Check the folder that a save or an export replaces, and turn failed writes into errors with advice.

Imports the standard library and of hub_tools `errors`, `files`, `layout` and `library_errors`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ... import layout
from ...errors import FolderRefusedError, GPT2ValueHubError, PackageChangedError, SaveFailedError
from ...files import read_json
from ...library_errors import gist

READS = 100  # of a config.json that other saves replace while it is read


def check_target(
    folder: str | os.PathLike[str],
    *,
    overwrite: bool,
    what: str,
    model_type: str,
    may_replace: Callable[[str], bool],
) -> Path:
    """Return the folder to replace, with links resolved; refuse one whose content must not be lost.

    Args:
        folder: the folder to write.
        overwrite: whether a folder that holds a model of the same kind may be replaced.
        what: the kind of model, for messages: "a package".
        model_type: its `model_type` in `config.json`.
        may_replace: whether a file of this name belongs to such a model.

    Raises:
        FolderRefusedError: it is no path, a file, a mount point, the current folder, a git checkout, or holds
            something else.
    """
    expected = f"a new folder, an empty one, or {what}" if overwrite else "a new folder, or an empty one"
    try:
        target = Path(folder).resolve()
        exists, is_folder = target.exists(), target.is_dir()
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # too long, a loop of links, no path, a NUL in it
        raise FolderRefusedError(
            f"{str(folder)[:200]!r} cannot be a folder: {gist(error)}",
            expected=expected,
            next_step="choose another name",
        ) from error

    def refuse(found: str, next_step: str) -> FolderRefusedError:
        return FolderRefusedError(f"{target} {found}", expected=expected, next_step=next_step)

    if not exists:
        return target
    if not is_folder:
        raise refuse("is a file", "choose another name")
    if os.path.ismount(target):
        raise refuse("is a mount point, which cannot be replaced in one step", f"use a folder in it: {target}/model")
    if target in (Path.cwd(), *Path.cwd().parents):
        raise refuse("is the current directory, or holds it: it would be removed", "cd elsewhere first")
    try:
        names = sorted(set(os.listdir(target)) - layout.LITTER)
    except OSError as error:
        raise refuse(f"cannot be read: {gist(error)}", "check its permissions, or choose another folder") from error
    if ".git" in names:
        raise refuse(
            "is a git checkout, whose history would be lost",
            "write to another folder, and upload that: gpt2-value push; or copy its files into the checkout",
        )
    if not names:
        return target
    if not overwrite:
        raise refuse(
            "is not empty, and overwrite is off", "choose another folder, or pass overwrite=True (--overwrite)"
        )
    foreign = [name for name in names if not may_replace(name)]
    if foreign:
        raise refuse(f"holds {foreign[:5]}, which would be lost", "move them elsewhere, or choose another folder")
    for attempt in range(1, READS + 1):
        try:
            found = read_json(target, layout.CONFIG).get("model_type")
            break
        except GPT2ValueHubError as error:
            if isinstance(error, PackageChangedError) and attempt < READS:
                continue  # another save has put its package there meanwhile: read that one
            raise refuse(f"is not {what}: {error.found}", "choose another folder, or remove this one") from error
    if found != model_type:
        raise refuse(f"holds a model of type {found!r}, which would be lost", "choose another folder")
    return target


@contextmanager
def writing_to(target: Path) -> Iterator[None]:
    """Raise SaveFailedError for what the system or safetensors refuses while a model is written to `target`."""
    from safetensors import SafetensorError

    try:
        yield
    except GPT2ValueHubError:
        raise
    except (OSError, SafetensorError) as error:
        raise SaveFailedError(
            f"saving to {target} failed: {gist(error)}",
            expected=f"a folder in {target.parent} that can be written, and space for the model",
            next_step="make room or choose another folder, and save again; what was there is untouched",
        ) from error
