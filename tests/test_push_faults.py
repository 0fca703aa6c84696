"""A push either happened or did not: whatever fails, whenever, and however many push at once."""

import itertools
import random
import shutil
import threading
import time

import pytest
from slow.fault_sweep import FAULTS, REPO, SCENARIOS, hurried, requests_of, run_push, serving, set_up, sweep, try_fault
from support.hub_server import Fault

from hub_tools.errors import (
    ConcurrentPushError,
    GPT2ValueHubError,
    HubRefusedError,
    HubUnavailableError,
    PackageChangedError,
)
from hub_tools.hub import retry
from hub_tools.hub.repository import Hub
from hub_tools.package.save import save_package
from hub_tools.publish.push import Package, PushOptions, push

NEW_REPO, NEW_BRANCH, PULL_REQUEST = SCENARIOS


@pytest.fixture
def server():
    with serving(xet=False) as server, hurried():
        yield server


@pytest.fixture
def package(tmp_path, tiny_model):
    save_package(tiny_model, tmp_path / "package", repo_id=REPO)
    return tmp_path / "package"


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_any_single_failure_leaves_the_old_commit_or_one_whole_new_one(server, package, scenario):
    bad = [
        f"request {number} ({route}), {fault}: {outcome}"
        for number, route, fault, outcome in sweep(server, package, scenario)
        if not outcome.good
    ]
    assert not bad, "\n".join(bad)


def test_what_waiting_does_not_mend_is_not_tried_again(server, package):
    for status, error in ((401, "AuthenticationError"), (403, "AuthenticationError"), (404, "RemoteNotFoundError")):
        for number, route in enumerate(requests_of(server, package, NEW_REPO), start=1):
            outcome = try_fault(server, package, NEW_REPO, fault := Fault(nth=number, status=status))
            if route == "model_info" and status == 404 and number == 2:
                assert outcome.first == "completed"  # this is how the Hub says that there is no repository yet
            else:
                assert (route, outcome.first, fault.hits) == (route, error, 1)


def test_a_lost_answer_to_a_commit_is_found_on_the_branch_and_not_committed_twice(server, package):
    for scenario in SCENARIOS:
        for settings in ({"cut": "after"}, {"status": 504, "acts": True}):
            set_up(server, scenario)
            server.faults.append(Fault(route="commit", nth=1, **settings))
            report = run_push(package, scenario)
            made = [commit for commit in server.repos[REPO].commits.values() if commit.title == "push"]
            assert [commit.oid for commit in made] == [report.commit]
            assert server.routes().count("commit") == 1
            assert (report.pr_url is not None) == scenario.create_pr


def test_a_lost_answer_is_found_also_when_others_pushed_on_top(server, package):
    set_up(server, NEW_BRANCH)
    server.faults.append(Fault(route="commit", nth=1, cut="after", delay=0.0))
    pushed_on_top = threading.Event()
    serve = server.commit

    def commit_and_push_on_top(repo, ref, title, changes, **settings):
        made = serve(repo, ref, title, changes, **settings)
        if title == "push" and not pushed_on_top.is_set():
            pushed_on_top.set()
            serve(repo, ref, "somebody's", {"notes.txt": None})
        return made

    server.commit = commit_and_push_on_top
    report = run_push(package, NEW_BRANCH)
    assert [c.title for c in server.history(REPO, "dev")][:2] == ["somebody's", "push"]
    assert report.commit == server.history(REPO, "dev")[1].oid


@pytest.mark.parametrize("route", ["preupload", "lfs_upload", "validate_yaml", "commit"])
def test_a_push_of_somebody_else_in_the_meantime_is_reported_and_stands(server, package, route):
    """Whatever we were doing when they pushed."""
    set_up(server, PULL_REQUEST)
    main = NEW_BRANCH.__class__("main", exists=True)

    class TheyPush(Fault):
        def strikes(self, request):
            if request.route == self.route and not self.hits:
                self.hits = 1
                server.commit(server.repos[REPO], "refs/heads/main", "theirs", {"notes.txt": None})
            return False

    server.faults.append(TheyPush(route=route))
    with pytest.raises(ConcurrentPushError, match="somebody pushed 1 commit"):
        run_push(package, main)
    assert server.history(REPO)[0].title == "theirs"
    run_push(package, main)
    assert [commit.title for commit in server.history(REPO)][:2] == ["push", "theirs"]
    assert "notes.txt" not in server.files(REPO)


