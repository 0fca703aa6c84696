"""What training pays for checkpoints that are pushed while it goes on: whole runs, with and without, in turns.

    python benchmarks/checkpoint_pusher.py --seconds 240 --every 60

The Hub on loopback is a process of its own, and waits before it takes an upload. The pusher is made before the loop and
closed after it, neither of which is training time.
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
DELAY = 10.0  # seconds that an upload waits at the Hub


def serve():
    from support.hub_server import Fault, HubServer

    os.nice(19)  # a Hub does not take its time from the machine that trains
    with HubServer() as server:
        server.faults.append(Fault(route="lfs_upload", delay=DELAY))
        print(server.url, server.token, flush=True)
        sys.stdin.read()


def train(model, optimizer, batch, steps, every=None, push=None):
    """Run the loop; returns (seconds, seconds of them in push)."""
    pushing, started = 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        output = model(input_ids=batch, labels=batch)
        (output.loss + output.value.square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if push is not None and step % every == 0:
            before = time.perf_counter()
            push(model, step=step, metrics={"loss": output.loss.item()})
            pushing += time.perf_counter() - before
    return time.perf_counter() - started, pushing


def measure(rounds, seconds, every, threads):
    import torch

    from configuration_gpt2_value import GPT2ValueConfig
    from hub_tools import CheckpointPusher
    from modeling_gpt2_value import GPT2ValueModel

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    size = {"n_layer": 4, "n_embd": 384, "n_head": 6, "vocab_size": 16384, "n_positions": 128}
    model = GPT2ValueModel(GPT2ValueConfig(**size, bos_token_id=0, eos_token_id=0)).train()
    work = (model, torch.optim.AdamW(model.parameters(), lr=1e-4), torch.randint(0, 16384, (2, 64)))
    train(*work, 3)
    step = train(*work, 20)[0] / 20
    steps, each = max(round(seconds / step), 10), max(round(every / step), 1)
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    print(f"{weights / 2**20:.0f} MiB of weights, {steps} steps a run, a checkpoint each {each}, {threads} threads\n")
    print("| run | without (s) | with (s) | ratio | in push (s) | pushed | skipped |")
    print("|---|---|---|---|---|---|---|", flush=True)
    times = {False: [], True: []}
    for number in range(rounds):
        for on in (True, False) if number % 2 == 0 else (False, True):
            if not on:
                times[on].append(train(*work, steps)[0])
                continue
            with CheckpointPusher(f"run-{number}", metric_for_best_model="loss") as pusher:
                taken, pushing = train(*work, steps, each, pusher.push)
            times[on].append(taken)
        plain, pushed = times[False][-1], times[True][-1]
        counts = f"{len(pusher.pushed)} | {len(pusher.skipped)}"
        row = f"| {number + 1} | {plain:.1f} | {pushed:.1f} | {pushed / plain:.3f} | {pushing:.2f} | {counts} |"
        print(row, flush=True)
    # neighbours in time, since what the machine gives drifts by more than what is measured
    ratios = [pushed / plain for plain, pushed in zip(times[False], times[True], strict=True)]
    print(f"\nslowest / fastest run without: {max(times[False]) / min(times[False]):.3f}")
    print(f"with / without, median of the {rounds} ratios: {statistics.median(ratios):.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=240.0, help="of a run")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two checkpoints")
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
        measure(options.rounds, options.seconds, options.every, options.threads)
        server.stdin.close()


if __name__ == "__main__":
    main()
