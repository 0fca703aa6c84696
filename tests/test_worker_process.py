"""A worker process: it gives way, ends with all that it started, and leaves nothing behind when its parent dies."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hub_tools.publish.checkpoints import worker_process
from hub_tools.publish.checkpoints.job import Destination, Job, PackageOptions

HERE = Path(__file__).parent


def ended(pid):
    """Whether a process, whoever has to reap it, has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_for(condition, seconds=60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this never happened"
        time.sleep(0.02)


def test_a_sandbox_that_refuses_the_idle_class_does_not_stop_the_worker():
    script = (
        "import os\nfrom hub_tools.publish.checkpoints.worker_process import give_way\n"
        "def refuse(*_): raise OSError(22, 'Invalid argument')\n"
        "os.sched_setscheduler = refuse\ngive_way(0)\nprint(os.nice(0))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=HERE.parent, capture_output=True, text=True, check=True)
    assert done.stdout == "19\n"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_a_worker_started_ends_with_it(tmp_path, monkeypatch):
    """An interpreter that verifies holds as much memory as the worker, for which there may not be enough."""
    script = (
        "import os, subprocess, sys\nos.setpgid(0, 0)\nsys.stdin.readline()\n"
        "sleep = [sys.executable, '-c', 'import time; time.sleep(1000)']\n"
        "process = subprocess.Popen(sleep, stdout=subprocess.DEVNULL)\n"
        f"print('{worker_process.ANSWER}', process.pid, sep='', flush=True)\n"
        "sys.stdin.readline()"
    )
    monkeypatch.setattr(worker_process, "give_way", lambda pid: None)  # other tests run at the same time
    monkeypatch.setattr(worker_process, "COMMAND", (sys.executable, "-c", script))
    process = worker_process.Worker(tmp_path, "http://127.0.0.1:9")
    started = int(process.ask("start it"))
    assert not ended(started)
    process.end()
    assert ended(process.pid)
    wait_for(lambda: ended(started))


@pytest.mark.parametrize("when", ["has answered", "is about to answer"])
def test_a_run_that_is_killed_when_its_worker_is_done_leaves_the_disk_clean(tmp_path, when):
    """The folder is the run's to remove, which it may not live to do."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "weights").touch()
    destination = Destination("alice/value", "main", None, "hf_any", 0.0)
    job = Job(1, {}, "imdb", destination, PackageOptions(None, None, (), "5GB"), None)
    script = (
        "import os, signal, socket, sys, threading\nfrom pathlib import Path\n"
        "from hub_tools.publish.checkpoints import worker_process\n"
        "worker_process.give_way = lambda pid: None\n"  # other tests run at the same time
        "hub = socket.create_server(('127.0.0.1', 0))\n"
        "worker = worker_process.Worker(Path(sys.argv[1]), f'http://127.0.0.1:{hub.getsockname()[1]}')\n"
        "def be_asked():\n"
        "    while True:\n"
        "        hub.accept()\n"  # and closed at once
        "        if sys.argv[3] == 'is about to answer': os.kill(os.getpid(), signal.SIGKILL)\n"
        "threading.Thread(target=be_asked, daemon=True).start()\n"
        "print(worker.ask(sys.argv[2]), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", script, str(folder), job.to_json(), when]
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    assert ("HubUnavailableError" in done.stdout) == (when == "has answered")
    wait_for(lambda: not folder.exists())
