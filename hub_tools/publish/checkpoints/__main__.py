"""The worker: a process that pushes one checkpoint, `python -m hub_tools.publish.checkpoints FOLDER PARENT`.

Imports the standard library and, when it is set up, `worker`.
"""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path


def end_with_parent(parent: int, folder: Path) -> None:
    """Wait until the parent has died; then remove the folder and end, with the interpreter that verifies, if there is
    one. The parent's death is not told by the end of a pipe: processes that it forked hold that open, too."""
    while os.getppid() == parent:
        time.sleep(0.5)
    for _ in range(100):  # that interpreter and our main thread may still be writing: what was removed can come back
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.05)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    watch = None
    if os.name == "posix":
        # A process group of its own, since a terminal's Ctrl-C is for the training loop, which then ends the worker.
        # Not a session of its own: Linux shares the cores between sessions before it looks at priorities (sched(7),
        # "The autogroup feature"), so even the lowest priority takes half of a busy core from training in another
        # session.
        os.setpgid(0, 0)
        # before the imports, which can take a minute where training leaves little of the cores
        watch = threading.Thread(target=end_with_parent, args=(parent, folder), daemon=True)
        watch.start()
    from .worker import main

    main(folder)
    if watch is not None:
        # The folder is the parent's to remove, and it may die before it has: so the worker stays until it is killed.
        # That nothing more will be printed tells the parent that the result is there.
        os.closerange(1, 3)
        watch.join()
