"""A small Hugging Face Hub on 127.0.0.1 for the tests: real HTTP, spoken to by the unmodified clients.

It keeps repositories in memory, answers the routes that huggingface_hub and transformers use for a model, records what
it was asked, and fails any request in any way when a `Fault` says so. It has no Xet storage. The routes are those of
https://huggingface.co/docs/hub/api.

    with HubServer() as hub:
        os.environ["HF_ENDPOINT"], os.environ["HF_TOKEN"] = hub.url, hub.token
"""

import base64
import fnmatch
import hashlib
import json
import re
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LFS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.h5", "*.msgpack", "*.model")
GITATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()


def in_lfs(path):
    return any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)


def digest(path, content):
    """What the Hub calls a file's content: its SHA-256 in LFS, otherwise git's hash of the blob."""
    hashed = hashlib.sha256(content) if in_lfs(path) else hashlib.sha1(b"blob %d\0" % len(content) + content)
    return hashed.hexdigest()


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """`refs` maps full names (refs/heads/main, refs/tags/v1, refs/pr/1) to commits."""

    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def resolve(self, revision):
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return self.commits.get(next((self.refs[name] for name in names if name in self.refs), revision))

    def history(self, revision="main"):
        """The commits of a branch, newest first. The oldest is the Hub's own, made with the repository."""
        found, commit = [], self.resolve(revision)
        while commit:
            found.append(commit)
            commit = self.commits.get(commit.parent)
        return found


@dataclass(frozen=True)
class Request:
    """One request as it arrived; `size` is its body's bytes."""

    route: str
    path: str
    size: int
    token: str | None


@dataclass
class Fault:
    """Fail requests to a route and path: all of them, or the `nth` (from 1), counted from now.

    `status` answers with an error, and `cut` closes the connection, without acting unless `acts` (as a gateway does
    that lost patience); `body` answers with these bytes, after acting, an iterable without saying how many; `delay`
    waits this many seconds first, and alone only delays; `meanwhile` is called, once, and alone changes nothing else.
    """

    route: str = "*"
    path: str = "*"
    nth: int | None = None
    status: int | None = None
    cut: bool = False
    acts: bool = False
    message: str = "fault"
    retry_after: str | None = None
    delay: float = 0.0
    body: bytes | Iterable[bytes] | None = None
    meanwhile: Callable[[], object] | None = None
    seen: int = 0
    hits: int = 0

    def strikes(self, request):
        if not (fnmatch.fnmatch(request.route, self.route) and fnmatch.fnmatch(request.path, self.path)):
            return False
        self.seen += 1
        hit = self.nth is None or self.seen == self.nth
        self.hits += hit
        if self.meanwhile and self.hits == 1:
            self.meanwhile()
        return hit


class HubServer:
    """The Hub: what it knows, and a thread that answers. `tokens` maps bearer tokens to the users who own them;
    `requests` and `faults` may be read and set between calls."""

    token = "hf_" + "alice" * 7

    def __init__(self, tokens=None):
        self.tokens = tokens or {self.token: "alice"}
        self.repos = {}
        self.requests = []
        self.sent = Counter()  # path -> bytes
        self.faults = []
        self.sizes = {}  # of files that are said to be larger than they are
        self.lock = threading.RLock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def routes(self):
        """The routes asked for, in order."""
        return [request.route for request in self.requests]

    def uploaded(self, route="lfs_upload"):
        """Bytes received by a route."""
        return sum(request.size for request in self.requests if request.route == route)

    def history(self, repo_id, revision="main"):
        return self.repos[repo_id].history(revision)

    def files(self, repo_id, revision="main"):
        return self.repos[repo_id].resolve(revision).files

    def create(self, repo_id, files=None, *, private=False):
        """A repository with the Hub's own first commit, and one more if `files` are given."""
        repo = self.repos[repo_id] = Repo(private)
        self.commit(repo, "refs/heads/main", "initial commit", {".gitattributes": GITATTRIBUTES})
        if files:
            self.commit(repo, "refs/heads/main", "by hand", files)
        return repo

    def commit(self, repo, ref, title, changes, *, parent=None):
        """Add a commit on `parent` (by default the ref's) and move the ref. A None deletes."""
        parent = parent or repo.refs.get(ref)
        files = {**(repo.commits[parent].files if parent else {}), **changes}
        files = {path: content for path, content in files.items() if content is not None}
        commit = Commit(secrets.token_hex(20), parent, title, files)
        repo.commits[commit.oid] = commit
        repo.refs[ref] = commit.oid
        return commit


class Refused(Exception):
    """A route's way to answer with an error: status, message, and the Hub's code for it."""

    def __init__(self, status, message, code=""):
        super().__init__(message)
        self.answer = status, {"error": message}, {"X-Error-Message": message, "X-Error-Code": code}


ROUTES = []
PARTS = {"{repo}": "(?P<repo_id>[^/]+/[^/]+?)", "{rev}": "(?P<rev>[^/]+)", "{rest}": "(?P<rest>.+)"}


