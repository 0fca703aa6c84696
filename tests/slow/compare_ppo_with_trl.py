"""Advantages and losses of gpt2_value.ppo against those that TRL 1.12.0's PPOTrainer computes on the same batch.

    TRL-PYTHON tests/slow/compare_ppo_with_trl.py write FOLDER     with TRL 1.12.0 (the last with the trainer)
    python tests/slow/compare_ppo_with_trl.py compare FOLDER       with this package

The first runs TRL's own `train()` for one rollout and two updates, and saves what it held in its hands on the way: it
replaces no computation, but looks at the local variables of `train()` whenever that calls `masked_mean` or
`masked_whiten`. The second puts the same log-probabilities, values and scores through the functions of gpt2_value, and
prints where the numbers agree and where they do not. It exits with 1 where they differ and docs/ppo.md does not say so.
`make compare-trl` runs both.
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
from trl_steps import PPO_CONFIG, write_or_compare

SHOWS = [("TRL", "advantages and losses of gpt2_value.ppo against PPOTrainer's (`make compare-trl`)")]
B, P, T, V = 16, 5, 14, 40
END, OWN = V - 1, V - 2  # the end of a text, and a token that is nothing but padding
CASES = {"padding is a token of its own": OWN, "padding is the end-of-text token": END}
SETTINGS = {"kl_coef": 0.2, "gamma": 1.0, "lam": 0.95}
CLIP = 0.2
EXACT = 1e-5


def write(folder: Path) -> None:
    """Run TRL once for each case, and save what it computed."""
    import transformers
    import trl

    for number, (name, pad) in enumerate(CASES.items()):
        save_file(numbers_of_trl(pad), folder / f"case-{number}.safetensors")
        print(f"TRL {trl.__version__}, transformers {transformers.__version__}: {name}")


def numbers_of_trl(pad: int) -> dict[str, torch.Tensor]:
    """Local variables of TRL's `train()` after its advantages and at each of its updates."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerFast
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    class Digits(torch.nn.Module):
        """Scores that depend on every token up to the last."""

        base_model_prefix = "body"

        def __init__(self):
            super().__init__()
            self.body, self.score = Sums(), torch.nn.Identity()

    class Sums(torch.nn.Module):
        def forward(self, input_ids, **kwargs):
            return argparse.Namespace(hidden_states=[(input_ids.cumsum(1) % 7 - 3).float().unsqueeze(-1)])

    seen: dict[str, torch.Tensor] = {}
    of_updates: list[dict[str, torch.Tensor]] = []
    raw: list[torch.Tensor] = []
    mean, whiten, log_softmax = ppo_trainer.masked_mean, ppo_trainer.masked_whiten, ppo_trainer.selective_log_softmax

    def watched_whiten(values, mask, *args, **kwargs):
        held = sys._getframe(1).f_locals
        names = ("responses", "values", "scores", "rewards", "returns", "padding_mask", "padding_mask_p1")
        seen.update({name: held[name].clone() for name in names} | {"advantages": values.clone()})
        seen["white"] = whiten(values, mask, *args, **kwargs)
        return seen["white"]

    def watched_mean(values, mask, *args, **kwargs):
        held = sys._getframe(1).f_locals
        if "pg_loss" in held:  # the fourth of an update: both losses are there
            names = ("new_logprobs", "mb_logprobs", "mb_advantage", "vpred", "mb_values", "mb_return")
            update = {name: held[name].detach().clone() for name in (*names, "pg_loss", "vf_loss")}
            update["rows"] = torch.as_tensor(held["micro_batch_inds"])
            of_updates.append(update)
        return mean(values, mask, *args, **kwargs)

    def watched_log_softmax(logits, index):
        raw.append(log_softmax(logits, index).detach().clone())
        return log_softmax(logits, index)

    patches = {"masked_mean": watched_mean, "masked_whiten": watched_whiten}
    for name, function in (patches | {"selective_log_softmax": watched_log_softmax}).items():
        setattr(ppo_trainer, name, function)

    words = {str(token): token for token in range(V)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), eos_token=str(END), pad_token=str(pad)
    )
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 4, "vocab_size": V, "n_positions": 32, "num_labels": 1}
    config = GPT2Config(
        **sizes, tie_word_embeddings=False, eos_token_id=END, bos_token_id=END, pad_token_id=pad, initializer_range=0.3
    )
    policy, reference = GPT2LMHeadModel(config), GPT2LMHeadModel(config)
    with torch.no_grad():  # rows of ones read the bias of the last layer norm alone: these two logits are constants
        for model in (policy, reference):
            model.transformer.ln_f.bias.fill_(1)
            model.lm_head.weight[OWN] = -2.0  # -64: never drawn
            model.lm_head.weight[END] = 0.1  # +3.2
    prompts = torch.randint(OWN, (B, P), generator=torch.Generator().manual_seed(1)).tolist()
    with tempfile.TemporaryDirectory() as output:
        arguments = PPOConfig(
            **PPO_CONFIG,
            output_dir=output,
            learning_rate=3e-3,
            per_device_train_batch_size=B,
            num_ppo_epochs=2,
            local_rollout_forward_batch_size=B,
            total_episodes=B,
            response_length=T,
            temperature=1.0,
            cliprange=CLIP,
            cliprange_value=CLIP,
            **SETTINGS,
        )
        trainer = PPOTrainer(
            args=arguments,
            processing_class=tokenizer,
            model=policy,
            ref_model=reference,
            reward_model=Digits(),
            value_model=GPT2ForSequenceClassification(config),
            train_dataset=datasets.Dataset.from_dict({"input_ids": prompts}),
            eval_dataset=datasets.Dataset.from_dict({"input_ids": prompts}),
        )
        trainer.train()
    for name, function in {"masked_mean": mean, "masked_whiten": whiten, "selective_log_softmax": log_softmax}.items():
        setattr(ppo_trainer, name, function)
    if (seen["responses"] == OWN).any() and pad == END:
        raise SystemExit("the token that should never be drawn was drawn")
    (logged,) = (line for line in trainer.state.log_history if "policy/approxkl_avg" in line)
    told = {name: torch.tensor(logged[f"{name}"]) for name in ("policy/approxkl_avg", "val/ratio")}
    updates = {f"update-{n}/{name}": value for n, update in enumerate(of_updates) for name, value in update.items()}
    found = {**seen, "logprobs": raw[0], "ref_logprobs": raw[1], **told, **updates}
    return {name: value.contiguous() for name, value in found.items()}


