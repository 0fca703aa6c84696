"""What you push is what they load: one verified commit, of what changed, with nothing in it that should not be."""

import json
import logging
import os
import shutil
import struct
import subprocess
import sys
import traceback

import huggingface_hub
import pytest
from conftest import make_tiny_model
from slow.fault_sweep import FAULTS, REPO, SCENARIOS, hurried, push_verified, requests_of, serving, set_up
from support.hub_server import Fault

from hub_tools.errors import (
    AuthenticationError,
    ChangedFileError,
    GPT2ValueHubError,
    OptionsError,
    PackageError,
    SecretFoundError,
)
from hub_tools.package.save import save_package
from hub_tools.publish import push as push_module
from hub_tools.publish.push import push_package, push_to_hub


def test_what_you_push_is_what_they_load(server, tmp_path, tiny_model, tiny_tokenizer, monkeypatch):
    """In a fresh process with an empty cache, over HTTP; and pushing the same again moves no weights."""
    import torch

    report = push_to_hub(tiny_model, "value", tiny_tokenizer, license="mit", tag="v1")
    assert [commit.title for commit in server.history(REPO)] == ["Push a value-head package", "initial commit"]
    assert server.history(REPO)[0].oid == report.commit == server.repos[REPO].refs["refs/tags/v1"]
    assert (report.repo_id, report.committed) == (REPO, True)
    assert server.uploaded() == report.added["model.safetensors"]

    script = (
        f"{report.load_lines}\nimport json, torch\n"
        "assert tokenizer('a').input_ids\nprint(json.dumps(model(input_ids=torch.tensor([[1, 2, 3]])).value.tolist()))"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = tiny_model(input_ids=torch.tensor([[1, 2, 3]])).value
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected, atol=1e-6, rtol=0)

    server.requests.clear()
    monkeypatch.setattr(push_module, "verify_package", lambda *_, **__: None)
    again = push_to_hub(tiny_model, REPO, tiny_tokenizer, license="mit")
    assert (again.committed, again.commit) == (False, report.commit)
    assert server.uploaded() == server.uploaded("commit") == 0


def test_a_package_that_does_not_verify_is_not_pushed(server, package):
    config = json.loads((package / "generation_config.json").read_text())
    (package / "generation_config.json").write_text(json.dumps({**config, "temperature": 0.5}))
    with pytest.raises(ChangedFileError):
        push_package(package, REPO)
    assert REPO not in server.repos


def test_only_what_changed_is_uploaded(server, package):
    server.create(REPO, {".gitignore": b"*.safetensors\n*.py\n"})  # which does not thin out the package
    push_verified(package)
    assert set(os.listdir(package)) <= set(server.files(REPO))
    server.requests.clear()
    first = shutil.copytree(package, package.with_name("first"))
    save_package(make_tiny_model(seed=1), package)
    report = push_verified(package)
    assert set(report.changed) == {"model.safetensors", "verification.json"}
    assert not report.added | report.deleted
    assert server.uploaded() == report.changed["model.safetensors"]
    push_verified(first)
    assert server.uploaded() == report.changed["model.safetensors"], "the Hub still has the first weights"


def test_a_dry_run_says_everything_and_does_nothing(server, package):
    assert push_verified(package, dry_run=True).new
    assert REPO not in server.repos
    server.create(REPO, {"config.json": b"{}", "tf_model.h5": b"old", "notes.txt": b"mine"})
    before = server.repos[REPO].refs.copy()
    report = push_verified(package, revision="dev", dry_run=True)
    assert server.repos[REPO].refs == before
    assert not server.uploaded()
    assert (report.new, report.commit, report.committed, report.load_lines) == (True, None, False, None)
    assert (set(report.changed), report.deleted) == ({"config.json"}, {"tf_model.h5": 3})
    assert {*report.added, *report.changed} == set(os.listdir(package))
    for name, size in {**report.added, **report.changed, **report.deleted}.items():
        assert f"{name}  {size:,} bytes" in str(report)


def test_another_branch_or_a_pull_request_leaves_main_alone(server, package):
    main = server.create(REPO, {"notes.txt": b"mine"}).refs["refs/heads/main"]
    server.tokens["hf_bob"] = "bob"
    branch = push_verified(package, revision="experiments/7")
    proposed = push_verified(package, create_pr=True, token="hf_bob")
    assert proposed.pr_url == f"{server.url}/{REPO}/discussions/1"
    for name, report in (("experiments/7", branch), ("refs/pr/1", proposed)):
        assert [commit.oid for commit in server.history(REPO, name)][:2] == [report.commit, main]
    assert server.history(REPO)[0].oid == main


