"""What a push refuses: tokens, files that do not belong, and secrets, of which nothing shows anywhere."""

import logging
import traceback

import huggingface_hub
import pytest
from slow.fault_sweep import FAULTS, SCENARIOS, hurried, requests_of, run_push, set_up
from support.hub_server import Fault, User
from support.pushing import REPO, push_verified

from hub_tools.errors import (
    AuthenticationError,
    GPT2ValueHubError,
    PackageError,
    SecretFoundError,
)
from hub_tools.package.save import save_package
from hub_tools.publish.push import push_package


@pytest.fixture
def package(tmp_path, tiny_model):
    save_package(tiny_model, tmp_path / "package", repo_id=REPO)
    return tmp_path / "package"


def test_a_wrong_token_is_corrected_where_it_was_set(server, package, monkeypatch):
    with pytest.raises(AuthenticationError) as passed:
        push_package(package, REPO, token="hf_wrong")
    assert "token=" in passed.value.next_step
    assert "hf auth login" not in passed.value.next_step, "an argument overrides the login"
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(AuthenticationError) as in_environment:
        push_package(package, REPO)
    assert "HF_TOKEN" in in_environment.value.next_step
    assert "unset it" in in_environment.value.next_step


def test_a_repository_that_may_not_be_created_may_exist_and_be_private(server, package):
    server.create("alice/secret", private=True)
    server.tokens["hf_bob"] = User("bob")
    with pytest.raises(AuthenticationError) as refused:
        push_verified(package, "alice/secret", token="hf_bob")
    assert "private" in refused.value.next_step
    assert "create_pr" not in refused.value.next_step


@pytest.mark.parametrize(
    ("token", "repo_id", "error"),
    [
        ("hf_wrong", REPO, AuthenticationError),
        ("hf_reader", REPO, AuthenticationError),
        ("hf_bob", REPO, AuthenticationError),
        ("hf_bob", "alice/another", AuthenticationError),
        ("hf_two words", REPO, AuthenticationError),
        ("hf_\u00fc", REPO, AuthenticationError),
    ],
)
def test_token_and_repo_are_checked_before_a_byte_is_uploaded(server, package, token, repo_id, error):
    server.create(REPO)
    server.tokens |= {"hf_reader": User("alice", role="read"), "hf_bob": User("bob")}
    with pytest.raises(error) as refused:
        push_verified(package, repo_id, token=token)
    assert refused.value.next_step
    assert "lfs_upload" not in server.routes()
    assert len(server.history(REPO)) == 1


def test_without_a_token_nothing_is_asked(server, package, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(package / "nowhere"))
    with pytest.raises(AuthenticationError, match="no token"):
        push_package(package, REPO)
    assert not server.requests


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        ".netrc",
        "id_rsa",
        "server.pem",
        "token",
        "credentials.json",
        ".notes.md",
        "wandb",
        "train.py",
        "run.log",
    ],
)
def test_files_that_do_not_belong_are_refused_by_name(server, package, name):
    (package / name).write_text("x")
    with pytest.raises(PackageError, match=name):
        push_package(package, REPO)
    assert set(server.routes()) <= {"whoami", "unknown"}


@pytest.mark.parametrize("name", ["optimizer.pt", "replay.pkl", "pytorch_model.bin"])
def test_pickles_are_refused_by_name(server, package, name):
    (package / name).write_bytes(b"")
    with pytest.raises(PackageError, match=name):
        push_package(package, REPO)


def test_links_out_of_the_package_are_refused(server, package, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (package / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(PackageError, match="LICENSE"):
        push_package(package, REPO)


@pytest.mark.parametrize("secret", ["hf_" + "x" * 34, "the token in use"])
def test_a_token_in_a_text_is_not_published(server, package, secret):
    secret = secret.replace("the token in use", server.token)
    (package / "notes.md").write_text(f"export HF_TOKEN={secret}")
    with pytest.raises(SecretFoundError, match=r"notes\.md") as refused:
        push_package(package, REPO)
    assert secret not in str(refused.value)
    (package / "notes.md").unlink()
    with pytest.raises(SecretFoundError, match="commit message"):
        push_package(package, REPO, commit_message=f"with {secret}")


def everything_in(error):
    """All that a log of this exception could show: its text, its traceback, and those of what it came from."""
    texts = ["".join(traceback.format_exception(error))]
    while error is not None:
        texts += [str(error), repr(error), repr(vars(error))]
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def test_the_token_appears_nowhere(server, package, caplog, capfd):
    """Not in logs, errors, reports, or the repository; also where the Hub itself repeats it in its answers."""
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.INFO, "httpcore2")  # below INFO it logs the Hub's answers as they come, byte for byte
    seen, scenario = [], SCENARIOS[0]
    with hurried():
        for number, _ in enumerate(requests_of(server, package, scenario), start=1):
            for settings in FAULTS.values():
                set_up(server, scenario)
                server.faults.append(Fault(nth=number, message=f"bad token {server.token}", **settings))
                try:
                    seen.append(repr(run_push(package, scenario)))
                except GPT2ValueHubError as error:
                    seen.append(everything_in(error))
    assert any("[token]" in text for text in seen), "the Hub's answers reached us"
    for commit in server.repos[REPO].commits.values():
        seen += [commit.title, commit.description, *(f.content.decode("latin-1") for f in commit.files.values())]
    seen += [caplog.text, *capfd.readouterr()]
    assert not [text for text in seen if server.token in text]
    assert all(request.token in (server.token, None) for request in server.requests)
