"""The command and repositories on the Hub: what is not there, or not for this token, is named, with useful advice."""

import pytest
from slow.fault_sweep import serving
from support.hub_server import Fault, User

from hub_tools import layout

REPO = "alice/value"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
READING = {
    "inspect": lambda repo, out: ("inspect", repo),
    "respond": lambda repo, out: ("respond", repo, "Hello"),
    "create": lambda repo, out: ("create", "--base", repo, out, "--no-tokenizer"),
    "audit": lambda repo, out: ("audit", repo),
}


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(xet=False) as server:
        yield server


def files_of(package):
    return {path.name: path.read_bytes() for path in package.iterdir()}


@pytest.mark.parametrize("command", READING)
def test_what_lies_in_a_repository_in_the_place_of_a_package_is_named(command, server, gpt2_value, package, tmp_path):
    files = files_of(package)
    server.create("alice/empty", {})
    server.create("alice/pickled", {layout.CONFIG: files[layout.CONFIG], "pytorch_model.bin": b"a pickle"})
    server.create("alice/pointer", {**files, layout.WEIGHTS: POINTER})
    for repo, says in (
        ("alice/empty", "alice/empty holds no package: it has no files"),
        ("alice/pickled", "weights only as pickles (pytorch_model.bin)"),
        ("alice/pointer", "model.safetensors of alice/pointer is not the file but a pointer of git-lfs"),
    ):
        status, out, err = gpt2_value(*READING[command](repo, tmp_path / "out"))
        assert (status, out) == (1, "")
        assert says in err or (command, repo) == ("create", "alice/pickled")  # which reads pickles, and these are none
        assert "allow_patterns" not in err, "a line of huggingface_hub's about our patterns"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", READING)
def test_a_revision_that_is_not_there_is_named(command, server, gpt2_value, package, tmp_path):
    server.create(REPO, files_of(package))
    status, out, err = gpt2_value(*READING[command](REPO, tmp_path / "out"), "--revision", "nope")
    assert (status, out) == (1, "")
    assert "alice/value at revision nope" in err
    assert "check the revision" in err
    assert "log in" not in err, "no token would help"


@pytest.mark.parametrize("command", READING)
def test_a_wrong_token_in_the_environment_is_corrected_there(
    command, server, gpt2_value, package, monkeypatch, tmp_path
):
    server.create(REPO, files_of(package))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    status, out, err = gpt2_value(*READING[command](REPO, tmp_path / "out"))
    assert (status, out) == (1, "")
    assert "set HF_TOKEN, which overrides the login" in err
    assert "hf_wrong" not in err


def test_a_repository_that_may_be_private_asks_for_a_token_where_it_is_set(server, gpt2_value):
    """HF_TOKEN is set here, so that a login would change nothing."""
    status, _, err = gpt2_value("inspect", "alice/nothing")
    assert status == 1
    assert "could not find alice/nothing" in err
    assert "if it is private, set HF_TOKEN" in err
    assert "Please make sure" not in err, "a paragraph of huggingface_hub's for every 404"


def test_a_token_that_may_not_read_is_not_told_to_propose_a_change(server, gpt2_value, package):
    server.create(REPO, files_of(package))
    server.faults = [Fault(route="model_info", status=403)]
    status, _, err = gpt2_value("inspect", REPO)
    assert status == 1
    assert "ask its owner for access" in err
    assert "create-pr" not in err


def test_a_repository_that_may_not_be_created_may_be_private(server, gpt2_value, package, monkeypatch):
    server.create("alice/secret", private=True)
    server.tokens["hf_bob"] = User("bob")
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    status, out, err = gpt2_value("push", package, "alice/secret")
    assert (status, out) == (1, "")
    assert "403" in err
    assert "it is private" in err
    assert "create-pr" not in err


@pytest.mark.parametrize("command", ["inspect", "respond"])
def test_a_hub_that_stays_silent_is_not_waited_for_for_ever(
    command, server, gpt2_value, package, caplog, monkeypatch, tmp_path
):
    monkeypatch.setattr("hub_tools.hub.ask.PATIENCE", 0.5)
    monkeypatch.setattr("hub_tools.hub.ask.ANSWER_WITHIN", 0.5)
    monkeypatch.setattr("hub_tools.hub.ask.FIRST_NOTE", 0.1)
    server.create(REPO, files_of(package))
    server.faults = [Fault(route="model_info", delay=8.0)]
    status, out, err = gpt2_value(*READING[command](REPO, tmp_path / "out"))
    assert (status, out) == (1, "")
    assert "no answer for" in err
    assert "waiting for the Hub to find alice/value" in caplog.text


def test_a_hub_that_stays_silent_is_not_pushed_to(server, gpt2_value, package, caplog, monkeypatch):
    monkeypatch.setattr("hub_tools.hub.ask.PATIENCE", 0.5)
    monkeypatch.setattr("hub_tools.hub.ask.ANSWER_WITHIN", 0.5)
    monkeypatch.setattr("hub_tools.hub.ask.FIRST_NOTE", 0.1)
    server.create(REPO, files_of(package))
    server.faults = [Fault(route="whoami", delay=5.0)]
    status, out, err = gpt2_value("push", package, REPO)
    assert (status, out) == (1, "")
    assert "no answer for" in err
    assert "waiting for the Hub to check the token" in caplog.text
