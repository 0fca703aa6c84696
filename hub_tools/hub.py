"""One repository on a Hub: what its branches hold, uploads, and commits that either happened or did not.

Imports the standard library, huggingface_hub (0.36 and newer), `errors` and `layout`. Every request goes through
`HfApi`; this room adds patience, typed errors, and an answer to "did that commit land?" when the Hub's was lost.
"""

from __future__ import annotations

import email.utils
import io
import itertools
import json
import logging
import random
import re
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from huggingface_hub.hf_api import GitRefs

from . import layout
from .errors import (
    AuthenticationError,
    ConcurrentPushError,
    GPT2ValueHubError,
    HubRefusedError,
    HubUnavailableError,
    NoAccessError,
    PushOptionsError,
    RemoteNotFoundError,
    TagExistsError,
)

logger = logging.getLogger(__name__)

FIRST_WAIT = 1.0  # seconds before the second attempt; doubles with each further one
LONGEST_WAIT = 30.0
PUSH_ID = "gpt2-value-push: "  # a line in a commit's description, by which a push recognises its own commit

T = TypeVar("T")


def _http_errors() -> tuple[type[Exception], tuple[type[Exception], ...]]:
    """The base of all errors of the HTTP library under huggingface_hub, and those of a connection that broke.

    huggingface_hub 0.36 stands on requests, later ones on httpx (under changing names): its own error says which.
    """
    base = [c for c in HfHubHTTPError.__mro__ if c.__module__.split(".")[0].startswith(("requests", "httpx"))][-1]
    library = sys.modules[base.__module__.split(".")[0]]
    if hasattr(library, "TransportError"):
        return base, (library.TimeoutException, library.NetworkError, library.RemoteProtocolError, library.ProxyError)
    return base, (library.ConnectionError, library.Timeout, library.exceptions.ChunkedEncodingError)


_HTTP_ERROR, _BROKEN_CONNECTION = _http_errors()


@dataclass(frozen=True)
class RemoteFile:
    """A file on the Hub: git's hash of it and, where it is in large file storage, the SHA-256 of its content."""

    size: int
    git_oid: str
    sha256: str | None


@dataclass(frozen=True)
class Branch:
    """A branch as it was read. A branch that does not exist yet holds what it will start from."""

    name: str
    commit: str  # "" where the repository does not exist
    files: dict[str, RemoteFile]
    exists: bool
    tags: dict[str, str]  # the repository's: name -> commit


@dataclass(frozen=True)
class Landed:
    """A commit that is on the Hub."""

    commit: str
    pr_number: int | None = None


