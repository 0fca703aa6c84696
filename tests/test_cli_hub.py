"""The command and repositories on the Hub: what is not there, or not for this token, is named, with useful advice."""

import pytest
from support.hub_server import Fault

from hub_tools import layout

REPO = "alice/value"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"


@pytest.fixture(params=["inspect {}", "respond {} Hello", "create --no-tokenizer OUT --base {}", "audit {}"])
def read(request, gpt2_value, tmp_path):
    """Run each command that reads a repository; returns (exit status, stdout, stderr)."""
    command = request.param.replace("OUT", str(tmp_path / "out"))
    return lambda repo, *options: gpt2_value(*command.format(repo).split(), *options)


@pytest.fixture
def files(package, server):
    """A package's files, which are pushed."""
    files = {path.name: path.read_bytes() for path in package.iterdir()}
    server.create(REPO, files)
    return files


def test_what_lies_in_a_repository_in_the_place_of_a_package_is_named(read, server, files, tmp_path):
    server.create("alice/empty", {})
    server.create("alice/pickled", {layout.CONFIG: files[layout.CONFIG], "pytorch_model.bin": b"a pickle"})
    server.create("alice/pointer", {**files, layout.WEIGHTS: POINTER})
    for repo, says in (
        ("alice/empty", "alice/empty holds no package: it has .gitattributes"),
        ("alice/pickled", "pytorch_model.bin"),
        ("alice/pointer", "git-lfs pointer"),
    ):
        status, out, err = read(repo)
        assert (status, out) == (1, "")
        assert says in err
        assert "allow_patterns" not in err, "a line of huggingface_hub's about our patterns"
    assert not (tmp_path / "out").exists()


def test_a_revision_and_a_token_that_are_wrong_are_named(read, files, monkeypatch):
    status, out, err = read(REPO, "--revision", "nope")
    assert (status, out) == (1, "")
    assert "alice/value at revision nope" in err
    assert "check the name, the revision" in err
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    status, out, err = read(REPO)
    assert (status, out) == (1, "")
    assert "set HF_TOKEN, which overrides the login" in err
    assert "hf_wrong" not in err


def test_a_repository_that_may_be_private_asks_for_a_token_where_it_is_set(server, gpt2_value):
    """HF_TOKEN is set here, so that a login would change nothing."""
    status, _, err = gpt2_value("inspect", "alice/nothing")
    assert status == 1
    assert "could not find alice/nothing" in err
    assert "if it is private" in err
    assert "HF_TOKEN, which overrides the login" in err
    assert "Please make sure" not in err, "a paragraph of huggingface_hub's for every 404"


def test_a_token_that_may_not_read_is_not_told_to_propose_a_change(server, files, gpt2_value):
    server.faults = [Fault(route="model_info", status=403)]
    status, _, err = gpt2_value("inspect", REPO)
    assert status == 1
    assert "ask its owner for access" in err
    assert "create-pr" not in err


@pytest.mark.parametrize("command", ["inspect", "push"])
def test_a_hub_that_stays_silent_is_not_waited_for_for_ever(command, server, files, gpt2_value, package, monkeypatch):
    for name, seconds in {"PATIENCE": 0.5, "ANSWER_WITHIN": 0.5}.items():
        monkeypatch.setattr(f"hub_tools.hub.ask.{name}", seconds)
    server.faults = [Fault(route=route, delay=8.0) for route in ("model_info", "whoami")]
    status, out, err = gpt2_value(command, *([package] if command == "push" else []), REPO)
    assert (status, out) == (1, "")
    assert "no answer for" in err
