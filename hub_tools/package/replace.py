"""Replace a folder by another in one step: a process killed at any moment leaves the old or the new one.

The new folder is prepared beside the old one, in
`.<name>.saving-xxxxxxxx/package`, synced to the disk, and then exchanged with it: renameat2(2) with RENAME_EXCHANGE on
Linux, renamex_np(2) with RENAME_SWAP on macOS.

If the file system has no exchange, the old folder is renamed to `previous` in the staging folder, and then the new one
to its place. Between these two renames the place is empty. A process killed at this moment leaves `previous`, and the
next save first puts it back.

A staging folder is locked while its process lives. So the next save can find the folders that killed processes left,
and remove them. Snapshots of checkpoints are in such folders too. If the file system has no locks, no folder is ever
treated as left behind.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .. import layout
from ..errors import FolderRefusedError, GPT2ValueHubError, SaveFailedError, gist
from ..files import read_json

LOCK = "lock"  # the file that is locked, in each staging folder
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h; macOS's RENAME_SWAP, in sys/stdio.h, is 2 as well
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)


class Staging:
    """A staging folder beside `target`. A package is prepared in it, and `commit` puts that in the target's place."""

    def __init__(self, home: Path, target: Path) -> None:
        self.home = home
        self.target = target
        self.package = home / "package"
        self.package.mkdir()

    def commit(self) -> bool:
        """Put the package in the target's place; return whether it replaced something.

        Raises:
            OSError: the system refused; the target is as it was.
        """
        _sync_tree(self.package)
        replaced = False
        while True:
            try:
                os.rename(self.package, self.target)  # succeeds where the target is absent, or an empty folder
                break
            except OSError as error:
                if error.errno not in _OCCUPIED:
                    raise
            try:
                shutil.copymode(self.target, self.package)
                if exchange(self.package, self.target):
                    replaced = True
                    break
                self._make_room()
                replaced = True
            except FileNotFoundError:  # another save of this target is between its two renames
                continue
        _sync(self.target.parent)
        return replaced

    def _make_room(self) -> None:
        previous = self.home / "previous"
        if previous.exists():  # another save wrote the target between our two renames; its package is now the previous
            shutil.rmtree(previous)
        os.rename(self.target, previous)


@contextmanager
def staging_folder(target: Path) -> Iterator[Staging]:
    """Make a staging folder for `target`, and remove it afterwards.

    Cleans up after killed saves of the same target. Concurrent saves of the same target do not disturb each other,
    because each locks its own staging folder, and locked folders are not cleaned up. The last one to finish wins. If
    the file system has no locks, nothing is cleaned up.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clean(target)
    home, lock = locked_folder(f".{target.name}.saving-", target.parent)
    try:
        yield Staging(home, target)
    finally:
        _put_back(home, target)
        discard(home, lock)


def clean(target: Path) -> None:
    """Put back a package that a killed save of `target` had moved, and remove the staging folders of such saves."""
    pattern = layout.staging_name(target)
    homes = (home for home in sorted(target.parent.iterdir()) if pattern.fullmatch(home.name))
    for home, lock in left_behind(homes):
        try:
            _put_back(home, target)
        finally:
            discard(home, lock)


def _put_back(home: Path, target: Path) -> None:
    """Undo the first rename of a save that was stopped between its two renames."""
    previous = home / "previous"
    if previous.is_dir() and not target.exists():
        os.rename(previous, target)


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step. Return False if the system or the file system cannot.

    Raises:
        OSError: the system can, but refused.
    """
    if os.name != "posix":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    first, second = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        result = libc.renamex_np(first, second, _RENAME_EXCHANGE)
    elif hasattr(libc, "renameat2"):  # glibc 2.28, musl 1.2.6
        result = libc.renameat2(_AT_FDCWD, first, _AT_FDCWD, second, _RENAME_EXCHANGE)
    else:
        return False
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _sync_tree(folder: Path) -> None:
    """Flush files and folder to the disk, so that after a power cut no file is empty."""
    for path in sorted(folder.iterdir()):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def locked_folder(prefix: str, parent: Path) -> tuple[Path, FileLock]:
    """Make a folder in `parent`; return it and its lock, which this process holds."""
    while True:  # again, if another process removes the folder as left behind before this one has locked it
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire()
        except NotImplementedError:
            return folder, lock
        except FileNotFoundError:
            continue
        if (folder / LOCK).exists():
            return folder, lock
        lock.release()


def left_behind(folders: Iterable[Path]) -> Iterator[tuple[Path, FileLock]]:
    """Yield those of `folders` whose process is dead, each with its lock, which this process then holds: pass both to
    `discard`."""
    for folder in folders:
        # filelock before 3.20 follows a link that somebody put in the lock's place, and empties the file
        if folder.is_symlink() or not folder.is_dir() or (folder / LOCK).is_symlink():
            continue
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except (Timeout, NotImplementedError, OSError):  # in use; no locks; another user's, or removed meanwhile
            continue
        yield folder, lock


def discard(folder: Path, lock: FileLock) -> None:
    """Remove a folder, and release its lock."""
    shutil.rmtree(folder, ignore_errors=True)  # the next save removes what cannot be removed now
    lock.release()
    if os.name == "nt":  # Windows cannot remove the lock file while it is open
        shutil.rmtree(folder, ignore_errors=True)


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
    try:
        found = read_json(target, layout.CONFIG).get("model_type")
    except GPT2ValueHubError as error:
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
