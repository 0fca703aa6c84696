"""Importance ratios and KL of a policy that has learnt, with the kept sets of a rollout and without them.

    python benchmarks/kept_sets.py     # half a minute on one core; the table of docs/sampling-and-scoring.md

A random GPT-2 (3 layers, 64 wide, vocabulary 300) draws 6,144 tokens. A copy of it takes policy-gradient steps until
its KL to the first is 0.03 nats a token, and scores those tokens. It does so twice: over the tokens that each draw
chose among (`Rollout.kept`), and with `kept` thrown away, so that top-k and top-p cut off once more by the scorer's own
ranking, which `rescore` refuses to do. Imports torch, transformers and the remote code.
"""

import copy
import dataclasses
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

import torch

from configuration_gpt2_value import GPT2ValueConfig
from generation_gpt2_value import Rollout
from modeling_gpt2_value import GPT2ValueModel
from sampling_gpt2_value import sampling_distribution
from scoring_gpt2_value import rescore

SETTINGS: tuple[dict, ...] = ({}, {"top_k": 20}, {"top_p": 0.8}, {"top_p": 0.3})
PROMPTS = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]
COPIES, STEPS = 64, 24  # 4 prompts x 64 x 24 = 6,144 tokens
KL = 0.03  # nats a token


@dataclasses.dataclass(frozen=True)
class Scores:
    """What a scorer says of the tokens that another model drew: one side of a row of the table."""

    impossible: int  # drawn tokens with a log-probability of -inf
    ratio: float  # mean of exp(logprob of the scorer - logprob of the rollout): 1 for honest scores
    error: float  # its standard error
    kl: float | None  # KL(scorer || sampler), mean over the tokens; None where the two are one model


def make_model() -> GPT2ValueModel:
    """A random model whose logits differ from token to token about as much as a trained one's."""
    torch.manual_seed(0)
    shape = {"n_layer": 3, "n_embd": 64, "n_head": 4, "vocab_size": 300, "n_positions": 64}
    model = GPT2ValueModel(GPT2ValueConfig(**shape, bos_token_id=0, eos_token_id=0)).eval()
    with torch.no_grad():
        for weight in model.transformer.parameters():
            if weight.dim() == 2:
                weight.mul_(5)
    return model


def draw(model: GPT2ValueModel, settings: dict) -> Rollout:
    """6,144 tokens by these settings, always by the same random numbers."""
    generator = torch.Generator().manual_seed(0)
    return model.rollout(PROMPTS, max_new_tokens=STEPS, num_return_sequences=COPIES, generator=generator, **settings)


def learn(model: GPT2ValueModel) -> GPT2ValueModel:
    """A copy of the model after policy-gradient steps with random advantages, at a KL of about `KL` to the model."""
    policy, drawn = copy.deepcopy(model), draw(model, {})
    advantages = torch.randn(drawn.logprobs.shape, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-5)
    while True:
        scored = rescore(policy, drawn, reference=model)
        if scored.kl.mean() > KL:
            return policy
        optimizer.zero_grad()
        (-(scored.logprobs * advantages).mean()).backward()
        optimizer.step()


@torch.no_grad()
def scores(scorer: GPT2ValueModel, drawn: Rollout, sampler: GPT2ValueModel) -> tuple[Scores, Scores]:
    """With the sets thrown away, and with them."""
    reference = None if scorer is sampler else sampler
    scored = rescore(scorer, drawn, reference=reference)
    own = cut_again(scorer, drawn)
    kl = None
    if reference is not None:
        possible = own > -math.inf
        difference = (own - cut_again(reference, drawn)).masked_fill(~possible, 0.0)
        kl = (own.exp() * difference).sum(-1)
    taken = own.gather(-1, drawn.responses.unsqueeze(-1)).squeeze(-1)
    return summary(taken, kl, drawn), summary(scored.logprobs, scored.kl, drawn)


def cut_again(model: GPT2ValueModel, drawn: Rollout) -> torch.Tensor:
    """Log-probabilities `[B, T, V]` over what top-k and top-p keep by this model's ranking, whatever was drawn."""
    logits = model(drawn.sequences, attention_mask=drawn.attention_mask).logits[:, -STEPS - 1 : -1]
    return sampling_distribution(logits, drawn.sampling).log_softmax(-1)


def summary(logprobs: torch.Tensor, kl: torch.Tensor | None, drawn: Rollout) -> Scores:
    ratios = (logprobs - drawn.logprobs).double().exp()
    error = float(ratios.std()) / math.sqrt(ratios.numel())
    impossible = int((logprobs == -math.inf).sum())
    return Scores(impossible, float(ratios.mean()), error, None if kl is None else float(kl.mean()))


def rows() -> dict[str, tuple[Scores, Scores]]:
    """By settings: with the sets thrown away, and with them."""
    model = make_model()
    policy, low = learn(model), copy.deepcopy(model).to(torch.bfloat16)
    cases = [(", ".join(f"{k}={v}" for k, v in settings.items()) or "none", settings) for settings in SETTINGS]
    found = {}
    for name, settings, sampler, scorer in (
        *((name, settings, model, policy) for name, settings in cases),
        ("top_k=20, same weights, bfloat16", {"top_k": 20}, low, low),
    ):
        found[name] = scores(scorer, draw(sampler, settings), sampler)
    return found


def table() -> str:
    """The rows as Markdown."""
    lines = [
        "| settings | -inf, own ranking | mean ratio | KL | -inf, kept sets | mean ratio | KL |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, sides in rows().items():
        cells = []
        for side in sides:
            kl = "" if side.kl is None else f"{side.kl:.3f}"
            cells.append(f"{side.impossible:,} | {side.ratio:.4f} ± {side.error:.4f} | {kl}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)  # a model this small is fastest so
    print(table())
