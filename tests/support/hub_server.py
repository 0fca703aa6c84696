"""A small Hugging Face Hub on 127.0.0.1 for the tests: real HTTP, spoken to by the unmodified clients.

It keeps repositories in memory, answers the routes that huggingface_hub and transformers use for a model,
counts what it was asked and sent, and fails any request in any way when a `Fault` says so. It has no Xet storage.
The routes are those of https://huggingface.co/docs/hub/api.

    with HubServer() as hub:
        os.environ["HF_ENDPOINT"], os.environ["HF_TOKEN"] = hub.url, hub.token
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import itertools
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import parse_qs, unquote, urlsplit

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.h5", "*.msgpack", "*.model")
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


# What it keeps


@dataclass(frozen=True)
class User:
    """Who a token belongs to; `role` is "write" or "read"."""

    name: str
    role: str = "write"


@dataclass(frozen=True)
class File:
    """One file in a commit: `oid` is git's hash of the blob; in LFS the content has a SHA-256 as well."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    description: str
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
    """Fail requests to a route: all of them, or the `nth` (from 1), counted from now.

    `status` answers with an error, without acting unless `acts` (as a gateway does that lost patience); `body` answers
    with these bytes, after acting, and `endless` with bytes that never end; `cut` closes the connection before or after
    acting; `delay` waits this many seconds first, and alone only delays; `meanwhile` is called, once, and alone changes
    nothing else.
    """

    route: str = "*"
    nth: int | None = None
    status: int | None = None
    acts: bool = False
    message: str = "fault"
    retry_after: str | None = None
    delay: float = 0.0
    body: bytes | None = None
    endless: bool = False
    cut: Literal["before", "after"] | None = None
    meanwhile: Callable[[], object] | None = None
    seen: int = 0
    hits: int = 0

    def strikes(self, request: Request) -> bool:
        if not fnmatch.fnmatch(request.route, self.route):
            return False
        self.seen += 1
        hit = self.nth is None or self.seen == self.nth
        self.hits += hit
        if self.meanwhile is not None and self.hits == 1:
            self.meanwhile()
        return hit


