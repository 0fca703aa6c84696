"""What a repository holds, and its files, fetched without running any of it: bounded, and as the Hub announced them.

Imports huggingface_hub (0.36 and newer) through `ask`. Files are kept in huggingface_hub's own cache, where
transformers finds them: https://huggingface.co/docs/huggingface_hub/guides/manage-cache. They are written there by
`http_get`, one by one, and not by `snapshot_download`, which writes whatever a server sends, to a path of its choosing.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers

from .. import layout, limits
from ..errors import (
    GPT2ValueHubError,
    HubRefusedError,
    HubUnavailableError,
    NotAPackageError,
    PackageError,
    SaveFailedError,
)
from ..files import LFS_POINTER, read_json
from .ask import Hub, Passing, offline

FIRST_BYTES = 256  # of a file of weights: a pointer of git-lfs is shorter
ADAPTER_BYTES = 2 << 30  # of an adapter: a LoRA of rank 256, and new embeddings, for the largest GPT-2
CHUNK = 10_000_000  # bytes of a download that huggingface_hub collects before it writes them


_ADAPTER = "adapter_config.json"
_PICKLED = re.compile(r"(pytorch_model|adapter_model|value_head|v_head)\b.*\.bin")


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub: git's hash of it and, where it is in large file storage, the SHA-256 of its content."""

    size: int
    oid: str
    sha256: str | None

    def is_at(self, path: Path) -> bool:
        """Whether this is what a local file holds. Git hashes a file as `blob <size>\\0<content>`."""
        size = path.stat().st_size
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % size)
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        return size == self.size and digest.hexdigest() == (self.sha256 or self.oid)


