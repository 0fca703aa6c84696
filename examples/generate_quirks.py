"""What `generate()` followed by plain scoring does to a KL penalty, and what `rollout` does in the same place.

Imports the other examples, the audit, torch, transformers, rich and matplotlib. The first two quirks, and the reason
for all of this, are those of the notebook that TRL began with: `make_policy` trains a policy that exploits both.
"""

import copy
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # a checkout need not be installed

import torch
from review_grammar import write_reviews
from torch.nn.functional import log_softmax
from train_small_gpt2 import Recipe, small_gpt2
from transformers import AutoTokenizer, GPT2LMHeadModel

from generation_gpt2_value import Rollout, rollout, sampling_logprobs
from sampler_audit import SamplerAudit, audit_logits, audit_sampler

TOKENS = 4000  # that each audit sees, at least
PROMPT, RESPONSE = 8, 32  # tokens
LONGEST = 32  # tokens of a ragged prompt
END_EARLY = 0.1  # the policy's probability of ending at any token
END_LATE = 3.0  # nats that it takes from end-of-text after the first one
# Quirks of sampling do not need a model that writes well: a quarter of the demo's training will do.
RECIPE = Recipe(steps=200)


@dataclass(frozen=True)
class Quirk:
    """One thing that `generate()` or plain scoring does behind a trainer's back.

    Attributes:
        name: for the table.
        generate: what `generate()` is called with, beside `do_sample=True, top_k=0, max_new_tokens=32`.
        rollout: what `rollout` is called with in its place.
        inherited: fields of the `generation_config` that came with the checkpoint; nobody passes them.
        scores_padding: all 32 columns are scored, also those after the first end-of-text token.
        ragged: prompts have 2 to 32 tokens, and padding at the left.
        dropout: the policy is in training mode when it is scored.
    """

    name: str
    generate: dict[str, Any] = field(default_factory=dict)
    rollout: dict[str, Any] = field(default_factory=dict)
    inherited: dict[str, Any] = field(default_factory=dict)
    scores_padding: bool = False
    ragged: bool = False
    dropout: bool = False

    @property
    def settings(self) -> str:
        """What makes the quirk, in a few words of code."""
        passed = [f"{name}={value}" for name, value in self.generate.items()]
        carried = [f"generation_config.{name}={value}" for name, value in self.inherited.items()]
        habits = {
            "padding is scored": self.scores_padding,
            "left padding, no position_ids": self.ragged,
            "scored in train()": self.dropout,
        }
        return ", ".join([*passed, *carried, *(habit for habit, is_there in habits.items() if is_there)])


QUIRKS = (
    Quirk("padding after the end", scores_padding=True),
    Quirk("end suppressed", generate={"min_new_tokens": RESPONSE}, rollout={"min_new_tokens": RESPONSE}),
    Quirk("hidden top-k", inherited={"top_k": 50}, rollout={"top_k": 50}),
    Quirk("temperature", generate={"temperature": 0.8}, rollout={"temperature": 0.8}),
    Quirk("top-p", generate={"top_p": 0.9}, rollout={"top_p": 0.9}),
    Quirk("repetition penalty", inherited={"repetition_penalty": 1.2}),
    Quirk("left padding", ragged=True),
    Quirk("dropout", dropout=True),
)


@dataclass(frozen=True)
class Finding:
    """What one sampler and its scoring did: `kl_estimate` and `kl_exact` in nats per token.

    The estimate is the mean of log p(x) - log p_reference(x) over the scored tokens, as in PPO's penalty; `kl_exact` is
    what it should be about: at the same places, the sum over the vocabulary.
    """

    kl_estimate: float
    kl_exact: float
    standard_error: float
    audit: SamplerAudit

    @property
    def bias(self) -> float:
        return self.kl_estimate - self.kl_exact

    def to_json(self) -> dict[str, Any]:
        names = ("kl_estimate", "kl_exact", "bias", "standard_error")
        return {**{name: getattr(self, name) for name in names}, "audit": self.audit.to_json()}