class Hub:
    """One model repository, as one token may use it.

    Args:
        repo_id: `name` or `owner/name`; without an owner it is the token's.
        token: a user access token; None takes the one that huggingface_hub knows.
        patience: seconds for which one request may keep failing in ways that pass (409, 429, 5xx, broken
            connections) before the push gives up.

    Raises:
        AuthenticationError: no token, or one that no HTTP header can hold.
    """

    def __init__(self, repo_id: str, *, token: str | None = None, patience: float = 300.0) -> None:
        self._token = _checked_token(token)
        self._patience = patience
        self.api = HfApi(token=self._token, library_name="gpt2-value", library_version=layout.__version__)
        self.repo_id = repo_id

    def holds_token(self, data: bytes) -> bool:
        """Whether `data` contains the token."""
        return self._token.encode() in data

    # Before a byte is uploaded

    def check_token(self) -> None:
        """Ask the Hub who we are; complete `repo_id` with the owner if it has none.

        Raises:
            AuthenticationError, NoAccessError: the token is not valid, or may only read.
        """
        me = self._ask("check the token", self.api.whoami)
        if "/" not in self.repo_id:
            self.repo_id = f"{me['name']}/{self.repo_id}"
        access = me.get("auth", {}).get("accessToken", {})
        if access.get("role") == "read":
            raise NoAccessError(
                "the token may only read",
                expected="a token with write permission",
                next_step=f"make one at {self.api.endpoint}/settings/tokens, then: hf auth login",
            )

    def is_private(self) -> bool | None:
        """Whether the repository is private; None where there is none."""
        try:
            info = self._ask("look for the repository", self.api.model_info, self.repo_id)
        except RemoteNotFoundError:
            return None
        return bool(info.private)

    def create(self, *, private: bool | None) -> None:
        """Create the repository. One that appeared in the meantime is as good."""
        self._ask(
            "create the repository",
            self.api.create_repo,
            self.repo_id,
            private=private,
            look=lambda: None if self.is_private() is None else True,
        )

    def read_branch(self, name: str) -> Branch:
        """The branch's head, and what is in it.

        Raises:
            PushOptionsError: there is a tag of this name, or it is a commit.
        """
        refs = self._refs()
        heads = {ref.name: ref.target_commit for ref in refs.branches}
        heads |= {ref.ref: ref.target_commit for ref in refs.pull_requests or []}
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        if name not in heads and (name in tags or re.fullmatch("[0-9a-f]{40}", name)):
            raise PushOptionsError(
                f"revision {name!r} is a {'tag' if name in tags else 'commit'}",
                expected="a branch, or a new name for one",
                next_step="pass a branch; to name the new commit pass tag=... (--tag)",
            )
        commit = heads.get(name, heads.get("main"))
        if commit is None:
            raise RemoteNotFoundError(
                f"{self.repo_id} has no branch main to start {name!r} from",
                next_step="push to main first: leave out revision",
            )
        entries = self._ask(
            "list the files", lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit))
        )
        files = {
            entry.path: RemoteFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
            for entry in entries
            if hasattr(entry, "blob_id")
        }
        return Branch(name, commit, files, exists=name in heads, tags=tags)

    def create_branch(self, branch: Branch) -> None:
        """Create the branch where it was said to start. One that appeared in the meantime is looked at later."""
        self._ask(
            f"create the branch {branch.name}",
            self.api.create_branch,
            self.repo_id,
            branch=branch.name,
            revision=branch.commit,
            look=lambda: next((True for ref in self._refs().branches if ref.name == branch.name), None),
        )

    def read(self, path: str, *, commit: str, folder: Path) -> bytes:
        """A file's content, fetched by way of `folder`, which is left to the caller."""
        fetched = self._ask(
            f"read {path}", self.api.hf_hub_download, self.repo_id, path, revision=commit, cache_dir=folder
        )
        return Path(fetched).read_bytes()

    # Upload and commit

    def upload(
        self, files: dict[str, bytes | Path], *, branch: str, create_pr: bool
    ) -> list[CommitOperationAdd]:
        """Upload what large file storage takes, and return the operations that commit all of `files`.

        A Hub without Xet storage, and one whose Xet storage fails, gets its uploads by LFS.
        """
        # The repository's .gitignore must not thin out a package. What is in a comment ignores nothing.
        options = {"revision": branch, "create_pr": create_pr, "free_memory": False, "gitignore_content": "# none"}
        by_lfs = False

        def attempt() -> list[CommitOperationAdd]:
            nonlocal by_lfs
            additions = [CommitOperationAdd(name, _source(what, by_lfs)) for name, what in files.items()]
            try:
                self.api.preupload_lfs_files(self.repo_id, additions, **options)
            except FileNotFoundError:
                raise
            except (OSError, RuntimeError, ValueError) as error:
                if by_lfs or _is_http(error):
                    raise
                logger.info("no upload by Xet (%s); by LFS instead", self._text(error))
                by_lfs = True  # huggingface_hub sends open files by LFS, also where hf_xet is installed
                return attempt()
            return additions

        return self._ask("upload", attempt)

    def commit(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        *,
        onto: Branch,
        message: str,
        create_pr: bool,
    ) -> Landed:
        """Make one commit on top of `onto`, once.

        The commit carries an id of this push in its description. Whenever an answer is lost, the branch is looked at
        before anything is sent again; and since the commit names its parent, the Hub refuses a second one.

        Raises:
            ConcurrentPushError: the branch has moved since it was read. Nothing was committed.
        """
        push_id = PUSH_ID + uuid.uuid4().hex
        old_prs = self._pull_requests() if create_pr else set()

        def attempt() -> Landed:
            made = self.api.create_commit(
                self.repo_id,
                operations,
                commit_message=message,
                commit_description=push_id,
                revision=onto.name,
                parent_commit=onto.commit,
                create_pr=create_pr,
            )
            return Landed(made.oid, made.pr_num)

        def look() -> Landed | None:
            if create_pr:
                return self._landed_as_pr(push_id, old_prs)
            return self._landed(push_id, onto)

        if not create_pr and (landed := look()):  # raises where somebody pushed during the upload
            return landed
        return self._ask("commit", attempt, look=look)

    def tag(self, tag: str, *, commit: str) -> None:
        """Give `commit` a tag.

        Raises:
            TagExistsError: another commit has it.
        """

        def look() -> str | None:
            found = next((ref.target_commit for ref in self._refs().tags if ref.name == tag), None)
            if found not in (None, commit):
                raise TagExistsError(
                    f"the tag {tag!r} is on {found} already",
                    expected="a free tag",
                    next_step="choose another, or delete that one first: hf repos tag delete",
                )
            return found

        self._ask(f"tag {tag}", self.api.create_tag, self.repo_id, tag=tag, revision=commit, look=look)

    def _landed(self, push_id: str, onto: Branch) -> Landed | None:
        """Our commit, if it is on the branch; None if the branch is where it was."""
        head = self._ask("look at the branch", self.api.model_info, self.repo_id, revision=onto.name).sha
        if head == onto.commit:
            return None
        commits = self._ask("list the commits", self.api.list_repo_commits, self.repo_id, revision=onto.name)
        new = list(itertools.takewhile(lambda commit: commit.commit_id != onto.commit, commits))
        for commit in new:
            if push_id in commit.message:
                return Landed(commit.commit_id)
        raise ConcurrentPushError(
            f"{self.repo_id} ({onto.name}) is at {head}: somebody pushed {len(new)} commit(s) since it was read at "
            f"{onto.commit}",
            expected="a branch that nobody else pushes to at the same time",
            next_step=f"look at {self.url}/commits/{onto.name}; to push on top of it, run the same again",
        )

    def _refs(self) -> GitRefs:
        return self._ask("list the branches", self.api.list_repo_refs, self.repo_id, include_pull_requests=True)

    def _pull_requests(self) -> set[str]:
        return {ref.ref for ref in self._refs().pull_requests or []}

    def _landed_as_pr(self, push_id: str, old: set[str]) -> Landed | None:
        for ref in self._pull_requests() - old:
            commits = self._ask("list the commits", self.api.list_repo_commits, self.repo_id, revision=ref)
            for commit in commits:
                if push_id in commit.message:
                    return Landed(commit.commit_id, int(ref.rsplit("/", 1)[1]))
        return None

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.repo_id}"

    # Patience

    def _ask(
        self,
        what: str,
        request: Callable[..., T],
        *args: Any,
        look: Callable[[], T | None] | None = None,
        **kwargs: Any,
    ) -> T:
        """Make a request until it succeeds, fails for good, or has kept failing for longer than our patience.

        `look` finds out, after a wait, whether a request whose answer was lost has done its work all the same.
        """
        started = None
        for attempt in itertools.count():
            try:
                return request(*args, **kwargs)
            except GPT2ValueHubError:
                raise
            except (_HTTP_ERROR, OSError, ValueError, RuntimeError) as caught:
                error = caught
            status = _status(error)
            passing = status is not None and (status in (408, 409, 425, 429) or status >= 500)
            passing = passing or (status is None and _is_http(error)) or isinstance(error, json.JSONDecodeError)
            if not passing and not (look and status == 412):
                if status is None and not isinstance(error, OfflineModeIsEnabled | LocalTokenNotFoundError):
                    raise error
                raise self._refusal(what, error, status) from None
            now = time.monotonic()
            started = now if started is None else started
            wait = _retry_after(error)
            if wait is None:
                wait = min(FIRST_WAIT * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.0)
            if now + wait > started + self._patience:
                if look and (landed := look()) is not None:
                    return landed
                raise HubUnavailableError(
                    f"could not {what}: the Hub kept failing for {now - started:.0f} s; last: {self._text(error)}",
                    next_step="see https://status.huggingface.co and run the same again; what is already uploaded is "
                    "not sent twice, and a commit that did land is not made twice",
                ) from None
            logger.warning("could not %s yet (%s); again in %.1f s", what, self._text(error), wait)
            time.sleep(wait)
            if look and (landed := look()) is not None:
                return landed
        raise AssertionError("unreachable")

    def _refusal(self, what: str, error: Exception, status: int | None) -> GPT2ValueHubError:
        """The typed error for a failure that waiting does not mend. It does not carry the HTTP library's error,
        which holds the request and with it the token."""
        text = f"could not {what}: {self._text(error)}"
        if isinstance(error, OfflineModeIsEnabled):
            return HubUnavailableError(text, next_step="unset HF_HUB_OFFLINE and run the same again")
        if isinstance(error, LocalTokenNotFoundError) or status == 401:
            return AuthenticationError(
                text,
                expected=f"a token that {self.api.endpoint} accepts",
                next_step="log in with a write token: hf auth login; or pass token=... (or set HF_TOKEN)",
            )
        if status == 403:
            return NoAccessError(
                text,
                expected=f"a token that may write to {self.repo_id}",
                next_step="ask the owner for write access, use a token with write permission for it, or push to a "
                "repository of your own; to propose the change instead pass create_pr=True (--create-pr)",
            )
        if isinstance(error, RepositoryNotFoundError | RevisionNotFoundError) or status == 404:
            return RemoteNotFoundError(
                text,
                expected=f"{self.repo_id} on {self.api.endpoint}",
                next_step="check the name, and HF_ENDPOINT if you use another Hub; then run the same again",
            )
        return HubRefusedError(text, next_step="read the Hub's message above; nothing was committed")

    def _text(self, error: BaseException) -> str:
        """What went wrong, in one line, without the token and without the signatures of upload addresses."""
        parts = [str(error)]
        if error.__cause__ is not None and isinstance(error, RuntimeError):  # "Error while uploading ..." from the cause
            parts.append(str(error.__cause__))
        text = " ".join(" ".join(parts).split()).replace(self._token, "[token]")
        text = re.sub(r"For more information check: \S+ ?", "", text)
        return re.sub(r"\?[^\s'\"]+", "?[...]", text)[:500] or type(error).__name__


