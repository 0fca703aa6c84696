"""Replace a folder by another in one step: a process killed at any moment leaves the old or the new one.

Imports the standard library, filelock and `layout`. The new folder is prepared beside the old one, in
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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ... import layout

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
        if folder.is_symlink() or not folder.is_dir():
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
