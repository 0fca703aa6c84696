"""Try thousands of spoiled inputs in processes with limits, watch what each does, and print a table of the outcomes.

`fuzz_packages.py` and `fuzz_checkpoints.py` say what is spoiled and what reads it; both take these options:

    --every 10        # a tenth of the cases
    --processes 1     # how many at a time; 2 otherwise
    --seconds 120     # for one case, on a machine that has other things to do

Cases run in processes that may not grow by more than a GiB, and that are stopped when one case takes longer than
`CASE_SECONDS`. An audit hook watches what Python opens, imports and runs; the time of the last access, what others do.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from support.spoiling import Mutation

ROOT = Path(__file__).resolve().parents[2]
CASE_SECONDS = 20.0
GROWTH = 1 << 30  # bytes of address space that a process may take beyond what it has once torch is imported
LOADED = "loaded bit by bit"
Case = tuple[Mutation, str]  # and what reads it, or how its record was treated
Attempt = Callable[[Mutation, str], tuple[str, bool]]  # the outcome, and whether it is one that is allowed


@dataclass(frozen=True)
class Hunt:
    """What is tried."""

    program: str  # the script, which is run again as a worker
    cases: Callable[[], list[Case]]
    write_bases: Callable[[Path], None]  # writes what is spoiled into a folder
    prepare: Callable[[Path], Attempt]  # in a worker: how a case is tried, given that folder


@dataclass(frozen=True)
class Outcome:
    kind: str
    name: str
    record: str  # what read it, or how its record was treated
    outcome: str  # LOADED, or the error's type; whatever else it is, it is a defect
    good: bool
    grown: int = 0  # bytes by which the process's peak memory grew


def run_all(hunt: Hunt, *, processes: int = 2, every: int = 1, seconds: float = CASE_SECONDS) -> list[Outcome]:
    """The outcome of every case, or of `every` how many-th and one of each kind and reader; so many processes run at a
    time."""
    firsts = {(mutation.kind, reader): number for number, (mutation, reader) in enumerate(hunt.cases())}
    numbers = sorted({*range(0, len(hunt.cases()), every), *firsts.values()})
    with tempfile.TemporaryDirectory(prefix="fuzz-") as home, ThreadPoolExecutor(processes) as pool:
        hunt.write_bases(Path(home))
        shares = [
            pool.submit(run_share, hunt, Path(home), numbers[part::processes], seconds) for part in range(processes)
        ]
        return [outcome for share in shares for outcome in share.result()]


def run_share(hunt: Hunt, home: Path, todo: list[int], seconds: float) -> list[Outcome]:
    """The outcomes of the cases `todo`, tried in a process of their own; a new one goes on where one ended."""
    everything, found = hunt.cases(), []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HOME": str(home / "hf"), "PYTHONPATH": str(ROOT)}
    while len(found) < len(todo):
        done = subprocess.run(
            [sys.executable, hunt.program, "--worker", str(home), str(seconds)],
            input=json.dumps(todo[len(found) :]),
            capture_output=True,
            text=True,
            env=environment,
        )
        found += [Outcome(**json.loads(line)) for line in done.stdout.splitlines()]
        if done.returncode != 0:
            mutation, record = everything[todo[len(found)]]
            why = "hung" if "Timeout (" in done.stderr else f"ended with {done.returncode}"
            found.append(Outcome(mutation.kind, mutation.name, record, f"the process {why}", good=False))
    return found


# In the process


def work(hunt: Hunt, home: Path, seconds: float) -> None:
    """Try the cases that stdin lists, and print each one's outcome."""
    import resource

    import torch
    import transformers

    todo = json.load(sys.stdin)
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not for the parent
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    everything, attempt = hunt.cases(), hunt.prepare(home)
    with contextlib.suppress(FileNotFoundError):  # where /proc is
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        # soft: the processes that it starts set limits of their own
        limit = pages * os.sysconf("SC_PAGE_SIZE") + GROWTH
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    for number in todo:
        faulthandler.dump_traceback_later(seconds, exit=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mutation, record = everything[number]
        outcome, good = attempt(mutation, record)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        faulthandler.cancel_dump_traceback_later()
        result = Outcome(mutation.kind, mutation.name, record, outcome, good, grown)
        print(json.dumps(asdict(result)), file=report, flush=True)


class Watch:
    """What a case opened or ran that it must not; an audit hook, which stays for the life of the process.

    A case lies in a folder `parent`. What is called `outside` there, the mutations lead to.
    """

    def __init__(self) -> None:
        self.parent: Path | None = None
        self.seen: list[str] = []
        sys.addaudithook(self._hear)
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]  # importlib.import_module raises no audit event

    @contextlib.contextmanager
    def over(self, parent: Path) -> Iterator[None]:
        """Watch in the block; `seen` says afterwards what happened."""
        outside = [path for path in (parent / "outside", *parent.glob("outside/*")) if path.is_file()]
        for path in outside:
            os.utime(path, (0, path.stat().st_mtime))  # libraries in Rust open without an audit event
        self.seen, self.parent = [], parent
        try:
            yield
        finally:
            self.parent = None
        self.seen += [f"read {path.name} outside" for path in outside if path.stat().st_atime != 0]

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Note that somebody looks for a module of the mutations'; it is left to others to find it."""
        if self.parent is not None and name.partition(".")[0] == "armed":
            self.seen.append(f"imported {name}")

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.parent is None:
            return
        what = str(arguments[0]) if arguments else ""
        if event == "open" and what.startswith((str(self.parent / "outside"), "/etc/passwd", "/etc/hostname")):
            self.seen.append(f"opened {what}")
        elif event == "exec" and str(self.parent) in getattr(arguments[0], "co_filename", ""):
            self.seen.append(f"ran {arguments[0].co_filename}")
        elif event in ("os.system", "os.exec", "os.mknod"):
            self.seen.append(f"{event} {what}")


