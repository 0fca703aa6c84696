"""Rollouts against other ways to get tokens, log-probabilities and values: interleaved in one process, medians, ratios.

The others are `generate()` and a scoring pass; `generate(output_scores=True)`, from whose scores TRL's PPOTrainer took
log-probabilities (no values); CTranslate2, a C++ runtime (`pip install ctranslate2`; temperature 1, the full
vocabulary, scores, no values); and the seed notebook's loop without a cache. The floor computes nothing of use. On a
CPU it is the matrix products of the steps alone, by the faster of `torch.mm` and oneDNN with packed weights. On a GPU
it is the time to read the weights and the cache once a step, at the copy bandwidth measured in the same run.

Weights are random: no time depends on them. `make bench` runs this and writes docs/benchmarks.md.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configuration_gpt2_value import GPT2ValueConfig
from modeling_gpt2_value import GPT2ValueModel

OURS, PLAIN, PEER = "rollout", "generate() + scoring pass", "CTranslate2 (no values)"
BY_MM, BY_ONEDNN, FLOOR = "products by torch.mm", "products by oneDNN", "floor: the products alone"
ONCE = ("the seed's loop, no cache",)


def ways(model, queries, T, *, compiled=None, seed_loop=False, engine=None):
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
    if engine is not None:
        found[PEER] = lambda: ctranslate2_responses(engine, queries.tolist(), T)
    if queries.device.type == "cpu":
        found[BY_MM] = bare_products(model, B, T)
        found[BY_ONEDNN] = bare_products(model, B, T, packed_as=torch.float32)
    return found


def ctranslate2_engine(model):
    """The same policy in CTranslate2, or None where it is not installed."""
    try:
        import ctranslate2
    except ImportError:
        return None
    from hub_tools import export_policy, save_package

    with tempfile.TemporaryDirectory() as folder:
        save_package(model, f"{folder}/package")
        export_policy(f"{folder}/package", f"{folder}/policy")
        words = {str(token): token for token in range(model.config.vocab_size)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="0"))
        special = dict.fromkeys(("unk_token", "bos_token", "eos_token"), "0")
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(f"{folder}/policy")
        kind = str(model.dtype).removeprefix("torch.")
        converter = ctranslate2.converters.TransformersConverter(f"{folder}/policy")
        converter.convert(f"{folder}/engine", quantization=kind)
        return ctranslate2.Generator(f"{folder}/engine", intra_threads=torch.get_num_threads(), compute_type=kind)


def ctranslate2_responses(engine, prompts, T):
    """T tokens for each prompt, with their scores."""
    results = engine.generate_batch(
        [[str(token) for token in prompt] for prompt in prompts],
        max_length=T,
        min_length=T,
        sampling_topk=0,
        sampling_temperature=1.0,
        return_scores=True,
        include_prompt_in_result=False,
        end_token=[],
    )
    if any(len(result.sequences_ids[0]) != T for result in results):
        raise SystemExit("CTranslate2 drew other lengths than it was asked for: nothing to compare.")
    return results


def bare_products(model, B, T, *, packed_as=None):
    """The matrix products of T steps of B rows, and nothing else: by torch.mm, or packed by oneDNN as this dtype."""
    weights = [module.weight.t() for module in model.transformer.modules() if type(module).__name__ == "Conv1D"]
    weights.append(model.lm_head.weight)  # [out, in]
    pairs = [(torch.randn(B, weight.shape[1], dtype=weight.dtype), weight) for weight in weights]
    if packed_as is not None:
        pack = torch.ops.mkldnn._reorder_linear_weight
        pairs = [(rows.to(packed_as), pack(weight.to(packed_as).contiguous(), B)) for rows, weight in pairs]

    def run():
        for _ in range(T):
            for rows, weight in pairs:
                if packed_as is not None:
                    torch.ops.mkldnn._linear_pointwise(rows, weight, None, "none", [], "")
                else:
                    torch.mm(rows, weight.t())

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
    engine = ctranslate2_engine(model) if device.type == "cpu" and arguments.dtype == "float32" else None

    results = []
    for shape in tqdm(arguments.shapes, desc="shapes"):
        B, P, T = map(int, shape.split("x"))
        queries = torch.randint(0, config.vocab_size, (B, P), device=device)
        functions = ways(model, queries, T, compiled=compiled, seed_loop=arguments.seed_loop, engine=engine)
        times = timed(functions, arguments.rounds, device, once=ONCE)
        medians = {name: statistics.median(seconds) for name, seconds in times.items()}
        if BY_MM in medians:
            medians[FLOOR] = min(medians.pop(name) for name in (BY_MM, BY_ONEDNN) if name in medians)
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
            "| | seconds | times as fast |",
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
