"""Values, advantages and losses of this project against those of TRL 1.12.0's PPOTrainer on the same batch.

    python tests/slow/compare_ppo_with_trl.py export FOLDER        with this package
    TRL-PYTHON tests/slow/compare_ppo_with_trl.py write FOLDER     with TRL 1.12.0 (the last with the trainer)
    python tests/slow/compare_ppo_with_trl.py compare FOLDER       with this package

The first exports a critic. The second runs TRL's own `train()` with it as `value_model`, for one rollout and two
updates, and saves what it held in its hands on the way: it replaces no computation, but looks at the local variables of
`train()` whenever that calls `masked_mean` or `masked_whiten`. The third puts the same tokens, log-probabilities and
scores through our model and the functions of gpt2_value, and prints where the numbers agree and where they do not. It
exits with 1 where they differ and docs/ppo.md does not say so. `make compare-trl` runs all.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from safetensors.torch import load_file, save_file
from trl_steps import run_step

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
B, P, T, V = 16, 5, 14, 40
END, OWN = V - 1, V - 2  # the end of a text, and a token that is nothing but padding
CASES = {"a token of its own": OWN, "the end-of-text token": END}
SHAPE = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": V, "n_positions": 32, "initializer_range": 0.3}
IDS = {"bos_token_id": END, "eos_token_id": END}
KL_COEF, GAMMA, LAM, CLIP = 0.2, 1.0, 0.95, 0.2
EXACT = 1e-5


def critic():
    """A model with values that differ from token to token."""
    from gpt2_value import GPT2ValueConfig, GPT2ValueModel

    torch.manual_seed(0)
    model = GPT2ValueModel(GPT2ValueConfig(**SHAPE, **IDS, value_head_initializer_range=0.3)).eval()
    with torch.no_grad():
        model.v_head.summary.bias.fill_(0.7)  # a classifier's `score` has none: it must be somewhere else
    return model


def export(folder):
    from gpt2_value import export_critic

    export_critic(critic(), folder / "critic", head="sequence-classification")


def write(folder):
    """Run TRL once for each case, and save what it computed."""
    import trl

    for number, (name, pad) in enumerate(CASES.items()):
        save_file(numbers_of_trl(folder / "critic", pad), folder / f"case-{number}.safetensors")
        print(f"TRL {trl.__version__}: padding is {name}")


def numbers_of_trl(critic, pad):
    """Local variables of TRL's `train()` after its advantages and at each of its updates."""
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    class Digits(torch.nn.Module):
        """Scores that depend on every token up to the last."""

        base_model_prefix = "body"

        def __init__(self):
            super().__init__()
            self.body, self.score = Sums(), torch.nn.Identity()

    class Sums(torch.nn.Module):
        def forward(self, input_ids, **kwargs):
            return argparse.Namespace(hidden_states=[(input_ids.cumsum(1) % 7 - 3).float()[..., None]])

    found = {}
    original = {name: getattr(ppo_trainer, name) for name in ("masked_mean", "masked_whiten", "selective_log_softmax")}

    def keep(names, under=""):
        held = sys._getframe(2).f_locals
        found.update({f"{under}{name}": torch.as_tensor(held[name]).detach().clone() for name in names})

    def whiten(values, *args, **kwargs):
        names = ["query_responses", "responses", "values", "scores", "rewards", "returns"]
        keep([*names, "padding_mask", "padding_mask_p1"])
        found["advantages"], found["white"] = values.clone(), original["masked_whiten"](values, *args, **kwargs)
        return found["white"]

    def mean(*args, **kwargs):
        if "pg_loss" in sys._getframe(1).f_locals:  # the fourth of an update: both losses are there
            names = ["new_logprobs", "mb_logprobs", "mb_advantage", "vpred", "mb_values", "mb_return"]
            number = sum(name.endswith("pg_loss") for name in found)
            keep([*names, "micro_batch_inds", "pg_loss", "vf_loss"], f"update-{number}/")
        return original["masked_mean"](*args, **kwargs)

    def log_softmax(logits, index):
        logprobs = original["selective_log_softmax"](logits, index)
        found.setdefault("ref_logprobs" if "logprobs" in found else "logprobs", logprobs.detach().clone())
        return logprobs

    for name, watched in zip(original, (mean, whiten, log_softmax), strict=True):
        setattr(ppo_trainer, name, watched)
    words = Tokenizer(models.WordLevel({str(token): token for token in range(V)}, unk_token="0"))
    tokens = {"eos_token": str(END), "pad_token": str(pad), "padding_side": "left"}
    torch.manual_seed(0)
    config = GPT2Config(**SHAPE, **IDS, tie_word_embeddings=False, pad_token_id=pad)
    policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    with torch.no_grad():  # rows of ones read the bias of the last layer norm alone: these two logits are constants
        for model in (policy, reference):
            model.transformer.ln_f.bias.fill_(1)
            model.lm_head.weight[OWN] = -2.0  # -64: never drawn
            model.lm_head.weight[END] = 0.1  # +3.2
    prompts = [{"input_ids": torch.randint(OWN, (1 + row % P,)).tolist()} for row in range(B)]
    value_model = AutoModelForSequenceClassification.from_pretrained(critic)
    before = value_model.score.weight.clone()
    with tempfile.TemporaryDirectory() as output:
        arguments = PPOConfig(
            output_dir=output,
            use_cpu=True,
            bf16=False,
            seed=0,
            stop_token="eos",
            num_sample_generations=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            learning_rate=3e-3,
            per_device_train_batch_size=B,
            gradient_accumulation_steps=1,
            num_mini_batches=1,
            num_ppo_epochs=2,
            local_rollout_forward_batch_size=B,
            total_episodes=B,
            response_length=T,
            temperature=1.0,
            kl_coef=KL_COEF,
            gamma=GAMMA,
            lam=LAM,
            cliprange=CLIP,
            cliprange_value=CLIP,
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **tokens),
            model=policy,
            ref_model=reference,
            reward_model=Digits(),
            value_model=value_model,
            train_dataset=prompts,
            eval_dataset=prompts,
        )
        trainer.train()
    for name, function in original.items():
        setattr(ppo_trainer, name, function)
    found["critic was trained"] = (value_model.score.weight != before).any()
    return {name: value.contiguous() for name, value in found.items()}


