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


def launch(line, *options, out):
    """Start a line of the page, with some of its options replaced, few rows and one step."""
    before, after = line.split("examples/many_gpus.py")
    own = ["--out", out, "--steps", "1", "--rows", "2"]
    arguments = [*shlex.split(before)[2:], *options, "examples/many_gpus.py", *shlex.split(after), *own]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def main():
    for line in re.findall(r"^accelerate launch .*", PAGE.read_text(encoding="utf-8"), re.MULTILINE):
        if "--machine_rank 1" in line:
            continue  # it starts beside the first machine's
        machines = [[]]
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            options = ["--num_processes", "2", "--main_process_port", str(server.getsockname()[1])]
        if "--machine_rank 0" in line:
            options += ["--main_process_ip", "127.0.0.1"]
            machines = [["--machine_rank", rank] for rank in "01"]
        with tempfile.TemporaryDirectory() as folder:
            started = [launch(line, *options, *rank, out=f"{folder}/{number}") for number, rank in enumerate(machines)]
            for process in started:
                output = process.communicate()[0].decode()
                if process.returncode:
                    raise SystemExit(f"{line}\n{output}")
        print(f"works: {line}")


if __name__ == "__main__":
    main()
