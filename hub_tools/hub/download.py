"""Fetch a package from a Hub without running any of it: all that a loader reads, or only what inspection reads.

Imports the standard library, huggingface_hub (0.36 and newer), and of hub_tools `errors`, `files`, `layout`, `retry`
and `transfers`. Only files that belong to a package are fetched, and never a pickle. The Hub's cache and its offline
mode are huggingface_hub's own: https://huggingface.co/docs/huggingface_hub/guides/manage-cache.
"""

from __future__ import annotations

import glob
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import HfApi, HfFileSystem, constants, get_token, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .. import layout
from ..errors import (
    AuthenticationError,
    HubUnavailableError,
    NotAPackageError,
    PackageError,
    RemoteNotFoundError,
)
from ..files import HEADER_LIMIT, LFS_POINTER, MIB
from .retry import Retrier, is_http, other_token, status_of, token_source
from .transfers import no_warning_of_empty_downloads

PATIENCE = 60.0  # seconds for which a request may keep failing in ways that pass
# What inspection reads whole. Nothing of it is larger in a sound package: a tokenizer of a million tokens.
OUTLINE_LIMIT = 256 * MIB

_TEXTS = [layout.CONFIG, layout.GENERATION_CONFIG, layout.WEIGHTS_INDEX, layout.RECORD, *sorted(layout.TOKENIZER)]
_CODE = "*.py"
_WEIGHTS = [layout.WEIGHTS, "model-*-of-*.safetensors"]
_NOT_IN_FOLDERS = "*/*"  # a pattern's star takes slashes too

T = TypeVar("T")


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit, in a folder."""

    folder: Path
    commit: str


def offline() -> bool:
    """Whether huggingface_hub was told to ask nobody (HF_HUB_OFFLINE)."""
    return bool(constants.HF_HUB_OFFLINE)


def fetch(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: Path | None = None,
    local_files_only: bool = False,
) -> Snapshot:
    """Download the files of a package that a loader reads, at one commit, to the Hub's cache.

    Where the Hub cannot be reached, or in offline mode, the cache answers alone, as it does for transformers.

    Raises:
        NotAPackageError, PackageError: a repository without a package, or with pickles in the place of its weights.
        PackageError: a pointer of git-lfs in the place of a file.
        RemoteNotFoundError: no such repository or revision, or not for this token.
        AuthenticationError: the Hub does not accept the token, or wants one.
        HubUnavailableError: the Hub cannot be reached, or must not be asked, and the cache does not have it.
    """
    cached_only = local_files_only or offline()
    api = HfApi(token=token, library_name="gpt2-value", library_version=layout.__version__)
    if not cached_only:
        _ask(lambda: _answers(api, repo_id, revision), repo_id, revision, token)
    folder = _ask(
        lambda: snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=cached_only,
            allow_patterns=[*_TEXTS, layout.CARD, _CODE, *_WEIGHTS],
            ignore_patterns=[_NOT_IN_FOLDERS],
            library_name="gpt2-value",
            library_version=layout.__version__,
        ),
        repo_id,
        revision,
        token,
        transfer=math.inf,
    )
    snapshot = Snapshot(Path(folder), Path(folder).name)
    names = {path.name for path in snapshot.folder.iterdir()} if snapshot.folder.is_dir() else set()
    for name in sorted(names):
        path = snapshot.folder / name
        if path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
            raise _pointer(repo_id, name)
    if not (_has_model(names) or cached_only):
        # what is there instead was not downloaded: only the list of files tells
        names |= set(_ask(lambda: api.list_repo_files(repo_id, revision=snapshot.commit), repo_id, revision, token))
    _refuse_no_model(names, repo_id)
    return snapshot


def _answers(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Ask for the revision, and say whether the Hub can be reached; where it cannot, the cache may do. A download has
    no time limit, and huggingface_hub sets none for its first answer, so a silent Hub is found out here."""
    try:
        api.model_info(repo_id, revision=revision)
    except (OSError, RuntimeError, ValueError) as error:
        if status_of(error) is None and is_http(error):
            return False
        raise
    return True


def _has_model(names: set[str]) -> bool:
    return layout.CONFIG in names and any(layout.kind_of(name) == "weights" for name in names)


def _refuse_no_model(names: set[str], repo_id: str) -> None:
    """Refuse a repository whose files, by their names, are no model's. (Inspection finds out whether they are sound.)

    Raises:
        NotAPackageError: it holds no model.
        PackageError: all of its weights are pickles.
    """
    if layout.CONFIG not in names:
        files = sorted(name for name in names if layout.kind_of(name) != "litter")
        raise NotAPackageError(
            f"{repo_id} holds no package: it has {', '.join(files[:5]) or 'no files'}",
            expected=f"a repository with {layout.CONFIG} and {layout.WEIGHTS}, as gpt2-value push makes it",
            next_step="check the name and the revision",
        )
    pickles = sorted(name for name in names if layout.kind_of(name) == "pickle")
    if pickles and not _has_model(names):
        raise PackageError(
            f"{repo_id} has its weights only as pickles ({', '.join(pickles[:3])}), which can run code when opened; "
            "none was downloaded",
            expected="weights in safetensors",
            next_step=f"ask its author for safetensors; or hf download {repo_id} --local-dir FOLDER , and read it "
            "without running it: gpt2-value create --base FOLDER OUT , or, where another library wrote it: gpt2-value "
            "convert FOLDER OUT",
        )


