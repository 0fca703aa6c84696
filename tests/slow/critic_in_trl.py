"""An exported critic as the `value_model` of TRL 1.12.0's PPOTrainer: its values are the model's, and it is trained.

    python tests/slow/critic_in_trl.py write FOLDER                with this package
    TRL-PYTHON tests/slow/critic_in_trl.py compare FOLDER          with TRL 1.12.0 (the last with the trainer)

The first exports a critic, and saves the model's own values for padded prompts. The second reads it as transformers
does, without this package, gets the same values by the function that TRL's trainer calls, and lets that train for two
steps.
`make compare-trl` runs both.
"""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from safetensors.torch import load_file, save_file
from trl_steps import PPO_CONFIG, write_or_compare

SHOWS = [("TRL", "PPOTrainer takes `export_critic`'s classifier as `value_model`, and trains it (`make compare-trl`)")]
B, P, T, V = 16, 5, 14, 40
END, PAD = V - 1, V - 2
EXACT = 1e-6  # of the largest value, where that is above 1
SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": V, "n_positions": 32}
IDS = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": PAD}


def write(folder: Path) -> None:
    """Export a critic with weights that differ from token to token, and save what the model itself says."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from configuration_gpt2_value import GPT2ValueConfig
    from hub_tools import export_critic
    from modeling_gpt2_value import GPT2ValueModel

    torch.manual_seed(0)
    config = GPT2ValueConfig(**SHAPE, **IDS, initializer_range=0.3, value_head_initializer_range=0.3)
    model = GPT2ValueModel(config).eval()
    with torch.no_grad():
        model.v_head.summary.bias.fill_(0.7)  # a classifier's `score` has none: it must be somewhere else
    export_critic(model, folder / "critic", head="sequence-classification")
    tokens = torch.randint(PAD, (B, P + T))
    mask = torch.arange(P + T) >= torch.arange(B)[:, None] % P  # prompts with padding on the left
    with torch.no_grad():
        values = model(tokens, attention_mask=mask.long()).value
    save_file({"tokens": tokens.masked_fill(~mask, PAD), "values": values}, folder / "values.safetensors")


def compare(folder: Path) -> int:
    """Print what TRL makes of the critic; returns how much of it is wrong."""
    import trl
    from transformers import AutoModelForSequenceClassification
    from trl.experimental.utils import get_reward

    critic = AutoModelForSequenceClassification.from_pretrained(folder / "critic")
    expected = load_file(folder / "values.safetensors")
    with torch.no_grad():
        values = get_reward(critic, expected["tokens"], PAD, P)[0].squeeze(-1)
    mask = expected["tokens"] != PAD
    gap = (values - expected["values"])[mask].abs().max().item()
    largest = expected["values"][mask].abs().max().item()
    before = {name: weight.clone() for name, weight in critic.named_parameters()}
    losses = train(critic)
    moved = [name for name, weight in critic.named_parameters() if not torch.equal(weight, before[name])]
    print(f"TRL {trl.__version__}: values of {int(mask.sum())} tokens, up to {largest:.2f}, differ by {gap:.1e}")
    print(f"value losses of {len(losses)} steps: {losses}; {len(moved)} of {len(before)} weights were trained")
    wrong = [gap > EXACT * max(1, largest), len(losses) != 2, not all(0 < loss < float("inf") for loss in losses)]
    wrong.append("score.weight" not in moved or len(moved) < len(before) // 2)
    return sum(wrong)


def train(critic) -> list[float]:
    """Two steps of TRL's PPOTrainer; the value loss of each."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    words = {str(token): token for token in range(V)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), eos_token=str(END), pad_token=str(PAD)
    )
    config = GPT2Config(**SHAPE, **IDS, num_labels=1, initializer_range=0.3)
    prompts = datasets.Dataset.from_dict({"input_ids": torch.randint(PAD, (2 * B, P)).tolist()})
    with tempfile.TemporaryDirectory() as output:
        arguments = PPOConfig(
            **PPO_CONFIG,
            output_dir=output,
            learning_rate=1e-3,
            per_device_train_batch_size=B,
            num_ppo_epochs=1,
            total_episodes=2 * B,
            response_length=T,
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=GPT2LMHeadModel(config),
            ref_model=GPT2LMHeadModel(config),
            reward_model=GPT2ForSequenceClassification(config),
            value_model=critic,
            train_dataset=prompts,
            eval_dataset=prompts,
        )
        trainer.train()
    return [float(line["loss/value_avg"]) for line in trainer.state.log_history if "loss/value_avg" in line]


if __name__ == "__main__":
    sys.exit(write_or_compare(__doc__, "where the critic lies", write, compare))
