"""One repository on a Hub: what its branches hold, uploads, and commits that either happened or did not.

Imports the standard library, huggingface_hub (0.36 and newer), `errors`, `layout` and `patience`. How a commit is
made: https://huggingface.co/docs/huggingface_hub/guides/upload.
"""

from __future__ import annotations

import io
import itertools
import logging
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import GitRefs, RepoFile
from huggingface_hub.utils import validate_repo_id

from .. import layout
from ..errors import (
    AuthenticationError,
    ConcurrentPushError,
    NoAccessError,
    PushOptionsError,
    RemoteNotFoundError,
    TagExistsError,
)
from .retry import Patience, is_http

logger = logging.getLogger(__name__)

PUSH_ID = "gpt2-value-push: "  # a line in a commit's description, by which a push recognises its own commit


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
        PushOptionsError: `repo_id` cannot be a repository's id.
    """

    def __init__(self, repo_id: str, *, token: str | None = None, patience: float = 300.0) -> None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise PushOptionsError(
                str(error), next_step="pass owner/name, of letters, digits, '-', '_' and '.'"
            ) from None
        self._token = _checked_token(token)
        self.repo_id = repo_id
        self.api = HfApi(token=self._token, library_name="gpt2-value", library_version=layout.__version__)
        self._patience = Patience(seconds=patience, token=self._token, endpoint=self.api.endpoint)
        self._ask = self._patience.ask

    def holds_token(self, data: bytes) -> bool:
        """Whether `data` contains the token."""
        return self._token.encode() in data

    @property
    def url(self) -> str:
        """Where people find the repository."""
        return f"{self.api.endpoint}/{self.repo_id}"

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
            if isinstance(entry, RepoFile)
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

    @contextmanager
    def uploaded(
        self, files: dict[str, bytes | Path], *, branch: str, create_pr: bool
    ) -> Iterator[list[CommitOperationAdd]]:
        """Upload what large file storage takes; yield the operations that commit all of `files`.

        A Hub without Xet storage, and one whose Xet storage fails, gets its uploads by LFS.
        """
        by_lfs = False
        with ExitStack() as opened:

            def attempt() -> list[CommitOperationAdd]:
                nonlocal by_lfs
                additions = [
                    CommitOperationAdd(name, _readable(content, opened) if by_lfs else content)
                    for name, content in files.items()
                ]
                try:
                    self.api.preupload_lfs_files(
                        self.repo_id,
                        additions,
                        revision=branch,
                        create_pr=create_pr,
                        free_memory=False,
                        gitignore_content="# none",  # the repository's own must not thin out a package
                    )
                except FileNotFoundError:
                    raise
                except (OSError, RuntimeError, ValueError) as error:
                    if by_lfs or is_http(error):
                        raise
                    logger.info("no upload by Xet (%s); by LFS instead", self._patience.text(error))
                    by_lfs = True  # huggingface_hub sends open files by LFS, also where hf_xet is installed
                    return attempt()
                return additions

            yield self._ask("upload", attempt)

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
            found = self.tagged(tag)
            if found not in (None, commit):
                raise TagExistsError(
                    f"the tag {tag!r} is on {found} already",
                    expected="a free tag",
                    next_step="choose another, or delete that one first: hf repos tag delete",
                )
            return found

        self._ask(f"tag {tag}", self.api.create_tag, self.repo_id, tag=tag, revision=commit, look=look)

    def tagged(self, tag: str) -> str | None:
        """The commit that has the tag."""
        return next((ref.target_commit for ref in self._refs().tags if ref.name == tag), None)

    def move_tag(self, tag: str, *, commit: str) -> None:
        """Give `commit` a tag, and take it from any other that has it.

        The Hub's tags do not move: this deletes and creates, and between the two there is none.
        """
        found = self.tagged(tag)
        if found == commit:
            return
        if found is not None:
            self._ask(
                f"delete the tag {tag}",
                self.api.delete_tag,
                self.repo_id,
                tag=tag,
                look=lambda: True if self.tagged(tag) is None else None,
            )
        self.tag(tag, commit=commit)

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


def _readable(content: bytes | Path, opened: ExitStack) -> Any:
    """An open file; those on the disk are closed with `opened`."""
    return io.BytesIO(content) if isinstance(content, bytes) else opened.enter_context(open(content, "rb"))