def _pointer(repo_id: str, name: str) -> PackageError:
    return PackageError(
        f"{name} of {repo_id} is not the file but a pointer of git-lfs to it",
        expected="the file itself",
        next_step="ask its author to upload it again, by gpt2-value push; git alone, without git-lfs, uploads pointers",
    )


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
        PackageError: a file's name leads out of the folder.
        PackageError: a file is far larger than any package's.
        And what `fetch` raises.
    """
    api = HfApi(token=token, library_name="gpt2-value", library_version=layout.__version__)
    info = _ask(
        lambda: api.model_info(repo_id, revision=revision, files_metadata=True),
        repo_id,
        revision,
        token,
    )
    commit = str(info.sha)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    _refuse_no_model(set(sizes), repo_id)
    for name, size in sizes.items():
        # a Hub serves what git can hold, which is neither; a server that claims to be one may say anything
        if PurePosixPath(name).is_absolute() or not {"..", ""}.isdisjoint(name.split("/")) or "\0" in name:
            raise PackageError(
                f"{repo_id} has a file called {name[:200]!r}",
                expected="names that stay in the repository",
                next_step="do not use this repository",
            )
        if _read_whole(name) and size > OUTLINE_LIMIT:
            raise PackageError(
                f"{name} has {size:,} bytes",
                expected=f"at most {OUTLINE_LIMIT:,}",
                next_step="ask the package's author",
            )
    folder = Path(
        _ask(
            lambda: snapshot_download(
                repo_id,
                revision=commit,
                token=token,
                cache_dir=cache_dir,
                allow_patterns=[glob.escape(name) for name in sizes if _read_whole(name)],
                library_name="gpt2-value",
                library_version=layout.__version__,
            ),
            repo_id,
            revision,
            token,
            transfer=math.inf,
        )
    )
    files = HfFileSystem(token=token, skip_instance_cache=True)
    try:
        for name, size in sizes.items():
            top, *below = name.split("/")
            if below:
                (into / top).mkdir(exist_ok=True)
            elif _read_whole(name):
                (into / name).write_bytes((folder / name).read_bytes())
            elif layout.kind_of(name) == "weights":
                place = f"{repo_id}@{commit}/{name}"
                header = _ask(lambda place=place: _header(files, place), repo_id, revision, token)  # type: ignore[misc]
                if header.startswith(LFS_POINTER[:8]):
                    raise _pointer(repo_id, name)
                with open(into / name, "wb") as file:
                    file.write(header)
                    file.truncate(max(size, len(header)))
            else:
                (into / name).touch()
    except OSError as error:
        raise PackageError(
            f"the files of {repo_id} cannot be laid out in {into}: {error.strerror or error}",
            expected="names that this system can hold, and space for the files",
            next_step="look at its list of files on the Hub",
        ) from None
    return Snapshot(folder, commit)


def _read_whole(name: str) -> bool:
    return "/" not in name and (name in _TEXTS or name.endswith(".py"))


def _header(files: HfFileSystem, place: str) -> bytes:
    """Return the start of a safetensors file, up to the end of its header. Two requests, for a range of bytes each."""
    with files.open(place, "rb", cache_type="none") as file:  # no read-ahead, which is 5 MiB otherwise
        length = bytes(file.read(8))
        if len(length) < 8:
            return length
        (claimed,) = struct.unpack("<Q", length)
        # an impossible length is left to inspection, which names it
        return length + bytes(file.read(min(claimed, HEADER_LIMIT)))


def _ask(
    request: Callable[[], T], repo_id: str, revision: str | None, token: str | None, *, transfer: float = 0.0
) -> T:
    """Make a request, with retries, and return its answer; `transfer` is how many seconds its bytes may take. What the
    Hub refuses is raised as an error of ours, which holds no token."""
    secret = token or get_token() or "\0"
    source = token_source(token)
    retrier = Retrier(seconds=PATIENCE, token=secret, endpoint=HfApi().endpoint, token_source=source, writes=False)
    where = f"{repo_id} at revision {revision}" if revision else repo_id

    def attempt() -> T:
        refusal: Exception
        try:
            with no_warning_of_empty_downloads():
                return request()
        except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
            refusal = error
        except LocalEntryNotFoundError as error:
            if status_of(error) is not None:
                raise
            refusal = error
        except OfflineModeIsEnabled as error:
            refusal = error
        raise _refusal(refusal, where, retrier.text(refusal), source)

    return retrier.call(f"download {where}", attempt, transfer=transfer)


def _refusal(error: Exception, where: str, text: str, source: str) -> Exception:
    """Return the typed error for what the Hub, or its cache, does not give."""
    if isinstance(error, GatedRepoError):  # also a RepositoryNotFoundError
        return AuthenticationError(
            f"{where} is gated: {text}",
            expected="a token of somebody who was given access",
            next_step="ask for access on its page; then " + other_token(source, "a token of your account"),
        )
    if isinstance(error, (LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return HubUnavailableError(
            f"{where} is not in the cache, and the Hub was not reached: {text}",
            expected="a package that was downloaded before, or a connection",
            next_step="leave out local_files_only, unset HF_HUB_OFFLINE, and check the connection; then run the same "
            "again",
        )
    if isinstance(error, RevisionNotFoundError):
        return RemoteNotFoundError(
            f"{where} is not on the Hub: the repository is, and has no such revision: {text}",
            expected="a branch, a tag or a commit of the repository",
            next_step="check the revision on the repository's page; without one, main is taken",
        )
    if status_of(error) == 401 and isinstance(error, RepositoryNotFoundError) and "credentials" in text.lower():
        return AuthenticationError(
            f"{where}: {text}", expected="a token that the Hub accepts", next_step=other_token(source)
        )
    return RemoteNotFoundError(
        f"{where} is not on the Hub, or not for this token: {text}",
        expected="a folder, or owner/name of a repository with a package",
        next_step="check the name; if it is private, " + other_token(source, "a token that may see it"),
    )