@dataclass(frozen=True)
class Repository:
    """One commit of a repository, as the Hub lists it."""

    repo_id: str
    commit: str
    files: dict[str, RemoteFile]
    private: bool


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit, in a folder."""

    folder: Path
    commit: str


def read_repository(hub: Hub, repo_id: str, revision: str | None = None) -> Repository:
    """Ask for the files of a revision, with their sizes and hashes.

    Raises:
        HubRefusedError: the Hub answers with something that is no commit, or no list of files.
        What `Hub.ask` raises.
    """
    where = f"find {repo_id}" + (f" at revision {revision}" if revision else "")
    info = hub.ask(where, hub.api.model_info, repo_id, revision=revision)
    if not is_hex(info.sha, 40):
        raise _odd_answer(f"says that {repo_id} is at commit {str(info.sha)[:80]!r}")

    def listed() -> list[Any]:
        entries = hub.api.list_repo_tree(repo_id, recursive=True, revision=info.sha)
        return list(itertools.islice(entries, limits.NAMES_IN_A_FOLDER + 1))

    entries, files = hub.ask(f"list the files of {repo_id}", listed), {}
    if len(entries) > limits.NAMES_IN_A_FOLDER:
        raise _odd_answer(f"lists more than {limits.NAMES_IN_A_FOLDER:,} files of {repo_id}")
    for entry in entries:
        if isinstance(entry, RepoFile):
            file = RemoteFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
            fits = type(file.size) is int and file.size >= 0 and is_hex(file.oid, 40)
            if not (fits and _stays_inside(entry.path) and (file.sha256 is None or is_hex(file.sha256, 64))):
                raise _odd_answer(f"lists a file {str(entry.path)[:200]!r} of {str(file)[:200]}")
            files[entry.path] = file
    return Repository(repo_id, str(info.sha), files, bool(info.private))


def is_hex(text: object, digits: int) -> bool:
    """Whether a text is so many hexadecimal digits: nothing else may touch a path."""
    return isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", text) is not None


def _stays_inside(name: str) -> bool:
    """Whether a name leads to a place in the repository. Git allows no other, but a server may say anything."""
    return not PurePosixPath(name).is_absolute() and {"..", ".", ""}.isdisjoint(name.split("/")) and "\0" not in name


def _odd_answer(found: str) -> HubRefusedError:
    return HubRefusedError(
        f"the Hub {found}",
        expected="commits of 40 hexadecimal digits, and files in the repository with their sizes and hashes",
        next_step="make sure that HF_ENDPOINT is a Hub that you trust",
    )


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
    checkpoint: bool = False,
) -> Snapshot:
    """Download the files that a loader of a package or a plain GPT-2 reads, at one commit, to the Hub's cache.

    Sizes are checked before anything is downloaded. Pickles are not downloaded. Where the Hub cannot be reached, or in
    offline mode, the cache answers alone, as it does for transformers.

    Args:
        checkpoint: another library's checkpoint, or an adapter, is wanted: also heads in files of their own, and
            pickled weights where there are no others. Nothing opens them.

    Raises:
        NotAPackageError, PackageError: a repository without a model, or with pickles in the place of its weights.
        PackageError: a file, or all weights together, larger than such a model needs; a pointer of git-lfs.
        RemoteNotFoundError: no such repository or revision, or not for this token.
        AuthenticationError: the Hub does not accept the token, or wants one.
        HubUnavailableError: the Hub cannot be reached, or must not be asked, and the cache does not have it.
        HubRefusedError: the Hub sends other files than it announced.
        SaveFailedError: the system does not let the cache be written.
    """
    hub = Hub(token)
    home = Path(cache_dir or constants.HF_HUB_CACHE, "models--" + repo_id.replace("/", "--"))

    def attempt() -> Snapshot:
        try:
            repository = read_repository(hub, repo_id, revision)
        except Passing as failure:
            if not failure.answered and (cached := _cached(home, revision)):
                return cached
            raise
        wanted = _wanted(repository, checkpoint=checkpoint)
        folder = home / "snapshots" / repository.commit
        for name in sorted(wanted, key=lambda name: _limit(name) is None):  # the config before the weights
            if _limit(name) is None:
                _check_weights(folder, repository, wanted)
            download_file(hub, repository, name, home)
        if revision != repository.commit:  # for the cache alone, another time
            ref = home / "refs" / (revision or "main")
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(repository.commit)
        return Snapshot(folder, repository.commit)

    if not (local_files_only or offline()):
        return _kept(hub, f"download {repo_id}", attempt)
    if (cached := _cached(home, revision)) is None:
        raise HubUnavailableError(
            f"{repo_id} is not in the cache, and the Hub must not be asked",
            expected="a model that was downloaded before",
            next_step="leave out local_files_only, unset HF_HUB_OFFLINE, and run the same again",
        )
    return cached


def fetch_outline(
    repo_id: str,
    into: Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
) -> Snapshot:
    """Download what inspection reads of a package: JSON and code, and only the headers of the weights.

    Args:
        into: a new folder, which will hold one file for each of the repository's: JSON and code whole; weights with
            their header and, instead of the data, a hole of its size; all others empty.

    Returns:
        where JSON and code are in the Hub's cache, to be read by people, and their commit.

    Raises:
        What `fetch` raises.
    """
    hub = Hub(token)
    home = Path(cache_dir or constants.HF_HUB_CACHE, "models--" + repo_id.replace("/", "--"))

    def attempt() -> Snapshot:
        repository = read_repository(hub, repo_id, revision)
        wanted = _wanted(repository)
        for name, file in repository.files.items():
            top, *below = name.split("/")
            if below:
                (into / top).mkdir(exist_ok=True)
            elif name in wanted and _limit(name) is None:
                with open(into / name, "wb") as outline:
                    outline.write(_header(hub, repository, name))
                    outline.truncate(file.size)
            elif name in wanted and name != layout.CARD:
                shutil.copyfile(download_file(hub, repository, name, home), into / name)
            else:
                (into / name).touch()
        return Snapshot(home / "snapshots" / repository.commit, repository.commit)

    return _kept(hub, f"look into {repo_id}", attempt)


def _kept(hub: Hub, what: str, attempt: Callable[[], Snapshot]) -> Snapshot:
    try:
        return hub.patiently(what, attempt)
    except GPT2ValueHubError:
        raise
    except OSError as error:
        raise SaveFailedError(
            f"could not {what}: {error}",
            expected="space, and permission to write, in the cache of the Hub and for temporary files",
            next_step="free some space, or name another folder: export HF_HOME=FOLDER",
        ) from error


def _limit(name: str) -> int | None:
    """Return the most bytes that a file of this name may have; None for weights, which are bounded together."""
    kind = layout.kind_of(name)
    if name.endswith(".safetensors") or kind == "pickle":
        return None
    if kind == "config":
        return limits.CONFIG_BYTES
    if kind == "tokenizer" and name not in layout.TOKENIZER_SETTINGS:
        return limits.VOCABULARY_BYTES_AT_MOST
    return limits.INDEX_BYTES if kind == "record" or name.endswith(".index.json") else limits.CODE_BYTES


def _wanted(repository: Repository, *, checkpoint: bool = False) -> list[str]:
    """Return the files that a loader reads, after checking that there is a model, and their sizes.

    Raises:
        NotAPackageError: it holds no model.
        PackageError: all of its weights are pickles; a file is far larger than any package's.
    """
    names = [name for name in repository.files if "/" not in name]
    if layout.CONFIG not in names and not (checkpoint and _ADAPTER in names):
        files = sorted(name for name in names if layout.kind_of(name) != "litter")
        raise NotAPackageError(
            f"{repository.repo_id} holds no package: it has {', '.join(files[:5]) or 'no files'}",
            expected=f"a repository with {layout.CONFIG} and {layout.WEIGHTS}, as gpt2-value push makes it",
            next_step="check the name and the revision",
        )
    kinds = {name: layout.kind_of(name) for name in names}
    pickled = sorted(name for name in names if _PICKLED.fullmatch(name))
    only_pickles = bool(pickled) and not any(name.endswith(".safetensors") for name in names)
    if only_pickles and not checkpoint:
        raise PackageError(
            f"{repository.repo_id} has its weights only as pickles ({', '.join(pickled[:3])}), which can run code when "
            "opened; none was downloaded",
            expected="weights in safetensors",
            next_step="ask its author for safetensors; or read them without running them: gpt2-value convert "
            f"{repository.repo_id} OUT",
        )
    wanted = [n for n in names if kinds[n] in ("config", "weights", "tokenizer", "card", "record") or n.endswith(".py")]
    if checkpoint:
        wanted = [name for name in wanted if not name.endswith(".py") and kinds[name] != "card"]
        wanted += [n for n in names if n not in wanted and (n == _ADAPTER or n.endswith(".safetensors"))]
        wanted += [n for n in names if n.endswith(".bin.index.json")] if only_pickles else []
        wanted += [n for n in pickled if only_pickles or "head" in n]
    for name in wanted:
        size, limit = repository.files[name].size, _limit(name)
        if limit is not None and size > limit:
            raise PackageError(
                f"{name} of {repository.repo_id} has {size:,} bytes; nothing was downloaded",
                expected=f"at most {limit:,}",
                next_step="ask its author",
            )
    return wanted


def _check_weights(folder: Path, repository: Repository, wanted: list[str]) -> None:
    """Refuse weights that have more bytes than the model needs that the config describes."""
    fields = read_json(folder, layout.CONFIG) if layout.CONFIG in wanted else {}
    sides = [fields.get(name) for name in ("n_layer", "n_embd", "vocab_size", "n_positions")]
    layers, width, vocabulary, positions = (side if type(side) is int and 0 < side < 1 << 24 else 0 for side in sides)
    inner = fields.get("n_inner")
    inner = inner if type(inner) is int and 0 < inner < 1 << 24 else 4 * width
    numbers = width * (layers * (4 * width + 2 * inner + 16) + 2 * vocabulary + positions + 4)
    most = limits.foreign_bytes(numbers, layers * positions * positions) if fields else ADAPTER_BYTES
    size = sum(repository.files[name].size for name in wanted if _limit(name) is None)
    if size > most:
        raise PackageError(
            f"{repository.repo_id} has {size:,} bytes of weights; none were downloaded",
            expected=f"at most {most:,} for the GPT-2 in its {layout.CONFIG}, of n_layer, n_embd, vocab_size, "
            f"n_positions {sides}",
            next_step="check the name and the revision, or ask its author",
        )


class _Bounded:
    """A file that takes so many bytes, and no more. `Hub.hear` is told of each piece."""

    def __init__(self, file: BinaryIO, size: int, hub: Hub, name: str) -> None:
        self._file, self._size, self._hub, self._name = file, size, hub, name

    def write(self, data: bytes) -> int:
        self._hub.hear()
        if self._file.tell() + len(data) > self._size:
            raise HubRefusedError(
                f"the Hub sends more than the {self._size:,} bytes of {self._name} that were asked for",
                expected="files of the size that the Hub lists, and answers to requests for a range of bytes",
                next_step="make sure that HF_ENDPOINT is a Hub that you trust",
            )
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _get(hub: Hub, repository: Repository, name: str, into: BinaryIO, first: int, size: int) -> None:
    """Write `size` bytes of a remote file to `into`, an empty file, from the byte `first` on."""
    headers = build_hf_headers(token=hub.token, library_name="gpt2-value", library_version=layout.__version__)
    if size != repository.files[name].size:
        headers["Range"] = f"bytes={first}-{first + size - 1}"
    url = hf_hub_url(repository.repo_id, name, revision=repository.commit, endpoint=hub.api.endpoint)
    file: Any = _Bounded(into, size, hub, name)
    what = f"download {name} of {repository.repo_id}"
    hub.ask(
        what, http_get, url, file, headers=headers, expected_size=size, displayed_filename=name, moves=min(size, CHUNK)
    )


def download_file(hub: Hub, repository: Repository, name: str, home: Path) -> Path:
    """Return where a file is in the cache of the repository, `home`, after downloading it if it is not there yet.

    Raises:
        HubRefusedError: the Hub sends another file than it listed.
        PackageError: a pointer of git-lfs.
        What `Hub.ask` raises.
    """
    file, place = repository.files[name], home / "snapshots" / repository.commit / name
    blob = home / "blobs" / (file.sha256 or file.oid)
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    blob.parent.mkdir(exist_ok=True)
    if not blob.exists():
        descriptor, part = tempfile.mkstemp(suffix=".incomplete", dir=blob.parent)
        try:
            with open(descriptor, "w+b") as opened:
                if file.size:
                    _get(hub, repository, name, opened, 0, file.size)
            if file.size < FIRST_BYTES:
                _refuse_pointer(repository, name, Path(part).read_bytes())
            if not file.is_at(Path(part)):
                raise _odd_answer(f"sends another {name} than it lists")
            os.replace(part, blob)
        finally:
            Path(part).unlink(missing_ok=True)
    try:
        place.symlink_to(os.path.relpath(blob, place.parent))
    except FileExistsError:  # another process was faster
        pass
    except OSError:  # Windows, where links are a privilege
        shutil.copyfile(blob, place)
    return place


def _header(hub: Hub, repository: Repository, name: str) -> bytes:
    """Return the start of a safetensors file, up to the end of its header, by one or two requests for a range."""
    parts, size = [io.BytesIO(), io.BytesIO()], repository.files[name].size
    first = min(size, FIRST_BYTES)
    if size:
        _get(hub, repository, name, parts[0], 0, first)
    _refuse_pointer(repository, name, parts[0].getvalue())
    length = int.from_bytes(parts[0].getvalue()[:8], "little")
    # an impossible length is left to inspection, which names it
    if first < 8 + length <= min(size, limits.HEADER_BYTES):
        _get(hub, repository, name, parts[1], first, 8 + length - first)
    return b"".join(part.getvalue() for part in parts)


def _refuse_pointer(repository: Repository, name: str, start: bytes) -> None:
    if start.startswith(LFS_POINTER):
        raise PackageError(
            f"{name} of {repository.repo_id} is not the file but a pointer of git-lfs to it",
            expected="the file itself",
            next_step="ask its author to upload it again, by gpt2-value push; git alone, without git-lfs, uploads "
            "pointers",
        )


def _cached(home: Path, revision: str | None) -> Snapshot | None:
    """Return what the cache has of a revision, if it has a model."""
    ref = home / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision or ""
    folder = home / "snapshots" / commit
    whole = is_hex(commit, 40) and (folder / layout.CONFIG).exists()
    return Snapshot(folder, commit) if whole and any(_limit(path.name) is None for path in folder.iterdir()) else None
