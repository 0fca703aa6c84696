"""`make launches`: every `accelerate launch` line of docs/many-gpus.md, with few steps and two processes in all."""

import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "many-gpus.md"


def launch_line(line, out, *options):
    """Start a line of the page, with some of its options replaced, few rows and one step."""
    _, _, *arguments = shlex.split(line)
    script = arguments.index("examples/many_gpus.py")
    own = ["--out", str(out), "--steps", "1", "--rows", "2"]
    arguments = [*arguments[:script], *options, arguments[script], *own]
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def main():
    lines = re.findall(r"^accelerate launch .*", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    for line in lines:
        ranks = (0, 1) if "--machine_rank 0" in line else (None,)
        if "--machine_rank 1" in line:
            continue
        with socket.socket() as server, tempfile.TemporaryDirectory() as folder:
            server.bind(("127.0.0.1", 0))
            where = ["--num_processes", "2", "--main_process_port", str(server.getsockname()[1])]
            server.close()
            if ranks != (None,):
                where += ["--main_process_ip", "127.0.0.1"]
            started = [
                launch_line(line, f"{folder}/{rank}", *where, *(() if rank is None else ("--machine_rank", str(rank))))
                for rank in ranks
            ]
            for process in started:
                output = process.communicate()[0].decode()
                if process.returncode:
                    raise SystemExit(f"{line}\n{output}")
        print(f"works: {line}")


if __name__ == "__main__":
    main()
