"""One repository on a Hub: what its branches hold, uploads, and commits that either happened or did not.

Imports the standard library, huggingface_hub (0.36 and newer), and of hub_tools `errors`, `layout`, `retry` and
`transfers`. How a commit is made: https://huggingface.co/docs/huggingface_hub/guides/upload.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import re
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import HFValidationError
from huggingface_hub.hf_api import GitCommitInfo, GitRefs, RepoFile
from huggingface_hub.utils import build_hf_headers, get_session, validate_repo_id

from .. import layout
from ..errors import (
    AuthenticationError,
    ConcurrentPushError,
    OptionsError,
    RemoteNotFoundError,
)
from .retry import CREATE, Retrier, checked_token, is_http, other_token, token_source
from .transfers import bars_only_on_a_terminal, without_xet

logger = logging.getLogger(__name__)

SLOWEST_UPLOAD = 16_000.0  # bytes a second; an upload that is slower is given up
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
class PushedCommit:
    """A commit of ours that is on the Hub; with the number of its pull request, where it was proposed."""

    commit: str
    pr_number: int | None = None


class Hub:
    """One repository, as one token may use it.

    Args:
        repo_id: `name` or `owner/name`; without an owner it is the token's.
        kind: what the repository is.
        token: a user access token; None takes the one that huggingface_hub knows.
        patience: seconds for which one request may keep failing in ways that pass (409, 429, 5xx, broken
            connections) before the push gives up.

    Raises:
        AuthenticationError: no token, or one that no HTTP header can hold.
        OptionsError: `repo_id` cannot be a repository's id.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        kind: Literal["model", "space"] = "model",
        token: str | None = None,
        patience: float = 300.0,
    ) -> None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise OptionsError(str(error), next_step="pass owner/name, of letters, digits, '-', '_' and '.'") from None
        self._token = checked_token(token)
        self.repo_id, self.kind = repo_id, kind
        self.api = HfApi(token=self._token, library_name="gpt2-value", library_version=layout.__version__)
        self._token_source = token_source(token)
        self._retrier = Retrier(
            seconds=patience, token=self._token, endpoint=self.api.endpoint, token_source=self._token_source
        )
        self._call = self._retrier.call

    def holds_token(self, data: bytes) -> bool:
        """Whether `data` contains the token."""
        return self._token.encode() in data

    @property
    def url(self) -> str:
        """Where people find the repository."""
        return f"{self.api.endpoint}/{'spaces/' if self.kind == 'space' else ''}{self.repo_id}"

    # Before a byte is uploaded

    def check_token(self) -> None:
        """Ask the Hub who we are; complete `repo_id` with the owner if it has none.

        Raises:
            AuthenticationError: the token is not valid, or may only read.
        """
        me = self._call("check the token", self.api.whoami)
        if "/" not in self.repo_id:
            self.repo_id = f"{me['name']}/{self.repo_id}"
        access = me.get("auth", {}).get("accessToken", {})
        if access.get("role") == "read":
            raise AuthenticationError(
                "the token may only read",
                expected="a token with write permission",
                next_step=f"make one at {self.api.endpoint}/settings/tokens; then "
                + other_token(self._token_source, "that one"),
            )

    def is_private(self) -> bool | None:
        """Whether the repository is private; None where there is none."""
        try:
            info = self._ask("look for the repository", self.api.repo_info)
        except RemoteNotFoundError:
            return None
        return bool(info.private)

    def create(self, *, private: bool | None) -> None:
        """Create the repository, unless somebody else has done so in the meantime."""
        self._ask(
            CREATE,
            self.api.create_repo,
            private=private,
            space_sdk="gradio" if self.kind == "space" else None,
            look=lambda: None if self.is_private() is None else True,
        )

    def find_branch(self, name: str) -> Branch:
        """Return the branch's head, without its files.

        Raises:
            OptionsError: there is a tag of this name, or it is a commit.
        """
        refs = self._refs()
        heads = {ref.name: ref.target_commit for ref in refs.branches}
        heads |= {ref.ref: ref.target_commit for ref in refs.pull_requests or []}
        tags = {ref.name: ref.target_commit for ref in refs.tags}
        if name not in heads and (name in tags or re.fullmatch("[0-9a-f]{40}", name)):
            raise OptionsError(
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
        return Branch(name, commit, {}, exists=name in heads, tags=tags)

    def read_branch(self, name: str) -> Branch:
        """Return the branch's head, and what is in it. Raises what `find_branch` raises."""
        branch = self.find_branch(name)
        entries = self._ask(
            "list the files",
            lambda *repo, **kind: list(self.api.list_repo_tree(*repo, recursive=True, revision=branch.commit, **kind)),
        )
        files = {
            entry.path: RemoteFile(entry.size, entry.blob_id, entry.lfs.sha256 if entry.lfs else None)
            for entry in entries
            if isinstance(entry, RepoFile)
        }
        return replace(branch, files=files)

    def check_write_access(self, branch: Branch, *, create_pr: bool) -> None:
        """Check that the token may push, by asking how to upload a small file: the Hub answers that only to those who
        may.

        Raises:
            AuthenticationError: the token may not.
        """
        self._ask(
            f"push to {self.repo_id}",
            self.api.preupload_lfs_files,
            [CommitOperationAdd(layout.CONFIG, b"{}")],
            revision=branch.name if branch.exists else "main",
            create_pr=create_pr,
        )

    def create_branch(self, branch: Branch) -> None:
        """Create the branch at the commit that was read, unless somebody else has created it in the meantime."""
        self._ask(
            f"create the branch {branch.name}",
            self.api.create_branch,
            branch=branch.name,
            revision=branch.commit,
            look=lambda: next((True for ref in self._refs().branches if ref.name == branch.name), None),
        )

    def read(self, path: str, *, commit: str, folder: Path) -> bytes:
        """Return a file's content. It is downloaded to `folder`, which the caller removes."""
        fetched = self._ask(f"read {path}", self.api.hf_hub_download, path, revision=commit, cache_dir=folder)
        return Path(fetched).read_bytes()

    # Upload and commit

    def upload(self, files: dict[str, bytes | Path], *, branch: str, create_pr: bool) -> list[CommitOperationAdd]:
        """Upload what large file storage takes; return the operations that commit all of `files`.

        A Hub without Xet storage, and one whose Xet storage fails, gets its uploads by LFS. On a terminal
        huggingface_hub shows the bytes as they go.
        """
        size = sum(len(data) if isinstance(data, bytes) else data.stat().st_size for data in files.values())
        by_xet = bool(files) and self._has_xet(branch, create_pr=create_pr)

        def attempt() -> list[CommitOperationAdd]:
            nonlocal by_xet
            additions = [CommitOperationAdd(name, content) for name, content in files.items()]
            try:
                with bars_only_on_a_terminal(), nullcontext() if by_xet else without_xet():
                    self.api.preupload_lfs_files(
                        self.repo_id,
                        additions,
                        repo_type=self.kind,
                        revision=branch,
                        create_pr=create_pr,
                        free_memory=False,
                        gitignore_content="# none",  # the repository's own must not thin out a package
                    )
            except FileNotFoundError:
                raise
            except (OSError, RuntimeError, ValueError) as error:
                if not by_xet or is_http(error):
                    raise
                logger.info("no upload by Xet (%s); by LFS instead", self._retrier.text(error))
                by_xet = False
                return attempt()
            return additions

        if not files:
            return []
        return self._call(f"upload {len(files)} files ({size:,} bytes)", attempt, transfer=1 + size / SLOWEST_UPLOAD)

    def _has_xet(self, branch: str, *, create_pr: bool) -> bool:
        """Whether the Hub takes uploads by Xet. Asked first, since a failed attempt leaves its bars on the screen."""
        if constants.HF_HUB_DISABLE_XET or importlib.util.find_spec("hf_xet") is None:
            return False
        place = f"xet-write-token/{quote(branch, safe='')}{'?create_pr=1' if create_pr else ''}"
        url, headers = (
            f"{self.api.endpoint}/api/{self.kind}s/{self.repo_id}/{place}",
            build_hf_headers(token=self._token),
        )
        answer = self._call("ask how to upload", get_session().get, url, headers=headers)
        return bool(answer.status_code == 200)

    def commit(
        self,
        operations: Sequence[CommitOperationAdd | CommitOperationDelete],
        *,
        onto: Branch,
        message: str,
        create_pr: bool,
        note: str = "",
    ) -> PushedCommit:
        """Make one commit on top of `onto`, once.

        The commit carries an id of this push in its description, below `note`. Whenever an answer is lost, the branch
        is looked at before anything is sent again; and since the commit names its parent, the Hub refuses a second one.

        Raises:
            ConcurrentPushError: the branch has moved since it was read. Nothing was committed.
        """
        push_id = PUSH_ID + uuid.uuid4().hex
        old_prs = self._pull_requests() if create_pr else set()

        def attempt() -> PushedCommit:
            made = self.api.create_commit(
                self.repo_id,
                operations,
                repo_type=self.kind,
                commit_message=message,
                commit_description=f"{note}\n{push_id}" if note else push_id,
                revision=onto.name,
                parent_commit=onto.commit,
                create_pr=create_pr,
            )
            return PushedCommit(made.oid, made.pr_num)

        def look() -> PushedCommit | None:
            if create_pr:
                return self._own_pull_request(push_id, old_prs)
            return self._own_commit(push_id, onto)

        if not create_pr and (found := look()):  # raises where somebody pushed during the upload
            return found
        return self._call("commit", attempt, look=look)

    def tag(self, tag: str, *, commit: str) -> None:
        """Give `commit` a tag.

        Raises:
            OptionsError: another commit has it.
        """

        def look() -> str | None:
            found = self.tagged(tag)
            if found not in (None, commit):
                raise OptionsError(
                    f"the tag {tag!r} is on {found} already",
                    expected="a free tag",
                    next_step="choose another, or delete that one first: hf repos tag delete",
                )
            return found

        self._ask(f"tag {tag}", self.api.create_tag, tag=tag, revision=commit, look=look)

    def tagged(self, tag: str) -> str | None:
        """Return the commit that has the tag; None where no commit has it."""
        return next((ref.target_commit for ref in self._refs().tags if ref.name == tag), None)

    def commits(self, revision: str) -> list[GitCommitInfo]:
        """Return the commits of a revision, newest first."""
        return self._ask("list the commits", self.api.list_repo_commits, revision=revision)

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
                tag=tag,
                look=lambda: True if self.tagged(tag) is None else None,
            )
        self.tag(tag, commit=commit)

    def _own_commit(self, push_id: str, onto: Branch) -> PushedCommit | None:
        """Return our commit if it is on the branch, and None if the branch has not moved."""
        head = self._ask("look at the branch", self.api.repo_info, revision=onto.name).sha
        if head == onto.commit:
            return None
        new = list(itertools.takewhile(lambda commit: commit.commit_id != onto.commit, self.commits(onto.name)))
        for commit in new:
            if push_id in commit.message:
                return PushedCommit(commit.commit_id)
        raise ConcurrentPushError(
            f"{self.repo_id} ({onto.name}) is at {head}: somebody pushed {len(new)} commit(s) since it was read at "
            f"{onto.commit}",
            expected="a branch that nobody else pushes to at the same time",
            next_step=f"look at {self.url}/commits/{onto.name}; to push on top of it, run the same again",
        )

    def _ask(self, what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function of `api` about this repository."""
        return self._call(what, function, self.repo_id, *arguments, repo_type=self.kind, **options)

    def _refs(self) -> GitRefs:
        return self._ask("list the branches", self.api.list_repo_refs, include_pull_requests=True)

    def _pull_requests(self) -> set[str]:
        return {ref.ref for ref in self._refs().pull_requests or []}

    def _own_pull_request(self, push_id: str, old: set[str]) -> PushedCommit | None:
        for ref in self._pull_requests() - old:
            for commit in self.commits(ref):
                if push_id in commit.message:
                    return PushedCommit(commit.commit_id, int(ref.rsplit("/", 1)[1]))
        return None
