"""What you push is what they load: one verified commit, of what changed, with nothing in it that should not be."""

import json
import logging
import os
import subprocess
import sys
import traceback

import huggingface_hub
import pytest
from conftest import make_tiny_model
from slow.fault_sweep import FAULTS, SCENARIOS, hurried, requests_of, run_push, serving, set_up
from support.hub_server import Fault, User

from hub_tools.errors import (
    AuthenticationError,
    CardMetadataError,
    ChangedFileError,
    ForeignFileError,
    GPT2ValueHubError,
    NoAccessError,
    PickleError,
    PushOptionsError,
    SecretFoundError,
    TagExistsError,
    UnsafeFileError,
)
from hub_tools.hub import retry
from hub_tools.hub.repository import Hub
from hub_tools.package.save import save_package
from hub_tools.publish.push import Package, PushOptions, push, push_package, push_to_hub

REPO = "alice/value"
STALE = {
    "model-00001-of-00002.safetensors": b"old",
    "model-00002-of-00002.safetensors": b"old",
    "model.safetensors.index.json": b"{}",
    "pytorch_model.bin": b"old",
    "tf_model.h5": b"old",
}
MINE = {"notes.txt": b"mine", "images/curve.png": b"png", "training_args.bin": b"args", "LICENSE": b"MIT"}


@pytest.fixture
def server():
    with serving(xet=False) as server:
        yield server


@pytest.fixture
def package(tmp_path, tiny_model):
    save_package(tiny_model, tmp_path / "package", repo_id=REPO)
    return tmp_path / "package"


def push_verified(folder, repo_id=REPO, *, token=None, **options):
    """`push_package` for a package that needs no further proof (verifying takes an interpreter's start)."""
    hub = Hub(repo_id, token=token)
    hub.check_token()
    package = Package.read(folder)
    package.refuse_secrets(hub, "push")
    return push(package, hub, PushOptions(**{"message": "push", **options}))


def verified_before(folder, *, trust_remote_code=False):
    """In place of `verify_package` where a test has seen it already: it takes an interpreter's start."""


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


def test_a_card_on_the_hub_keeps_its_words_and_gets_our_metadata(server, package):
    metadata = "---\nlicense: apache-2.0\nlanguage: de\ntags:\n- mine\npipeline_tag: fill-mask\n---\n"
    words = "# Mine\r\n\u00fcber alles\r\n"
    server.create(REPO, {"README.md": (metadata + words).encode()})
    push_verified(package)
    card = server.files(REPO)["README.md"]
    assert card.endswith(("---\n" + words).encode())
    data = huggingface_hub.ModelCard(card.decode(), ignore_metadata_errors=True).data.to_dict()
    assert (data["license"], data["language"], data["pipeline_tag"]) == ("apache-2.0", "de", "text-generation")
    assert data["tags"][0] == "mine"
    assert "value-head" in data["tags"]
    assert not push_verified(package).committed, "merging again changes nothing"
    assert server.files(REPO)["README.md"] == card


def test_a_card_that_was_written_for_a_folder_gets_the_repositorys_address(server, tiny_model, tmp_path):
    folder = tmp_path / "local"
    save_package(tiny_model, folder)
    assert 'from_pretrained(".", ' in (folder / "README.md").read_text()
    push_verified(folder)
    card = server.files(REPO)["README.md"].decode()
    assert f'AutoModel.from_pretrained("{REPO}", trust_remote_code=True)' in card
    assert 'from_pretrained(".", ' not in card
    assert "In the folder of this package" not in card
    assert not push_verified(folder).committed


@pytest.mark.parametrize("theirs", [b"---\nlicense: mit\n---\n", b"---\r\nlicense: mit\r\n---", b"", b"# Only words\n"])
def test_a_card_without_metadata_or_without_text_is_completed(server, package, theirs):
    server.create(REPO, {"README.md": theirs})
    push_verified(package)
    card = server.files(REPO)["README.md"]
    assert b"library_name: transformers" in card
    assert (b"license: mit" in card) == (b"license" in theirs)
    assert b"# Only words" in card or b"AutoModel.from_pretrained" in card
    assert not push_verified(package).committed


