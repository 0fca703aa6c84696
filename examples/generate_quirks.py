"""What `generate()` followed by plain scoring does to a KL penalty, and what `rollout` does in the same place.

Imports the other examples, the audit, torch, transformers, rich and matplotlib. The first two quirks, and the reason
for all of this, are those of the notebook that TRL began with: `make_policy` trains a policy that exploits both.
"""

import copy
import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout need not be installed

import torch
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from review_grammar import write_reviews
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.functional import log_softmax
from train_small_gpt2 import Recipe, small_gpt2
from transformers import AutoTokenizer, GPT2LMHeadModel
from transformers.utils import logging

from generation_gpt2_value import Rollout, rollout
from sampler_audit import SamplerAudit, audit_logits, audit_sampler
from sampling_gpt2_value import sampling_distribution

TOKENS = 4000  # that each audit sees, at least
PROMPT, RESPONSE = 8, 24  # tokens
LONGEST = 24  # tokens of a ragged prompt
END_EARLY = 0.1  # the policy's probability of ending at any token
END_LATE = 3.0  # nats that it takes from end-of-text after the first one
# Nothing here needs a model that writes well: a quarter of the demo's training will do.
RECIPE = Recipe(steps=200)

RED, BLUE = "#c8452f", "#2a78b5"
COLUMNS = ("quirk", "sampler", "KL estimate", "KL", "audit: bias", "p", "verdict")
LEFT = ("quirk", "sampler", "verdict")
TALLEST = 2.5  # density; what is above it is cut off, and written beside


@dataclass(frozen=True)
class Quirk:
    """One thing that `generate()` or plain scoring does behind a trainer's back.

    Attributes:
        name, settings: for the table.
        generate: what `generate()` is called with, beside `do_sample`, `max_new_tokens` and the end-of-text token.
        rollout: what `rollout` is called with in its place.
        inherited: fields of the `generation_config` that came with the checkpoint; nobody passes them.
        scores_padding: all columns are scored, also those after the first end-of-text token.
        ragged: prompts have 2 to 24 tokens, and padding at the left.
        training: nobody called `eval()`: the policy samples and is scored in training mode, with dropout.
    """

    name: str
    settings: str
    generate: dict[str, Any] = field(default_factory=lambda: {"top_k": 0})
    rollout: dict[str, Any] = field(default_factory=dict)
    inherited: dict[str, Any] = field(default_factory=dict)
    scores_padding: bool = False
    ragged: bool = False
    training: bool = False


