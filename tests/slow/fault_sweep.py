"""Fail every single request of a push, one at a time, in every way; print request x fault -> outcome.

    python tests/slow/fault_sweep.py

Each fault strikes once, and in a second round stays. After each: is the branch at the old commit or at one complete new
one, and does running the push again complete it? The tests of pushes use the same functions.
"""

import itertools
import logging
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]  # tests/ and the checkout

import huggingface_hub
import transformers
from huggingface_hub import file_download, hf_api
from huggingface_hub.utils import disable_progress_bars
from huggingface_hub.utils import logging as hub_logging
from support.hub_server import GITATTRIBUTES, Fault, HubServer

from hub_tools.errors import GPT2ValueHubError
from hub_tools.hub import ask
from hub_tools.publish import push

REPO = "alice/value"
FAULTS = {
    **{str(status): {"status": status} for status in (401, 403, 409, 412, 429, 500, 503)},
    "504 acted": {"status": 504, "acts": True},
    "cut before": {"cut": True},
    "cut after": {"cut": True, "acts": True},
}
OLD = {
    "README.md": b"---\nlicense: mit\ntags: [mine]\n---\nMy words.\n",
    "model-00001-of-00002.safetensors": b"an older model's weights",
    "notes.txt": b"mine",
}


@dataclass(frozen=True)
class Scenario:
    """Whether there is a repository before the push, where the push's commit is to be found, and its options."""

    exists: bool
    branch: str
    options: dict


SCENARIOS = {
    "new repository": Scenario(False, "main", {"tag": "v1"}),
    "new branch": Scenario(True, "dev", {"revision": "dev", "tag": "v1"}),
    "pull request": Scenario(True, "refs/pr/1", {"create_pr": True}),
}


def push_verified(folder, *, patience=300.0, **options):
    """`push_package` for a package that needs no proof: verifying takes an interpreter's start."""
    with mock.patch.object(push, "verify_package"), mock.patch.object(ask, "PATIENCE", patience):
        return push.push_package(folder, REPO, **{"commit_message": "push", **options})


def set_up(server, scenario):
    server.repos.clear()
    server.faults.clear()
    if scenario.exists:
        server.create(REPO, OLD)
    server.requests.clear()


def requests_of(server, folder, scenario):
    """The routes of one push without faults, in order."""
    for _ in range(2):  # a process's first request is preceded by one that huggingface_hub makes once
        set_up(server, scenario)
        push_verified(folder, **scenario.options)
    return server.routes()


def try_fault(server, folder, scenario, fault, *, patience=300.0):
    """Push with the fault; then, without it, again. Returns "completed" or the first error's type; or what is bad."""
    set_up(server, scenario)
    server.faults.append(fault)
    first = _result(folder, scenario, patience)
    assert fault.hits, "the fault never struck"
    server.faults.clear()
    if _commits(server, folder, scenario) is None:
        return f"BAD: {first}, and the branch is neither as before nor the package"
    again, commits = _result(folder, scenario, patience), _commits(server, folder, scenario)
    tagged = "tag" not in scenario.options or "refs/tags/v1" in server.repos[REPO].refs
    once = commits == 1 or (commits and "create_pr" in scenario.options)  # each run opens a pull request
    return first if again == "completed" and once and tagged else f"BAD: {first}; then {again}, {commits=}, {tagged=}"


def _result(folder, scenario, patience):
    try:
        push_verified(folder, patience=patience, **scenario.options)
    except GPT2ValueHubError as error:
        return type(error).__name__
    return "completed"


def _commits(server, folder, scenario):
    """How many commits were made anywhere; None if the branch is neither the whole package nor, without one, as
    before."""
    if (repo := server.repos.get(REPO)) is None:
        return 0
    made = sum(commit.title == "push" for commit in repo.commits.values())
    expected = {".gitattributes": GITATTRIBUTES, **(OLD if scenario.exists else {})}
    head = repo.resolve(scenario.branch)
    files = dict(head.files if head else expected)
    if made:
        expected.pop("model-00001-of-00002.safetensors", None)
        expected |= {path.name: path.read_bytes() for path in folder.iterdir()}
        card, _ = files.pop("README.md", b""), expected.pop("README.md")
        if b"value-head" not in card or (b"My words." in card) != scenario.exists:
            return None
    return made if files == expected else None


@contextmanager
def hurried():
    """All waits, ours and huggingface_hub's, a hundred times shorter."""
    sleep = time.sleep
    with (
        mock.patch.object(time, "sleep", lambda seconds: sleep(seconds / 100)),
        mock.patch.object(ask, "FIRST_PAUSE", 0.5),
    ):
        yield


@contextmanager
def serving(*, xet=False):
    """A server that this process's huggingface_hub talks to."""
    with HubServer() as server, talking_to(server.url, server.token, xet=xet):
        yield server


@contextmanager
def talking_to(url, token, *, xet=False):
    """Let this process's huggingface_hub, which was imported before, talk to this server."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    with (
        mock.patch.multiple(
            huggingface_hub.constants,
            ENDPOINT=url,
            HUGGINGFACE_CO_URL_TEMPLATE=template,
            HF_HUB_OFFLINE=False,
            HF_HUB_DISABLE_XET=not xet,
        ),
        # what transformers lists files by; both keep the endpoint of the moment when they were made
        mock.patch.object(hf_api.api, "endpoint", url),
        mock.patch.object(transformers.utils.hub, "_hf_api", None, create=True),
        # huggingface_hub 0.36 keeps a copy here
        mock.patch.object(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, create=True),
        mock.patch.dict(os.environ, HF_TOKEN=token),
    ):
        yield


def sweep(server, folder, *, stays=False, every=1):
    """Yield (scenario, number of the request, its route, fault, outcome) for every scenario, request and fault, or for
    each `every`-th of these.

    With `stays` the fault keeps striking this request's route, and the push's patience is short.
    """
    for name, scenario in SCENARIOS.items():
        pairs = itertools.product(enumerate(requests_of(server, folder, scenario), start=1), FAULTS.items())
        for (number, route), (way, settings) in itertools.islice(pairs, 0, None, every):
            fault = Fault(route=route, **settings) if stays else Fault(nth=number, **settings)
            outcome = try_fault(server, folder, scenario, fault, patience=0.05 if stays else 300.0)
            yield name, number, route, way, outcome


def main():
    from conftest import make_tiny_model

    from hub_tools import save_package

    outcomes = []
    disable_progress_bars()
    hub_logging.set_verbosity_error()
    logging.getLogger("hub_tools").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as home, serving() as server, hurried():
        folder = Path(home, "package")
        save_package(make_tiny_model(), folder)
        for stays in (False, True):
            print(f"\nEach fault {'stays' if stays else 'strikes once'}")
            for scenario, number, route, fault, outcome in sweep(server, folder, stays=stays):
                print(f"{scenario:<15} {number:>2} {route:<15} {fault:<12} {outcome}", flush=True)
                outcomes.append(outcome)
    bad = sum(outcome.startswith("BAD") for outcome in outcomes)
    print(f"\n{len(outcomes)} faults, {bad} bad outcomes")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
