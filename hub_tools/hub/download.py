"""What a repository holds, and its files, fetched without running any of it: bounded, and as the Hub announced them.

Files are kept in huggingface_hub's own cache, where transformers finds them:
https://huggingface.co/docs/huggingface_hub/guides/manage-cache. They are written there by `http_get`, one by one, and
not by `snapshot_download`, which writes whatever a server sends, to a path of its choosing.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils.sha import git_hash

from .. import layout, limits
from ..errors import HubRefusedError, HubUnavailableError, NotAPackageError, PackageError
from ..files import read_json
from .ask import Hub, Passing

FIRST_BYTES = 1 << 18  # of a file of weights, which hold its header: 60 kB for the largest GPT-2
ADAPTER_BYTES = 2 << 30  # of an adapter: a LoRA of rank 256, and new embeddings, for the largest GPT-2

_ADAPTER = "adapter_config.json"
_PICKLED = re.compile(r"(pytorch_model|adapter_model|value_head|v_head)\b.*\.bin")


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub: the SHA-256 of its content where it is in large file storage, and else git's SHA-1."""

    size: int
    digest: str

    def is_at(self, path: Path) -> bool:
        """Whether this is what a local file holds."""
        if path.stat().st_size != self.size:
            return False
        digest = layout.sha256_of(path) if len(self.digest) == 64 else git_hash(path.read_bytes())
        return digest == self.digest


class _Bounded(io.FileIO):
    """A new file that takes so many bytes, and no more."""

    def __init__(self, path: Path, size: int) -> None:
        super().__init__(path, "w+")
        self._size = size

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.tell() + len(data) > self._size:
            raise odd_answer(f"sends more than the {self._size:,} bytes that were asked for")
        return super().write(data)


@dataclass(frozen=True)
class Repository:
    """One commit of a repository, as the Hub lists it."""

    hub: Hub
    repo_id: str
    commit: str
    files: dict[str, RemoteFile]
    private: bool
    folder: Path  # in the Hub's cache

    def download(self, name: str) -> Path:
        """Return where a file is in the cache, after downloading it if it is not there yet.

        Raises:
            HubRefusedError: the Hub sends another file than it listed.
            What `Hub.ask` raises.
        """
        file, place = self.files[name], self.folder / name
        home = self.folder.parents[1]
        blob = home / "blobs" / file.digest
        if place.exists():
            return place
        place.parent.mkdir(parents=True, exist_ok=True)
        blob.parent.mkdir(exist_ok=True)
        if not blob.exists():
            with tempfile.TemporaryDirectory(dir=home) as private:
                part = Path(private, "part")
                self.get(name, part, file.size)
                if not file.is_at(part):
                    raise odd_answer(f"sends another {name} than it lists")
                os.replace(part, blob)
        try:
            place.symlink_to(os.path.relpath(blob, place.parent))
        except FileExistsError:  # another process was faster
            pass
        except OSError:  # Windows, where links are a privilege
            shutil.copyfile(blob, place)
        return place

    def get(self, name: str, path: Path, size: int) -> None:
        """Write the first `size` bytes of a remote file to `path`."""
        headers = build_hf_headers(token=self.hub.token)
        if size != self.files[name].size:
            headers["Range"] = f"bytes=0-{size - 1}"
        url = hf_hub_url(self.repo_id, name, revision=self.commit, endpoint=self.hub.api.endpoint)
        with _Bounded(path, size) as file:
            # by default, http_get expects the whole file
            how = {"headers": headers, "expected_size": size}
            self.hub.ask(f"download {name} of {self.repo_id}", http_get, url, file, moves=size, **how)


