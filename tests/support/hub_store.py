"""What the loopback Hub of the tests keeps: users, repositories with their commits, what it was asked, and faults.

Imports the standard library only. How git and LFS hash: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects,
https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.h5", "*.msgpack", "*.model")
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


@dataclass(frozen=True)
class User:
    """Who a token belongs to; `role` is "write" or "read"."""

    name: str
    role: str = "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class File:
    """One file in a commit: `oid` is git's hash of the blob, and of the content's SHA-256 where it is in LFS."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        data = self.content
        if self.lfs:  # git holds a pointer to the content
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(data)}\n"
            data = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def info(self, path: str) -> dict[str, Any]:
        info: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.oid}
        if self.lfs:
            info["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 130}
        return info


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
    author: str
    files: dict[str, File]


@dataclass
class Repo:
    """`refs` maps full names (refs/heads/main, refs/tags/v1, refs/pr/1) to commits."""

    private: bool
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit | None:
        for name in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if name in self.refs:
                return self.commits[self.refs[name]]
        return self.commits.get(revision)

    def history(self, revision: str = "main") -> list[Commit]:
        """The commits of a branch, newest first."""
        found, commit = [], self.resolve(revision)
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent or "")
        return found


@dataclass(frozen=True)
class Request:
    """One request as it arrived; `size` is its body's bytes."""

    method: str
    route: str
    path: str
    size: int
    token: str | None


@dataclass
class Fault:
    """Fail requests: all that match, or the `nth` (from 1), or every `every`-th of them, counted from now.

    `status` answers with an error, without acting unless `acts` (as a gateway does that lost patience); `body` answers
    with these bytes, after acting, and `endless` with bytes that never end; `cut` closes the connection before or after
    acting; `delay` waits this many seconds first, and alone only delays.
    """

    route: str = "*"
    method: str = "*"
    nth: int | None = None
    every: int | None = None
    status: int | None = None
    acts: bool = False
    message: str = "fault"
    retry_after: str | None = None
    delay: float = 0.0
    body: bytes | None = None
    endless: bool = False
    cut: Literal["before", "after"] | None = None
    seen: int = 0
    hits: int = 0

    def strikes(self, request: Request) -> bool:
        if not (fnmatch.fnmatch(request.route, self.route) and fnmatch.fnmatch(request.method, self.method)):
            return False
        self.seen += 1
        hit = (self.nth is None or self.seen == self.nth) and (self.every is None or self.seen % self.every == 0)
        self.hits += hit
        return hit


def in_lfs(path: str, size: int = 0) -> bool:
    return size > 10_000_000 or any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)


class Store:
    """What the Hub knows. `tokens` maps bearer tokens to users; `requests` and `faults` may be read and set between
    calls."""

    token = "hf_" + "alice" * 7

    def __init__(self, tokens: dict[str, User] | None = None) -> None:
        self.tokens = tokens if tokens is not None else {self.token: User("alice")}
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.sizes: dict[str, int] = {}  # of files that are said to be larger than they are
        self.ranges = True  # whether parts of files can be asked for
        self.lock = threading.RLock()
        self._serial = itertools.count()

    # What tests read

    def routes(self) -> list[str]:
        """The routes asked for, in order."""
        return [request.route for request in self.requests]

    def uploaded(self) -> Counter[str]:
        """Bytes received, by route."""
        received: Counter[str] = Counter()
        for request in self.requests:
            received[request.route] += request.size
        return received

    def history(self, repo_id: str, revision: str = "main") -> list[Commit]:
        """The commits of a branch, newest first. The oldest is the Hub's own, made with the repository."""
        return self.repos[repo_id].history(revision)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.history(repo_id, revision)[0].files.items()}

    # What tests and handlers write

    def create(self, repo_id: str, files: dict[str, bytes] | None = None, *, private: bool = False) -> Repo:
        """A repository with the Hub's own first commit, and one more if `files` are given."""
        repo = self.repos[repo_id] = Repo(private)
        self.commit(repo, "refs/heads/main", "initial commit", {".gitattributes": File(GITATTRIBUTES, lfs=False)})
        if files:
            self.commit(repo, "refs/heads/main", "by hand", {p: File(c, lfs=in_lfs(p)) for p, c in files.items()})
        return repo

    def commit(
        self,
        repo: Repo,
        ref: str,
        title: str,
        changes: dict[str, File | None],
        *,
        parent: str | None = None,
        description: str = "",
        author: str = "alice",
    ) -> Commit:
        """Add a commit on `parent` (by default the ref's) and move the ref. A None deletes."""
        parent = parent or repo.refs.get(ref)
        files = dict(repo.commits[parent].files) if parent else {}
        files = {path: file for path, file in (files | changes).items() if file is not None}
        identity = repr((parent, title, sorted((p, f.oid) for p, f in files.items()), next(self._serial)))
        oid = hashlib.sha1(identity.encode()).hexdigest()
        commit = repo.commits[oid] = Commit(oid, parent, title, description, author, files)
        repo.refs[ref] = oid
        return commit