@dataclass
class Answer:
    status: int = 200
    body: Any = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refused(Exception):
    """A handler's way to answer with an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self.answer = Answer(status, {"error": message}, headers)


def in_lfs(path: str, size: int = 0) -> bool:
    return size > 10_000_000 or any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)


class HubServer:
    """The Hub: what it knows, and a thread that answers. `tokens` maps bearer tokens to users; `requests` and `faults`
    may be read and set between calls."""

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
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> HubServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

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
    ) -> Commit:
        """Add a commit on `parent` (by default the ref's) and move the ref. A None deletes."""
        parent = parent or repo.refs.get(ref)
        files = dict(repo.commits[parent].files) if parent else {}
        files = {path: file for path, file in (files | changes).items() if file is not None}
        identity = repr((parent, title, sorted((p, f.oid) for p, f in files.items()), next(self._serial)))
        oid = hashlib.sha1(identity.encode()).hexdigest()
        commit = repo.commits[oid] = Commit(oid, parent, title, description, files)
        repo.refs[ref] = oid
        return commit


# What it answers


@dataclass
class Call:
    """What a handler is given: the server, who asks, and the request taken apart."""

    hub: HubServer
    user: User | None
    query: dict[str, list[str]]
    body: bytes
    headers: Any
    repo_id: str = ""
    rev: str = "main"
    rest: str = ""

    def json(self) -> Any:
        return json.loads(self.body)

    def repo(self, *, write: bool = False) -> Repo:
        repo = self.hub.repos.get(self.repo_id)
        readable = repo is not None and (not repo.private or self._may_write())
        if repo is None or not readable:
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.user is None:
            raise Refused(401, "Invalid username or password.")
        if write and not self._may_write():
            raise Refused(403, f"You don't have the rights to write to {self.repo_id}")
        return repo

    def commit_at(self) -> Commit:
        commit = self.repo().resolve(self.rev)
        if commit is None:
            raise Refused(404, f"Invalid rev id: {self.rev}", "RevisionNotFound")
        return commit

    def _may_write(self) -> bool:
        return self.user == User(self.repo_id.split("/")[0])


_ROUTES: list[tuple[str, re.Pattern[str], str, Callable[[Call], Answer]]] = []


def route(method: str, pattern: str) -> Callable[[Callable[[Call], Answer]], Callable[[Call], Answer]]:
    """Register a handler; the route is called as the function is. {repo}, {rev} and {rest} fill the Call."""
    for name, part in (("repo", "repo_id>[^/]+/[^/]+?"), ("rev", "rev>[^/]+"), ("rest", "rest>.+")):
        pattern = pattern.replace("{" + name + "}", f"(?P<{part})")

    def register(handler: Callable[[Call], Answer]) -> Callable[[Call], Answer]:
        _ROUTES.append((method, re.compile(pattern), handler.__name__, handler))
        return handler

    return register


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Answer:
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    return Answer(body={"type": "user", "name": call.user.name})


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Answer:
    asked = call.json()
    owner = asked.get("organization") or (call.user.name if call.user else "")
    call.repo_id = f"{owner}/{asked['name']}"
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    if not call._may_write():
        raise Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
    url = f"{call.hub.url}/{call.repo_id}"
    if call.repo_id in call.hub.repos:
        return Answer(409, {"error": "You already created this model repo", "url": url})
    call.hub.create(call.repo_id, private=bool(asked.get("private")) or asked.get("visibility") == "private")
    return Answer(body={"url": url, "name": call.repo_id})


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Answer:
    return Answer(body={"errors": [], "warnings": []})


@route("POST", "/api/models/{repo}/preupload/{rev}")
def preupload(call: Call) -> Answer:
    asked, files = call.json(), call.commit_at().files
    call.repo(write="create_pr" not in call.query)
    default = files[".gitignore"].content.decode() if ".gitignore" in files else ""
    ignored = asked.get("gitIgnore", default).split()
    answers = []
    for item in asked["files"]:
        path = item["path"]
        lfs, there = in_lfs(path, item["size"]), files.get(path)
        oid = None if there is None else there.sha256 if there.lfs else there.oid
        ignore = any(fnmatch.fnmatch(path, pattern) for pattern in ignored)
        mode = "lfs" if lfs else "regular"
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": ignore, "oid": oid})
    return Answer(body={"files": answers})


@route("POST", "/{repo}\\.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Answer:
    asked, objects = call.json(), []
    repo = call.repo(write="ref" in asked)  # a pull request names no branch, and may come from anybody
    for item in asked["objects"]:
        upload = {"href": f"{call.hub.url}/lfs/{call.repo_id}/{item['oid']}?signature=1"}
        objects.append(item if item["oid"] in repo.lfs else item | {"actions": {"upload": upload}})
    return Answer(body={"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/{repo}/{rest}")
def lfs_upload(call: Call) -> Answer:
    if hashlib.sha256(call.body).hexdigest() != call.rest:
        raise Refused(400, "The content does not have the announced SHA-256")
    call.hub.repos[call.repo_id].lfs[call.rest] = call.body
    return Answer(headers={"ETag": f'"{call.rest}"'})


@route("POST", "/api/models/{repo}/commit/{rev}")
def commit(call: Call) -> Answer:
    as_pr, ref = "create_pr" in call.query, call.rev if call.rev.startswith("refs/") else f"refs/heads/{call.rev}"
    repo, base = call.repo(write=not as_pr), call.commit_at()
    lines = [json.loads(line) for line in call.body.splitlines()]
    header, changes = lines[0]["value"], dict[str, File | None]()
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    if not as_pr and ref not in repo.refs:
        raise Refused(400, f"{call.rev} is not a branch")
    if not as_pr and header.get("parentCommit", base.oid) != base.oid:
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            changes[value["path"]] = File(base64.b64decode(value["content"]), lfs=False)
        elif line["key"] == "lfsFile":
            changes[value["path"]] = File(repo.lfs[value["oid"]], lfs=True)
        elif line["key"] == "deletedFile":
            changes[value["path"]] = None
    pull_request = None
    if as_pr:
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        ref, pull_request = f"refs/pr/{number}", f"{call.hub.url}/{call.repo_id}/discussions/{number}"
    made = call.hub.commit(
        repo,
        ref,
        header["summary"],
        changes,
        parent=header.get("parentCommit", base.oid),
        description=header["description"],
    )
    url = f"{call.hub.url}/{call.repo_id}/commit/{made.oid}"
    return Answer(body={"success": True, "commitOid": made.oid, "commitUrl": url, "pullRequestUrl": pull_request})


@route("GET", "/api/models/{repo}/tree/{rev}(?:/{rest})?")
def tree(call: Call) -> Answer:
    """By which transformers looks for templates and adapters; folders are not listed."""
    folder = f"{call.rest}/" if call.rest else ""
    inside = {path: file for path, file in call.commit_at().files.items() if path.startswith(folder)}
    if folder and not inside:
        raise Refused(404, f"{call.rest} does not exist on {call.rev}", "EntryNotFound")
    return Answer(
        body=[{"type": "file", "path": p, "size": len(f.content), "oid": f.oid} for p, f in sorted(inside.items())]
    )


@route("GET", "/api/models/{repo}/refs")
def refs(call: Call) -> Answer:
    found: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
    for ref, oid in call.repo().refs.items():
        kind = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[ref.split("/")[1]]
        found[kind].append({"name": ref.split("/", 2)[2], "ref": ref, "targetCommit": oid})
    if "include_prs" not in call.query:
        del found["pullRequests"]
    return Answer(body=found)


@route("POST", "/api/models/{repo}/branch/{rev}")
def create_branch(call: Call) -> Answer:
    repo, ref = call.repo(write=True), f"refs/heads/{call.rev}"
    start = repo.resolve(call.json().get("startingPoint", "main") if call.body else "main")
    if ref in repo.refs or start is None:
        raise Refused(409 if start else 404, "Reference already exists" if start else "No such starting point")
    repo.refs[ref] = start.oid
    return Answer()


@route("POST", "/api/models/{repo}/tag/{rev}")
def create_tag(call: Call) -> Answer:
    repo, ref, target = call.repo(write=True), f"refs/tags/{call.json()['tag']}", call.commit_at()
    if ref in repo.refs:
        raise Refused(409, "Tag reference exists already.")
    repo.refs[ref] = target.oid
    return Answer()


@route("DELETE", "/api/models/{repo}/tag/{rev}")
def delete_tag(call: Call) -> Answer:
    if call.repo(write=True).refs.pop(f"refs/tags/{call.rev}", None) is None:
        raise Refused(404, "No such tag", "RevisionNotFound")
    return Answer()


@route("GET", "/api/models/{repo}/commits/{rev}")
def commits(call: Call) -> Answer:
    when = "2026-01-01T00:00:00.000Z"
    return Answer(
        body=[
            {"id": c.oid, "title": c.title, "message": c.description, "date": when, "authors": [{"user": "alice"}]}
            for c in call.repo().history(call.commit_at().oid)
        ]
    )


@route("GET", "/api/models/{repo}(?:/revision/{rev})?")
def model_info(call: Call) -> Answer:
    repo, at = call.repo(), call.commit_at()
    siblings = []
    for path, file in at.files.items():
        size = call.hub.sizes.get(path, len(file.content))
        lfs = {"lfs": {"sha256": file.sha256, "size": size, "pointerSize": 130}} if file.lfs else {}
        siblings.append({"rfilename": path} | ({"size": size, "blobId": file.oid, **lfs} if call.query else {}))
    info = {"_id": "0" * 24, "id": call.repo_id, "modelId": call.repo_id, "sha": at.oid, "private": repo.private}
    return Answer(body=info | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})


@route("GET", "/{repo}/resolve/{rev}/{rest}")
def resolve(call: Call) -> Answer:
    at = call.commit_at()
    file = at.files.get(call.rest)
    if file is None:
        refused = Refused(404, "Entry not found", "EntryNotFound")
        refused.answer.headers["X-Repo-Commit"] = at.oid
        raise refused
    headers = {"X-Repo-Commit": at.oid, "ETag": f'"{file.sha256 if file.lfs else file.oid}"'}
    wanted = re.fullmatch(r"bytes=0-(\d+)", call.headers.get("Range", ""))
    if wanted is None or not call.hub.ranges:
        return Answer(body=file.content, headers=headers)
    part = file.content[: int(wanted[1]) + 1]
    return Answer(206, part, headers | {"Content-Range": f"bytes 0-{len(part) - 1}/{len(file.content)}"})


class _Handler(BaseHTTPRequestHandler):
    """Takes a request apart, counts it, lets the faults strike, and sends what the route's handler answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60
    hub: HubServer

    def _serve(self) -> None:
        hub, url = self.hub, urlsplit(self.path)
        body = self._body()
        method = "GET" if self.command == "HEAD" else self.command
        matches = ((m, p.fullmatch(url.path), name, h) for m, p, name, h in _ROUTES)
        found = next(((match, name, h) for m, match, name, h in matches if m == method and match), None)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        request = Request(self.command, found[1] if found else "unknown", self.path, len(body), token)
        with hub.lock:
            hub.requests.append(request)
            fault = next((fault for fault in hub.faults if fault.strikes(request)), None)
        if fault:
            time.sleep(fault.delay)
        if fault and fault.cut == "before":
            return self._cut()
        if fault and fault.status and not fault.acts:
            return self._send(_failure(fault))
        answer = Answer(404, {"error": f"no route {method} {url.path}"})
        if found:
            parts = {key: unquote(value) for key, value in found[0].groupdict().items() if value is not None}
            query = parse_qs(url.query, keep_blank_values=True)
            try:
                if token is not None and token not in hub.tokens:
                    raise Refused(401, "Invalid credentials in Authorization header")
                user = hub.tokens[token] if token else None
                with hub.lock:
                    answer = found[2](Call(hub, user, query, body, self.headers, **parts))
            except Refused as refused:
                answer = refused.answer
        if fault and fault.cut == "after":
            return self._cut()
        if fault and fault.endless:
            return self._send_for_ever()
        if fault and fault.body is not None:
            answer = Answer(200, fault.body, answer.headers)
        self._send(_failure(fault) if fault and fault.status else answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, answer: Answer) -> None:
        plain = isinstance(answer.body, bytes)
        data = answer.body if plain else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        kind = {"Content-Type": "application/octet-stream" if plain else "application/json"}
        for name, value in (kind | answer.headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _send_for_ever(self) -> None:
        self.close_connection = True
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):  # until the client has enough
            while True:
                self.wfile.write(bytes(1 << 20))

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Quiet: what was asked is in `HubServer.requests`."""


def _failure(fault: Fault) -> Answer:
    assert fault.status is not None
    headers = {"Retry-After": fault.retry_after} if fault.retry_after is not None else {}
    if fault.status >= 500:  # as gateways do it: a page, not JSON
        return Answer(fault.status, b"<html><body>Bad gateway</body></html>", headers)
    message = "Invalid credentials in Authorization header" if fault.status == 401 else fault.message
    return Answer(fault.status, {"error": message}, headers | {"X-Error-Message": message})
