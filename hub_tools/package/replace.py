"""Replace a folder by another in one step: a process killed at any moment leaves the old or the new one.

The new folder is prepared beside the old one, in `.<name>.saving-xxxxxxxx/package`, synced to the disk, and then
exchanged with it: renameat2(2) with RENAME_EXCHANGE on Linux, renamex_np(2) with RENAME_SWAP on macOS.

If the file system has no exchange, the old folder is renamed to `previous` in the staging folder, and then the new one
to its place. Between these two renames the place is empty. A process killed at this moment leaves `previous`, and the
next save first puts it back.

A staging folder is locked while its process lives, so the next save of the same folder finds those that killed
processes left. If the file system has no locks, no folder is ever treated as left behind.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from .. import layout
from ..errors import FolderRefusedError, SaveFailedError, as_ours, gist
from ..files import read_json

_RENAME_EXCHANGE = 2  # linux/fs.h; macOS's RENAME_SWAP, in sys/stdio.h, is 2 as well


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield an empty folder, which takes the target's place when the block ends without an error.

    Concurrent saves of the same target do not disturb each other; the last one to finish wins.

    Raises:
        SaveFailedError: the system, or a library, refused to write. The target is as it was.
    """
    with as_ours(
        lambda gist: SaveFailedError(
            f"saving to {target} failed: {gist}",
            expected=f"a folder in {target.parent} that can be written, and space for the model",
            next_step="make room or choose another folder, and save again; what was there is untouched",
        )
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        clean(target)
        home, lock = _staging_folder(target)
        try:
            package = home / "package"
            package.mkdir()
            yield package
            _put_in_place(package, target)
        finally:
            _discard(home, lock, target)


def clean(target: Path) -> None:
    """Put back a package that a killed save of `target` had moved, and remove the staging folders of such saves."""
    for home in target.parent.glob(f".{glob.escape(target.name)}.saving-????????"):
        # filelock before 3.20 follows a link that somebody put in the lock's place, and empties the file
        if home.is_symlink() or (home / "lock").is_symlink():
            continue
        lock = FileLock(home / "lock", timeout=0)
        with suppress(OSError, NotImplementedError):  # in use; another user's, or removed meanwhile; no locks
            lock.acquire()
            _discard(home, lock, target)


def _staging_folder(target: Path) -> tuple[Path, FileLock]:
    """Make a staging folder; return it and its lock, which this process holds."""
    while True:  # again, if another process removes the folder as left behind before this one has locked it
        home = Path(tempfile.mkdtemp(prefix=f".{target.name}.saving-", dir=target.parent))
        lock = FileLock(home / "lock")
        with suppress(FileNotFoundError, NotImplementedError):
            lock.acquire()
        if (home / "lock").exists():
            return home, lock
        lock.release()


def _discard(home: Path, lock: FileLock, target: Path) -> None:
    """Remove a staging folder; put back what was moved into it, if nothing took its place."""
    previous = home / "previous"
    if previous.is_dir() and not target.exists():
        os.rename(previous, target)
    lock.release()
    shutil.rmtree(home, ignore_errors=True)  # the next save removes what cannot be removed now


def _put_in_place(package: Path, target: Path) -> None:
    for path in package.iterdir():
        with open(path, "r+b") as file:
            os.fsync(file.fileno())  # so that after a power cut no file is empty
    while True:
        try:
            os.rename(package, target)  # succeeds where the target is absent, or an empty folder
            break
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        with suppress(FileNotFoundError):  # another save of this target is between its two renames
            shutil.copymode(target, package)
            if exchange(package, target):
                break
            previous = package.with_name("previous")
            shutil.rmtree(previous, ignore_errors=True)  # another save wrote the target between our renames
            os.rename(target, previous)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step. Return False if the system or the file system cannot.

    Raises:
        OSError: the system can, but refused.
    """
    if sys.platform not in ("linux", "darwin"):
        return False
    system, first, second = ctypes.CDLL(None, use_errno=True), os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        failed = system.renamex_np(first, second, _RENAME_EXCHANGE)
    else:
        failed = system.renameat2(0, first, 0, second, _RENAME_EXCHANGE)  # 0: of no effect where paths are absolute
    code = ctypes.get_errno()
    if failed and code not in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), str(other))
    return not failed


def check_target(
    folder: str | os.PathLike[str],
    *,
    overwrite: bool,
    model_type: str = layout.MODEL_TYPE,
    may_replace: Callable[[str], bool] = layout.written_by_save,
) -> Path:
    """Return the folder to replace, with links resolved; refuse one whose content must not be lost.

    Args:
        folder: the folder to write.
        overwrite: whether a folder that holds a model of the same kind may be replaced.
        model_type: its `model_type` in `config.json`.
        may_replace: whether a file of this name belongs to such a model.

    Raises:
        FolderRefusedError: it is no path, a file, the current folder, or holds something else.
    """
    problem = ""
    try:
        target = Path(folder).resolve()
        names = set(os.listdir(target)) - layout.LITTER if target.exists() else set()
        foreign = sorted(name for name in names if not may_replace(name))
        if target == Path.cwd():
            problem = "is the current directory, which would be removed"
        elif names and not overwrite:
            problem = "is not empty, and overwrite is off"
        elif foreign:
            problem = f"holds {foreign[:5]}, which would be lost"
        elif names and (found := read_json(target, layout.CONFIG).get("model_type")) != model_type:
            problem = f"holds a model of type {found!r}, which would be lost"
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # a file, too long, a loop of links, a NUL, no JSON
        problem = f"cannot be replaced: {gist(error)}"
    if problem:
        raise FolderRefusedError(
            f"{str(folder)[:300]} {problem}",
            expected=f"a new folder, an empty one, or, to be overwritten, one that holds a {model_type} model alone",
            next_step="choose another folder, or move away what is there; overwrite=True (--overwrite) replaces",
        )
    return target