def weights_in(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes."""
    from safetensors.torch import load_file

    held = (load_file(path) for path in folder.glob("*.safetensors"))
    return bytes_of({name: tensor for tensors in held for name, tensor in tensors.items()})


def bytes_of(tensors: dict[str, Any]) -> dict[str, bytes]:
    import torch

    return {name: each.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, each in tensors.items()}


# The report


def table(outcomes: list[Outcome]) -> Iterator[str]:
    """Lines: kind of mutation, cases, loaded, refused by which errors, defects."""
    yield f"{'mutation':<18}{'cases':>6}{'loaded':>8}{'refused':>9}{'defects':>9}   refused by"
    for kind in [*dict.fromkeys(outcome.kind for outcome in outcomes), "all"]:
        mine = [outcome for outcome in outcomes if kind in (outcome.kind, "all")]
        counts = Counter(outcome.outcome for outcome in mine if outcome.good)
        loaded = counts.pop(LOADED, 0)
        bad = sum(not outcome.good for outcome in mine)
        errors = ", ".join(f"{name.removesuffix('Error')} {count}" for name, count in counts.most_common())
        yield f"{kind:<18}{len(mine):>6}{loaded:>8}{sum(counts.values()):>9}{bad:>9}   {errors}"


def main(hunt: Hunt) -> None:
    """Run as a worker, or try everything and print it: a table for each reader, or treatment of the record."""
    if sys.argv[1:2] == ["--worker"]:
        work(hunt, Path(sys.argv[2]), float(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=CASE_SECONDS)
    outcomes = run_all(hunt, **vars(parser.parse_args()))
    bad = [outcome for outcome in outcomes if not outcome.good]
    for outcome in bad:
        print(f"DEFECT {outcome.kind}: {outcome.name} [{outcome.record}] -> {outcome.outcome}")
    for record in dict.fromkeys(outcome.record for outcome in outcomes):
        print("\n".join([f"-- {record}", *table([outcome for outcome in outcomes if outcome.record == record])]))
    print(f"{len(outcomes)} cases; the most memory for one: {max(outcome.grown for outcome in outcomes) / 1e6:.1f} MB")
    raise SystemExit(bool(bad))
