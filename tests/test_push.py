"""What you push is what they load: one verified commit, of what changed, with nothing in it that should not be."""

import json
import os
import subprocess
import sys

import pytest
from conftest import make_tiny_model
from support.hub_server import User
from support.pushing import REPO, push_verified, verified_before

from hub_tools.errors import (
    AuthenticationError,
    ChangedFileError,
    OptionsError,
)
from hub_tools.hub import retry
from hub_tools.package.save import save_package
from hub_tools.publish.push import push_package, push_to_hub

STALE = {
    "model-00001-of-00002.safetensors": b"old",
    "model-00002-of-00002.safetensors": b"old",
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"old",
    "tf_model.h5": b"old",
}
MINE = {"notes.txt": b"mine", "images/curve.png": b"png", "training_args.bin": b"args", "LICENSE": b"MIT"}


@pytest.fixture
def package(tmp_path, tiny_model):
    save_package(tiny_model, tmp_path / "package", repo_id=REPO)
    return tmp_path / "package"


def test_what_you_push_is_what_they_load(server, tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    """In a fresh process with an empty cache, over HTTP; and pushing the same again moves no weights."""
    import torch

    report = push_to_hub(tiny_model, "value", tiny_tokenizer, license="mit", tag="v1")
    assert [commit.title for commit in server.history(REPO)] == ["Push a value-head package", "initial commit"]
    assert server.history(REPO)[0].oid == report.commit == server.repos[REPO].refs["refs/tags/v1"]
    assert report.committed
    assert report.repo_id == REPO
    assert server.uploaded()["lfs_upload"] == report.added["model.safetensors"]

    script = (
        f"{report.load_lines}\nimport json, torch\n"
        "assert tokenizer('a').input_ids\n"
        "print(json.dumps(model(input_ids=torch.tensor([[1, 2, 3]])).value.tolist()))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = tiny_model(input_ids=torch.tensor([[1, 2, 3]])).value
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected, atol=1e-6, rtol=0)

    server.requests.clear()
    monkeypatch.setattr("hub_tools.publish.push.verify_package", verified_before)
    again = push_to_hub(tiny_model, REPO, tiny_tokenizer, license="mit")
    assert (again.committed, again.commit) == (False, report.commit)
    assert server.uploaded()["lfs_upload"] == server.uploaded()["commit"] == 0
    assert len(server.history(REPO)) == 2


def test_a_package_that_does_not_verify_is_not_pushed(server, package):
    config = json.loads((package / "generation_config.json").read_text())
    (package / "generation_config.json").write_text(json.dumps({**config, "temperature": 0.5}))
    with pytest.raises(ChangedFileError):
        push_package(package, REPO)
    assert REPO not in server.repos


def test_only_what_changed_is_uploaded(server, package):
    push_verified(package)
    server.requests.clear()
    save_package(make_tiny_model(seed=1), package, repo_id=REPO)
    report = push_verified(package)
    assert set(report.changed) == {"model.safetensors", "verification.json"}
    assert not report.added
    assert not report.deleted
    assert server.uploaded()["lfs_upload"] == report.changed["model.safetensors"]
    server.requests.clear()
    save_package(make_tiny_model(seed=0), package, repo_id=REPO)
    push_verified(package)
    assert server.uploaded()["lfs_upload"] == 0, "the Hub still has the first weights"


def test_stale_weights_go_in_the_same_commit_and_everything_else_stays(server, package):
    server.create(REPO, {**STALE, **MINE, "tokenizer.json": b"{}"})
    report = push_verified(package)
    assert set(report.deleted) == set(STALE)
    assert set(report.kept) == {*MINE, "tokenizer.json", ".gitattributes"}
    assert len(server.history(REPO)) == 3
    files = server.files(REPO)
    assert {name: files[name] for name in MINE} == MINE
    assert set(files) == {*MINE, "tokenizer.json", ".gitattributes", *os.listdir(package)}


def test_a_new_tokenizer_replaces_the_old_one_whole(server, tmp_path, tiny_model, tiny_tokenizer):
    save_package(tiny_model, tmp_path / "package", tiny_tokenizer)
    server.create(REPO, {"vocab.json": b"{}", "merges.txt": b""})
    assert set(push_verified(tmp_path / "package").deleted) == {"vocab.json", "merges.txt"}


def test_a_gitignore_in_the_repository_does_not_thin_out_the_package(server, package):
    server.create(REPO, {".gitignore": b"*.safetensors\n*.py\n"})
    push_verified(package)
    assert set(os.listdir(package)) <= set(server.files(REPO))


def test_a_dry_run_says_everything_and_does_nothing(server, package):
    fresh = push_verified(package, dry_run=True)
    assert REPO not in server.repos
    assert fresh.new_repository
    assert set(fresh.added) == set(os.listdir(package))
    server.create(REPO, {**STALE, **MINE, "config.json": b"{}"})
    before = server.history(REPO)
    report = push_verified(package, branch="dev", dry_run=True)
    assert server.repos[REPO].refs == {"refs/heads/main": before[0].oid}
    assert not {"preupload", "lfs_batch", "lfs_upload", "commit"} & set(server.routes())
    assert (report.new_branch, report.commit, report.committed, report.load_lines) == (True, None, False, None)
    sizes = {path.name: path.stat().st_size for path in package.iterdir()}
    assert report.changed == {"config.json": sizes.pop("config.json")}
    assert report.added == sizes
    text = str(report)
    for name, size in {**sizes, **{name: len(data) for name, data in STALE.items()}}.items():
        assert f"{name}  {size:,} bytes" in text


def test_a_branch_is_created_where_it_is_missing(server, package):
    server.create(REPO, MINE)
    report = push_verified(package, branch="experiments/7")
    assert report.new_branch
    assert server.history(REPO, "experiments/7")[0].oid == report.commit
    assert server.history(REPO, "experiments/7")[0].parent == server.history(REPO)[0].oid
    assert set(server.files(REPO)) == {*MINE, ".gitattributes"}


def test_a_pull_request_leaves_the_branch_alone(server, package):
    server.create(REPO)
    server.tokens["hf_bob"] = User("bob")
    report = push_verified(package, create_pr=True, token="hf_bob")
    assert len(server.history(REPO)) == 1
    assert report.pr_url == f"{server.url}/{REPO}/discussions/1"
    assert server.history(REPO, "refs/pr/1")[0].oid == report.commit


def test_a_tag_is_set_once(server, package):
    first = push_verified(package, tag="v1")
    assert server.repos[REPO].refs["refs/tags/v1"] == first.commit
    assert push_verified(package, tag="v1").commit == first.commit
    assert push_verified(package, tag="v2").commit == first.commit, "nothing changed; the tag is new"
    save_package(make_tiny_model(seed=1), package, repo_id=REPO)
    with pytest.raises(OptionsError):
        push_verified(package, tag="v1")
    assert server.history(REPO)[0].oid == first.commit, "found out before the commit"


def test_a_tag_that_is_in_its_place_is_not_sent_again_and_the_summary_names_it(server, package):
    assert "tag    v1" in str(push_verified(package, tag="v1"))
    server.requests.clear()
    again = push_verified(package, tag="v1")
    assert "create_tag" not in server.routes()
    assert "tag    v1 (in its place already)" in str(again)
    only_the_tag = str(push_verified(package, tag="v2"))
    assert "unchanged; the tag was set" in only_the_tag
    assert "tag    v2" in only_the_tag


def test_what_the_hub_can_refuse_cheaply_is_asked_before_the_verification(server, package, monkeypatch):
    def verify(*_, **__):
        raise AssertionError("verified first")

    monkeypatch.setattr("hub_tools.publish.push.verify_package", verify)
    repo = server.create(REPO, MINE)
    first = server.history(REPO)[-1].oid
    repo.refs["refs/tags/v1"] = first
    server.tokens["hf_bob"] = User("bob")
    for options, error in (
        ({"tag": "v1"}, OptionsError),
        ({"revision": "v1"}, OptionsError),
        ({"private": True}, OptionsError),
        ({"token": "hf_bob"}, AuthenticationError),
    ):
        with pytest.raises(error):
            push_package(package, REPO, **options)
    assert "commit" not in server.routes()


@pytest.mark.parametrize(
    ("route", "state"),
    [
        ("model_info", "nothing was changed"),
        ("preupload", "nothing was committed"),
        ("commit", "may be there"),
        ("create_tag", "tag may be missing"),
    ],
)
def test_an_interrupt_says_in_which_state_the_repository_is(server, package, caplog, monkeypatch, route, state):
    server.create(REPO)
    call = retry._in_thread

    def interrupted(what, request, limit):
        answer = call(what, request, limit)
        if route in server.routes():
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(retry, "_in_thread", interrupted)
    with pytest.raises(KeyboardInterrupt):
        push_verified(package, tag="v1")
    assert state in caplog.text


def test_visibility_is_as_asked_or_the_push_is_refused(server, package):
    push_verified(package, private=True)
    assert server.repos[REPO].private
    assert push_verified(package, private=True).committed is False
    with pytest.raises(OptionsError, match="private already"):
        push_verified(package, private=False)
    server.repos[REPO].private = False
    with pytest.raises(OptionsError, match="public already"):
        push_verified(package, private=True)


@pytest.mark.parametrize(
    "options",
    [{"create_pr": True, "revision": "dev"}, {"create_pr": True, "tag": "v1"}],
    ids=lambda options: str(options),
)
def test_options_that_contradict_each_other_are_refused_before_anything_is_asked(server, package, options):
    with pytest.raises(OptionsError):
        push_package(package, REPO, **options)
    with pytest.raises(OptionsError):
        push_to_hub(make_tiny_model(), REPO, **options)
    assert not server.requests


@pytest.mark.parametrize("revision", ["v1", "0" * 40])
def test_tags_and_commits_are_no_place_to_push_to(server, package, revision):
    repo = server.create(REPO)
    repo.refs["refs/tags/v1"] = repo.refs["refs/heads/main"]
    with pytest.raises(OptionsError, match=r"is a (tag|commit)"):
        push_verified(package, branch=revision)
