"""Start a worker process that takes from training only what it leaves of the cores, and end it.

Imports the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path


def start(folder: Path, endpoint: str) -> subprocess.Popen[str]:
    """Start a worker on `folder`. It reads its job from the pipe `stdin`; all that it prints arrives in `stdout`."""
    own = {
        # it finds what this process finds, whatever the training script is
        "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_VERBOSITY": "error",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "TMPDIR": str(folder),  # of what is verified and merged; removed with it
        "TEMP": str(folder),  # the same on Windows
    }
    worker = subprocess.Popen(
        [sys.executable, "-m", __package__, str(folder), str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        cwd=folder,  # where nothing can be imported from: `python -m` looks there first
        env={**os.environ, **own},
    )
    give_way(worker.pid)
    return worker


def give_way(pid: int) -> None:
    """Have a process run only while a core has nothing else to do.

    On Linux by SCHED_IDLE (sched(7)), which leaves a core at once when somebody needs it. The lowest nice value, as
    elsewhere, keeps it for some milliseconds, for which all threads of a training step wait.
    """
    with suppress(OSError):  # it has ended already; or a sandbox refuses, sometimes as if the call did not exist
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, pid, 19)
        if sys.platform == "linux":
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))


def kill(worker: subprocess.Popen[str]) -> None:
    """Kill a worker and the interpreter in which it verifies, unless somebody has waited for it and so knows its end:
    its number may be another process's by then."""
    if worker.returncode is None and hasattr(os, "killpg"):
        # it has not come to making its group; or (macOS) nobody but itself is in it, dead
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.pid, signal.SIGKILL)
    worker.kill()
