"""The worker: a process that pushes one checkpoint, `python -m hub_tools.publish.checkpoints FOLDER PARENT`.

Imports the standard library and, when it is set up, `worker`.
"""

import os
import sys

if __name__ == "__main__":
    # A process group of its own, since a terminal's Ctrl-C is for the training loop, which then ends the worker. Not
    # a session of its own: Linux shares the cores between sessions before it looks at priorities (sched(7), "The
    # autogroup feature"), so even the lowest priority takes half of a busy core from training in another session.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    from .worker import main

    main(sys.argv[1], int(sys.argv[2]))
