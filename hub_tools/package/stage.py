"""Find a package, in a folder or on the Hub, and make a private copy of the files of it that are needed.

A library reads more of a folder than it is asked for: adapters, templates, links. So the wanted files of a stranger's
folder are copied once, each within its limit, and everything after that reads, and runs, the copy.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from .. import layout, limits
from ..errors import GPT2ValueHubError, NotAPackageError, OptionsError, PackageError, ResourceLimitError
from ..files import AGAIN, open_in, read_json
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
    """Return `source` if it has the form `owner/name` and is no local path; None for a folder.

    Args:
        source: what the user named.
        options: of a download, as `revision` and `token`; none of them applies to a folder.

    Raises:
        OptionsError: one of the options is set, but `source` is a folder.
    """
    if isinstance(source, str) and not os.path.exists(source):
        parts = source.split("/")
        if len(parts) == 2 and not {"", ".", "..", "~"}.intersection(parts):
            return source
    for name, value in options.items():
        if value:
            raise OptionsError(
                f"{name}={'...' if name == 'token' else value} for {os.fspath(source)!r}",
                expected="owner/name of a repository on the Hub: a folder has no use for it",
                next_step=f"leave {name} out",
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
    raise NotAPackageError(
        f"{os.fspath(source)!r} is not a folder",
        expected="the folder of a value-head package",
        next_step="write one: gpt2-value create --base openai-community/gpt2 FOLDER",
    )


def fetched(source: str | os.PathLike[str], **options: Any) -> tuple[Path, str | None]:
    """Return the folder of a package, and its commit where it was downloaded. `options` are those of `download.fetch`.

    Raises:
        OptionsError, NotAPackageError: see `repository_id` and `local_folder`.
        And what `download.fetch` raises.
    """
    repo_id = repository_id(source, **options)
    if repo_id is None:
        return local_folder(source), None
    from ..hub import download

    snapshot = download.fetch(repo_id, **options)
    return snapshot.folder, snapshot.commit


@contextmanager
def stage(
    source: str | os.PathLike[str], *, limit_of: Callable[[str], int | None], total: int = limits.WEIGHT_BYTES_AT_MOST
) -> Iterator[Stage]:
    """Copy the wanted files of `source`, and yield the copy; it is removed afterwards.

    A link is followed only if it leads to a file of the same folder or, in the Hub's cache, to its blob (see
    `files.file_in`). Files in subfolders are never copied. Later changes to `source` do not affect the copy.

    Args:
        source: a folder.
        limit_of: maps a file's name to the most bytes that it may have, or to None if it is not wanted.
        total: the most bytes that all of the files may have together.

    Raises:
        NotAPackageError: there is no such folder.
        PackageError: a wanted file is a link out of the folder, a device, a pipe or a folder, or cannot be read.
        PackageError: a file, or all together, or the list of files, is larger than its limit.
        ResourceLimitError: the temporary folder has no room for the copy.
    """
    folder = Path(source)
    with tempfile.TemporaryDirectory(prefix="gpt2-value-", ignore_cleanup_errors=True) as home:
        copy = Path(home, "files")
        copy.mkdir(mode=0o700)
        names, sha256, left = _names(folder), {}, total
        for name in names:
            limit = limit_of(name)
            if limit is not None:
                with open(copy / name, "xb") as copied:
                    sha256[name], size = _copy(folder, name, copied, limit=min(limit, left))
                left -= size
        yield Stage(copy, folder, names, sha256)


@contextmanager
def stage_package(source: str | os.PathLike[str], *, with_weights: bool = True, **options: Any) -> Iterator[Stage]:
    """`stage` for a package, in a folder or on the Hub: copies config, weights, code, tokenizer and record.

    The sizes in `config.json` decide how large the files may be.

    Args:
        source: a package's folder, or the id of a repository on the Hub (`owner/name`).
        with_weights: copy the weights too.
        options: of `download.fetch`, for a repository.

    Raises:
        What `fetched`, `stage` and `checked_package_config` raise.
    """
    folder, commit = fetched(source, **options)
    config = checked_package_config(read_json(folder, layout.CONFIG))
    vocabulary = limits.vocabulary_bytes(config["vocab_size"])
    weights = limits.weight_bytes(config_fields.count_numbers(config))

    def limit_of(name: str) -> int | None:
        left_out = name.endswith(".safetensors") and not with_weights
        return None if left_out else package_file_limit(name, vocabulary=vocabulary, weights=weights)

    with stage(folder, limit_of=limit_of, total=weights + limits.BESIDE_BYTES) as copy:
        yield replace(copy, commit=commit)


def checked_package_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what libraries may see of a package's `config.json`, after checking it.

    Raises:
        NotAPackageError: it is another kind of model's.
        PackageError: what `config.checked_config` raises; or `auto_map` does not name the package's own classes.
    """
    if fields.get("model_type") != layout.MODEL_TYPE:
        raise NotAPackageError(
            f"config.json says model_type {str(fields.get('model_type'))[:80]!r}",
            expected=repr(layout.MODEL_TYPE),
            next_step="make a package of a GPT-2 checkpoint: gpt2-value create --base FOLDER OUT",
        )
    if fields.get("auto_map") != layout.AUTO_MAP:
        raise PackageError(
            f"config.json has auto_map {str(fields.get('auto_map'))[:300]}",
            expected=f"{layout.AUTO_MAP}: the classes in the package itself",
            next_step="GPT2ValueModel.from_pretrained(FOLDER) loads it and runs none of its code; save that",
        )
    return config_fields.checked_config(fields)


