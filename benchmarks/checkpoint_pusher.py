"""The same training loop with and without a CheckpointPusher, on a Hub that is slower than training.

Runs alternate (with, without; without, with; ...), so that what else the machine does falls on both. Each run takes
about `--seconds`; the pusher is made before its loop and flushed after it, neither of which is training time. The
Hub on loopback is a process of its own, and waits before it takes an upload. `make bench` runs this.
"""

import argparse
import logging
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
DELAY = 20.0  # seconds that an upload waits at the Hub; a checkpoint is made every tenth of a run


def serve():
    from hub_server import Fault, HubServer

    with HubServer() as server:
        server.faults.append(Fault(route="lfs_upload", delay=DELAY))
        print(server.url, server.token, flush=True)
        sys.stdin.read()


def train(model, optimizer, batch, steps, push):
    """Run the loop; returns (seconds, seconds of them in push, seconds of this process's CPU)."""
    every, pushing = max(steps // 10, 1), 0.0
    started, cpu = time.perf_counter(), time.process_time()
    for step in range(1, steps + 1):
        output = model(input_ids=batch, labels=batch)
        (output.loss + output.value.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if push is not None and step % every == 0:
            before = time.perf_counter()
            push(model, step=step, metrics={"loss": output.loss.item()})
            pushing += time.perf_counter() - before
    return time.perf_counter() - started, pushing, time.process_time() - cpu


def measure(rounds, seconds, threads):
    import torch

    from configuration_gpt2_value import GPT2ValueConfig
    from hub_tools import CheckpointPusher
    from modeling_gpt2_value import GPT2ValueModel

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    size = {"n_layer": 4, "n_embd": 384, "n_head": 6, "vocab_size": 16384, "n_positions": 128}
    model = GPT2ValueModel(GPT2ValueConfig(**size, bos_token_id=0, eos_token_id=0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch = torch.randint(0, 16384, (4, 64))
    train(model, optimizer, batch, 3, None)
    one, _, _ = train(model, optimizer, batch, 10, None)
    steps = max(round(10 * seconds / one), 10)
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    print(
        f"{weights / 2**20:.0f} MiB of weights, {steps} steps a run, {threads} threads, a checkpoint every {steps // 10}\n"
    )
    print("| run | without (s) | with (s) | ratio | in push (s) | CPU ratio | pushed | skipped | flush (s) |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    times = {False: [], True: []}
    for number in range(rounds):
        row = {}
        for on in (True, False) if number % 2 == 0 else (False, True):
            if on:
                pusher = CheckpointPusher(f"run-{number}", metric_for_best_model="loss")
                row[on] = train(model, optimizer, batch, steps, pusher.push)
                before = time.perf_counter()
                pusher.close()
                flush = time.perf_counter() - before
            else:
                row[on] = train(model, optimizer, batch, steps, None)
            times[on].append(row[on][0])
        (plain, _, plain_cpu), (pushed, pushing, pushed_cpu) = row[False], row[True]
        print(
            f"| {number + 1} | {plain:.1f} | {pushed:.1f} | {pushed / plain:.3f} | {pushing:.2f} | "
            f"{pushed_cpu / plain_cpu:.3f} | {len(pusher.pushed)} | {len(pusher.skipped)} | {flush:.0f} |",
            flush=True,
        )
    ratio = statistics.median(times[True]) / statistics.median(times[False])
    print(f"\nwithout, slowest / fastest run: {max(times[False]) / min(times[False]):.3f} (what else the machine does)")
    print(f"with / without, medians of {rounds} runs each: {ratio:.3f} (at most 1.03)\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return
    command = [sys.executable, __file__, "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        url, token = server.stdout.readline().split()
        os.environ |= {"HF_ENDPOINT": url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        logging.getLogger("hub_tools").setLevel(logging.ERROR)
        measure(options.rounds, options.seconds, options.threads)
        server.stdin.close()


if __name__ == "__main__":
    main()