def test_retry_after_is_waited_for(server, package, monkeypatch):
    waits = []
    set_up(server, NEW_REPO)
    server.faults.append(Fault(route="commit", nth=1, status=429, retry_after="17"))
    server.faults.append(Fault(route="tree", nth=1, status=429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"))
    with monkeypatch.context() as patched:  # undone here: `server` has hurried the same function
        patched.setattr(retry.time, "sleep", waits.append)
        run_push(package, NEW_REPO)
    assert 17.0 in waits


def test_patience_ends(server, package):
    set_up(server, NEW_REPO)
    server.faults.append(Fault(route="commit", status=503))
    with pytest.raises(HubUnavailableError, match="503"):
        run_push(package, NEW_REPO, seconds=0.05)
    server.faults.clear()
    uploaded = server.uploaded()["lfs_upload"]
    run_push(package, NEW_REPO)
    assert server.uploaded()["lfs_upload"] == uploaded, "the weights were there already"


@pytest.mark.parametrize("status", retry.PERMANENT)
def test_a_status_that_stays_is_not_tried_again(server, package, status):
    set_up(server, PULL_REQUEST)
    server.faults.append(fault := Fault(route="commit", status=status))
    with pytest.raises(HubRefusedError, match=str(status)):
        run_push(package, PULL_REQUEST)
    assert fault.hits == 1


def test_only_the_public_hub_has_a_status_page(server, package):
    set_up(server, NEW_REPO)
    server.faults.append(Fault(route="whoami", status=503))
    with pytest.raises(HubUnavailableError) as own:
        run_push(package, NEW_REPO, seconds=0.05)
    assert "status.huggingface.co" not in own.value.next_step
    assert server.url in own.value.next_step
    public = retry.Retrier(seconds=0.0, token="hf_x", endpoint=retry.PUBLIC_HUB)
    assert "status.huggingface.co" in public._given_up("ask", OSError("down"), 1.0).next_step


@pytest.mark.parametrize("route", ["whoami", "tree", "commit"])
def test_a_hub_that_stays_silent_is_given_up_and_meanwhile_a_line_says_what_is_waited_for(
    server, package, monkeypatch, caplog, route
):
    monkeypatch.setattr(retry, "SHORTEST_LIMIT", 1.0)
    monkeypatch.setattr(retry, "FIRST_NOTE", 0.2)
    set_up(server, NEW_BRANCH)
    server.faults.append(Fault(route=route, delay=400.0))  # hurried: four seconds
    began = time.monotonic()
    with pytest.raises(HubUnavailableError, match="no answer"):
        run_push(package, NEW_BRANCH, seconds=1.0)
    assert time.monotonic() - began < 12.0
    assert "waiting for the Hub to" in caplog.text


@pytest.mark.parametrize("route", ["preupload", "lfs_upload"])
def test_a_package_written_to_during_the_push_is_not_committed(server, package, tiny_model, route):
    set_up(server, NEW_REPO)

    class SomethingSaves(Fault):
        def strikes(self, request):
            if request.route == self.route and not self.hits:
                self.hits = 1
                save_package(tiny_model, package)
            return False

    server.faults.append(SomethingSaves(route=route))
    with pytest.raises(PackageChangedError):
        run_push(package, NEW_REPO)
    assert [commit.title for commit in server.history(REPO)] == ["initial commit"]


def test_concurrent_pushers_lose_and_duplicate_nothing(server, package, tmp_path):
    """8 pushers of 20 checkpoints each to one branch, while every 13th request fails in one way or another."""
    server.create(REPO)
    ways = itertools.cycle(settings for name, settings in FAULTS.items() if name not in ("401", "403", "412"))

    class Weather(Fault):
        def strikes(self, request):
            self.seen += 1
            if self.seen % 13:
                return False
            for name, value in {"status": None, "cut": None, "acts": False, **next(ways)}.items():
                setattr(self, name, value)
            return True

    server.faults.append(Weather())
    pushed, errors = [], []

    def pusher(number):
        own, dice = tmp_path / f"pusher-{number}", random.Random(number)
        shutil.copytree(package, own)
        weights = (own / "model.safetensors").read_bytes()
        for step in range(20):
            content = weights[:-8] + bytes([number, step]) * 4
            (own / "model.safetensors").write_bytes(content)
            while True:
                try:
                    hub = Hub(REPO, patience=60.0)
                    report = push(Package.read(own), hub, PushOptions(message=f"{number}/{step}"))
                except ConcurrentPushError:
                    retry.time.sleep(dice.random() * 10)
                    continue
                except GPT2ValueHubError as error:
                    errors.append(error)
                    return
                pushed.append((report.commit, f"{number}/{step}", content))
                break

    threads = [threading.Thread(target=pusher, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    history = [commit for commit in server.history(REPO) if commit.title != "initial commit"]
    assert len(history) == len(pushed) == len({commit for commit, _, _ in pushed}) == 160
    weights = {c.oid: (c.title, c.files["model.safetensors"].content) for c in history}
    assert weights == {commit: (title, content) for commit, title, content in pushed}
    expected = {path.name for path in package.iterdir()} | {".gitattributes"}
    assert set(server.files(REPO)) == expected