def read_repository(
    hub: Hub, repo_id: str, revision: str | None = None, *, cache_dir: Path | None = None
) -> Repository:
    """Ask for the files of a revision, with their sizes and hashes.

    Raises:
        HubRefusedError: the Hub answers with something that is no commit, or no list of files.
        What `Hub.ask` raises.
    """
    where = f"find {repo_id}" + (f" at revision {revision}" if revision else "")
    info = hub.ask(where, hub.api.model_info, repo_id, revision=revision, files_metadata=True)
    commit, entries, files = str(info.sha), info.siblings or [], {}
    if not is_hash(commit):
        raise odd_answer(f"says that {repo_id} is at commit {commit[:80]!r}")
    if len(entries) > limits.NAMES_IN_A_FOLDER:
        raise odd_answer(f"lists more than {limits.NAMES_IN_A_FOLDER:,} files of {repo_id}")
    for entry in entries:
        name, size, digest = entry.rfilename, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id
        # git allows no name that leads out, but a server may say anything
        inside = {"..", ".", ""}.isdisjoint(name.split("/"))
        if type(size) is not int or size < 0 or not is_hash(digest) or not inside:
            raise odd_answer(f"lists a file {str(name)[:200]!r} of size {str(size)[:80]} and hash {str(digest)[:80]}")
        files[name] = RemoteFile(size, str(digest))
    home = Path(cache_dir or constants.HF_HUB_CACHE, "models--" + repo_id.replace("/", "--"))
    return Repository(hub, repo_id, commit, files, bool(info.private), home / "snapshots" / commit)


def is_hash(text: object) -> bool:
    """Whether a text is a hash, of 40 or 64 hexadecimal digits: nothing else may touch a path."""
    return isinstance(text, str) and re.fullmatch("[0-9a-f]{40}([0-9a-f]{24})?", text) is not None


def odd_answer(found: str) -> HubRefusedError:
    """Return the error for an answer that no Hub gives."""
    return HubRefusedError(
        f"the Hub {found}",
        expected="commits of 40 hexadecimal digits, files with their sizes and hashes, and ranges of bytes",
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
    outline: Path | None = None,
) -> Path:
    """Download the files that a loader of a package or a plain GPT-2 reads, at one commit, to the Hub's cache, and
    return their folder there, whose name is the commit.

    Sizes are checked before anything is downloaded. Pickles are not downloaded. Where the Hub does not answer, or in
    offline mode, the cache answers alone, as it does for transformers.

    Args:
        checkpoint: another library's checkpoint, or an adapter, is wanted: also heads in files of their own, and
            pickled weights where there are no others. Nothing opens them.
        outline: an empty folder. It gets a file for each of the repository's, for inspection: the wanted ones whole;
            weights, which are then not downloaded to the cache, with a hole instead of what follows their header; all
            others empty. Where the cache answers alone, it stays empty.

    Raises:
        NotAPackageError, PackageError: a repository without a model, or with pickles in the place of its weights.
        PackageError: a file, or all weights together, larger than such a model needs.
        RemoteNotFoundError: no such repository or revision, or not for this token.
        AuthenticationError: the Hub does not accept the token, or wants one.
        HubUnavailableError: the Hub cannot be reached, or must not be asked, and the cache does not have it.
        HubRefusedError: the Hub sends other files than it announced.
        SaveFailedError: the system does not let the cache be written.
    """
    hub = Hub(token)
    cached = _cached(repo_id, cache_dir, revision)

    def attempt() -> Path:
        try:
            repository = read_repository(hub, repo_id, revision, cache_dir=cache_dir)
        except Passing:
            if cached is None:
                raise
            return cached
        wanted = _wanted(repository, checkpoint=checkpoint)
        for name in sorted(wanted, key=_holds_weights):  # the config before the weights
            if _holds_weights(name):
                if outline is not None:
                    continue
                _check_weights(repository, wanted)
            repository.download(name)
        if outline is not None:
            _write_outline(repository, wanted, outline)
        if revision != repository.commit:  # for the cache alone, another time
            ref = repository.folder.parents[1] / "refs" / (revision or "main")
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(repository.commit)
        return repository.folder

    if not (local_files_only or constants.HF_HUB_OFFLINE):
        return hub.patiently(f"download {repo_id}", attempt)
    if cached is None:
        raise HubUnavailableError(
            f"{repo_id} is not in the cache, and the Hub must not be asked",
            next_step="leave out local_files_only, unset HF_HUB_OFFLINE, and run the same again",
        )
    return cached


