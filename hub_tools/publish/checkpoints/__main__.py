"""The worker: a process that pushes one checkpoint, `python -m hub_tools.publish.checkpoints FOLDER PARENT`.

Imports the standard library and, after the watch over its folder has started, `worker`.
"""

import gc
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path


def end_with_parent(parent: int, folder: Path) -> None:
    """Wait until the parent has died; then remove the folder, and end this process and the interpreter that verifies.

    The end of a pipe would not show that the parent has died: processes that it forked hold the pipe open, too.
    """
    while os.getppid() == parent:
        time.sleep(0.5)
    for _ in range(100):  # that interpreter and our main thread may still write files, after the first removal too
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    watch = None
    if os.name == "posix":
        # The worker has a process group of its own, so that Ctrl-C in a terminal reaches only the training loop, which
        # then ends the worker. It has no session of its own: Linux shares the cores between sessions before it looks at
        # priorities (sched(7), "The autogroup feature"), so even a process of the lowest priority would take half of a
        # busy core from training in another session.
        os.setpgid(0, 0)
        # before the imports, which can take a minute while training uses most of the cores
        watch = threading.Thread(target=end_with_parent, args=(parent, folder), daemon=True)
        watch.start()
    gc.disable()  # garbage collection would take an eighth of the time of the imports
    from .worker import main

    gc.enable()
    # Normally the parent removes the folder and then kills this process. If `main` returns, or the pipe breaks, the
    # parent is dead; `watch` may notice that a little later.
    with suppress(BrokenPipeError):
        main(folder)
    if watch is not None:
        watch.join()