def test_a_tag_is_set_once(server, package):
    first = push_verified(package, tag="v1")
    for tag in ("v1", "v2"):
        assert push_verified(package, tag=tag).commit == first.commit, "nothing has changed"
        assert server.repos[REPO].refs[f"refs/tags/{tag}"] == first.commit
    assert server.routes().count("create_tag") == 2


def test_what_the_hub_would_refuse_is_found_before_the_verification(server, package, monkeypatch):
    monkeypatch.setattr(push_module, "verify_package", lambda *_, **__: pytest.fail("verified first"))
    repo = server.create(REPO, {"notes.txt": b"mine"})
    repo.refs["refs/tags/v1"] = server.history(REPO)[-1].oid
    for options in ({"tag": "v1"}, {"revision": "v1"}, {"revision": "0" * 40}, {"private": True}):
        with pytest.raises(OptionsError):
            push_package(package, REPO, **options)
    server.requests.clear()
    for options in ({"create_pr": True, "revision": "dev"}, {"create_pr": True, "tag": "v1"}):
        with pytest.raises(OptionsError):
            push_to_hub(make_tiny_model(), REPO, **options)
    with pytest.raises(OptionsError):
        push_package(package, "alice/bad--name")
    assert not server.requests, "for options that can never be right"


# The card: its words are its owner's, the metadata ours


CARDS = {
    "words": b"---\nlicense: mit\nlanguage: de\ntags:\n- mine\npipeline_tag: fill-mask\n---\n# \xc3\xbcber\r\n",
    "metadata alone": b"---\nlicense: mit\n---\n",
    "no line at the end": b"---\r\nlicense: mit\r\n---",
    "nothing": b"",
    "words alone": b"# \xc3\xbcber\r\n",
}


@pytest.mark.parametrize("case", CARDS)
def test_a_card_on_the_hub_keeps_its_words_and_gets_our_metadata(server, package, case):
    theirs = CARDS[case]
    server.create(REPO, {"README.md": theirs})
    push_verified(package)
    card = server.files(REPO)["README.md"]
    data = huggingface_hub.ModelCard(card.decode(), ignore_metadata_errors=True).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert (data.license == "mit") == (b"mit" in theirs)
    assert "value-head" in data.tags
    if case == "words":
        assert (data.tags[0], data.language) == ("mine", "de")
    assert card.endswith(b"\n# \xc3\xbcber\r\n") if "words" in case else b"AutoModel.from_pretrained" in card
    assert not push_verified(package).committed, "merging again changes nothing"


def test_a_card_that_cannot_be_read_is_not_overwritten(server, package):
    server.create(REPO, {"README.md": b"---\ntags: [unclosed\n---\nwords"})
    with pytest.raises(OptionsError, match=r"README.md in the repository"):
        push_verified(package)
    assert server.files(REPO)["README.md"].endswith(b"words")


# What is refused


@pytest.mark.parametrize("token", [None, "hf_wrong", "hf_bob", "hf_two words", "hf_\u00fc"])
def test_a_token_that_may_not_write_uploads_nothing(server, package, token, monkeypatch):
    server.create(REPO)
    server.tokens["hf_bob"] = "bob"
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(package / "nowhere"))
    with pytest.raises(AuthenticationError) as refused:
        push_verified(package, token=token)
    assert str(token) not in str(refused.value)
    assert {"lfs_upload", "commit"}.isdisjoint(server.routes())


FOREIGN = [".env", ".notes.md", "id_rsa", "server.pem", "credentials.json", "train.py", "optimizer.pt"]


@pytest.mark.parametrize("name", [*FOREIGN, "pytorch_model.bin", "wandb"])
def test_files_that_do_not_belong_are_refused_by_name(server, package, name):
    (package / name).write_text("x")
    with pytest.raises(PackageError, match=name):
        push_package(package, REPO)
    assert "commit" not in server.routes()


@pytest.mark.parametrize("route", ["whoami", "preupload", "lfs_upload"])
def test_what_was_checked_is_what_is_pushed_whatever_happens_to_the_folder(server, package, tmp_path, route):
    """A file that is exchanged for a link to a private key while the push goes on."""
    server.create(REPO)
    (tmp_path / "id_rsa").write_text("private key")
    (package / "NOTICE.md").write_text("harmless")

    def exchange():
        (package / "NOTICE.md").unlink()
        (package / "NOTICE.md").symlink_to(tmp_path / "id_rsa")

    server.faults.append(Fault(route=route, meanwhile=exchange))
    if route == "whoami":  # before the package is copied
        with pytest.raises(PackageError, match="NOTICE"):
            push_verified(package)
    else:
        push_verified(package)
        assert server.files(REPO)["NOTICE.md"] == b"harmless"


