"""Rollouts against the other roads to (tokens, log-probabilities, values): interleaved in one process, medians, ratios.

Roads: `rollout` (ours); `generate()` and a scoring pass; `generate(output_scores=True)`, from whose scores TRL's
PPOTrainer took log-probabilities (no values); the seed notebook's loop without a cache; and two floors, which compute
nothing of use: on a CPU the bare `torch.mm` products of the steps, on a GPU the time to read the weights and the cache
once a step at the copy bandwidth measured in the same run.

Weights are random: no road's time depends on them. `make bench` runs this and writes docs/benchmarks.md.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configuration_gpt2_value import GPT2ValueConfig
from modeling_gpt2_value import GPT2ValueModel

OURS, PLAIN = "rollout", "generate() + scoring pass"


def roads(model, queries, T, *, compiled=None, seed_loop=False):
    """Name -> a function that does the work once."""
    B, P = queries.shape
    everything = torch.ones((B, P + T), dtype=torch.long, device=queries.device)
    sampling = {
        "attention_mask": everything[:, :P],
        "max_new_tokens": T,
        "min_new_tokens": T,
        "do_sample": True,
        "top_k": 0,
        "top_p": 1.0,
        "pad_token_id": 0,
        "eos_token_id": None,
    }

    def taken(logits, sequences):
        return logits.log_softmax(-1).gather(-1, sequences[:, P:, None]).squeeze(-1)

    def generate_and_score():
        sequences = model.generate(queries, **sampling)
        output = model(sequences, attention_mask=everything, logits_to_keep=T + 1, use_cache=False)
        return taken(output.logits[:, :-1], sequences), output.value[:, P - 1 : -1]

    def generate_with_scores():
        output = model.generate(queries, **sampling, return_dict_in_generate=True, output_scores=True)
        return taken(torch.stack(output.scores, 1), output.sequences)

    def without_cache():
        tokens = queries
        for _ in range(T):
            logits = model(tokens, use_cache=False).logits[:, -1]
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
        return tokens

    found = {
        OURS: lambda: model.rollout(queries, max_new_tokens=T),
        PLAIN: generate_and_score,
        "generate(output_scores=True)": generate_with_scores,
        "generate() alone": lambda: model.generate(queries, **sampling),
    }
    if compiled is not None:
        found["rollout of torch.compile(model)"] = lambda: type(model).rollout(compiled, queries, max_new_tokens=T)
    if seed_loop:
        found["the seed's loop, no cache"] = without_cache
    if queries.device.type == "cpu":
        found["floor: bare torch.mm"] = bare_products(model, B, T)
    return found


def bare_products(model, B, T):
    """The matrix products of T steps of B rows, by `torch.mm`, and nothing else."""
    layers = [module.weight for module in model.transformer.modules() if type(module).__name__ == "Conv1D"]
    pairs = [(torch.randn(B, weight.shape[0], dtype=weight.dtype), weight) for weight in layers]
    pairs.append((torch.randn(B, model.config.n_embd, dtype=model.dtype), model.lm_head.weight.t()))

    def run():
        for _ in range(T):
            for rows, weight in pairs:
                torch.mm(rows, weight)

    return run


def bandwidth_floor(model, B, P, T):
    """Seconds to read weights and cache once a step, at the copy bandwidth of this GPU (measured here)."""
    buffer = torch.empty(2**28, dtype=torch.float32, device=model.device)
    times = timed({"copy": lambda: buffer.clone()}, 5, model.device)["copy"]
    bandwidth = 2 * buffer.nbytes / statistics.median(times)
    weights = sum(weight.nbytes for weight in model.transformer.h.parameters()) + model.lm_head.weight.nbytes
    token = 2 * model.config.n_layer * model.config.n_embd * model.lm_head.weight.element_size()
    read = T * weights + B * token * sum(range(P, P + T))
    return read / bandwidth, bandwidth


def timed(functions, rounds, device, once=()):
    """Seconds of each function, `rounds` times in turn (those in `once` a single time)."""
    times = {name: [] for name in functions}
    for turn in tqdm(range(rounds + 1), desc="rounds", leave=False):  # the first is the warm-up
        for name, function in functions.items():
            if name in once and turn != 1:
                continue
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["16x16x48", "1x16x48", "64x16x48", "16x16x128"], help="BxPxT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=12, help="12 is GPT-2 124M")
    parser.add_argument("--compile", action="store_true", help="also a rollout of torch.compile(model)")
    parser.add_argument("--seed-loop", action="store_true", help="also the seed's loop, once (slow)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = GPT2ValueConfig(n_layer=arguments.layers, value_head_initializer_range=0.02)
    model = GPT2ValueModel(config).eval().to(device, getattr(torch, arguments.dtype))
    compiled = torch.compile(model, dynamic=True) if arguments.compile else None

    results = []
    for shape in tqdm(arguments.shapes, desc="shapes"):
        B, P, T = map(int, shape.split("x"))
        queries = torch.randint(0, config.vocab_size, (B, P), device=device)
        functions = roads(model, queries, T, compiled=compiled, seed_loop=arguments.seed_loop)
        times = timed(functions, arguments.rounds, device, once=("the seed's loop, no cache",))
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        if device.type == "cuda":
            medians["floor: bandwidth"], bandwidth = bandwidth_floor(model, B, P, T)
        drawn = model.rollout(queries, max_new_tokens=T)
        scored = model.rescore(drawn)
        result = {
            "shape": shape,
            "seconds": medians,
            "times as fast": {name: medians[PLAIN] / seconds for name, seconds in medians.items()},
            "sampled - rescored": (drawn.logprobs - scored.logprobs).abs().max().item(),
            "sampled - rescored, mean": (drawn.logprobs - scored.logprobs).abs().mean().item(),
        }
        if device.type == "cuda":
            result["bandwidth, GB/s"] = bandwidth / 1e9
        results.append(result)
    report = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": arguments.dtype,
        "rounds": arguments.rounds,
        "results": results,
    }
    print(json.dumps(report) if arguments.json else as_markdown(report))


def as_markdown(report):
    """A table for each shape; the ratio is to `generate()` and a scoring pass."""
    setting = (
        f"{report['device']}, {report['dtype']}, {report['threads']} threads, medians of {report['rounds']} rounds"
    )
    lines = []
    for result in report["results"]:
        lines += [
            f"**B x P x T = {result['shape']}** ({setting})",
            "",
            "| road | seconds | times as fast |",
            "|---|---:|---:|",
        ]
        for name, seconds in result["seconds"].items():
            lines.append(f"| {name} | {seconds:.3f} | {result['times as fast'][name]:.2f} |")
        worst, mean = result["sampled - rescored"], result["sampled - rescored, mean"]
        lines += ["", f"abs(sampled - rescored): largest {worst:.1e}, mean {mean:.1e}", ""]
        if "bandwidth, GB/s" in result:
            lines += [f"copy bandwidth {result['bandwidth, GB/s']:.0f} GB/s", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
