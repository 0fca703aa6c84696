"""Find a package, in a folder or on the Hub, and make a private copy of the files of it that are needed.

A library reads more of a folder than it is asked for: adapters, templates, links. So the wanted files of a stranger's
folder are copied once, each within its limit, and everything after that reads, and runs, the copy.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import layout, limits
from ..errors import AGAIN, NotAPackageError, OptionsError, PackageError, ResourceLimitError, as_ours
from ..files import open_in, read_json
from . import config as config_fields


@dataclass(frozen=True)
class Stage:
    """A private folder with copies of some of the files of `source`."""

    folder: Path  # it has only regular files, no links and no folders
    source: Path
    names: tuple[str, ...]  # everything that lies in the source, copied or not, sorted
    sha256: Mapping[str, str]  # of each file that was copied
    commit: str | None = None  # of a repository on the Hub


def repository_id(source: str | os.PathLike[str], **options: Any) -> str | None:
    """Return `source` if it names a repository on the Hub, `owner/name`; None for a folder.

    Args:
        source: what the user named.
        options: of a download, as `revision` and `token`; none of them applies to a folder.

    Raises:
        NotAPackageError: it is neither.
        OptionsError: one of the options is set, but `source` is a folder.
    """
    name = os.fspath(source)
    if os.path.isdir(name):
        if given := [option for option, value in options.items() if value]:
            raise OptionsError(
                f"{', '.join(given)} for {name!r}",
                expected="owner/name of a repository on the Hub: a folder has no use for it",
                next_step="leave it out",
            )
        return None
    from ..hub.ask import is_repository_id

    if "/" in name and is_repository_id(name):
        return name
    raise NotAPackageError(
        f"{name!r} is not a folder",
        expected="the folder of a value-head package, or owner/name of a repository on the Hub",
        next_step="write one: gpt2-value create --base openai-community/gpt2 FOLDER",
    )


def fetched(source: str | os.PathLike[str], **options: Any) -> tuple[Path, str | None]:
    """Return the folder of a package, and its commit where it was downloaded.

    Raises:
        What `repository_id` and `download.fetch` raise, whose options these are.
    """
    repo_id = repository_id(source, **options)
    if repo_id is None:
        return Path(source), None
    from ..hub.download import fetch

    folder = fetch(repo_id, **options)
    return folder, folder.name


@contextmanager
def stage(
    source: str | os.PathLike[str],
    *,
    limit_of: Callable[[str], int | None],
    total: int = limits.WEIGHT_BYTES_AT_MOST,
    commit: str | None = None,
) -> Iterator[Stage]:
    """Copy the wanted files of `source`, and yield the copy; it is removed afterwards.

    A link is followed only if it leads to a file of the same folder or, in the Hub's cache, to its blob (see
    `files.open_in`). Files in subfolders are never copied. Later changes to `source` do not affect the copy.

    Args:
        source: a folder.
        limit_of: maps a file's name to the most bytes that it may have, or to None if it is not wanted.
        total: the most bytes that all of the files may have together.
        commit: of a repository on the Hub.

    Raises:
        PackageError: the folder cannot be read.
        PackageError: a wanted file is a link out of the folder, a device, a pipe or a folder, or cannot be read.
        PackageError: a file, or all together, is larger than its limit.
        ResourceLimitError: the temporary folder has no room for the copy.
    """
    folder, sha256 = Path(source), {}
    with as_ours(lambda gist: PackageError(f"{folder} cannot be read: {gist}", next_step="check its permissions")):
        names = sorted(os.listdir(folder))
    with tempfile.TemporaryDirectory(prefix="gpt2-value-", ignore_cleanup_errors=True) as home:
        copy = Path(home, "files")
        copy.mkdir(mode=0o700)
        for name in names:
            limit = limit_of(name)
            if limit is None:
                continue
            most = min(limit, total)
            with open_in(folder, name) as opened, as_ours(_no_room):
                size = os.fstat(opened.fileno()).st_size
                if size > most:
                    raise PackageError(f"{name} has {size:,} bytes", expected=f"at most {most:,}", next_step=AGAIN)
                with open(copy / name, "xb") as copied:
                    shutil.copyfileobj(opened, copied)
                sha256[name] = layout.sha256_of(copy / name)
            total -= size
        yield Stage(copy, folder, tuple(names), sha256, commit)


def stage_package(
    source: str | os.PathLike[str], *, with_weights: bool = True, **options: Any
) -> AbstractContextManager[Stage]:
    """`stage` for a package, in a folder or on the Hub: copies config, weights, code, tokenizer and record.

    The sizes in `config.json` decide how large the files may be.

    Args:
        source: a package's folder, or the id of a repository on the Hub (`owner/name`).
        with_weights: copy the weights too.
        options: of `download.fetch`, for a repository.

    Raises:
        NotAPackageError: `config.json` is another kind of model's, or names other classes than the package's own.
        What `fetched`, `stage` and `config.checked_config` raise.
    """
    folder, commit = fetched(source, **options)
    fields = read_json(folder, layout.CONFIG)
    found = {name: fields.get(name) for name in ("model_type", "auto_map")}
    expected = {"model_type": layout.MODEL_TYPE, "auto_map": layout.AUTO_MAP}
    if found != expected:
        raise NotAPackageError(
            f"config.json says {str(found)[:300]}",
            expected=f"{expected}: the classes in the package itself",
            next_step="make a package of a GPT-2 checkpoint: gpt2-value convert FOLDER OUT",
        )
    config = config_fields.checked_config(fields)
    vocabulary = limits.vocabulary_bytes(config["vocab_size"])
    weights = limits.weight_bytes(config_fields.count_numbers(config))

    def limit_of(name: str) -> int | None:
        left_out = name.endswith(".safetensors") and not with_weights
        return None if left_out else package_file_limit(name, vocabulary=vocabulary, weights=weights)

    return stage(folder, limit_of=limit_of, total=weights + limits.BESIDE_BYTES, commit=commit)


def package_file_limit(name: str, *, vocabulary: int, weights: int) -> int | None:
    """Return the most bytes that a package's file of this name may have; None for a file that no loader needs.

    Args:
        name: the file's.
        vocabulary: the limit for each of the tokenizer's files, see `limits.vocabulary_bytes`.
        weights: the limit for all weights together, see `limits.weight_bytes`.
    """
    if layout.is_code(name):
        return limits.CODE_BYTES
    most = {"config": limits.CONFIG_BYTES, "record": limits.RECORD_BYTES, "weights": weights, "tokenizer": vocabulary}
    return most.get(layout.kind_of(name))


def make_loadable(copy: Stage, code: Collection[str]) -> Path:
    """Reduce the inspected copy of a package to what a library may load, and return its folder.

    The JSON files keep the fields that a library may see (see `config.reduce`), and code that is not in `code` goes.

    Raises:
        What `config.reduce` raises.
    """
    for name in copy.sha256:
        path = copy.folder / name
        if name.endswith(layout.CODE_SUFFIXES) and name not in code:
            path.unlink()
        elif name in config_fields.REDUCED:
            fields = read_json(copy.folder, name, limit=limits.INDEX_BYTES)
            path.write_text(json.dumps(config_fields.reduce(name, fields)), encoding="utf-8")
    return copy.folder


def _no_room(gist: str) -> ResourceLimitError:
    return ResourceLimitError(
        f"copying files to {tempfile.gettempdir()} failed: {gist}",
        expected="room for a private copy of the files that are read",
        next_step="name a folder on a larger disk for temporary files: export TMPDIR=FOLDER",
    )
