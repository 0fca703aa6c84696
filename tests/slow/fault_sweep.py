"""Fail every single request of a push, one at a time, in every way; print request x fault -> outcome.

    python tests/slow/fault_sweep.py            # all scenarios, a fault once and a fault that stays
    python tests/slow/fault_sweep.py --every 7  # a sample

After each: is the branch at the old commit or at one complete new one, and does running the push again complete it?
"""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]  # tests/ and the checkout

import huggingface_hub
from huggingface_hub import file_download, hf_api
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from support.hub_server import GITATTRIBUTES, Fault, HubServer
from support.pushing import push_verified

from hub_tools.errors import GPT2ValueHubError
from hub_tools.hub import ask
from hub_tools.publish.push import PushReport

REPO = "alice/value"
DOWNLOADS = "/{repo_id}/resolve/{revision}/{filename}"
FAULTS: dict[str, dict[str, Any]] = {
    **{str(status): {"status": status} for status in (401, 403, 409, 412, 429, 500, 503)},
    "504 acted": {"status": 504, "acts": True},
    "cut before": {"cut": "before"},
    "cut after": {"cut": "after"},
}
OLD = {
    "README.md": b"---\nlicense: mit\ntags: [mine]\n---\nMy words.\n",
    "model-00001-of-00002.safetensors": b"an older model's weights",
    "notes.txt": b"mine",
}


@dataclass(frozen=True)
class Scenario:
    """A repository as it is before the push, and the push."""

    name: str
    exists: bool
    branch: str = "main"
    create_pr: bool = False
    tag: str | None = None


SCENARIOS = (
    Scenario("new repository", exists=False, tag="v1"),
    Scenario("new branch", exists=True, branch="dev", tag="v1"),
    Scenario("pull request", exists=True, create_pr=True),
)


def run_push(folder: Path, scenario: Scenario, *, patience: float = 300.0) -> PushReport:
    """What `push_package` does, but for the verification."""
    with mock.patch.object(ask, "PATIENCE", patience):
        return push_verified(
            folder,
            REPO,
            revision=scenario.branch,
            create_pr=scenario.create_pr,
            tag=scenario.tag,
            commit_message="push",
        )


def set_up(server: HubServer, scenario: Scenario) -> None:
    server.repos.clear()
    server.faults.clear()
    if scenario.exists:
        server.create(REPO, OLD)
    server.requests.clear()


def requests_of(server: HubServer, folder: Path, scenario: Scenario) -> list[str]:
    """The routes of one push without faults, in order."""
    for _ in range(2):  # a process's first request is preceded by one that huggingface_hub makes once
        set_up(server, scenario)
        run_push(folder, scenario)
    return server.routes()


def try_fault(server: HubServer, folder: Path, scenario: Scenario, fault: Fault, *, patience: float = 300.0) -> str:
    """Push with the fault; then, without it, again. Returns "completed" or the first error's type; or what is bad."""
    set_up(server, scenario)
    server.faults.append(fault)
    first = _result(folder, scenario, patience)
    assert fault.hits > 0, "the fault never struck"
    commits, whole = _state(server, folder, scenario)
    server.faults.clear()
    if not whole:
        return f"BAD: {first}, and the branch is neither as before nor the package"
    again = _result(folder, scenario, patience)
    commits, whole = _state(server, folder, scenario)
    tagged = scenario.tag is None or f"refs/tags/{scenario.tag}" in server.repos[REPO].refs
    once = commits == 1 or scenario.create_pr  # each run opens a pull request
    good = again == "completed" and once and whole and tagged
    return first if good else f"BAD: {first}; then {again}, {commits} commits, {whole=}, {tagged=}"


def _result(folder: Path, scenario: Scenario, patience: float) -> str:
    try:
        run_push(folder, scenario, patience=patience)
    except GPT2ValueHubError as error:
        return type(error).__name__
    return "completed"


