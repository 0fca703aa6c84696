"""Spoil packages in hundreds of ways; each must be refused by a typed error, or load bit by bit. Print the outcomes.

    python tests/slow/fuzz_packages.py            # the table: kind of mutation x outcome
    python tests/slow/fuzz_packages.py --list     # every case and its outcome

Each mutation is tried with the package's record as it was, and again with a record that was made to fit the spoiled
files, and again without one: the record's hashes would otherwise shield everything behind them. Cases run in processes
that may not grow by more than a GiB, and that are stopped when one case takes longer than `CASE_SECONDS`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[up]) for up in (1, 2)]  # tests/ and the checkout

from support.mutations import mutations
from support.spoiling import CANARY, RECORD, Mutation, data_of

ROOT = Path(__file__).resolve().parents[2]
CASE_SECONDS = 20.0
GROWTH = 1 << 30  # bytes of address space that a process may take beyond what it has once torch is imported
RECORDS = ("kept", "fitted", "removed")
LOADED = "loaded bit by bit"


@dataclass(frozen=True)
class Outcome:
    kind: str
    name: str
    record: str  # one of RECORDS
    outcome: str  # LOADED, or the error's type; whatever else it is, it is a defect
    good: bool
    grown: int = 0  # bytes by which the process's peak memory grew


def cases() -> list[tuple[Mutation, str]]:
    """Every mutation with every state of the record; a record that is itself spoiled stays so."""
    return [
        (mutation, record)
        for mutation in mutations()
        for record in RECORDS
        if record == "kept" or RECORD not in mutation.name
    ]


def run_all(
    processes: int = 2,
    *,
    every: int = 1,
    seconds: float = CASE_SECONDS,
    program: str = __file__,
    everything: list[tuple[Mutation, str]] | None = None,
    bases: Callable[[Path], None] | None = None,
) -> list[Outcome]:
    """The outcome of every case, or of `every` how many-th, in their order.

    Args:
        processes: how many run at a time.
        every: 10 for a tenth of the cases.
        seconds: for one case.
        program: the script that is run as a worker; this one and `fuzz_checkpoints.py` are.
        everything: its cases.
        bases: writes what they spoil into a folder.
    """
    everything = cases() if everything is None else everything
    found: dict[int, Outcome] = {}
    with tempfile.TemporaryDirectory(prefix="fuzz-packages-") as home:
        (bases or write_bases)(Path(home))

        def share(number: int) -> None:
            first, step = number * every, processes * every
            run_share(Path(home), first, step, seconds, found, program=program, everything=everything)

        threads = [threading.Thread(target=share, args=(number,)) for number in range(processes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [found[number] for number in sorted(found)]


def run_share(
    home: Path,
    first: int,
    step: int,
    seconds: float,
    found: dict[int, Outcome],
    *,
    program: str,
    everything: list[tuple[Mutation, str]],
) -> None:
    """Every `step`-th case from `first` on, in a process of their own; a new one goes on where one ended."""
    while first < len(everything):
        number = first
        arguments = [sys.executable, program, "--worker", str(home), str(first), str(step), str(seconds)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "HF_HUB_OFFLINE": "1"}
        environment |= {"HF_HOME": str(home / "hf"), "PYTHONPATH": str(ROOT)}
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process,
        ):
            for line in process.stdout or ():
                number, outcome = json.loads(line)
                if outcome is not None:
                    found[number] = Outcome(**outcome)
            ended = process.wait()
            if ended != 0:
                errors.seek(0)
                why = "hung" if "Timeout (" in errors.read() else f"ended with {ended}"
                mutation, record = everything[number]
                found[number] = Outcome(mutation.kind, mutation.name, record, f"the process {why}", good=False)
        first = number + step


# In the process


def work(
    home: Path,
    first: int,
    step: int,
    seconds: float,
    *,
    everything: list[tuple[Mutation, str]] | None = None,
    attempt: Callable[[Mutation, str], tuple[str, bool]] | None = None,
) -> None:
    """Try every `step`-th case from `first` on, and print each one's number before it and its outcome after it."""
    import resource

    import torch
    import transformers

    import hub_tools.package.load  # noqa: F401

    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is not for the parent
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    with contextlib.suppress(FileNotFoundError):  # where /proc is
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        # soft: the processes that it starts set limits of their own
        limit = pages * os.sysconf("SC_PAGE_SIZE") + GROWTH
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    everything = cases() if everything is None else everything
    bases = {path.name: weights_in(path) for path in home.glob("base-*")}

    def spoil_and_load(mutation: Mutation, record: str) -> tuple[str, bool]:
        return try_case(home, mutation, record, bases[f"base-{mutation.base}"])

    for number in range(first, len(everything), step):
        print(json.dumps([number, None]), file=report, flush=True)
        faulthandler.dump_traceback_later(seconds, exit=True)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mutation, record = everything[number]
        outcome, good = (attempt or spoil_and_load)(mutation, record)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        faulthandler.cancel_dump_traceback_later()
        result = Outcome(mutation.kind, mutation.name, record, outcome, good, grown)
        print(json.dumps([number, asdict(result)]), file=report, flush=True)