def test_a_card_that_cannot_be_read_is_not_overwritten(server, package):
    server.create(REPO, {"README.md": b"---\ntags: [unclosed\n---\nwords"})
    with pytest.raises(CardMetadataError, match=r"README.md in the repository"):
        push_verified(package)
    assert server.files(REPO)["README.md"].endswith(b"words")


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
    with pytest.raises(TagExistsError):
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
        ({"tag": "v1"}, TagExistsError),
        ({"revision": "v1"}, PushOptionsError),
        ({"private": True}, PushOptionsError),
        ({"token": "hf_bob"}, NoAccessError),
    ):
        with pytest.raises(error):
            push_package(package, REPO, **options)
    assert "commit" not in server.routes()


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
    with pytest.raises(NoAccessError) as refused:
        push_verified(package, "alice/secret", token="hf_bob")
    assert "private" in refused.value.next_step
    assert "create_pr" not in refused.value.next_step


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
    with pytest.raises(PushOptionsError, match="private already"):
        push_verified(package, private=False)
    server.repos[REPO].private = False
    with pytest.raises(PushOptionsError, match="public already"):
        push_verified(package, private=True)


@pytest.mark.parametrize(
    "options",
    [{"create_pr": True, "revision": "dev"}, {"create_pr": True, "tag": "v1"}],
    ids=lambda options: str(options),
)
def test_options_that_contradict_each_other_are_refused_before_anything_is_asked(server, package, options):
    with pytest.raises(PushOptionsError):
        push_package(package, REPO, **options)
    with pytest.raises(PushOptionsError):
        push_to_hub(make_tiny_model(), REPO, **options)
    assert not server.requests


@pytest.mark.parametrize("revision", ["v1", "0" * 40])
def test_tags_and_commits_are_no_place_to_push_to(server, package, revision):
    repo = server.create(REPO)
    repo.refs["refs/tags/v1"] = repo.refs["refs/heads/main"]
    with pytest.raises(PushOptionsError, match=r"is a (tag|commit)"):
        push_verified(package, branch=revision)


@pytest.mark.parametrize(
    ("token", "repo_id", "error"),
    [
        ("hf_wrong", REPO, AuthenticationError),
        ("hf_reader", REPO, NoAccessError),
        ("hf_bob", REPO, NoAccessError),
        ("hf_bob", "alice/another", NoAccessError),
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
    with pytest.raises(ForeignFileError, match=name):
        push_package(package, REPO)
    assert set(server.routes()) <= {"whoami", "unknown"}


@pytest.mark.parametrize("name", ["optimizer.pt", "replay.pkl", "pytorch_model.bin"])
def test_pickles_are_refused_by_name(server, package, name):
    (package / name).write_bytes(b"")
    with pytest.raises(PickleError, match=name):
        push_package(package, REPO)


def test_links_out_of_the_package_are_refused(server, package, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (package / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(UnsafeFileError, match="LICENSE"):
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


def test_a_hub_without_xet_is_pushed_to_by_lfs(package, monkeypatch):
    """With hf_xet installed and on, as users have it."""
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    with serving(xet=True) as server:
        report = push_verified(package)
        assert server.history(REPO)[0].oid == report.commit
        assert server.uploaded()["lfs_upload"] == report.added["model.safetensors"]
        assert server.routes().count("commit") == 1


def test_the_command_pushes_and_prints_the_lines_that_load(server, package, capsys, monkeypatch):
    from hub_tools import cli

    monkeypatch.setattr("hub_tools.publish.push.verify_package", verified_before)

    def run(*options):
        with pytest.raises(SystemExit) as ended:
            cli.main(["push", str(package), REPO, *options])
        return ended.value.code, capsys.readouterr()

    code, printed = run("--dry-run")
    assert code == 0
    assert "would push" in printed.out
    assert REPO not in server.repos
    code, printed = run("--private", "--tag", "v1", "--message", "by hand")
    commit = server.history(REPO)[0]
    assert (code, commit.title, server.repos[REPO].refs["refs/tags/v1"]) == (0, "by hand", commit.oid)
    assert f'AutoModel.from_pretrained("{REPO}", revision="{commit.oid}", trust_remote_code=True)' in printed.out
    code, printed = run("--public")
    assert code == 1
    assert "private already" in printed.err
