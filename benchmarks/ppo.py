"""One PPO iteration of gpt2_value.ppo and of TRL 1.12.0's PPOTrainer: seconds and peak memory.

    make bench-ppo

An iteration is a rollout, its scores under policy and reference, and four epochs of one update each, on the whole
batch: GPT-2 124M with random weights, float32, temperature 1. Both estimate the same advantages and make the same
number of steps; the reward costs nothing in either. TRL has its own environment and its value model is a second GPT-2,
as its documentation has it. Each turn is a fresh process, theirs after ours; the first of several iterations warms up
and is not counted. Memory is the largest resident size of the process. Processor seconds are those of all threads:
where other work runs on the machine, they say more than the clock, with --threads 1.

Imports the package in one environment, TRL alone in the other.
"""

import argparse
import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from tokenizers import Tokenizer, models
from transformers import GPT2Config, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
OURS, TRL = "gpt2_value.ppo", "TRL's PPOTrainer"
EPOCHS = 4
MEASURED = {"seconds": 1, "processor seconds": 1, "peak MiB": 0}  # name -> digits


def tokenizer(vocabulary):
    """A word for each id. The last id is the end of the text, which a random model all but never draws."""
    words = {str(token): token for token in range(vocabulary - 1)} | {"<|endoftext|>": vocabulary - 1}
    ends = dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), **ends)


def prompts(number, P, vocabulary):
    return torch.randint(vocabulary - 1, (number, P), generator=torch.Generator().manual_seed(0))


def now():
    return time.perf_counter(), time.process_time()


def iterations_of_ours(shape, iterations, layers):
    """Clock and processor before, between and after iterations."""
    sys.path.insert(0, str(ROOT))
    from accelerate import Accelerator

    from gpt2_value import GPT2ValueConfig, GPT2ValueModel, PPOSettings, rollout
    from gpt2_value.ppo import Run, Task

    B, P, T = shape
    config = GPT2ValueConfig(n_layer=layers)
    model, reference = (GPT2ValueModel(config).eval() for _ in range(2))
    reference.load_state_dict(model.state_dict())
    queries = list(prompts(B, P, config.vocab_size))
    task = Task(
        model=model,
        reference=reference.requires_grad_(False),
        critic=None,
        tokenizer=tokenizer(config.vocab_size),
        queries=queries,
        reward=lambda drawn: torch.zeros(drawn.responses.shape),
        facts={},
    )
    settings = PPOSettings(
        base="", prompts=[], iterations=iterations, batch_size=B, minibatch_size=B, epochs=EPOCHS, max_new_tokens=T
    )
    run = Run(settings, task, Accelerator(cpu=True), rollout)
    times = [now()]
    for iteration in range(iterations):
        run.learn(run.collect(iteration))
        times.append(now())
    return times


def iterations_of_trl(shape, iterations, layers):
    """Clock and processor at the beginning of TRL's `train()` and after each of its iterations."""
    import datasets
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    class Clock(TrainerCallback):
        def __init__(self):
            self.times = []

        def on_train_begin(self, *args, **kwargs):
            self.times.append(now())

        def on_step_end(self, *args, **kwargs):
            self.times.append(now())

    class NoReward(torch.nn.Module):
        """Scores of 0 in the form that TRL asks for: a body, and a layer that reads its hidden states."""

        base_model_prefix = "body"

        def __init__(self):
            super().__init__()
            self.body, self.score = Zeros(), torch.nn.Identity()

    class Zeros(torch.nn.Module):
        def forward(self, input_ids, **kwargs):
            return argparse.Namespace(hidden_states=[torch.zeros(*input_ids.shape, 1)])

    B, P, T = shape
    words = tokenizer(GPT2Config().vocab_size)
    ends = {"eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    config = GPT2Config(n_layer=layers, num_labels=1, **ends)
    policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    reference.load_state_dict(policy.state_dict())
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            seed=0,
            per_device_train_batch_size=B,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=EPOCHS,
            local_rollout_forward_batch_size=B,
            total_episodes=B * iterations,
            response_length=T,
            stop_token="eos",
            temperature=1.0,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
        )
        PPOTrainer(
            args=arguments,
            processing_class=words,
            model=policy,
            ref_model=reference,
            reward_model=NoReward(),
            value_model=GPT2ForSequenceClassification(config),
            train_dataset=datasets.Dataset.from_dict({"input_ids": prompts(B, P, config.vocab_size).tolist()}),
            eval_dataset=datasets.Dataset.from_dict({"input_ids": prompts(B, P, config.vocab_size).tolist()}),
            callbacks=[clock],
        ).train()
    return clock.times


def measured(python, method, arguments):
    """Seconds of the iterations that count, and peak MiB, of a process of its own."""
    passed = [f"--{name}={getattr(arguments, name)}" for name in ("shape", "iterations", "layers", "threads")]
    command = [python, __file__, "--only", method, *passed]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def as_markdown(found, arguments):
    medians = {
        method: {name: statistics.median(turn[name] for turn in turns) for name in MEASURED}
        for method, turns in found.items()
    }
    lines = [
        f"**B x P x T = {arguments.shape}** (cpu, float32, {arguments.threads} thread(s), medians of "
        f"{arguments.rounds} process(es) each, {max(1, arguments.iterations - 1)} iteration(s) counted in each)",
        "",
        "| one PPO iteration | " + "".join(f"{name} | of TRL's | " for name in MEASURED),
        f"|---|{'---:|' * 2 * len(MEASURED)}",
    ]
    for method, median in medians.items():
        cells = [method]
        for name, digits in MEASURED.items():
            cells += [f"{median[name]:.{digits}f}", f"{median[name] / medians[TRL][name]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    for name in MEASURED:
        ratios = (ours[name] / trl[name] for ours, trl in zip(found[OURS], found[TRL], strict=True))
        lines += ["", f"{name}, ours / TRL's, turn by turn: {', '.join(f'{ratio:.2f}' for ratio in ratios)}"]
    return "\n".join([*lines, ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", default=ROOT / ".trl/bin/python", help="of an environment with TRL")
    parser.add_argument("--shape", default="16x16x48", help="BxPxT")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each")
    parser.add_argument(
        "--iterations", type=int, default=2, help="in each process; the first of several is not counted"
    )
    parser.add_argument("--layers", type=int, default=12, help="12 is GPT-2 124M")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=[OURS, TRL], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        shape = tuple(map(int, arguments.shape.split("x")))
        torch.manual_seed(0)
        torch.set_num_threads(arguments.threads)
        work = iterations_of_ours if arguments.only == OURS else iterations_of_trl
        times = work(shape, arguments.iterations, arguments.layers)
        warm_up = 1 if arguments.iterations > 1 else 0
        counted = [(t1 - t0, p1 - p0) for (t0, p0), (t1, p1) in itertools.pairwise(times[warm_up:])]
        clock, processor = (statistics.median(column) for column in zip(*counted, strict=True))
        scale = 1024 if sys.platform != "darwin" else 1024**2
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
        print(json.dumps({"seconds": clock, "processor seconds": processor, "peak MiB": peak}))
        return
    found = {OURS: [], TRL: []}
    for turn in range(arguments.rounds):
        for method, python in ((OURS, sys.executable), (TRL, arguments.trl_python)):
            found[method].append(measured(python, method, arguments))
            print(f"turn {turn}, {method}: {found[method][-1]}", file=sys.stderr)
    print(as_markdown(found, arguments))


if __name__ == "__main__":
    main()
