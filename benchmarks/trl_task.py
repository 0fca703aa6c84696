"""The task of `make ppo` in TRL 1.12.0's PPOTrainer: the same model, prompts, reward, KL coefficient and episodes.

    TRL-PYTHON benchmarks/trl_task.py train --out runs/trl --seeds 3     with TRL, and vaderSentiment
    python benchmarks/trl_task.py draw --out runs/trl --ours runs/learning

Learning rate, epochs, minibatches, clipping, gamma, lam and temperature are the example's too, and both anneal the rate
to 0. The rest is as each has it: TRL's value model is a second GPT-2 with a random head, its Adam has an eps of 1e-8,
it clips no gradients, and nothing is learnt from the end-of-text token, which is padding too. `draw` takes the runs of
benchmarks/learning.py, writes the figure, and prints a table.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "examples"))

OURS, TRL = "gpt2_value.ppo", "TRL's PPOTrainer"
COLORS = {OURS: "#2a78b5", TRL: "#c8452f"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Those of the demo's that both trainers are given."""

    seed: int
    prompts: Path
    cut_prompts: tuple[int, int] = (2, 8)
    batch_size: int = 64
    minibatch_size: int = 16
    epochs: int = 4
    max_new_tokens: int = 48
    learning_rate: float = 1e-4
    kl_coef: float = 0.05


def train(settings, base, iterations):
    """Score and KL of each iteration of TRL's `train()`."""
    import datasets
    from ppo_task import vader
    from transformers import AutoTokenizer, GPT2ForSequenceClassification, GPT2LMHeadModel
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    from gpt2_value.ppo import make_queries

    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token  # the vocabulary has no other to spare, as GPT-2's has not

    class Body(torch.nn.Module):
        def forward(self, input_ids, attention_mask, **kwargs):
            rows = zip(input_ids, attention_mask.bool(), strict=True)
            texts = [tokenizer.decode(tokens[mask], skip_special_tokens=True) for tokens, mask in rows]
            scores = torch.tensor(vader(texts))
            return argparse.Namespace(hidden_states=[scores[:, None, None].expand(*input_ids.shape, 1)])

    class Reward(torch.nn.Module):
        base_model_prefix = "body"

        def __init__(self):
            super().__init__()
            self.body, self.score = Body(), torch.nn.Identity()

    torch.manual_seed(settings.seed)
    queries = [{"input_ids": query.tolist()} for query in make_queries(settings, tokenizer)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = PPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            seed=settings.seed,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=1,
            num_mini_batches=settings.batch_size // settings.minibatch_size,
            num_ppo_epochs=settings.epochs,
            local_rollout_forward_batch_size=settings.batch_size,
            total_episodes=settings.batch_size * iterations,
            response_length=settings.max_new_tokens,
            stop_token="eos",
            temperature=1.0,
            kl_coef=settings.kl_coef,
            num_sample_generations=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=GPT2LMHeadModel.from_pretrained(base),
            ref_model=GPT2LMHeadModel.from_pretrained(base),
            reward_model=Reward(),
            value_model=GPT2ForSequenceClassification.from_pretrained(base, num_labels=1),
            train_dataset=datasets.Dataset.from_list(queries),
            eval_dataset=datasets.Dataset.from_list(queries[:8]),
        )
        trainer.train()
    logged = [line for line in trainer.state.log_history if "objective/scores" in line]
    return [{"reward": line["objective/scores"], "kl": line["objective/kl"]} for line in logged]


def draw(found, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = (("reward", "mean reward"), ("kl", "KL to the reference, nats a response"))
    for axes, (name, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for method, runs in found.items():
            for number, lines in enumerate(runs):
                label = f"{method}, {len(runs)} seeds" if number == 0 else None
                axes.plot([line[name] for line in lines], color=COLORS[method], label=label, linewidth=1.2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["train", "draw"])
    parser.add_argument("--out", type=Path, default=Path("runs/trl"))
    parser.add_argument("--ours", type=Path, default=Path("runs/learning"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=15)
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "ppo_trl.png")
    arguments = parser.parse_args()
    files = [arguments.out / f"{seed}-{arguments.iterations}.json" for seed in range(arguments.seeds)]
    if arguments.step == "train":
        torch.set_num_threads(1)  # as the example does for a model this small
        from ppo_task import demo_settings

        task = demo_settings()
        arguments.out.mkdir(parents=True, exist_ok=True)
        for seed, file in enumerate(files):
            if not file.exists():
                file.write_text(
                    json.dumps(train(Settings(seed, task["prompts"]), task["base"], arguments.iterations)),
                    encoding="utf-8",
                )
        return
    metrics = [arguments.ours / f"one-{seed}" / "metrics.jsonl" for seed in range(arguments.seeds)]
    found = {
        OURS: [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in metrics],
        TRL: [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()],
    }
    draw(found, arguments.figure)
    print("| trainer | seed | reward | KL at the end | lowest KL |\n|---|---:|---:|---:|---:|")
    for method, runs in found.items():
        for seed, lines in enumerate(runs):
            reward = [line["reward"] for line in lines]
            ends = f"{statistics.fmean(reward[:2]):.2f} -> {statistics.fmean(reward[-5:]):.2f}"
            kl = [line["kl"] for line in lines]
            print(f"| {method} | {seed} | {ends} | {statistics.fmean(kl[-5:]):.1f} | {min(kl):.2f} |")


if __name__ == "__main__":
    main()
