"""`gpt2-value push`, and what an upload shows."""

import os
import re
import struct
import subprocess
import sys

import pytest
from conftest import make_tiny_model
from slow.fault_sweep import serving
from support.pushing import REPO, push_verified, verified_before

from hub_tools.hub import retry
from hub_tools.package.save import save_package


@pytest.fixture
def package(tmp_path, tiny_model):
    save_package(tiny_model, tmp_path / "package", repo_id=REPO)
    return tmp_path / "package"


def test_a_hub_without_xet_is_pushed_to_by_lfs(package, monkeypatch):
    """With hf_xet installed and on, as users have it."""
    monkeypatch.setattr(retry, "FIRST_WAIT", 0.01)
    with serving(xet=True) as server:
        report = push_verified(package)
        assert server.history(REPO)[0].oid == report.commit
        assert server.uploaded()["lfs_upload"] == report.added["model.safetensors"]
        assert server.routes().count("commit") == 1


@pytest.mark.skipif(os.name != "posix", reason="a pseudo-terminal is needed")
@pytest.mark.parametrize("xet", [False, True])
@pytest.mark.parametrize("stderr", ["terminal", "file"])
def test_the_command_shows_an_uploads_bytes_on_a_terminal_and_no_bar_in_a_file(tmp_path, stderr, xet):
    import fcntl
    import pty
    import termios

    save_package(make_tiny_model(n_embd=256), tmp_path / "package", repo_id=REPO)
    script = (
        "import sys\nfrom hub_tools import cli\nfrom hub_tools.publish import push\n"
        "push.verify_package = lambda folder, trust_remote_code: None\n"  # another test's, and an interpreter's start
        "cli.main(['push', *sys.argv[1:]])"
    )
    with serving(xet=xet) as server:
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HUB_OFFLINE": "0",
            "TERM": "xterm",
            "COLUMNS": "100",
        }
        del environment["HF_HUB_DISABLE_PROGRESS_BARS"]
        environment |= {} if xet else {"HF_HUB_DISABLE_XET": "1"}
        ours, theirs = pty.openpty() if stderr == "terminal" else os.pipe()
        if stderr == "terminal":
            fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))
        command = [sys.executable, "-c", script, str(tmp_path / "package"), REPO]
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=theirs) as process:
            os.close(theirs)
            printed = b"".join(iter(lambda: read_some(ours), b"")).decode()
        os.close(ours)
    assert process.returncode == 0, printed
    assert "Processing Files" not in printed
    if stderr == "terminal":
        assert re.search(r"model\.safetensors: 100%\|.*\d\.\d\dM/\d\.\d\dM", printed), printed
    else:
        assert printed == ""


def read_some(descriptor):
    """What is there; nothing at the end, which a terminal tells by an error."""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        return b""


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
