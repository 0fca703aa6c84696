"""`make matrix`: packages made on one transformers load on every other, with the same numbers.

Builds one virtual environment for each version, with torch and that transformers and nothing of ours. In each, a
package is made (with this checkout on the path, through `hub_tools.save_package`, and verified); then every package is
loaded in every environment without the checkout, measured, saved again, and what was saved is loaded and measured in
every environment once more. Every measurement must repeat the maker's numbers. Packages that earlier releases wrote are
verified in every environment, with the code that they carry. On the oldest and the newest version, one package is also
trained with the oldest and the newest PEFT and Accelerate that we allow, which lie in folders of their own.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

CHECKOUT = Path(__file__).resolve().parents[2]
SHOWS = [("transformers", "packages load, and give the same numbers, from 4.57.6 to the newest (`make matrix`)")]
TORCH = "torch==2.13.0"
VERSIONS = ("4.57.6", "5.0.0", "newest")
TOLERANCE = 1e-6  # of logits, values and log-probabilities; tokens must be equal


def newest():
    """The newest transformers that the constraints file has seen."""
    lines = (CHECKOUT / "constraints.txt").read_text().split()
    return next(line.split("==")[1] for line in lines if line.startswith("transformers=="))


def environment(version):
    """The Python of a virtual environment with torch and `version` of transformers, made when missing."""
    version = newest() if version == "newest" else version
    folder = CHECKOUT / ".matrix" / version
    python = folder / "bin" / "python"
    done = folder / ".done"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, TORCH, f"transformers=={version}"], check=True)
        done.touch()
    return python


def libraries(version):
    """A folder with PEFT and Accelerate for an environment, made when missing; the oldest goes with the oldest."""
    constraints = "constraints-oldest.txt" if version == VERSIONS[0] else "constraints.txt"
    lines = (CHECKOUT / constraints).read_text().split()
    wanted = [line for line in lines if line.startswith(("peft==", "accelerate=="))]
    folder = CHECKOUT / ".matrix" / "-".join(line.replace("==", "-") for line in wanted)
    if not (folder / ".done").exists():
        pip = [environment(version), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--upgrade", "--target", folder, *wanted, "psutil"], check=True)
        (folder / ".done").touch()
    return folder


def run(python, script, *arguments, home, checkout=False):
    """Run a script of this folder; without the checkout the interpreter is isolated from it (-I)."""
    keep = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
    env = {**keep, "HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    if checkout:
        env["PYTHONPATH"] = str(CHECKOUT)
    flags = [] if checkout else ["-I"]
    command = [python, *flags, Path(__file__).parent / script, *arguments]
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} {' '.join(map(str, arguments))} failed on {python}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def differences(expected, found):
    """The largest difference of the numbers, and whether all tokens are equal."""
    largest = max(
        abs(a - b)
        for name in ("logits", "values", "logprobs", "rescored")
        for a, b in zip(expected[name], found[name], strict=True)
    )
    same = all(expected[name] == found[name] for name in ("sampled", "greedy"))
    return largest, same


def compare_tools(found):
    """What PEFT and Trainer gave on each version: rows of a table, and what is wrong."""
    rows, failures = [], []
    expected = next(iter(found.values()))["PEFT"]
    for version, numbers in found.items():
        adapted = numbers["PEFT"]
        same = adapted["drawn"] == expected["drawn"]
        names = [name for name in adapted if name != "drawn"]
        peft = max(abs(a - b) for name in names for a, b in zip(adapted[name], expected[name], strict=True))
        trainer = max(number for name, number in numbers["Trainer"].items() if name.startswith("difference"))
        learnt = [losses[-1] < losses[0] for name, losses in numbers["Trainer"].items() if name.startswith("losses")]
        rows.append((f"{version}, peft {numbers['version']}", f"{peft:.1e}", f"{trainer:.1e}"))
        if not (same and peft <= TOLERANCE and trainer <= TOLERANCE and all(learnt)):
            failures.append((version, "PEFT and Trainer", same, peft, trainer, learnt))
    return rows, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="transformers versions, or 'newest'")
    versions = parser.parse_args().versions
    pythons = {version: environment(version) for version in tqdm(versions, desc="environments")}
    failures, rows = [], []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        homes = {version: scratch / f"home-{version}" for version in versions}
        for home in homes.values():
            home.mkdir()

        def measure(version, package, again=None):
            arguments = [package] if again is None else [package, again]
            return run(pythons[version], "measure.py", *arguments, home=homes[version])

        made = {}
        for version in tqdm(versions, desc="packages made"):
            package = scratch / f"made-{version}"
            made[version] = run(pythons[version], "make.py", package, home=homes[version], checkout=True)
        pairs = list(itertools.product(versions, versions))
        for maker, loader in tqdm(pairs, desc="loaded and saved again"):
            again = scratch / f"made-{maker}-saved-{loader}"
            found = {"loaded": measure(loader, scratch / f"made-{maker}", again)}
            for last in versions:
                found[f"saved again, loaded on {last}"] = measure(last, again)
            compared = {where: differences(made[maker], numbers) for where, numbers in found.items()}
            largest = max(difference for difference, _ in compared.values())
            same = all(equal for _, equal in compared.values())
            rows.append((maker, loader, f"{largest:.1e}", "equal" if same else "DIFFERENT"))
            failures += [(maker, loader, where) for where, (d, equal) in compared.items() if d > TOLERANCE or not equal]

        for archive in sorted((CHECKOUT / "tests" / "released").glob("*.zip")):
            zipfile.ZipFile(archive).extractall(scratch / archive.stem)
            for version in versions:
                package, home = scratch / archive.stem, homes[version]
                found = run(pythons[version], "released.py", package, home=home, checkout=True)["difference"]
                rows.append((archive.stem, version, f"{found:.1e}", "not compared"))
                failures += [(archive.stem, version, found)] if found > TOLERANCE else []

        trained = {}
        ends = [version for version in (VERSIONS[0], VERSIONS[-1]) if version in versions]
        for version in tqdm(ends, desc="PEFT and Trainer"):
            arguments = [libraries(version), scratch / f"made-{ends[0]}"]
            trained[version] = run(pythons[version], "tools.py", *arguments, home=homes[version])
        tools, wrong = compare_tools(trained) if trained else ([], [])
        failures += wrong

    table = Table("made on", "loaded and saved on", "largest difference", "sampled and greedy tokens")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    table = Table("transformers", "LoRA: difference to the oldest", "Trainer: difference to GPT2LMHeadModel")
    for row in tools:
        table.add_row(*row)
    Console().print(table)
    names = ", ".join(f"{version} = {newest()}" if version == "newest" else version for version in versions)
    print(f"{len(pairs)} pairs, {len(pairs) * len(versions)} chains of three, transformers {names}")
    if failures:
        raise SystemExit(f"{len(failures)} comparisons beyond {TOLERANCE}: {failures}")


if __name__ == "__main__":
    main()
