"""Fail every single request of a push, one at a time, in every way; print request x fault -> outcome.

    python tests/slow/fault_sweep.py            # all scenarios, a fault once and a fault that stays
    python tests/slow/fault_sweep.py --xet      # with hf_xet left on, as users have it, on a Hub without Xet storage

After each: is the branch at the old commit or at one complete new one, and does running the push again complete it?
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class Outcome:
    """What one fault did to one push."""

    first: str  # "completed", or the error's type
    commits: int  # that the first run made
    whole: bool  # whether the branch, after the first run, is as before or is the whole package
    again: str  # as `first`, for the second run
    commits_again: int  # in both runs together
    whole_again: bool  # whether the branch is the whole package now

    def __str__(self) -> str:
        return self.first if self.good else f"BAD: {self!r}"

    @property
    def good(self) -> bool:
        return self.whole and self.again == "completed" and self.commits_again == 1 and self.whole_again


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


def try_fault(server: HubServer, folder: Path, scenario: Scenario, fault: Fault, *, patience: float = 300.0) -> Outcome:
    """Push with the fault; then, without it, again."""
    set_up(server, scenario)
    server.faults.append(fault)
    first = _result(folder, scenario, patience)
    assert fault.hits > 0, "the fault never struck"
    commits, whole = _state(server, folder, scenario)
    server.faults.clear()
    if commits and scenario.create_pr and first != "completed":
        return Outcome(first, commits, whole, "completed", commits, whole)  # a second run would open a second one
    again = _result(folder, scenario, patience) if first != "completed" else first
    commits_again, whole_again = _state(server, folder, scenario)
    tagged = scenario.tag is None or f"refs/tags/{scenario.tag}" in server.repos[REPO].refs
    return Outcome(first, commits, whole, again, commits_again, whole_again and commits_again == 1 and tagged)


def _result(folder: Path, scenario: Scenario, patience: float) -> str:
    try:
        run_push(folder, scenario, patience=patience)
    except GPT2ValueHubError as error:
        return type(error).__name__
    return "completed"


def _state(server: HubServer, folder: Path, scenario: Scenario) -> tuple[int, bool]:
    """How many commits were made anywhere, and whether what they made is the whole package (or nothing)."""
    repo = server.repos.get(REPO)
    if repo is None:
        return 0, True
    made = [commit for commit in repo.commits.values() if commit.title == "push"]
    target = "refs/pr/1" if scenario.create_pr else scenario.branch
    if not made:
        head = repo.resolve(target)
        before = {**OLD, ".gitattributes": GITATTRIBUTES} if scenario.exists else {".gitattributes": GITATTRIBUTES}
        return 0, head is None or {p: f.content for p, f in head.files.items()} == before
    found = server.files(REPO, target)
    card = found.pop("README.md")
    package = {path.name: path.read_bytes() for path in folder.iterdir()}
    own_card = package.pop("README.md")
    rest = {".gitattributes": GITATTRIBUTES} | ({"notes.txt": b"mine"} if scenario.exists else {})
    card_is_right = b"My words." in card and b"value-head" in card if scenario.exists else card == own_card
    return len(made), card_is_right and found == package | rest


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
) -> Iterator[tuple[int, str, str, Outcome]]:
    """Yield (number of the request, its route, fault, outcome) for every request of the scenario and every fault, or
    for each `every`-th of these pairs.

    With `stays` the fault keeps striking this request's route, and the push's patience is short.
    """
    pairs = itertools.product(enumerate(requests_of(server, folder, scenario), start=1), FAULTS.items())
    for (number, route), (name, settings) in itertools.islice(pairs, 0, None, every):
        fault = Fault(route=route, **settings) if stays else Fault(nth=number, **settings)
        outcome = try_fault(server, folder, scenario, fault, patience=0.05 if stays else 300.0)
        yield number, route, name, outcome


def main() -> None:
    from conftest import make_tiny_model

    from hub_tools import save_package

    bad = total = 0
    xet = "--xet" in sys.argv
    disable_progress_bars()
    hub_logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as home, serving(xet=xet) as server, hurried():
        folder = Path(home, "package")
        save_package(make_tiny_model(), folder, repo_id=REPO)
        logging.getLogger("hub_tools").setLevel(logging.ERROR)
        for stays in (False,) if xet else (False, True):  # against one that stays hf_xet tries for minutes
            for scenario in SCENARIOS:
                print(f"\n{scenario.name}; each fault {'stays' if stays else 'strikes once'}")
                print(f"{'request':<20}" + "".join(f"{name:<21}" for name in FAULTS))
                row: list[str] = []
                for number, route, _, outcome in sweep(server, folder, scenario, stays=stays):
                    row.append(f"{outcome!s:<21}")
                    bad, total = bad + (not outcome.good), total + 1
                    if len(row) == len(FAULTS):
                        print(f"{number:>2} {route:<17}" + "".join(row), flush=True)
                        row = []
    print(f"\n{total} faults, {bad} bad outcomes")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
