"""`rescore` with gradients against full logits and log-softmax: memory in processes of their own, time interleaved.

Memory is the peak resident size of a process (getrusage), less that of one which runs only the body's own forward and
backward pass. `make bench` runs this and writes docs/benchmarks.md.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configuration_gpt2_value import GPT2ValueConfig
from generation_gpt2_value import Rollout
from modeling_gpt2_value import GPT2ValueModel
from sampling_gpt2_value import Sampling

WAYS = ("body alone", "full logits", "rescore")


def scene(B, P, T):
    """A 124M model in training mode (dropout 0, as scoring has it) and a rollout of random tokens, unscored."""
    torch.manual_seed(0)
    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_first_dropout"), 0.0)
    model = GPT2ValueModel(GPT2ValueConfig(**dropouts, value_head_initializer_range=0.02)).train()
    sequences = torch.randint(0, model.config.vocab_size, (B, P + T))
    return model, Rollout(
        sequences=sequences,
        attention_mask=torch.ones_like(sequences),
        responses=sequences[:, P:],
        response_mask=torch.ones((B, T), dtype=torch.bool),
        logprobs=torch.zeros(B, T),
        values=torch.zeros(B, T),
        truncated=torch.ones(B, dtype=torch.bool),
        kept=None,
        sampling=Sampling(),
    )


def work(way, model, rollout):
    """Log-probabilities and values of the responses, and their gradient."""
    model.zero_grad(set_to_none=True)
    T = rollout.responses.shape[1]
    if way == "body alone":
        model.transformer(rollout.sequences[:, :-1], use_cache=False).last_hidden_state.sum().backward()
        return
    if way == "rescore":
        scored = model.rescore(rollout)
        logprobs, values = scored.logprobs, scored.values
    else:
        output = model(rollout.sequences[:, :-1], use_cache=False)
        logprobs = output.logits[:, -T:].log_softmax(-1)
        logprobs = logprobs.gather(-1, rollout.responses[..., None]).squeeze(-1)
        values = output.value[:, -T:]
    (logprobs.mean() + values.pow(2).mean()).backward()


def peak_mib(way, shape):
    """Peak resident MiB of a fresh process that does the work twice."""
    command = [sys.executable, __file__, "--shape", shape, "--only", way]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="16x0x256", help="BxPxT; P=0 scores every token after the first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    B, P, T = map(int, arguments.shape.split("x"))
    if P == 0:
        P, T = 1, T - 1
    model, rollout = scene(B, P, T)
    if arguments.only:
        for _ in range(2):
            work(arguments.only, model, rollout)
        scale = 1024 if sys.platform != "darwin" else 1024**2
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale)
        return
    memory = {way: peak_mib(way, arguments.shape) for way in tqdm(WAYS, desc="memory")}
    times = {way: [] for way in WAYS}
    for turn in tqdm(range(arguments.rounds + 1), desc="time"):
        for way in WAYS:
            start = time.perf_counter()
            work(way, model, rollout)
            if turn:
                times[way].append(time.perf_counter() - start)
    seconds = {way: statistics.median(found) for way, found in times.items()}
    above = {way: memory[way] - memory["body alone"] for way in WAYS}
    report = {
        "shape": arguments.shape,
        "threads": torch.get_num_threads(),
        "peak MiB": memory,
        "seconds": seconds,
        "memory above the body, of full logits": above["rescore"] / above["full logits"],
        "time, of full logits": seconds["rescore"] / seconds["full logits"],
    }
    print(json.dumps(report) if arguments.json else as_markdown(report))


def as_markdown(report):
    lines = [
        f"**{report['shape']} (BxPxT), float32, {report['threads']} threads**",
        "",
        "| | peak MiB | above the body | seconds |",
        "|---|---:|---:|---:|",
    ]
    for way in WAYS:
        above = report["peak MiB"][way] - report["peak MiB"]["body alone"]
        lines.append(f"| {way} | {report['peak MiB'][way]:.0f} | {above:.0f} | {report['seconds'][way]:.2f} |")
    memory, seconds = report["memory above the body, of full logits"], report["time, of full logits"]
    return "\n".join([*lines, "", f"rescore / full logits: memory above the body {memory:.3f}, time {seconds:.2f}", ""])


if __name__ == "__main__":
    main()
