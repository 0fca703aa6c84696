"""Run one of our scripts in a process of its own, which cannot take more memory or processor time than it may.

Imports only the standard library. `run_limited` starts this file as a script, isolated (`python -I`); there it sets the
limits and then runs the other script, which so needs to know nothing of them.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# What an interpreter needs of its surroundings; tokens, proxies, PYTHON* and HF_* stay behind.
PASSED_ON = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "LANG", "LC_ALL", "TZ", "OMP_NUM_THREADS")


def run_limited(
    script: str | os.PathLike[str],
    *arguments: str,
    limits: Mapping[str, int],
    seconds: float,
    environment: Mapping[str, str],
    input: str = "",
    cwd: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a script with limits, and return what it printed and how it ended; see `failure_of`.

    Args:
        script: a file of Python code, ours.
        arguments: what it finds in `sys.argv[1:]`.
        limits: a name of the module `resource`, as RLIMIT_AS -> the most bytes or seconds.
        seconds: after which it is ended, busy or waiting.
        environment: variables besides those in `PASSED_ON`.
        input: what it finds in its standard input.
        cwd: its working directory.
    """
    bounds = ",".join(f"{name}={most}" for name, most in limits.items())
    surroundings = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    command = [sys.executable, "-I", "-B", __file__, bounds, str(script), *arguments]
    try:
        return subprocess.run(
            command,
            env={**surroundings, **environment},
            input=input,
            cwd=cwd,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -9, "", f"it did not end within {seconds:g} s")


def failure_of(done: subprocess.CompletedProcess[str]) -> str:
    """Return in one line how a process failed; nothing where it did not."""
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"{last[:500]} (exit status {done.returncode})" if done.returncode else ""


def search_path_of(*packages: str) -> list[str]:
    """Where this interpreter finds these packages, for one without PYTHONPATH and the user's own site-packages."""
    import importlib.util

    specs = [importlib.util.find_spec(package) for package in packages]
    return [str(Path(spec.origin).parent.parent) for spec in specs if spec is not None and spec.origin is not None]


def limit_this_process(limits: Mapping[str, int]) -> None:
    """Set limits, unless lower ones are set already: somebody meant those. Nothing where the system has none."""
    try:
        import resource
    except ImportError:  # Windows
        return
    for name, most in {**limits, "RLIMIT_CORE": 0}.items():
        kind = getattr(resource, name)
        soft, hard = resource.getrlimit(kind)
        lowest = min(number for number in (most, soft, hard) if number != resource.RLIM_INFINITY)
        try:
            resource.setrlimit(kind, (lowest, hard))
        except (ValueError, OSError):  # macOS has some of these names, and refuses to set them
            continue


if __name__ == "__main__":
    _, bounds, script, *arguments = sys.argv
    limit_this_process({name: int(most) for name, most in (pair.split("=") for pair in bounds.split(","))})
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
