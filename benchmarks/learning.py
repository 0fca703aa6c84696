"""Learning curves of `make ppo`: several seeds in one process, and in two that `accelerate launch` starts.

Every run is the command of `make ppo`, in a folder of its own; a run that is there already is continued or left as it
is. Writes a figure, and prints the table of docs/ppo.md.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
ONE, TWO = "one process", "two processes"
COLORS = {ONE: "#2a78b5", TWO: "#c8452f"}
PANELS = (
    ("reward", "mean reward"),
    ("kl", "KL to the reference, nats a response"),
    ("explained_variance", "explained variance of the values"),
)
# On a machine without a GPU the processes talk by gloo; the launcher's --cpu would start a single one.
LAUNCHERS = {
    ONE: [sys.executable],
    TWO: [
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}


def run(kind, seed, folder, iterations, as_it_is):
    """The metrics of a run, which is continued first if it should be."""
    out = folder / f"{kind.split()[0]}-{seed}"
    options = ["--out", out, "--seed", seed, "--iterations", iterations]
    if not as_it_is and not (out / "figure.png").exists():  # what a run writes last
        subprocess.run([*LAUNCHERS[kind], ROOT / "examples" / "ppo.py", *map(str, options)], check=True)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def mean(lines, name):
    return sum(line[name] for line in lines) / len(lines)


def row(kind, seed, lines):
    first, last = lines[:2], lines[-3:]
    cells = [
        kind,
        seed,
        len(lines),
        f"{mean(first, 'reward'):.2f} -> {mean(last, 'reward'):.2f}",
        f"{mean(last, 'kl'):.1f}",
        f"{min(line['kl'] for line in lines):.1e}",
        f"{mean(last, 'explained_variance'):.2f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def draw(found, file):
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("iteration")
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.grid(alpha=0.3)
        for number, ((kind, _), lines) in enumerate(found.items()):
            is_first = number == 0 or list(found)[number - 1][0] != kind
            runs = sum(other == kind for other, _ in found)
            label = f"{kind}, {runs} {'seeds' if runs > 1 else 'seed'}" if is_first else None
            style = {"linewidth": 1.1, "alpha": 0.85} if kind == ONE else {"linewidth": 1.8}
            axes.plot([line[name] for line in lines], color=COLORS[kind], label=label, **style)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/learning"))
    parser.add_argument("--seeds", type=int, default=5, help="in one process")
    parser.add_argument("--two", type=int, default=1, help="seeds in two processes")
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--as-it-is", action="store_true", help="draw what is there, finished or not")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "ppo_curves.png")
    arguments = parser.parse_args()
    plans = [(ONE, seed) for seed in range(arguments.seeds)] + [(TWO, seed) for seed in range(arguments.two)]
    found, rows = {}, []
    for kind, seed in plans:
        found[kind, seed] = run(kind, seed, arguments.out, arguments.iterations, arguments.as_it_is)
        rows.append(row(kind, seed, found[kind, seed]))
        draw(found, arguments.figure)
    print("| run | seed | iterations | reward | KL at the end | lowest KL | explained variance |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
