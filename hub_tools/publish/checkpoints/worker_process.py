"""A worker process that takes little from training: start it, send it jobs, end it.

Imports the standard library and of hub_tools `errors`. What the process does is in `__main__` and `worker`.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from ...errors import WorkerDiedError

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", __package__)
ANSWER = "gpt2-value-answer: "  # the prefix of lines that are answers
SHARE = 0.025  # of one core: the processor time that workers may take


class Worker:
    """A process that answers one line with one line. Everything else that it prints is logged.

    Args:
        folder: its working folder, also for temporary files. If this process dies, the worker removes the folder.
        endpoint: the Hub's address.
        in_background: let it run only while a core is idle.
    """

    def __init__(self, folder: Path, endpoint: str, *, in_background: bool = True) -> None:
        own = {
            # the worker then imports the same modules as this process, wherever the training script is
            "PYTHONPATH": os.pathsep.join(os.path.abspath(entry) for entry in sys.path),
            "HF_ENDPOINT": endpoint,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_VERBOSITY": "error",
            "TRANSFORMERS_VERBOSITY": "error",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(folder),
            "TEMP": str(folder),  # the same on Windows
        }
        self._process = subprocess.Popen(
            [*COMMAND, str(folder), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=folder,  # `python -m` imports from the working folder first, and this one has no modules
            env={**os.environ, **own},
        )
        self.pid = self._process.pid
        if in_background:
            give_way(self.pid)

    def ask(self, line: str) -> str:
        """Send a line, and wait for the answer.

        Raises:
            WorkerDiedError: the process ended without one.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        last = "it printed nothing"
        with suppress(BrokenPipeError):  # it has died
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        for printed in self._process.stdout:
            if printed.startswith(ANSWER):
                return printed.removeprefix(ANSWER)
            if printed.strip():
                last = printed.strip()
                logger.warning("the worker: %s", last)
        self.end()  # processes that it started may still run
        status = self._process.returncode
        raise WorkerDiedError(
            "the process that pushes checkpoints ended with "
            f"{f'signal {-status}' if status < 0 else f'exit status {status}'}: {last[:500]}",
            next_step="read what it printed, in the log; make sure that there is enough memory",
        )

    def kill(self) -> None:
        """Kill it and the interpreter in which it verifies. An `ask` in another thread then raises."""
        # Only before the process has been waited for: after that, its number may belong to another process.
        if self._process.returncode is None and hasattr(os, "killpg"):
            # raised if it has not made its group yet, or (macOS) if only dead processes are in the group
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()

    def end(self) -> None:
        """Kill it, wait until it is gone, and close the pipes to it."""
        self.kill()
        with suppress(BrokenPipeError), self._process:  # raised if it died before it read everything that was sent
            pass


def give_way(pid: int) -> None:
    """Let a process run only while a core has nothing else to do.

    On Linux this is SCHED_IDLE (sched(7)): the process leaves a core at once when another process needs it. Elsewhere
    it is the lowest priority (nice 19), with which a process keeps a core for some milliseconds, while all threads of a
    training step wait.
    """
    with suppress(OSError):  # it has ended already, or a sandbox forbids the call
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, pid, 19)
        if sys.platform == "linux":
            os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))


def rest_after(processor_seconds: float) -> float:
    """Seconds from the start of this worker to the earliest start of the next, so that workers keep to their `SHARE`.

    The lowest priority is not enough: even while training uses all cores, a process that has it gets about a quarter of
    one (docs/benchmarks.md). All threads of a training step may wait for the one that is held up, so the share does not
    grow with the number of cores.

    Args:
        processor_seconds: the processor time that this worker took.
    """
    return processor_seconds / SHARE
