"""Folders for what is on its way, locked while their process lives, so that what a killed one left can be removed.

Imports the standard library and filelock. Where the file system knows no locks, nothing counts as left behind.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = "lock"  # the file in each of them


def locked_folder(prefix: str, parent: Path) -> tuple[Path, FileLock]:
    """A new folder in `parent`, and its lock, which this process holds."""
    while True:  # once; again if somebody took the folder for left behind before it was locked, and removed it
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
    """Those of `folders` whose process is dead, and their locks, now held here, for `discard`."""
    for folder in folders:
        if folder.is_symlink() or not folder.is_dir():
            continue
        lock = FileLock(folder / LOCK, timeout=0)
        try:
            lock.acquire()
        except (Timeout, NotImplementedError, OSError):  # at work; no locks here; somebody else's, or just gone
            continue
        yield folder, lock


def discard(folder: Path, lock: FileLock) -> None:
    """Remove a folder, and let go of its lock."""
    shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed now is left behind, for the next to remove
    lock.release()
    if os.name == "nt":  # Windows removes no file that is open
        shutil.rmtree(folder, ignore_errors=True)