def try_case(home: Path, mutation: Mutation, record: str, original: dict[str, bytes]) -> tuple[str, bool]:
    """Spoil, inspect, load; the outcome, and whether it is one of the two that are allowed."""
    from hub_tools import inspect_package, load_package
    from hub_tools.errors import GPT2ValueHubError

    imported = remote_modules()
    with tempfile.TemporaryDirectory(dir=home) as parent:
        folder = Path(parent, "package")
        shutil.copytree(home / f"base-{mutation.base}", folder)
        mutation.edit(folder)
        if record == "fitted":
            fit_record(folder)
        elif record == "removed":
            (folder / RECORD).unlink()
        outcomes = []
        for function in (inspect_package, load_package):
            try:
                result = function(folder)
            except GPT2ValueHubError as error:
                outcomes.append(type(error).__name__)
            except BaseException as error:  # the Rust libraries' panics are no Exceptions
                return f"{function.__name__}: {type(error).__name__}: {str(error)[:200]}", False
            else:
                outcomes.append("read" if function is inspect_package else difference(result, folder, original, record))
        if (Path(parent) / CANARY).exists():
            return "code of the package ran", False
        if remote_modules() != imported:
            return "code of the package was imported", False
        return outcomes[-1], outcomes[-1].endswith("Error") or outcomes[-1] == LOADED


def remote_modules() -> set[str]:
    """The modules that transformers imported from packages."""
    return {name for name in sys.modules if name.startswith("transformers_modules")}


def difference(loaded: Any, folder: Path, original: dict[str, bytes], record: str) -> str:
    """LOADED if the model has, bit by bit, the weights that are in the files (the saved ones, says their record)."""
    import torch

    model = loaded.model
    held = {
        name: weight.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, weight in model.state_dict().items()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    if held != weights_in(folder):
        return "loaded weights that are not those in the files"
    if record == "kept" and held != original:
        return "loaded weights that are not those that were saved"
    if not all(weight.isfinite().all() for weight in model.state_dict().values()):
        return "loaded weights that are not finite"
    if not all(file.installed for file in loaded.package.code if file.name.endswith("_gpt2_value.py")):
        return "loaded with other code beside it"
    return LOADED


def weights_in(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes, read without the library that loads them."""
    found = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        header = json.loads(data[8 : data_of(data)])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = (data_of(data) + offset for offset in entry["data_offsets"])
            found[name] = data[begin:end]
    return found


def fit_record(folder: Path) -> None:
    """Make the record's hashes those of the files that are there, as somebody would who means harm."""
    from hub_tools import layout

    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
    except ValueError:  # it is the record itself that is spoiled
        return
    regular = {
        entry.name
        for entry in folder.iterdir()
        if stat.S_ISREG(entry.lstat().st_mode) and entry.stat().st_size < 1 << 30 and layout.written_by_save(entry.name)
    }
    record["sha256"] = {
        name: layout.sha256_of(folder / name) for name in sorted(regular - {layout.CARD, layout.RECORD})
    }
    path.write_text(json.dumps(record))


def write_bases(home: Path) -> None:
    """The sound packages: base-one (one weight file, a tokenizer) and base-shards."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from configuration_gpt2_value import GPT2ValueConfig
    from hub_tools import save_package
    from modeling_gpt2_value import GPT2ValueModel

    torch.manual_seed(0)
    config = GPT2ValueConfig(
        n_layer=1, n_embd=16, n_head=2, vocab_size=24, n_positions=16, bos_token_id=0, eos_token_id=0,
        value_head_initializer_range=0.5,
    )  # fmt: skip
    model = GPT2ValueModel(config)
    letters = {letter: number for number, letter in enumerate(["<|endoftext|>", *"abcdefghijklmnopqrstuvw"])}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    save_package(model, home / "base-one", fast)
    save_package(model, home / "base-shards", max_shard_size=6_000)


def table(outcomes: list[Outcome]) -> Iterator[str]:
    """Lines: kind of mutation, cases, loaded, refused by which errors, defects."""
    yield f"{'mutation':<18}{'cases':>6}{'loaded':>8}{'refused':>9}{'defects':>9}   refused by"
    kinds = dict.fromkeys(outcome.kind for outcome in outcomes)
    for kind in [*kinds, "all"]:
        mine = [outcome for outcome in outcomes if kind in (outcome.kind, "all")]
        counts = Counter(outcome.outcome for outcome in mine if outcome.good)
        loaded = counts.pop(LOADED, 0)
        bad = sum(not outcome.good for outcome in mine)
        errors = ", ".join(f"{name.removesuffix('Error')} {count}" for name, count in counts.most_common())
        yield f"{kind:<18}{len(mine):>6}{loaded:>8}{sum(counts.values()):>9}{bad:>9}   {errors}"


def main() -> None:
    outcomes = run_all()
    if "--list" in sys.argv:
        for outcome in outcomes:
            print(f"{outcome.kind}: {outcome.name} [record {outcome.record}] -> {outcome.outcome}")
    print("\n".join(table(outcomes)))
    bad = [outcome for outcome in outcomes if not outcome.good]
    for outcome in bad:
        print(f"DEFECT {outcome.kind}: {outcome.name} [record {outcome.record}] -> {outcome.outcome}")
    print(f"largest growth of memory by one case: {max(outcome.grown for outcome in outcomes) / 1e6:.1f} MB")
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5]))
    else:
        main()
