"""A training run's end of the pipe to the process beside it, and the folder through which the weights go.

Imports the standard library and of hub_tools `worker`, `errors` and `replace_folder`.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from ... import errors
from ...errors import GPT2ValueHubError, WorkerDiedError
from ...package.replace_folder import discard, left_behind, locked_folder
from .worker import Checkpoint, Failure, PushedCheckpoint, Settings

GRACE = 10.0  # seconds that a process which has stopped answering may take to end
HOME = "gpt2-value-checkpoints-"  # folders of this name in the system's folder for temporary files are ours

# A process group of its own, since a terminal's Ctrl-C is not for the process beside. (One in its first moment ends it,
# and another is started: Popen's `process_group` needs Python 3.11.) Not a session of its own: Linux shares the cores
# between sessions before it looks at priorities (sched(7), "The autogroup feature"), so the lowest priority in a
# session of its own takes half of a busy core from the training.
START = """
import json, os, sys
if hasattr(os, "setpgid"):
    os.setpgid(0, 0)
sys.path[:] = json.loads(sys.argv[1])
from hub_tools.publish.checkpoints import worker
worker.main()
"""


class WorkerProcess:
    """The process beside: started with the first checkpoint, and again where it died."""

    def __init__(self, home: Path, settings: Settings, endpoint: str) -> None:
        self._home = home
        self._settings = settings
        self._endpoint = endpoint
        self._running: subprocess.Popen[bytes] | None = None
        self._ended = False

    def ask(self, checkpoint: Checkpoint) -> PushedCheckpoint:
        """Have a checkpoint pushed.

        Raises:
            WorkerDiedError: the process ended instead of answering.
            Everything that `push_to_hub` raises.
        """
        running = self._running or self._start()
        assert running.stdin is not None
        assert running.stdout is not None
        try:
            pickle.dump(checkpoint, running.stdin)
            running.stdin.flush()
            answer: PushedCheckpoint | Failure = pickle.load(running.stdout)
        except (OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            self._running = None
            ended = _ended(running)
            raise WorkerDiedError(
                f"the process that pushes checkpoints ended with "
                f"{f'signal {-ended}' if ended < 0 else f'exit status {ended}'}",
                next_step="read what it printed to the standard error; make sure that there is enough memory",
            ) from error
        if isinstance(answer, Failure):
            kind: type[GPT2ValueHubError] = getattr(errors, answer.kind)
            raise kind(answer.found, expected=answer.expected, next_step=answer.next_step)
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        if self._ended:
            raise WorkerDiedError("the pusher was closed in the meantime", next_step="wait for close() to return")
        running = subprocess.Popen(
            _command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(self._endpoint, self._home),
        )
        self._running = running
        assert running.stdin is not None
        pickle.dump((os.getpid(), self._home, self._settings), running.stdin)
        return running

    def end(self, *, at_once: bool) -> None:
        """End it: when it has nothing to do, or in the middle of whatever it does."""
        self._ended = True
        running, self._running = self._running, None
        if running is None:
            return
        if at_once:
            _kill(running)  # the thread that waits for its answer closes the pipes
        else:
            assert running.stdin is not None
            pickle.dump(None, running.stdin)  # not the pipe's end alone: that it sees too when this process dies
            _close(running)
        running.wait()


def _ended(process: subprocess.Popen[bytes]) -> int:
    """The exit status of a process that has closed its end of a pipe, or sent what is no answer."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    _kill(process)  # where it has ended, what it started may live on
    _close(process)
    return process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill it, and the interpreter in which it verifies."""
    if hasattr(os, "killpg"):
        # it has not come to making its group; or (macOS) nobody but itself is in it, dead
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _close(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        with suppress(BrokenPipeError):  # what a dead process did not read any more
            if pipe is not None:
                pipe.close()


class Home:
    """A folder for what is on its way, locked while this process lives; those of dead processes are removed."""

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        for folder, lock in left_behind(parent.glob(f"{HOME}*")):
            discard(folder, lock)
        self.folder, self._lock = locked_folder(HOME, parent)

    def remove(self) -> None:
        discard(self.folder, self._lock)


def _environment(endpoint: str, home: Path) -> dict[str, str]:
    """The environment of the process beside."""
    own = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "TMPDIR": str(home),  # of what is verified and merged; removed with it
        "TEMP": str(home),  # the same on Windows
    }
    return {**os.environ, **own}


def _command() -> list[str]:
    """The command line of the process beside: it finds what this one finds, whatever the training script is."""
    path = [entry or os.getcwd() for entry in sys.path]
    return [sys.executable, "-c", START, json.dumps(path)]