@dataclass(frozen=True)
class Row:
    """One quirk: what it did to `generate()` with plain scoring, and what became of `rollout` there."""

    quirk: Quirk
    generate: Finding
    rollout: Finding

    @property
    def as_expected(self) -> bool:
        return not self.generate.audit.honest and self.rollout.audit.honest


@dataclass(frozen=True)
class Stage:
    """All that the quirks are shown on: the models, and prompts `[N, P]`, even and ragged (with their masks)."""

    policy: GPT2LMHeadModel
    reference: GPT2LMHeadModel
    end_of_text: int
    even: tuple[torch.Tensor, torch.Tensor]
    ragged: tuple[torch.Tensor, torch.Tensor]


def make_policy(reference: GPT2LMHeadModel, prompts: torch.Tensor, end_of_text: int, *, steps: int = 40) -> Any:
    """The reference after some steps towards the exploits of the seed notebook.

    End-of-text becomes more probable before the first one (`min_new_tokens` suppresses it while sampling, and what is
    drawn instead scores low), and less probable after it (the padding there scores low).
    """
    policy = copy.deepcopy(reference)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-4)
    written = rollout(reference, prompts, max_new_tokens=RESPONSE, eos_token_id=end_of_text).sequences
    ended = (written == end_of_text).cumsum(-1)[:, prompts.shape[1] - 1 : -1] > 0  # [B, T]
    late_before = None
    for _ in range(steps):
        logprobs = log_softmax(policy(written).logits[:, prompts.shape[1] - 1 : -1], -1)[..., end_of_text]
        early, late = logprobs[~ended].exp().mean().log(), logprobs[ended].mean()
        late_before = late.detach() if late_before is None else late_before
        ((early - math.log(END_EARLY)) ** 2 + (late - late_before + END_LATE) ** 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return policy.eval()


def set_stage(folder: Path, *, prompts: int, steps: int = 40, seed: int = 0) -> Stage:
    """Load a checkpoint with its tokenizer as the reference, and make the policy and the prompts."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = GPT2LMHeadModel.from_pretrained(folder).eval()
    end_of_text = int(tokenizer.eos_token_id)
    reviews: list[torch.Tensor] = []
    for review in write_reviews(seed + 1):
        ids = tokenizer(review.text)["input_ids"]
        reviews += [torch.tensor(ids)] * (len(ids) > LONGEST)
        if len(reviews) == prompts:
            break
    even = torch.stack([review[:PROMPT] for review in reviews])
    ragged = torch.full((prompts, LONGEST), end_of_text)
    mask = torch.zeros_like(ragged)
    for row, review in enumerate(reviews):
        length = 2 + row % (LONGEST - 1)
        ragged[row, -length:], mask[row, -length:] = review[:length], 1
    policy = make_policy(reference, even[:64], end_of_text, steps=steps)
    return Stage(policy, reference, end_of_text, (even, torch.ones_like(even)), (ragged, mask))


def generate_and_score(stage: Stage, quirk: Quirk) -> Finding:
    """As trainers did it: `generate()`, then a plain forward pass of the policy and of the reference."""
    policy, end = stage.policy, stage.end_of_text
    prompts, mask = stage.ragged if quirk.ragged else stage.even
    config = copy.deepcopy(policy.generation_config)
    config.update(do_sample=True, top_k=0, max_new_tokens=RESPONSE, eos_token_id=end, pad_token_id=end)
    config.update(**{**quirk.inherited, **quirk.generate})
    with torch.no_grad():
        sequences = policy.generate(prompts, attention_mask=mask, generation_config=config)
        mask = torch.cat([mask, torch.ones_like(sequences[:, mask.shape[1] :])], 1)
        P = prompts.shape[1]
        policy.train(quirk.dropout)
        logits, reference_logits = (
            model(sequences, attention_mask=mask).logits[:, P - 1 : -1] for model in (policy, stage.reference)
        )
        policy.eval()
    responses = sequences[:, P:]
    ends = (responses == end).long()
    scored = torch.ones_like(responses, dtype=torch.bool) if quirk.scores_padding else ends.cumsum(-1) - ends == 0
    scored &= _enough(scored)
    tokens, logits, reference_logits = responses[scored], logits[scored], reference_logits[scored]
    logprobs = log_softmax(logits, -1)
    return _finding(
        logprobs.gather(-1, tokens[:, None]).squeeze(-1),
        logprobs,
        log_softmax(reference_logits, -1),
        tokens,
        audit_logits(logits, tokens),
    )


def roll_out(stage: Stage, quirk: Quirk) -> Finding:
    """`rollout` in the same place; the log-probabilities are those that it reports."""
    policy, end = stage.policy, stage.end_of_text
    prompts, mask = stage.ragged if quirk.ragged else stage.even
    policy.generation_config.update(**quirk.inherited)  # rollout reads nothing of it
    policy.train(quirk.dropout)
    drawn = rollout(policy, prompts, attention_mask=mask, max_new_tokens=RESPONSE, eos_token_id=end, **quirk.rollout)
    drawn = drawn[_enough(drawn.response_mask).squeeze(-1)]
    audit = audit_sampler(policy, drawn)
    policy.eval()
    scored = drawn.response_mask
    logits, reference_logits = (_logits(model, drawn)[scored] for model in (policy, stage.reference))
    settings = {"temperature": drawn.temperature, "top_k": drawn.top_k, "top_p": drawn.top_p}
    suppress = None
    if drawn.min_new_tokens:
        suppress = torch.zeros(logits.shape[-1], dtype=torch.bool)
        suppress[end] = True
    return _finding(
        drawn.logprobs[scored],
        sampling_logprobs(logits, suppress=suppress, **settings),
        log_softmax(reference_logits, -1),
        drawn.responses[scored],
        audit,
    )


def measure(stage: Stage, quirk: Quirk) -> Row:
    """Both ways."""
    return Row(quirk, generate_and_score(stage, quirk), roll_out(stage, quirk))


def _enough(scored: torch.Tensor) -> torch.Tensor:
    """The first rows `[B, 1]` that together have `TOKENS` scored tokens."""
    before = scored.sum(1).cumsum(0) - scored.sum(1)
    return (before < TOKENS).unsqueeze(-1)


@torch.no_grad()
def _logits(model: Any, drawn: Rollout) -> torch.Tensor:
    """Where responses were drawn, `[B, T, V]`, by a plain forward pass that is told the positions."""
    positions = (drawn.attention_mask.cumsum(-1) - 1).clamp(min=0)
    output = model(drawn.sequences, attention_mask=drawn.attention_mask, position_ids=positions)
    return output.logits[:, -drawn.responses.shape[1] - 1 : -1]


def _finding(
    own: torch.Tensor, logprobs: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor, audit: Any
) -> Any:
    estimates = own - reference.gather(-1, tokens[:, None]).squeeze(-1)
    exact = (logprobs.exp() * (logprobs.clamp(min=-1e4) - reference)).sum(-1)
    error = (estimates - exact).std().item() / len(tokens) ** 0.5
    return Finding(estimates.mean().item(), exact.mean().item(), error, audit)


if __name__ == "__main__":
    import time

    t = time.time()
    torch.set_num_threads(2)
    stage = set_stage(small_gpt2(RECIPE).folder, prompts=int(sys.argv[1]))
    print(time.time() - t)
    for q in QUIRKS:
        r = measure(stage, q)
        print(q.name, "|", q.settings)
        for f in (r.generate, r.rollout):
            print("   ", f"{f.kl_estimate:.3f} {f.kl_exact:.3f} {f.bias:+.4f}±{f.standard_error:.4f}", f.audit)
    print(time.time() - t)