def route(method, pattern):
    """Let a method of the handler answer these requests; {repo}, {rev} and {rest} become its attributes."""
    for part, expression in PARTS.items():
        pattern = pattern.replace(part, expression)

    def register(function):
        ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    """Takes a request apart, records it, lets the faults strike, and sends what the route answers: JSON or bytes, or
    (status, either of them, headers)."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60
    hub: HubServer

    # Routes

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        return {"type": "user", "name": self.signed_in()}

    @route("POST", "/api/repos/create")
    def create_repo(self):
        asked, user = json.loads(self.body), self.signed_in()
        self.repo_id = f"{asked.get('organization') or user}/{asked['name']}"
        if not self.is_owner():
            raise Refused(403, f"You don't have the rights to create {self.repo_id}")
        answer = {"url": f"{self.hub.url}/{self.repo_id}"}
        if self.repo_id in self.hub.repos:
            return 409, {**answer, "error": "You already created this model repo"}, {}
        self.hub.create(self.repo_id, private=asked.get("private") or asked.get("visibility") == "private")
        return answer

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        return {"errors": [], "warnings": []}

    @route("POST", "/api/models/{repo}/preupload/{rev}")
    def preupload(self):
        self.repo(write="create_pr" not in self.query)
        asked, there = json.loads(self.body), self.commit_at().files
        ignored = asked.get("gitIgnore", there.get(".gitignore", b"").decode()).split()
        return {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if in_lfs(path) else "regular",
                    "shouldIgnore": any(fnmatch.fnmatch(path, pattern) for pattern in ignored),
                    "oid": digest(path, there[path]) if path in there else None,
                }
                for path in (item["path"] for item in asked["files"])
            ]
        }

    @route("POST", "/{repo}\\.git/info/lfs/objects/batch")
    def lfs_batch(self):
        asked = json.loads(self.body)
        repo = self.repo(write="ref" in asked)  # a pull request names no branch, and may come from anybody
        for item in asked["objects"]:
            if item["oid"] not in repo.lfs:
                item["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{self.repo_id}?signature=1"}}
        return {"transfer": "basic", "objects": asked["objects"]}

    @route("PUT", "/lfs/{repo}")
    def lfs_upload(self):
        self.hub.repos[self.repo_id].lfs[hashlib.sha256(self.body).hexdigest()] = self.body
        return b""

    @route("POST", "/api/models/{repo}/commit/{rev}")
    def commit(self):
        as_pr = "create_pr" in self.query
        self.signed_in()
        repo, head, changes = self.repo(write=not as_pr), self.commit_at().oid, {}
        ref, url = f"refs/heads/{self.rev}", f"{self.hub.url}/{self.repo_id}"
        if not as_pr and ref not in repo.refs:
            raise Refused(400, f"{self.rev} is not a branch")
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                header = value
            elif line["key"] == "file":
                changes[value["path"]] = base64.b64decode(value["content"])
            else:
                changes[value["path"]] = repo.lfs[value["oid"]] if line["key"] == "lfsFile" else None
        parent = header.get("parentCommit", head)
        if not as_pr and parent != head:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        made = self.hub.commit(repo, f"refs/pr/{number}" if as_pr else ref, header["summary"], changes, parent=parent)
        return {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{url}/commit/{made.oid}",
            "pullRequestUrl": f"{url}/discussions/{number}" if as_pr else None,
        }

    @route("GET", "/api/models/{repo}/tree/{rev}(?:/{rest})?")
    def tree(self):
        """By which transformers looks for templates and adapters; folders are not listed."""
        files = {path: content for path, content in self.commit_at().files.items() if path.startswith(self.rest)}
        if not files:
            raise Refused(404, f"{self.rest} does not exist on {self.rev}", "EntryNotFound")
        return [{"type": "file", "path": p, "size": len(c), "oid": digest(p, c)} for p, c in sorted(files.items())]

    @route("GET", "/api/models/{repo}/refs")
    def refs(self):
        found = {"branches": [], "tags": [], "converts": []}
        for kind, prefix in (("branches", "refs/heads/"), ("tags", "refs/tags/")):
            for ref, oid in self.repo().refs.items():
                if ref.startswith(prefix):
                    found[kind].append({"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": oid})
        return found

    @route("POST", "/api/models/{repo}/branch/{rev}")
    def create_branch(self):
        repo, ref = self.repo(write=True), f"refs/heads/{self.rev}"
        self.rev = json.loads(self.body).get("startingPoint", "main")
        return self.new_ref(repo, ref)

    @route("POST", "/api/models/{repo}/tag/{rev}")
    def create_tag(self):
        return self.new_ref(self.repo(write=True), f"refs/tags/{json.loads(self.body)['tag']}")

    @route("DELETE", "/api/models/{repo}/tag/{rev}")
    def delete_tag(self):
        if not self.repo(write=True).refs.pop(f"refs/tags/{self.rev}", None):
            raise Refused(404, "No such tag", "RevisionNotFound")
        return b""

    @route("GET", "/api/models/{repo}/commits/{rev}")
    def commits(self):
        same = {"message": "", "date": "2026-01-01T00:00:00.000Z", "authors": [{"user": "alice"}]}
        return [{"id": c.oid, "title": c.title, **same} for c in self.repo().history(self.commit_at().oid)]

    @route("GET", "/api/models/{repo}(?:/revision/{rev})?")
    def model_info(self):
        at, siblings = self.commit_at(), []
        for path, content in at.files.items():
            size, oid = self.hub.sizes.get(path, len(content)), digest(path, content)
            lfs = {"lfs": {"sha256": oid, "size": size, "pointerSize": 130}} if in_lfs(path) else {}
            siblings.append({"rfilename": path, **({"size": size, "blobId": oid, **lfs} if self.query else {})})
        info = {"_id": "0" * 24, "id": self.repo_id, "sha": at.oid, "private": self.repo().private}
        return {**info, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0}

    @route("GET", "/{repo}/resolve/{rev}/{rest}")
    def resolve(self):
        at = self.commit_at()
        if (content := at.files.get(self.rest)) is None:
            refused = Refused(404, "Entry not found", "EntryNotFound")
            refused.answer[2]["X-Repo-Commit"] = at.oid
            raise refused
        headers = {"X-Repo-Commit": at.oid, "ETag": f'"{digest(self.rest, content)}"'}
        if not (wanted := re.fullmatch(r"bytes=0-(\d+)", self.headers.get("Range", ""))):
            return 200, content, headers
        part = content[: int(wanted[1]) + 1]
        return 206, part, {**headers, "Content-Range": f"bytes 0-{len(part) - 1}/{len(content)}"}

    # What routes ask

    def signed_in(self):
        if not self.user:
            raise Refused(401, "Invalid username or password.")
        return self.user

    def is_owner(self):
        return self.user == self.repo_id.split("/")[0]

    def repo(self, *, write=False):
        repo = self.hub.repos.get(self.repo_id)
        if not repo or (repo.private and not self.is_owner()):
            raise Refused(404 if self.user else 401, "Repository not found", "RepoNotFound")
        if write and self.signed_in() and not self.is_owner():
            raise Refused(403, f"You don't have the rights to write to {self.repo_id}")
        return repo

    def commit_at(self):
        commit = self.repo().resolve(self.rev)
        if not commit:
            raise Refused(404, f"Invalid rev id: {self.rev}", "RevisionNotFound")
        return commit

    def new_ref(self, repo, ref):
        if ref in repo.refs:
            raise Refused(409, "Reference already exists")
        repo.refs[ref] = self.commit_at().oid
        return b""

    # HTTP

    def serve(self):
        hub, url, token = self.hub, urlsplit(self.path), self.headers.get("Authorization", "").removeprefix("Bearer ")
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.query = parse_qs(url.query, keep_blank_values=True)
        method, match, name = self.command.replace("HEAD", "GET"), None, "unknown"
        for wanted, pattern, function in ROUTES:
            if wanted == method and (match := pattern.fullmatch(url.path)):
                name = function.__name__
                break
        request = Request(name, self.path, len(self.body), token or None)
        with hub.lock:
            hub.requests.append(request)
            fault = next((fault for fault in hub.faults if fault.strikes(request)), Fault())
        time.sleep(fault.delay)
        if fault.acts or not (fault.cut or fault.status):
            try:
                if token and token not in hub.tokens:
                    raise Refused(401, "Invalid credentials in Authorization header")
                if not match:
                    raise Refused(404, f"no route {method} {url.path}")
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value}
                vars(self).update({"rev": "main", "rest": "", "user": hub.tokens.get(token), **parts})
                with hub.lock:
                    answer = function(self)
                answer = answer if isinstance(answer, tuple) else (200, answer, {})
            except Refused as refused:
                answer = refused.answer
        if fault.cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault.status:
            text = "Invalid credentials in Authorization header" if fault.status == 401 else fault.message
            headers = {"X-Error-Message": text} if fault.status < 500 else {}  # gateways send a page
            headers |= {"Retry-After": fault.retry_after} if fault.retry_after is not None else {}
            self.send(fault.status, {"error": text} if headers else b"<html>Bad gateway</html>", headers)
        elif fault.body is not None:
            self.send(200, fault.body, answer[2])
        else:
            self.send(*answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def send(self, status, content, headers):
        self.send_response(status)
        if isinstance(content, (dict, list)):
            content = json.dumps(content).encode()
            self.send_header("Content-Type", "application/json")
        if isinstance(content, bytes):
            self.send_header("Content-Length", str(len(content)))
            content = [content]
        else:
            self.close_connection = True  # its end is the body's
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(OSError):  # the client may have enough
                for piece in content:
                    self.hub.sent[self.path] += len(piece)
                    self.wfile.write(piece)

    def log_message(self, *_):
        """Quiet: what was asked is in `HubServer.requests`."""