LONG = {"min_new_tokens": RESPONSE}
BIASED = {(token,): 2.0 for token in (1, 12, 14)}
QUIRKS = (
    Quirk("padding after the end", "every column is scored", scores_padding=True),
    Quirk("end suppressed", f"min_new_tokens={RESPONSE}", generate={"top_k": 0, **LONG}, rollout=LONG),
    Quirk("hidden top-k", "top_k not passed: 50", generate={}, rollout={"top_k": 50}),
    Quirk("temperature", "temperature=0.8", generate={"top_k": 0, "temperature": 0.8}, rollout={"temperature": 0.8}),
    Quirk("top-p", "top_p=0.9", generate={"top_k": 0, "top_p": 0.9}, rollout={"top_p": 0.9}),
    Quirk("repetition penalty", "1.5 in generation_config", inherited={"repetition_penalty": 1.5}),
    Quirk("bad words", "3 tokens in bad_words_ids", generate={"top_k": 0, "bad_words_ids": [[1], [12], [14]]}),
    Quirk("suppressed tokens", "every second id", generate={"top_k": 0, "suppress_tokens": list(range(2, 1024, 2))}),
    Quirk("no repetition", "no_repeat_ngram_size=1", generate={"top_k": 0, "no_repeat_ngram_size": 1}),
    Quirk("sequence bias", "+2 nats for 3 tokens", generate={"top_k": 0, "sequence_bias": BIASED}),
    Quirk("left padding", "scored without position_ids", ragged=True),
    Quirk("dropout", "no eval(), dropout 0.1", training=True),
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

    def to_json(self) -> dict[str, Any]:
        about = {"quirk": self.quirk.name, "settings": self.quirk.settings}
        return {**about, "generate": self.generate.to_json(), "rollout": self.rollout.to_json()}


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
    policy = make_policy(reference, even[:32], end_of_text, steps=steps)
    return Stage(policy, reference, end_of_text, (even, torch.ones_like(even)), (ragged, mask))


def generate_and_score(stage: Stage, quirk: Quirk) -> Finding:
    """As trainers did it: `generate()`, then a plain forward pass of the policy and of the reference."""
    policy, end = stage.policy, stage.end_of_text
    prompts, mask = stage.ragged if quirk.ragged else stage.even
    P = prompts.shape[1]
    always = {"do_sample": True, "max_new_tokens": RESPONSE, "eos_token_id": end, "pad_token_id": end}
    with torch.no_grad(), _as_left(policy, quirk):
        sequences = policy.generate(prompts, attention_mask=mask, **always, **quirk.generate)
        mask = torch.cat([mask, torch.ones_like(sequences[:, P:])], 1)
        logits = policy(sequences, attention_mask=mask).logits[:, P - 1 : -1]
        reference_logits = stage.reference(sequences, attention_mask=mask).logits[:, P - 1 : -1]
    responses = sequences[:, P:]
    ends = (responses == end).long()
    scored = torch.ones_like(responses, dtype=torch.bool) if quirk.scores_padding else ends.cumsum(-1) - ends == 0
    scored &= _enough(scored).unsqueeze(-1)
    tokens, logprobs = responses[scored], log_softmax(logits[scored], -1)
    own = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    audit = audit_logits(logits[scored], tokens)
    return _finding(own, logprobs, log_softmax(reference_logits[scored], -1), tokens, audit)


def roll_out(stage: Stage, quirk: Quirk) -> Finding:
    """`rollout` in the same place; the log-probabilities are those that it reports."""
    policy, end = stage.policy, stage.end_of_text
    prompts, mask = stage.ragged if quirk.ragged else stage.even
    with _as_left(policy, quirk):
        settings = {"max_new_tokens": RESPONSE, "eos_token_id": end, **quirk.rollout}
        drawn = rollout(policy, prompts, attention_mask=mask, **settings)
        drawn = drawn[_enough(drawn.response_mask)]
        audit = audit_sampler(policy, drawn)
    scored = drawn.response_mask
    kept = None if drawn.kept is None else drawn.kept[scored]
    early = (torch.arange(RESPONSE) < drawn.sampling.min_new_tokens).expand_as(scored)[scored]
    logits = _logits(policy, drawn)[scored]
    logprobs = log_softmax(sampling_distribution(logits, drawn.sampling, early=early, kept=kept), -1)
    reference = log_softmax(_logits(stage.reference, drawn)[scored], -1)
    return _finding(drawn.logprobs[scored], logprobs, reference, drawn.responses[scored], audit)


def measure(stage: Stage, quirk: Quirk) -> Row:
    """The quirk both ways."""
    return Row(quirk, generate_and_score(stage, quirk), roll_out(stage, quirk))


@contextmanager
def _as_left(policy: GPT2LMHeadModel, quirk: Quirk) -> Iterator[None]:
    """The policy as the quirk leaves it: with what its checkpoint carries, and in the mode that it is left in."""
    before = policy.generation_config
    policy.generation_config = copy.deepcopy(before)
    policy.generation_config.update(**quirk.inherited)
    policy.train(quirk.training)
    try:
        yield
    finally:
        policy.generation_config = before
        policy.eval()


def _enough(scored: torch.Tensor) -> torch.Tensor:
    """Which rows `[B]` to keep: the first that together have `TOKENS` scored tokens."""
    return scored.sum(1).cumsum(0) - scored.sum(1) < TOKENS


@torch.no_grad()
def _logits(model: GPT2LMHeadModel, drawn: Rollout) -> torch.Tensor:
    """Where responses were drawn, `[B, T, V]`, by a plain forward pass that is told the positions."""
    positions = (drawn.attention_mask.cumsum(-1) - 1).clamp(min=0)
    output = model(drawn.sequences, attention_mask=drawn.attention_mask, position_ids=positions)
    return output.logits[:, -drawn.responses.shape[1] - 1 : -1]


def _finding(
    own: torch.Tensor, logprobs: torch.Tensor, reference: torch.Tensor, tokens: torch.Tensor, audit: SamplerAudit
) -> Finding:
    """Of n tokens: their log-probabilities `[n]` as reported; the whole vocabulary, `[n, V]`, under both models."""
    estimates = own - reference.gather(-1, tokens[:, None]).squeeze(-1)
    ratios = torch.where(logprobs == -math.inf, 0.0, logprobs - reference)
    exact = (logprobs.exp() * ratios).sum(-1)
    error = (estimates - exact).std().item() / math.sqrt(len(tokens))
    return Finding(estimates.mean().item(), exact.mean().item(), error, audit)


def show(rows: Sequence[Row], console: Console) -> None:
    """The table: two lines for each quirk."""
    table = Table(title="A KL penalty in nats per token, and the audit of the tokens that it was estimated from")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in LEFT else "right", no_wrap=True)
    for row in rows:
        for name, sampler, finding, wanted in (
            (f"[bold]{row.quirk.name}[/]", "generate()", row.generate, False),
            (f"[dim]  {row.quirk.settings}[/]", "rollout", row.rollout, True),
        ):
            color = "green" if finding.audit.honest == wanted else "bold red"
            verdict = f"[{color}]{finding.audit.verdict}[/]"
            table.add_row(name, sampler, *_numbers(finding), verdict, end_section=wanted)
    console.print(table)


