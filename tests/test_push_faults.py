"""A push either happened or did not: whatever fails, whenever, and however many push at once."""

import itertools
import random
import shutil
import socket
import threading
import time
from functools import partial
from unittest import mock

import pytest
from slow.fault_sweep import (
    FAULTS,
    REPO,
    SCENARIOS,
    hurried,
    push_verified,
    serving,
    set_up,
    sweep,
    talking_to,
)
from support.hub_server import Fault

from hub_tools.errors import (
    AuthenticationError,
    ConcurrentPushError,
    GPT2ValueHubError,
    HubUnavailableError,
    RemoteNotFoundError,
)
from hub_tools.hub import ask
from hub_tools.publish.push import push_package

NEW_BRANCH = SCENARIOS["new branch"]


@pytest.fixture
def server():
    with serving() as server, hurried():
        yield server


def test_any_single_failure_leaves_the_old_commit_or_one_whole_new_one(server, package):
    """A fixed sample of the grid; `make faults` fails every request of every scenario in every way."""
    outcomes = list(sweep(server, package, every=11))
    assert [outcome for outcome in outcomes if outcome[-1].startswith("BAD")] == []
    assert {fault for *_, fault, _ in outcomes} == set(FAULTS)


@pytest.mark.parametrize(("status", "error"), [(401, AuthenticationError), (404, RemoteNotFoundError)])
@pytest.mark.parametrize("route", ["whoami", "preupload", "commit", "create_tag"])
def test_what_waiting_does_not_mend_is_not_tried_again(server, package, status, error, route):
    server.faults.append(fault := Fault(route=route, status=status))
    with pytest.raises(error):
        push_verified(package, tag="v1")
    assert fault.hits == 1


@pytest.mark.parametrize("lost", ["cut after", "504 acted"])
def test_a_lost_answer_to_a_commit_is_found_on_the_branch_and_not_committed_twice(server, package, lost):
    server.faults.append(Fault(route="commit", nth=1, **FAULTS[lost]))
    report = push_verified(package)
    assert [commit.oid for commit in server.history(REPO)][:-1] == [report.commit]
    assert report.committed
    assert report.added


@pytest.mark.parametrize("route", ["lfs_upload", "commit"])
def test_a_push_of_somebody_else_in_the_meantime_is_reported_and_stands(server, package, route):
    """Whatever we were doing when they pushed."""
    theirs = partial(server.commit, server.create(REPO), "refs/heads/main", "theirs", {"notes.txt": b"theirs"})
    server.faults.append(Fault(route=route, meanwhile=theirs))
    with pytest.raises(ConcurrentPushError, match="somebody pushed"):
        push_verified(package)
    assert server.history(REPO)[0].title == "theirs"
    push_verified(package)
    assert [commit.title for commit in server.history(REPO)][:2] == ["push", "theirs"]
    assert "notes.txt" in server.files(REPO)


RETRY_AFTER = {"17": 17.0, "0": 0.25, "²": 0.25, "Wed, 21 Oct 2015 07:28:00 GMT": 0.25, "-5": 0.25, "": 0.25}


@pytest.mark.parametrize("asked", RETRY_AFTER)
def test_retry_after_is_waited_for_whatever_stands_there(server, package, monkeypatch, asked):
    waits = []
    header = asked.encode().decode("latin-1")
    server.faults.append(fault := Fault(route="commit", nth=1, status=429, retry_after=header))
    with monkeypatch.context() as patched:  # undone here: `server` has hurried the same function
        patched.setattr(ask.time, "sleep", waits.append)
        push_verified(package)
    assert fault.hits == 1
    assert RETRY_AFTER[asked] <= max(waits) < RETRY_AFTER[asked] + 1


@pytest.mark.parametrize("asked", [None, "0", "3600", "999999999"])
def test_patience_ends_after_a_bounded_number_of_tries_and_says_how_long_to_wait(server, package, asked):
    server.faults.append(fault := Fault(route="commit", status=429, retry_after=asked))
    with pytest.raises(HubUnavailableError, match="429") as given_up:
        push_verified(package)
    if asked in (None, "0"):
        assert 5 < fault.hits < 25
        assert server.url in given_up.value.next_step
    else:
        assert fault.hits == 1
        assert f"wait {int(asked):,} s" in given_up.value.next_step
    server.faults.clear()
    uploaded = server.uploaded()
    push_verified(package)
    assert server.uploaded() == uploaded, "the weights were there already"


def test_a_name_that_does_not_resolve_is_said_at_once(package, caplog):
    """Without a network; and a refused connection, which may pass, is tried again."""

    def unresolvable(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    with talking_to("http://hub.invalid", "hf_any"), mock.patch.object(socket, "getaddrinfo", unresolvable):
        with pytest.raises(HubUnavailableError, match="gave up") as refused:
            push_verified(package)
    assert "again in" not in caplog.text
    assert "that you have a connection" in refused.value.next_step
    with talking_to("http://127.0.0.1:9", "hf_any"), hurried():
        with pytest.raises(HubUnavailableError, match="gave up"):
            push_verified(package, patience=3.0)
    assert 2 <= caplog.text.count("again in") <= 8


ODD = {
    "whoami": [b"[]", b"{}", b'"x"', b"[" * 100_000, b"\xff"],
    "refs": [b"{}", b'{"branches": 1, "tags": [], "converts": []}', b"null"],
    "model_info": [b"[]", b'{"id": "a/b", "sha": "../../x"}', b'{"id": "a/b"}', b"12"],
    "preupload": [b"{}", b"[]"],
    "commit": [b"{}", b'{"commitOid": "../../x", "commitUrl": "u", "success": true}', b"[" * 100_000],
}


@pytest.mark.parametrize("route", ODD)
def test_odd_answers_of_a_hub_are_errors_of_ours(server, package, route):
    for body in ODD[route]:
        set_up(server, NEW_BRANCH)
        server.faults.append(Fault(route=route, body=body))
        with pytest.raises(GPT2ValueHubError) as refused:
            push_verified(package, patience=0.05, **NEW_BRANCH.options)
        assert refused.value.next_step


def test_concurrent_pushers_lose_nothing(server, package, tmp_path):
    """4 pushers of 6 checkpoints each to one branch, while every 13th request fails in one way or another."""
    server.create(REPO)
    ways = itertools.cycle(settings for name, settings in FAULTS.items() if name not in ("401", "403"))
    server.faults += [Fault(nth=13 * number, **next(ways)) for number in range(1, 60)]
    pushed = []  # in CPython, threads can append to it

    def pusher(number):
        own, dice = tmp_path / f"pusher-{number}", random.Random(number)
        shutil.copytree(package, own)
        weights = (own / "model.safetensors").read_bytes()
        for step in range(6):
            content = weights[:-8] + bytes([number, step]) * 4
            (own / "model.safetensors").write_bytes(content)
            report = None
            while report is None:
                try:
                    report = push_package(own, REPO, commit_message=f"{number}/{step}")
                except ConcurrentPushError:
                    time.sleep(dice.random() * 10)
            pushed.append((report.commit, (f"{number}/{step}", content)))

    threads = [threading.Thread(target=pusher, args=(number,)) for number in range(4)]
    with mock.patch("hub_tools.publish.push.verify_package"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    history = {c.oid: (c.title, c.files["model.safetensors"]) for c in server.history(REPO)[:-1]}
    assert len(dict(pushed)) == 24
    assert dict(pushed).items() <= history.items()
    assert set(history.values()) == set(dict(pushed).values())
    assert set(server.files(REPO)) == {path.name for path in package.iterdir()} | {".gitattributes"}