def _write_outline(repository: Repository, wanted: set[str], outline: Path) -> None:
    for name, file in repository.files.items():
        top, *below = name.split("/")
        if below:
            (outline / top).mkdir(exist_ok=True)
        elif name not in wanted:
            (outline / name).touch()
        elif _holds_weights(name):
            repository.get(name, outline / name, min(file.size, FIRST_BYTES))
            os.truncate(outline / name, file.size)
        else:
            shutil.copyfile(repository.folder / name, outline / name)


def _holds_weights(name: str) -> bool:
    return name.endswith(".safetensors") or layout.kind_of(name) == "pickle"


def _wanted(repository: Repository, *, checkpoint: bool) -> set[str]:
    """Return the files that a loader reads, after checking that there is a model, and the sizes of all but the weights.

    Raises:
        NotAPackageError: it holds no model.
        PackageError: all of its weights are pickles; a file is far larger than any package's.
    """
    names = sorted(name for name in repository.files if "/" not in name)
    if layout.CONFIG not in names and not (checkpoint and _ADAPTER in names):
        raise NotAPackageError(
            f"{repository.repo_id} holds no package: it has {', '.join(names[:5]) or 'no files'}",
            expected=f"a repository with {layout.CONFIG} and {layout.WEIGHTS}, as gpt2-value push makes it",
            next_step="check the name and the revision",
        )
    pickled = [name for name in names if _PICKLED.fullmatch(name)]
    only_pickles = bool(pickled) and not any(name.endswith(".safetensors") for name in names)
    if only_pickles and not checkpoint:
        raise PackageError(
            f"{repository.repo_id} has its weights only as pickles ({', '.join(pickled[:3])}), which can run code when "
            "opened; none was downloaded",
            next_step="ask its author for safetensors; or read them without running them: gpt2-value convert "
            f"{repository.repo_id} OUT",
        )
    kinds = ("config", "weights", "tokenizer", "card", "record")
    wanted = {name for name in names if layout.kind_of(name) in kinds or name.endswith(".py")}
    if checkpoint:
        wanted |= {name for name in names if name == _ADAPTER or name.endswith((".safetensors", ".bin.index.json"))}
        wanted |= {name for name in pickled if only_pickles or "head" in name}
    for name in wanted:
        size, most = repository.files[name].size, limits.VOCABULARY_BYTES_AT_MOST
        if size > most and not _holds_weights(name):
            raise PackageError(
                f"{name} of {repository.repo_id} has {size:,} bytes; nothing was downloaded",
                expected=f"at most {most:,}",
                next_step="ask its author",
            )
    return wanted


def _check_weights(repository: Repository, wanted: set[str]) -> None:
    """Refuse weights that have more bytes than the model needs that the config describes."""
    most = ADAPTER_BYTES
    if layout.CONFIG in repository.files:
        fields = read_json(repository.folder, layout.CONFIG)
        sides = [fields.get(name) for name in ("n_layer", "n_embd", "vocab_size", "n_positions")]
        layers, width, vocabulary, positions = (s if type(s) is int and 0 < s < 1 << 24 else 0 for s in sides)
        numbers = width * (layers * (12 * width + 16) + 2 * vocabulary + positions + 4)
        most = limits.foreign_bytes(numbers, layers * positions * positions)
    size = sum(repository.files[name].size for name in wanted if _holds_weights(name))
    if size > most:
        raise PackageError(
            f"{repository.repo_id} has {size:,} bytes of weights; none were downloaded",
            expected=f"at most {most:,} for the sizes in its {layout.CONFIG}",
            next_step="check the name and the revision, or ask its author",
        )


def _cached(repo_id: str, cache_dir: Path | None, revision: str | None) -> Path | None:
    """Return where the cache has a revision, if it has its model."""
    config = try_to_load_from_cache(repo_id, layout.CONFIG, cache_dir, revision)
    folder = Path(config).parent if isinstance(config, str) else None
    if folder is None or not any(_holds_weights(path.name) for path in folder.iterdir()):
        return None
    return folder