def _state(server: HubServer, folder: Path, scenario: Scenario) -> tuple[int, bool]:
    """How many commits were made anywhere, and whether the branch is the whole package (or, without one, as before)."""
    repo = server.repos.get(REPO)
    if repo is None:
        return 0, True
    made = sum(commit.title == "push" for commit in repo.commits.values())
    head = repo.resolve("refs/pr/1" if scenario.create_pr else scenario.branch)
    found = {} if head is None else {path: file.content for path, file in head.files.items()}
    others = {".gitattributes": GITATTRIBUTES}
    if not made:
        return 0, head is None or found == others | (OLD if scenario.exists else {})
    package = {path.name: path.read_bytes() for path in folder.iterdir()}
    card, _ = found.pop("README.md"), package.pop("README.md")
    words = b"My words." in card or not scenario.exists
    return made, words and b"value-head" in card and found == package | others | (
        {"notes.txt": b"mine"} if scenario.exists else {}
    )


@contextmanager
def hurried() -> Iterator[None]:
    """All waits, ours and huggingface_hub's, a hundred times shorter."""
    sleep = time.sleep
    with (
        mock.patch.object(time, "sleep", lambda seconds: sleep(seconds / 100)),
        mock.patch.object(ask, "FIRST_PAUSE", 0.5),
    ):
        yield


@contextmanager
def serving(*, xet: bool) -> Iterator[HubServer]:
    """A server that this process's huggingface_hub talks to."""
    with HubServer() as server, talking_to(server.url, server.token, xet=xet):
        yield server


@contextmanager
def talking_to(url: str, token: str, *, xet: bool) -> Iterator[None]:
    """Let this process's huggingface_hub, which was imported before, talk to this server."""
    with (
        mock.patch.object(huggingface_hub.constants, "ENDPOINT", url),
        # what transformers lists files by; it keeps the endpoint of the moment when it was imported
        mock.patch.object(hf_api.api, "endpoint", url),
        mock.patch.object(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + DOWNLOADS),
        # huggingface_hub 0.36 keeps a copy here
        mock.patch.object(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", url + DOWNLOADS, create=True),
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", False),
        mock.patch.object(huggingface_hub.constants, "HF_HUB_DISABLE_XET", not xet),
        mock.patch.dict(os.environ, HF_TOKEN=token),
    ):
        yield


def sweep(
    server: HubServer, folder: Path, scenario: Scenario, *, stays: bool = False, every: int = 1
) -> Iterator[tuple[int, str, str, str]]:
    """Yield (number of the request, its route, fault, outcome) for every request of the scenario and every fault, or
    for each `every`-th of these pairs.

    With `stays` the fault keeps striking this request's route, and the push's patience is short.
    """
    pairs = itertools.product(enumerate(requests_of(server, folder, scenario), start=1), FAULTS.items())
    for (number, route), (name, settings) in itertools.islice(pairs, 0, None, every):
        fault = Fault(route=route, **settings) if stays else Fault(nth=number, **settings)
        yield number, route, name, try_fault(server, folder, scenario, fault, patience=0.05 if stays else 300.0)


def main() -> None:
    from conftest import make_tiny_model

    from hub_tools import save_package

    parser = argparse.ArgumentParser()
    parser.add_argument("--every", type=int, default=1)
    every, bad, total = parser.parse_args().every, 0, 0
    disable_progress_bars()
    hub_logging.set_verbosity_error()
    logging.getLogger("hub_tools").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as home, serving(xet=False) as server, hurried():
        folder = Path(home, "package")
        save_package(make_tiny_model(), folder)
        for stays, scenario in itertools.product((False, True), SCENARIOS):
            print(f"\n{scenario.name}; each fault {'stays' if stays else 'strikes once'}")
            for number, route, fault, outcome in sweep(server, folder, scenario, stays=stays, every=every):
                print(f"{number:>2} {route:<15} {fault:<12} {outcome}", flush=True)
                bad, total = bad + outcome.startswith("BAD"), total + 1
    print(f"\n{total} faults, {bad} bad outcomes")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