def _checked_token(token: str | None) -> str:
    token = (token or get_token() or "").strip()
    if not token:
        raise AuthenticationError(
            "no token",
            expected="a user access token with write permission",
            next_step="log in: hf auth login; or pass token=... (or set HF_TOKEN)",
        )
    if not re.fullmatch(r"[!-~]+", token):  # HTTP libraries quote a header that they refuse in their errors
        raise AuthenticationError(
            "the token holds white space or characters outside ASCII",
            expected="a user access token, as hf_...",
            next_step="copy it again, alone",
        )
    return token


def _source(what: bytes | Path, by_lfs: bool) -> Any:
    if not by_lfs:
        return what
    return io.BytesIO(what) if isinstance(what, bytes) else open(what, "rb")


def _chain(error: BaseException) -> list[BaseException]:
    """The error and its causes: an upload's failure comes wrapped in a RuntimeError."""
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__
    return chain


def _is_http(error: BaseException) -> bool:
    """Whether the Hub answered with an error, or the connection to it broke."""
    return _status(error) is not None or any(isinstance(part, _BROKEN_CONNECTION) for part in _chain(error))


def _response(error: BaseException) -> Any:
    for part in _chain(error):
        response = getattr(part, "response", None) if isinstance(part, _HTTP_ERROR) else None
        if response is not None:
            return response
    return None


def _status(error: BaseException) -> int | None:
    response = _response(error)
    return None if response is None else int(response.status_code)


def _retry_after(error: BaseException) -> float | None:
    """Seconds that the Hub asked us to wait: a number, or a date (RFC 9110, section 10.2.3)."""
    response = _response(error)
    value = "" if response is None else response.headers.get("Retry-After", "").strip()
    if value.isdigit():
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (TypeError, ValueError):
        return None
    return max(0.0, when.timestamp() - time.time())
