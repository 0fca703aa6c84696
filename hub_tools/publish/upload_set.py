"""The files of a package that a push uploads: checked by name, read once, and compared again before the commit.

Imports the standard library, huggingface_hub, PyYAML (which comes with it), and of hub_tools `errors`, `files`,
`layout` and `hub`.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load, metadata_save

from .. import layout
from ..errors import (
    NotAPackageError,
    OptionsError,
    PackageChangedError,
    PackageError,
    SecretFoundError,
)
from ..files import MIB, file_in
from ..hub.repository import Hub, RemoteFile

IN_MEMORY = 64 * MIB  # files up to this size are read once; larger ones, and weights, stay on the disk
TOKEN_LIKE = re.compile(rb"\b(hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,})\b")


@dataclass(frozen=True)
class LocalFile:
    """A file of a package. Small ones were read into memory; large ones stay on the disk, and are hashed once."""

    path: Path
    size: int
    identity: tuple[int, ...]  # of the file on the disk; it changes with every write
    data: bytes | None  # None if the content was left on the disk

    @cached_property
    def sha256(self) -> str:
        return layout.sha256_of(self.path) if self.data is None else hashlib.sha256(self.data).hexdigest()

    def same_as(self, remote: RemoteFile | None) -> bool:
        """Whether the Hub has exactly this content. Git hashes a file as `blob <size>\\0<content>`."""
        if remote is None or remote.size != self.size:
            return False
        if remote.sha256 is not None:
            return remote.sha256 == self.sha256
        data = self.path.read_bytes() if self.data is None else self.data
        return remote.git_oid == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Package:
    """The files of a package that a push uploads, as they were when it began."""

    folder: Path
    files: Mapping[str, LocalFile] = field(repr=False)

    @classmethod
    def read(cls, folder: Path) -> Package:
        """Read a package's files, and refuse files that do not belong to a package.

        Raises:
            NotAPackageError: no such folder.
            PackageError: see `push_package`.
        """
        if not folder.is_dir():
            raise NotAPackageError(
                f"{os.fspath(folder)!r} is not a folder",
                expected="the folder of a package",
                next_step="write one: hub_tools.save_package(model, FOLDER)",
            )
        names = sorted(name for name in os.listdir(folder) if layout.kind_of(name) != "litter")
        foreign = [n for n in names if layout.kind_of(n) == "foreign" or (n.startswith(".") and n != ".gitignore")]
        if foreign:
            raise PackageError(
                f"{', '.join(map(repr, foreign))} do not belong to a package; nothing was uploaded",
                expected="the files that save_package writes, and documents such as a license",
                next_step="move them out of the folder; push other files on their own: hf upload",
            )
        pickles = [name for name in names if layout.kind_of(name) == "pickle"]
        if pickles:
            raise PackageError(
                f"{', '.join(map(repr, pickles))}: pickles, which can run code when they are opened",
                expected="weights in safetensors, and nothing else",
                next_step="move them out of the folder",
            )
        return cls(folder, {name: _read_file(file_in(folder, name)) for name in names})

    def refuse_secrets(self, hub: Hub, message: str) -> None:
        """Refuse to publish a Hub token, the one in use or any other.

        Raises:
            SecretFoundError: a file or the commit message holds one; the error names it.
        """
        texts = {name: file.data for name, file in self.files.items() if file.data is not None}
        for name, data in {**texts, "the commit message": message.encode()}.items():
            if hub.holds_token(data) or TOKEN_LIKE.search(data):
                raise SecretFoundError(
                    f"{name} holds what looks like a Hub token; nothing was uploaded",
                    next_step="take it out; if it was ever published, revoke it in the Hub's settings",
                )

    def check_unchanged(self) -> None:
        """Check that the files on the disk are still those that were read.

        Raises:
            PackageChangedError: a file was written to, replaced or removed.
        """
        for name, file in self.files.items():
            if not file.path.exists() or _identity(file.path) != file.identity:
                raise PackageChangedError(
                    f"{name} changed in {self.folder} during the push; nothing was committed",
                    expected="a package that stays as it is until the push is done",
                    next_step="push again once nothing writes to it",
                )


def merge_cards(ours: bytes, theirs: bytes, scratch: Path) -> bytes:
    """Merge the package's card (`ours`) into the repository's (`theirs`), and return the result.

    The text of theirs stays. Our metadata keys replace theirs, tags are united, and their other keys stay. If theirs
    has no text (the Hub's web page makes such a card from a license), it also gets our text.

    Raises:
        OptionsError: their metadata cannot be read.
    """
    our_path, their_path = scratch / "ours.md", scratch / "theirs.md"
    our_path.write_bytes(ours)
    their_path.write_bytes(theirs)
    try:
        kept: dict[str, Any] = metadata_load(their_path) or {}
        added: dict[str, Any] = metadata_load(our_path) or {}
    except (ValueError, yaml.YAMLError) as error:
        raise OptionsError(
            f"the metadata of the README.md in the repository cannot be read: {' '.join(str(error).split())[:300]}",
            expected="a block of YAML between two lines of ---",
            next_step="correct it on the Hub, or delete that file there to get a new card",
        ) from error
    tags = kept.get("tags") or []
    tags = [tags] if isinstance(tags, str) else tags
    merged = {**kept, **added}
    if tags or added.get("tags"):
        merged["tags"] = [*tags, *(tag for tag in added.get("tags", []) if tag not in tags)]
    body = re.sub(rb"\A\s*---\r?\n.*?\n---", b"", theirs, count=1, flags=re.DOTALL)
    if not body.strip():
        metadata_save(our_path, merged)
        return our_path.read_bytes()
    if merged == kept:
        return theirs
    metadata_save(their_path, merged)
    return their_path.read_bytes()


def _read_file(path: Path) -> LocalFile:
    identity, size = _identity(path), path.stat().st_size
    data = path.read_bytes() if size <= IN_MEMORY and layout.kind_of(path.name) != "weights" else None
    return LocalFile(path, size if data is None else len(data), identity, data)


def _identity(path: Path) -> tuple[int, ...]:
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