def compare(folder: Path) -> int:
    """Print the table; returns how many numbers differ that should not."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import gpt2_value

    wrong = 0
    print("| padding | number | rows or tokens | largest difference | |\n|---|---|---|---:|---|")
    for number, name in enumerate(CASES):
        for what, which, gap, expected in gaps(gpt2_value, load_file(folder / f"case-{number}.safetensors")):
            is_equal = gap <= EXACT
            wrong += is_equal != (expected == "")
            print(f"| {name.removeprefix('padding is ')} | {what} | {which} | {gap:.1e} | {expected or 'equal'} |")
    print(f"\n{wrong} of these are not as they should be" if wrong else "\nall as they should be")
    return wrong


def gaps(ppo, trl):
    """(what, of which rows or tokens, largest difference, why it may differ or "") of one case."""
    is_end = (trl["responses"] == END).long()
    mask = is_end.cumsum(1) - is_end == 0  # drawn, the end among them
    ended = is_end.bool().any(1)
    rewards = ppo.token_rewards(trl["scores"], trl["logprobs"], trl["ref_logprobs"], mask, SETTINGS["kl_coef"])
    how = {"gamma": SETTINGS["gamma"], "lam": SETTINGS["lam"]}
    advantages, returns = ppo.advantages_and_returns(rewards, trl["values"], mask, **how)
    pads_with_end = bool((trl["padding_mask"] & mask).any())
    place = "its KL leaves the end token out" if pads_with_end else "its score stands after the last drawn token"
    for rows, of, why in ((~ended, "without an end", ""), (ended, "with an end", place)):
        for what, ours in (("rewards", rewards), ("advantages", advantages), ("returns", returns)):
            yield what, of, ((ours - trl[what]).abs() * mask)[rows].max().item(), why
    learnt = ~trl["padding_mask"]
    white = ppo.whiten(trl["advantages"], learnt)
    gap = ((trl["white"] - white).abs() * learnt).max().item()
    yield "whitened advantages, of its own", "it trains", gap, "it divides by n - 1, ours by n"
    n = learnt.sum()
    gap = ((trl["white"] * (n / (n - 1)).sqrt() - white).abs() * learnt).max().item()
    yield "the same, times sqrt(n / (n - 1))", "it trains", gap, ""
    approxkl, ratios, updates = [], [], sum(name.endswith("/pg_loss") for name in trl)
    for number in range(updates):
        u = {name.split("/")[1]: value for name, value in trl.items() if name.startswith(f"update-{number}/")}
        learnt, valued = ~trl["padding_mask"][u["rows"]], ~trl["padding_mask_p1"][u["rows"]]
        ours = ppo.policy_loss(u["new_logprobs"], u["mb_logprobs"], u["mb_advantage"], learnt, CLIP)
        yield f"policy loss, update {number}", "it trains", (ours - u["pg_loss"]).abs().item(), ""
        ours = ppo.value_loss(u["vpred"], u["mb_values"], u["mb_return"], valued, CLIP)
        yield f"value loss, update {number}", "it trains, and one more", (ours - u["vf_loss"]).abs().item(), ""
        change = u["new_logprobs"] - u["mb_logprobs"]
        approxkl.append(0.5 * ppo.masked_mean(change**2, learnt))
        ratios.append(ppo.masked_mean(change.exp(), learnt))
    for what, logged, ours in (("approxkl", "policy/approxkl_avg", approxkl), ("mean ratio", "val/ratio", ratios)):
        gap = (trl[logged] - torch.stack(ours).mean()).abs().item()
        yield what, "drawn against all", gap, "its mean is over padding too"


if __name__ == "__main__":
    sys.exit(write_or_compare(__doc__, "where the numbers lie", write, compare))