def package_file_limit(name: str, *, vocabulary: int, weights: int) -> int | None:
    """Return the most bytes that a package's file of this name may have; None for a file that no loader needs.

    Args:
        name: the file's.
        vocabulary: the limit for each of the tokenizer's large files, see `limits.vocabulary_bytes`.
        weights: the limit for all weights together, see `limits.weight_bytes`.
    """
    if name.endswith(layout.CODE_SUFFIXES) and name != layout.HANDLER:
        return limits.CODE_BYTES
    if name == layout.WEIGHTS_INDEX:
        return limits.INDEX_BYTES
    if name in layout.TOKENIZER_SETTINGS:
        return limits.TOKENIZER_SETTINGS_BYTES
    most = {"config": limits.CONFIG_BYTES, "record": limits.RECORD_BYTES, "weights": weights, "tokenizer": vocabulary}
    return most.get(layout.kind_of(name))


def make_loadable(copy: Stage, code: Iterable[str]) -> Path:
    """Reduce the inspected copy of a package to what a library may load, and return its folder.

    The JSON files keep the fields that a library may see (see `config.reduce`), and code that is not in `code` goes.

    Raises:
        What `config.reduce` raises.
    """
    wanted = set(code)
    for path in sorted(copy.folder.iterdir()):
        if path.name.endswith(layout.CODE_SUFFIXES):
            if path.name not in wanted:
                path.unlink()
        elif path.name in config_fields.REDUCED:
            fields = read_json(copy.folder, path.name, limit=limits.INDEX_BYTES)
            path.write_text(json.dumps(config_fields.reduce(path.name, fields)), encoding="utf-8")
    return copy.folder


def _names(folder: Path) -> tuple[str, ...]:
    """Return the names in a folder, sorted."""
    try:
        with os.scandir(folder) as entries:
            found = [entry.name for entry, _ in zip(entries, range(limits.NAMES_IN_A_FOLDER + 1), strict=False)]
    except OSError as error:
        raise NotAPackageError(
            f"{os.fspath(folder)!r} cannot be read: {error.strerror}",
            expected="a folder with a model",
            next_step="check the name, and the permissions of the folder",
        ) from error
    if len(found) > limits.NAMES_IN_A_FOLDER:
        raise PackageError(
            f"{folder} has more than {limits.NAMES_IN_A_FOLDER:,} files",
            expected="a folder with one model",
            next_step="move the model's files to a folder of their own",
        )
    return tuple(sorted(found))


def _copy(folder: Path, name: str, copied: BinaryIO, *, limit: int) -> tuple[str, int]:
    """Copy one file of a folder into an open one of ours; return its SHA-256 and size."""
    digest, here = hashlib.sha256(), tempfile.gettempdir()
    try:
        with open_in(folder, name) as opened:
            size = os.fstat(opened.fileno()).st_size
            if size > limit:
                raise PackageError(f"{name} has {size:,} bytes", expected=f"at most {limit:,}", next_step=AGAIN)
            if size > (free := shutil.disk_usage(here).free):
                raise _no_room(f"{name} has {size:,} bytes, and {here} has room for {free:,}")
            left = size
            while left and (piece := opened.read(min(left, limits.MIB))):
                digest.update(piece)
                copied.write(piece)
                left -= len(piece)
    except GPT2ValueHubError:
        raise
    except OSError as error:
        raise _no_room(f"copying {name} to a private place failed: {error.strerror}") from error
    return digest.hexdigest(), size


def _no_room(found: str) -> ResourceLimitError:
    return ResourceLimitError(
        found,
        expected="room for a private copy of the files that are read",
        next_step="name a folder on a larger disk for temporary files: export TMPDIR=FOLDER",
    )
