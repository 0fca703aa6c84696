"""A small Hugging Face Hub on 127.0.0.1 for the tests: real HTTP, spoken to by the unmodified clients.

It keeps repositories in memory, answers the routes that huggingface_hub and transformers use for a model,
counts what it was asked and sent, and fails any request in any way when a `Fault` says so. It has no Xet storage.
Imports the standard library, PyYAML and `hub_store`. The routes are those of https://huggingface.co/docs/hub/api.

    with HubServer() as hub:
        os.environ["HF_ENDPOINT"], os.environ["HF_TOKEN"] = hub.url, hub.token
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from support.hub_store import GITATTRIBUTES, Commit, Fault, File, Repo, Request, Store, User, in_lfs

__all__ = ["GITATTRIBUTES", "Fault", "HubServer", "User"]


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


class HubServer(Store):
    """The Hub: what it knows, and a thread that answers."""

    def __init__(self, tokens: dict[str, User] | None = None) -> None:
        super().__init__(tokens)
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
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
        owner = self.repo_id.split("/")[0]
        return self.user is not None and self.user.role == "write" and owner in (self.user.name, *self.user.orgs)


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
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": call.user.role}}
    orgs = [{"type": "org", "name": org} for org in call.user.orgs]
    return Answer(body={"type": "user", "name": call.user.name, "orgs": orgs, "auth": auth})


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
    block = re.match(r"---\r?\n(.*?)\r?\n---", call.json()["content"], re.DOTALL)
    try:
        data = yaml.safe_load(block[1]) if block else {}
    except yaml.YAMLError as error:
        return Answer(400, {"errors": [{"message": str(error)}], "warnings": []})
    return Answer(body={"errors": [], "warnings": [] if data else [{"message": "empty or missing yaml metadata"}]})


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


@route("GET", "/api/models/{repo}/xet-(?:read|write)-token/{rev}")
def xet_token(call: Call) -> Answer:
    raise Refused(404, "This Hub has no Xet storage")


@route("POST", "/{repo}\\.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Answer:
    asked, objects = call.json(), []
    repo = call.repo(write="ref" in asked)  # a pull request names no branch, and may come from anybody
    for item in asked["objects"]:
        upload = {"href": f"{call.hub.url}/lfs/{call.repo_id}/{item['oid']}?signature=1"}
        verify = {"href": f"{call.hub.url}/{call.repo_id}.git/info/lfs/verify"}
        there = item["oid"] in repo.lfs
        objects.append(item if there else item | {"actions": {"upload": upload, "verify": verify}})
    return Answer(body={"transfer": "basic", "objects": objects})


@route("PUT", "/lfs/{repo}/{rest}")
def lfs_upload(call: Call) -> Answer:
    if hashlib.sha256(call.body).hexdigest() != call.rest:
        raise Refused(400, "The content does not have the announced SHA-256")
    call.hub.repos[call.repo_id].lfs[call.rest] = call.body
    return Answer(headers={"ETag": f'"{call.rest}"'})


@route("POST", "/{repo}\\.git/info/lfs/verify")
def lfs_verify(call: Call) -> Answer:
    asked = call.json()
    if len(call.repo().lfs.get(asked["oid"], b"")) != asked["size"]:
        raise Refused(404, "LFS object not found")
    return Answer()


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
            if value["oid"] not in repo.lfs:
                raise Refused(400, f"LFS object {value['oid']} was not uploaded")
            changes[value["path"]] = File(repo.lfs[value["oid"]], lfs=True)
        elif line["key"] == "deletedFile":
            if value["path"] not in base.files:
                raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")
            changes[value["path"]] = None
        else:
            raise Refused(400, f"Unknown operation {line['key']}")
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
        author=call.user.name,
    )
    url = f"{call.hub.url}/{call.repo_id}/commit/{made.oid}"
    return Answer(body={"success": True, "commitOid": made.oid, "commitUrl": url, "pullRequestUrl": pull_request})


@route("GET", "/api/models/{repo}/tree/{rev}(?:/{rest})?")
def tree(call: Call) -> Answer:
    files, folder = call.commit_at().files, f"{call.rest}/" if call.rest else ""
    recursive = call.query.get("recursive", [""])[0].lower() == "true"
    inside = {path: file for path, file in files.items() if path.startswith(folder)}
    if folder and not inside:
        raise Refused(404, f"{call.rest} does not exist on {call.rev}", "EntryNotFound")
    folders = {p[: p.index("/", len(folder))] for p in inside if "/" in p[len(folder) :]}
    entries = [{"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in sorted(folders)]
    entries += [
        f.info(p) | ({"size": call.hub.sizes[p]} if p in call.hub.sizes else {})
        for p, f in sorted(inside.items())
        if recursive or "/" not in p[len(folder) :]
    ]
    return Answer(body=entries)


@route("POST", "/api/models/{repo}/paths-info/{rev}")
def paths_info(call: Call) -> Answer:
    asked, files = parse_qs(call.body.decode())["paths"], call.commit_at().files
    return Answer(body=[files[path].info(path) for path in asked if path in files])


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
            {"id": c.oid, "title": c.title, "message": c.description, "date": when, "authors": [{"user": c.author}]}
            for c in call.repo().history(call.commit_at().oid)
        ]
    )


@route("GET", "/api/models/{repo}(?:/revision/{rev})?")
def model_info(call: Call) -> Answer:
    repo, at = call.repo(), call.commit_at()
    siblings = [
        {"rfilename": path} | ({"size": len(f.content), "blobId": f.oid} if "blobs" in call.query else {})
        for path, f in at.files.items()
    ]
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
    headers = {"X-Repo-Commit": at.oid, "ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
    if file.lfs:
        headers |= {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
    if wanted is None or not call.hub.ranges:
        return Answer(body=file.content, headers=headers)
    first, last = int(wanted[1]), min(int(wanted[2] or len(file.content) - 1), len(file.content) - 1)
    if first > last:
        raise Refused(416, f"Range {wanted[0]} of {len(file.content)} bytes")
    headers["Content-Range"] = f"bytes {first}-{last}/{len(file.content)}"
    return Answer(206, file.content[first : last + 1], headers)


class _Handler(BaseHTTPRequestHandler):
    """Takes a request apart, counts it, lets the faults strike, and sends what the route's handler answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    timeout = 60
    server_hub: HubServer

    def _serve(self) -> None:
        hub, url = self.server_hub, urlsplit(self.path)
        body = b"".join(self._body())
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

    def _body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield self.rfile.read(int(self.headers.get("Content-Length") or 0))

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