def compare(folder):
    """Print the table; returns how many numbers differ that should not."""
    wrong = 0
    print("| padding | number | rows or tokens | largest difference | |\n|---|---|---|---:|---|")
    for number, (name, pad) in enumerate(CASES.items()):
        for what, which, gap, expected in gaps(load_file(folder / f"case-{number}.safetensors"), pad):
            wrong += (gap <= EXACT) != (expected == "")
            print(f"| {name} | {what} | {which} | {gap:.1e} | {expected or 'equal'} |")
    print(f"\n{wrong} of these are not as they should be")
    return wrong


def gaps(trl, pad):
    """(what, of which rows or tokens, largest difference, why it may differ or "") of one case."""
    import gpt2_value as ours

    is_end = (trl["responses"] == END).long()
    mask = is_end.cumsum(1) - is_end == 0  # drawn, the end among them
    ended = is_end.bool().any(1)
    yield "critic trained", "", float(not trl["critic was trained"]), ""
    tokens = trl["query_responses"]
    with torch.no_grad():
        values = critic()(tokens, attention_mask=(tokens != pad).long()).value[:, -T - 1 : -1]
    yield "values", "drawn", ((values - trl["values"]).abs() * mask).max().item(), ""
    rewards = ours.token_rewards(trl["scores"], trl["logprobs"], trl["ref_logprobs"], mask, KL_COEF)
    advantages, returns = ours.advantages_and_returns(rewards, trl["values"], mask, GAMMA, LAM)
    pads_with_end = bool((trl["padding_mask"] & mask).any())
    place = "its KL leaves the end token out" if pads_with_end else "its score stands after the last drawn token"
    for rows, of, why in ((~ended, "without an end", ""), (ended, "with an end", place)):
        for what, found in (("rewards", rewards), ("advantages", advantages), ("returns", returns)):
            yield what, of, ((found - trl[what]).abs() * mask)[rows].max().item(), why
    learnt = ~trl["padding_mask"]
    white, n = ours.whiten(trl["advantages"], learnt), learnt.sum()
    for what, scale, why in (
        ("whitened advantages, of its own", 1, "it divides by n - 1, ours by n"),
        ("the same, times sqrt(n / (n - 1))", (n / (n - 1)).sqrt(), ""),
    ):
        yield what, "it trains", ((trl["white"] * scale - white).abs() * learnt).max().item(), why
    for number in range(2):
        u = {name.split("/")[1]: value for name, value in trl.items() if name.startswith(f"update-{number}/")}
        learnt, valued = (~trl[name][u["micro_batch_inds"]] for name in ("padding_mask", "padding_mask_p1"))
        loss = ours.policy_loss(u["new_logprobs"], u["mb_logprobs"], u["mb_advantage"], learnt, CLIP)
        yield f"policy loss, update {number}", "it trains", (loss - u["pg_loss"]).abs().item(), ""
        loss = ours.value_loss(u["vpred"], u["mb_values"], u["mb_return"], valued, CLIP)
        yield f"value loss, update {number}", "it trains, and one more", (loss - u["vf_loss"]).abs().item(), ""


if __name__ == "__main__":
    sys.exit(run_step(__doc__, export=export, write=write, compare=compare))