OWN = "Own.Token-1"
SECRET = "hf_" + "Ab1" * 12
JSON_ESCAPED = SECRET.replace("h", "\\u0068", 1).replace("A", "\\u0041")
HIDDEN = {
    "plain": ("notes.md", SECRET.encode()),
    "after an underscore": ("notes.md", f"my_{SECRET}".encode()),
    "OAuth": ("notes.md", b"hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJzY29wZSI6WyJvcGVuaWQiXX0.x_-y"),
    "a job": ("notes.md", b"hf_jwt_eyJhbGciOiJFZERTQSJ9.eyJzY29wZSI6WyJvcGVuaWQiXX0.x_-y"),
    "an organisation's": ("notes.md", b"api_org_" + b"x" * 34),
    "UTF-16": ("notes.md", SECRET.encode("utf-16")),
    "UTF-16, big-endian": ("notes.md", SECRET.encode("utf-16-be")),
    "UTF-32": ("notes.md", SECRET.encode("utf-32")),
    "JSON": ("config.json", f'{{"note": "{JSON_ESCAPED}"}}'.encode()),
    "JSON in JSON": ("config.json", f'{{"note": "{JSON_ESCAPED}"}}'.replace("\\", "\\\\").encode()),
    "a name": (f"{SECRET}.md", b""),
    "the one in use": ("notes.md", OWN.encode()),
    "the one in use, in UTF-16": ("notes.md", OWN.encode("utf-16")),
    "the one in use, in JSON": ("notes.md", OWN.replace("O", "\\u004f").encode()),
}


@pytest.mark.parametrize("case", HIDDEN)
def test_a_token_is_not_published_in_any_form(server, package, case):
    """The token in use is none whatever it looks like."""
    server.tokens[OWN] = "alice"
    name, data = HIDDEN[case]
    (package / name).write_bytes(data)
    with pytest.raises(SecretFoundError) as refused:
        push_verified(package, token=OWN)
    assert SECRET not in str(refused.value)
    assert "commit" not in server.routes()


def test_a_token_is_not_published_in_metadata_messages_tags_and_branches(server, package):
    for options in ({"commit_message": f"with {SECRET}"}, {"tag": f"v_{SECRET}"}, {"revision": SECRET}):
        with pytest.raises(SecretFoundError, match=r"commit message|tag|branch"):
            push_verified(package, **options)
    header = json.dumps({"__metadata__": {"format": "pt", "note": SECRET}}).encode()
    (package / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(SecretFoundError, match=r"model\.safetensors"):
        push_verified(package)


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
    seen, scenario = [], SCENARIOS["new repository"]
    with hurried():
        for number, _ in enumerate(requests_of(server, package, scenario), start=1):
            for name in ("401", "403", "429"):
                set_up(server, scenario)
                message = f"bad token {server.token} \x1b[2K"
                server.faults.append(Fault(nth=number, message=message, **FAULTS[name]))
                try:
                    seen.append(repr(push_verified(package, **scenario.options)))
                except GPT2ValueHubError as error:
                    seen.append(everything_in(error))
    assert any("[token]" in text for text in seen), "the Hub's answers reached us"
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("hub_tools")]
    assert any("bad token" in text for text in ours)
    assert not [text for text in ours if "\x1b" in text], "nor does an answer reach the terminal raw"
    for commit in server.repos[REPO].commits.values():
        seen += [commit.title, *(content.decode("latin-1") for content in commit.files.values())]
    assert not [text for text in (*seen, caplog.text, *capfd.readouterr()) if server.token in text]


def test_a_hub_without_xet_is_pushed_to_by_lfs(package):
    """With hf_xet installed and on, as users have it."""
    with serving(xet=True) as server:
        report = push_verified(package)
        assert server.history(REPO)[0].oid == report.commit
        assert server.uploaded() == report.added["model.safetensors"]


def test_the_command_pushes_and_prints_the_lines_that_load(server, package, gpt2_value, monkeypatch):
    monkeypatch.setattr(push_module, "verify_package", lambda *_, **__: None)
    code, printed, _ = gpt2_value("push", package, REPO, "--private", "--tag", "v1", "--message", "by hand")
    commit = server.history(REPO)[0]
    assert (code, commit.title, server.repos[REPO].refs["refs/tags/v1"]) == (0, "by hand", commit.oid)
    assert f'AutoModel.from_pretrained("{REPO}", revision="{commit.oid}", trust_remote_code=True)' in printed
    code, printed, errors = gpt2_value("push", package, REPO, "--public", "--dry-run")
    assert (code, printed) == (2, "")
    assert "private already" in errors
