"""The app as a Space: complete by itself, pinned, at the commit that was verified, and pushed in one commit."""

import json
import subprocess
import sys

import pytest
import yaml
from conftest import make_tiny_model
from slow.fault_sweep import serving
from support.hub_store import File

from hub_tools import layout
from hub_tools.app.space import push_space, space_files, write_space
from hub_tools.errors import AuthenticationError, FolderRefusedError, SourceError
from hub_tools.package.writing.save import save_package

MODEL, SPACE = "alice/value", "alice/look"


@pytest.fixture
def server(tiny_tokenizer, tmp_path):
    """A Hub that has a package."""
    save_package(make_tiny_model(), tmp_path / "package", tiny_tokenizer, repo_id=MODEL)
    with serving(xet=False) as server:
        server.create(MODEL, {path.name: path.read_bytes() for path in (tmp_path / "package").iterdir()})
        yield server


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty cache for the Hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


FILES = {"README.md": b"---\ntitle: x\nsdk: gradio\n---\n\ntext\n", "app.py": b"print()\n", "page/a.py": b"a = 1\n"}


def test_a_space_is_pushed_in_one_commit_and_not_again(server):
    report = push_space(FILES, "look")
    assert [commit.title for commit in server.history(f"spaces/{SPACE}")] == ["Push the app", "initial commit"]
    files = server.files(f"spaces/{SPACE}")
    assert {name: files[name] for name in FILES} == FILES
    assert report.url == f"{server.url}/spaces/{SPACE}/commit/{report.commit}"
    assert SPACE not in server.repos  # no model of that name
    again = push_space(FILES, SPACE)
    assert (again.committed, again.commit) == (False, report.commit)
    assert len(server.history(f"spaces/{SPACE}")) == 2


def test_a_push_replaces_the_app_and_keeps_what_is_not_ours(server):
    push_space(FILES, SPACE)
    by_hand = {"README.md": b"---\ntitle: mine\nemoji: E\n---\n\nmy words\n", "notes.txt": b"n"}
    changes = {name: File(data, lfs=False) for name, data in by_hand.items()}
    server.commit(server.repos[f"spaces/{SPACE}"], "refs/heads/main", "by hand", changes)
    report = push_space({**FILES, "page/b.py": b"b\n"} | {"page/a.py": b"a = 2\n"}, SPACE, dry_run=True)
    assert (list(report.added), sorted(report.changed), report.commit) == (
        ["page/b.py"],
        ["README.md", "page/a.py"],
        None,
    )
    new = {name: data for name, data in FILES.items() if name != "page/a.py"} | {"page/b.py": b"b\n"}
    report = push_space(new, SPACE)
    files = server.files(f"spaces/{SPACE}")
    assert set(files) == {"README.md", "app.py", "page/b.py", "notes.txt", ".gitattributes"}
    assert list(report.deleted) == ["page/a.py"]
    head, _, body = files["README.md"].decode().removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(head) == {"title": "x", "emoji": "E", "sdk": "gradio"}
    assert "my words" in body


def test_a_dry_run_changes_nothing(server):
    report = push_space(FILES, SPACE, dry_run=True)
    assert report.new_repository
    assert set(report.added) == set(FILES)
    assert f"spaces/{SPACE}" not in server.repos


def test_a_space_of_somebody_else_is_refused(server):
    server.create("spaces/bob/look")
    with pytest.raises(AuthenticationError):
        push_space(FILES, "bob/look")
    assert len(server.history("spaces/bob/look")) == 1


def test_only_a_package_on_the_hub_with_a_tokenizer_becomes_a_space(server, home, tmp_path):
    with pytest.raises(SourceError, match="not on the Hub"):
        space_files(str(tmp_path / "package"))
    save_package(make_tiny_model(), tmp_path / "mute")
    server.create("alice/mute", {path.name: path.read_bytes() for path in (tmp_path / "mute").iterdir()})
    with pytest.raises(SourceError, match="no tokenizer"):
        space_files("alice/mute")


def test_the_space_command_writes_what_runs_without_this_project(server, home, gpt2_value, tmp_path):
    """In an interpreter that cannot see this checkout, against the Hub, the Space draws a response."""
    pytest.importorskip("gradio", reason="the oldest versions are tested without the app")
    folder = tmp_path / "space"
    status, out, _ = gpt2_value("space", MODEL, "--folder", folder, "--json")
    assert status == 0
    assert set(json.loads(out)["files"]) == {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    head = (folder / "README.md").read_text().split("---\n")[1]
    data = yaml.safe_load(head)
    assert (data["sdk"], data["app_file"], data["models"]) == ("gradio", "app.py", [MODEL])
    pins = dict(line.split("==") for line in (folder / "requirements.txt").read_text().split())
    assert data["sdk_version"] == pins["gradio"]
    assert data["python_version"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    commit = server.history(MODEL)[0].oid
    assert f'COMMIT = "{commit}"' in (folder / "app.py").read_text()

    server.commit(server.repos[MODEL], "refs/heads/main", "later", {"config.json": None})  # the Space has its commit
    ours = [*(name.removesuffix(".py") for name in layout.REMOTE_CODE), "hub_tools", "sampler_audit"]
    done = subprocess.run(
        [sys.executable, "-c", RUN % {"ours": ours}],
        capture_output=True,
        text=True,
        cwd=folder,
        env={
            "PATH": "/usr/bin:/bin",
            "HOME": str(tmp_path / "home"),
            "HF_ENDPOINT": server.url,
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    assert "data-rank" in done.stdout


RUN = """
import os, runpy, sys
for name in %(ours)r:  # what a Space does not have itself cannot be imported
    if not os.path.exists(name) and not os.path.exists(name + ".py"):
        sys.modules[name] = None
import gradio
launch = gradio.Blocks.launch
def launch_and_draw(page, **where):
    launch(page, **where, prevent_thread_lock=True, server_name="127.0.0.1")
    from gradio_client import Client
    print(Client(page.local_url, verbose=False).predict("Hi", 1, 8, 0, 1.0, 0, 1.0, 1, api_name="/sample"))
    page.close(verbose=False)
gradio.Blocks.launch = launch_and_draw
runpy.run_path("app.py", run_name="__main__")
"""


def test_a_folder_that_holds_something_is_not_written_to(tmp_path):
    write_space(FILES, tmp_path / "new")
    assert (tmp_path / "new" / "page" / "a.py").read_bytes() == FILES["page/a.py"]
    with pytest.raises(FolderRefusedError):
        write_space(FILES, tmp_path / "new")


def test_the_space_command_wants_a_space_or_a_folder(gpt2_value):
    assert gpt2_value("space", MODEL)[0] == 2
    assert gpt2_value("space", MODEL, SPACE, "--folder", "x")[0] == 2
