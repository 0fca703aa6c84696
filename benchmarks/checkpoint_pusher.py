"""A training loop with and without a CheckpointPusher, on a Hub that is slower than training.

Two ways, since other work on the machine moves a minute's time by more than what is measured here:

- whole runs, with and without in turns; the pusher is made before the loop and closed after it, neither of which is
  training time;
- segments of one run, with one worker: it is stopped (SIGSTOP) for every other half second of training. The mean step
  while it may run, less the mean step while it may not, is what it takes from training; divided by the processor time
  that it took, this says what each second of a worker costs. Times `worker_process.SHARE`, it is what training pays.
  The same without a pusher (`control`) shows what the machine's other work does to the steps.

The Hub on loopback is a process of its own, and waits before it takes an upload.
"""

import argparse
import contextlib
import itertools
import logging
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
DELAY = 10.0  # seconds that an upload waits at the Hub; a checkpoint is made every tenth of a run


def serve():
    from support.hub_server import Fault, HubServer

    os.nice(19)  # a Hub does not take its time from the machine that trains
    with HubServer() as server:
        server.faults.append(Fault(route="lfs_upload", delay=DELAY))
        print(server.url, server.token, flush=True)
        sys.stdin.read()


def train(model, optimizer, batch, steps, push=None, between=None):
    """Run the loop; returns (seconds, seconds of them in push, seconds of each step)."""
    every, pushing, each = max(steps // 10, 1), 0.0, []
    started = time.perf_counter()
    for step in range(1, steps + 1):
        before = time.perf_counter()
        output = model(input_ids=batch, labels=batch)
        (output.loss + output.value.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after = time.perf_counter()
        each.append(after - before)
        if push is not None and step % every == 0:
            push(model, step=step, metrics={"loss": output.loss.item()})
            pushing += time.perf_counter() - after
        if between is not None:
            between(step)
    return time.perf_counter() - started, pushing, each


def whole_runs(rounds, work, steps, new_pusher):
    print("| run | without (s) | with (s) | ratio | in push (s) | pushed | skipped | close (s) |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    times = {False: [], True: []}
    for number in range(rounds):
        for on in (True, False) if number % 2 == 0 else (False, True):
            pusher = new_pusher() if on else None
            seconds, in_push, _ = train(*work, steps, pusher.push if on else None)
            times[on].append(seconds)
            if on:
                pushing, before = in_push, time.perf_counter()
                pusher.close()
                closing, counts = time.perf_counter() - before, (len(pusher.pushed), len(pusher.skipped))
        plain, pushed = times[False][-1], times[True][-1]
        print(
            f"| {number + 1} | {plain:.1f} | {pushed:.1f} | {pushed / plain:.3f} | {pushing:.2f} | "
            f"{counts[0]} | {counts[1]} | {closing:.0f} |",
            flush=True,
        )
    print(f"\nslowest / fastest run without: {max(times[False]) / min(times[False]):.3f}")
    # neighbours in time, since what the machine gives drifts by more than what is measured
    ratios = [pushed / plain for plain, pushed in zip(times[False], times[True], strict=True)]
    print(f"with / without, median of the {rounds} ratios: {statistics.median(ratios):.3f}")


def tell(pusher, number):
    """Send a signal to the worker and to what it started (verification): its own process group."""
    process = None if pusher is None else pusher._worker
    if process is not None:
        with contextlib.suppress(ProcessLookupError):  # it has not come to making its group
            os.killpg(process.pid, number)


def processor_time(pid):
    """Seconds of a process and all that it started."""
    process = psutil.Process(pid)
    return sum(sum(found.cpu_times()[:4]) for found in (process, *process.children(recursive=True)))


def segments(rounds, work, steps, new_pusher):
    print(
        "| run | steps while stopped (s) | while running (s) | ratio | lost (s) | time of the worker (s) | quotient |"
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    ratios, quotients = [], []
    for number in range(2 * rounds):
        pushes = number % 2 == 1
        pusher, may_run, taken = new_pusher() if pushes else None, [None], [0.0]
        length = max(round(steps / 120), 1)  # of a segment: about half a second of a minute

        def push_first(model, step, metrics, pusher=pusher):
            if step == steps // 10:
                pusher.push(model, step=step, metrics=metrics)

        def between(step, pusher=pusher, length=length, may_run=may_run, taken=taken):
            runs = step % (2 * length) < length  # in the next step
            tell(pusher, signal.SIGCONT if runs else signal.SIGSTOP)
            worker = None if pusher is None else pusher._worker
            if worker is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    taken.append(processor_time(worker.pid))
            there = step > steps // 10 and (pusher is None or worker is not None)
            may_run.append(runs if there else None)

        try:
            _, _, each = train(*work, steps, push_first if pushes else None, between)
        finally:
            tell(pusher, signal.SIGCONT)
        if pushes:
            pusher.close()
        stopped, moving = ([t for t, r in zip(each, may_run, strict=False) if r is on] for on in (False, True))
        ratio = statistics.mean(moving) / statistics.mean(stopped)
        row = f"| {'with' if pushes else 'control'} | {statistics.mean(stopped):.4f} | {statistics.mean(moving):.4f} | "
        row += f"{ratio:.3f} | "
        if pushes:
            lost = (statistics.mean(moving) - statistics.mean(stopped)) * len(moving)
            quotients.append(lost / max(taken))
            row += f"{lost:.2f} | {max(taken):.2f} | {quotients[-1]:.2f} |"
        else:
            ratios.append(ratio)
            row += "- | - | - |"
        print(row, flush=True)
    print(f"\ncontrol, median of {rounds}: {statistics.median(ratios):.3f}")
    print(f"training lost for each second of the worker, median of {rounds}: {statistics.median(quotients):.2f}")


def measure(rounds, seconds, threads, ways):
    import torch

    from configuration_gpt2_value import GPT2ValueConfig
    from hub_tools import CheckpointPusher
    from modeling_gpt2_value import GPT2ValueModel

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    size = {"n_layer": 4, "n_embd": 384, "n_head": 6, "vocab_size": 16384, "n_positions": 128}
    model = GPT2ValueModel(GPT2ValueConfig(**size, bos_token_id=0, eos_token_id=0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = torch.randint(0, 16384, (2, 64))
    work = (model, optimizer, batch)
    train(*work, 3)
    steps = max(round(10 * seconds / train(*work, 10)[0]), 10)
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    print(f"{weights / 2**20:.0f} MiB of weights, {steps} steps a run, {threads} threads\n")
    numbers = itertools.count()

    def new_pusher():
        return CheckpointPusher(f"run-{next(numbers)}", metric_for_best_model="loss")

    if "whole" in ways:
        whole_runs(rounds, work, steps, new_pusher)
    if "segments" in ways:
        segments(rounds, work, steps, new_pusher)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=("whole", "segments"), default=("whole", "segments"))
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        url, token = server.stdout.readline().split()
        # threads that wait by spinning make a busy machine's other work look like ours
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ |= {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        logging.getLogger("hub_tools").setLevel(logging.ERROR)
        measure(options.rounds, options.seconds, options.threads, options.ways)
        server.stdin.close()


if __name__ == "__main__":
    main()