def markdown(rows: Sequence[Row]) -> str:
    """The same table for a page."""
    lines = [
        f"| {' | '.join(COLUMNS)} |",
        "|" + "|".join("---" if column in LEFT else "---:" for column in COLUMNS) + "|",
    ]
    for row in rows:
        name = f"**{row.quirk.name}**: {row.quirk.settings}"
        for sampler, finding in ((f"{name} | `generate()`", row.generate), (" | `rollout`", row.rollout)):
            lines.append(f"| {' | '.join([sampler, *_numbers(finding), finding.audit.verdict])} |")
    return "\n".join(lines)


def _numbers(finding: Finding) -> list[str]:
    audit = finding.audit
    return [
        f"{finding.kl_estimate:+.2f}",
        f"{finding.kl_exact:.2f}",
        f"{audit.bias_nats:+.3f} ± {audit.standard_error:.3f}",
        "< 1e-300" if audit.p_value < 1e-300 else f"{audit.p_value:.2g}",
    ]


def draw(rows: Sequence[Row], file: Path) -> None:
    """The figure: one row a quirk; both histograms of the audit, and the biases of both KL estimates."""
    figure = Figure(figsize=(11, 1.25 * len(rows) + 1.0), layout="constrained")
    grid = figure.subplots(len(rows), 3, width_ratios=[1, 1, 1.1], squeeze=False)
    small: dict[str, Any] = {"ha": "center", "fontsize": 8}
    for (left, middle, right), row in zip(grid, rows, strict=True):
        _histogram(left, row.generate)
        _histogram(middle, row.rollout)
        left.set_ylabel(
            f"{row.quirk.name}\n{row.quirk.settings}", rotation=0, ha="right", va="center", fontsize=9, labelpad=28
        )
        for height, finding in ((1, row.generate), (0, row.rollout)):
            audit, color = finding.audit, BLUE if finding.audit.honest else RED
            right.plot(finding.bias, height, "D", color="white", markeredgecolor=color, markersize=7)
            right.errorbar(audit.bias_nats, height, xerr=2.576 * audit.standard_error, fmt="o", color=color, capsize=3)
            note = f"{audit.bias_nats:+.2f}"
            right.annotate(note, (audit.bias_nats, height), (0, 7), textcoords="offset points", color=color, **small)
        right.axvline(0, color="black", linewidth=0.8, zorder=0)
        right.set(xlim=(-6.6, 1.6), ylim=(-0.6, 1.9), yticks=[1, 0], yticklabels=["generate()", "rollout"])
        right.tick_params(labelsize=8)
    for axes in grid[:-1].flat:
        axes.set_xticklabels([])
    for axes, title in zip(grid[0], ("generate(), plain scoring", "rollout", "bias, nats per token"), strict=True):
        axes.set_title(title, fontsize=11)
    for axes in grid[-1, :2]:
        axes.set_xlabel("probability integral transform\n0: the most probable token, 1: the rarest", fontsize=8)
    key = "● log p(x) + H(p), with 99% bars\n◇ KL estimate against the reference - KL"
    grid[-1, 2].set_xlabel(key, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def _histogram(axes: Axes, finding: Finding) -> None:
    finding.audit.plot(axes)
    axes.set(ylim=(0, TALLEST), yticks=[0, 1, 2], xticks=[0, 0.5, 1])
    axes.tick_params(labelsize=8)
    for bar in axes.patches:
        if bar.get_height() > TALLEST:
            note, at = f"{bar.get_height():.0f} →", (bar.get_x(), TALLEST * 0.8)
            axes.annotate(note, at, ha="right", fontsize=8, color=RED)
    axes.annotate(finding.audit.verdict, (0.03, 0.82), xycoords="axes fraction", fontsize=8, color=bar.get_facecolor())


def main(
    figure: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path("generate_quirks.png"),
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that was measured, as JSON.")] = False,
    seed: Annotated[int, typer.Option(help="Of prompts and samples.")] = 0,
) -> None:
    """Show what generate() with plain scoring does to a KL penalty, and that rollout does not.

    Exits with 1 if a quirk of generate() was not caught, or if a rollout did not pass.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    errors = Console(stderr=True)
    stage = set_stage(small_gpt2(RECIPE).folder, prompts=520, seed=seed)
    rows = [measure(stage, quirk) for quirk in track(QUIRKS, "quirks", console=errors)]
    draw(rows, figure)
    if as_json:
        print(json.dumps([row.to_json() for row in rows], indent=2))
    elif as_markdown:
        print(markdown(rows))
    else:
        show(rows, Console(width=None if sys.stdout.isatty() else 120))
    errors.print(f"figure: {figure}")
    for row in rows:
        if not row.as_expected:
            errors.print(f"[red]{row.quirk.name}: generate() {row.generate.audit}; rollout {row.rollout.audit}[/]")
    if not all(row.as_expected for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
