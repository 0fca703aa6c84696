"""Give a new value head something to say: fit it, in closed form, to the judge's score of finished reviews.

Imports torch, tqdm, the grammar and the model's own class. The head is linear in the body's last hidden state, so the
best head under squared error is a ridge regression: policy evaluation by Monte Carlo returns (Sutton and Barto,
"Reinforcement Learning", 2nd edition, section 5.1) with linear function approximation (section 9.4). The body is not
touched.
"""

import itertools
import random
from dataclasses import dataclass
from typing import Any

import torch
from review_grammar import judge, write_reviews
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from modeling_gpt2_value import GPT2ValueModel

HELD_OUT = 5  # every fifth review is kept from the fit, to choose the penalty and to see how good the fit is


@dataclass(frozen=True)
class Scored:
    """Texts and what they were worth in the end: N texts of at most L tokens.

    `states [N, L]` (bool) marks the tokens after which the value is to be learnt.
    """

    sequences: Tensor
    attention_mask: Tensor
    states: Tensor
    returns: Tensor  # [N] float32, the judge's score of the whole text


@dataclass(frozen=True)
class Fit:
    """How well the head explains the returns of texts that it was not fitted to."""

    texts: int
    states: int
    explained_variance: float  # 1 - Var[return - value] / Var[return], over the held-out states


def own_reviews(model: GPT2ValueModel, tokenizer: Any, *, batches: int = 8, batch_size: int = 64) -> Scored:
    """Reviews that the model itself finishes, from openings of the grammar cut anywhere in the first words.

    States before the cut are left out: the model did not write what follows them.
    """
    dice, generator = random.Random(1), torch.Generator().manual_seed(1)
    openings = write_reviews(seed=1)
    rollouts = []
    for _ in tqdm(range(batches), "rollouts", unit="batch", leave=False):
        prompts = [
            " ".join(review.text.split()[: dice.randint(1, 10)]) for review in itertools.islice(openings, batch_size)
        ]
        queries = [torch.tensor(tokenizer(prompt)["input_ids"]) for prompt in prompts]
        end = tokenizer.eos_token_id
        rollouts.append(model.rollout(queries, max_new_tokens=80, eos_token_id=end, generator=generator))
    texts: list[str] = []
    rows, masks, states = [], [], []
    for rollout in rollouts:
        texts += tokenizer.batch_decode(rollout.sequences, skip_special_tokens=True)
        last_of_prompt = torch.zeros_like(rollout.attention_mask, dtype=torch.bool)
        last_of_prompt[:, -rollout.responses.shape[1] - 1] = True
        drawn = torch.zeros_like(last_of_prompt)
        drawn[:, -rollout.responses.shape[1] :] = rollout.response_mask
        rows += list(rollout.sequences)
        masks += list(rollout.attention_mask)
        states += list(last_of_prompt | drawn)
    return _scored(texts, rows, masks, states)


def written_reviews(tokenizer: Any, *, number: int) -> Scored:
    """Reviews that the grammar wrote, whole: for a model that does not write such reviews itself."""
    texts = [review.text for review in itertools.islice(write_reviews(seed=1), number)]
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    masks = [torch.ones_like(row) for row in rows]
    return _scored(texts, rows, masks, [mask.bool() for mask in masks])


def fit_value_head(model: GPT2ValueModel, scored: Scored, *, batch_size: int = 32) -> Fit:
    """Replace the head's weights by the ridge regression of the returns on what the head sees.

    The penalty is the best of a grid on held-out texts. The head is left detached from the body
    (`model.detach_value_head()`), as it was fitted.

    Raises:
        ValueError: the head is not one linear layer to one value.
    """
    head = model.v_head
    if isinstance(head.summary, torch.nn.Identity) or not isinstance(head.activation, torch.nn.Identity):
        raise ValueError(
            "the value head is not linear (summary_use_proj is off, or summary_activation is on in config.json); "
            "the fit in closed form needs GPT-2's own settings"
        )
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].float()))
    features, targets, held_out = [], [], []
    try:
        for start in tqdm(range(0, len(scored.returns), batch_size), "hidden states", unit="batch", leave=False):
            rows = slice(start, start + batch_size)
            with torch.no_grad():
                model(scored.sequences[rows], attention_mask=scored.attention_mask[rows], logits_to_keep=1)
            text, token = scored.states[rows].nonzero(as_tuple=True)
            features.append(seen.pop()[text, token])  # [states, n_embd]
            targets.append(scored.returns[rows][text])
            held_out.append((text + start) % HELD_OUT == 0)
    finally:
        hook.remove()
    x, y, held = torch.cat(features).double(), torch.cat(targets).double(), torch.cat(held_out)
    weight, bias, explained = _ridge(x, y, held)
    with torch.no_grad():
        head.summary.weight.copy_(weight[None])
        head.summary.bias.fill_(bias)
    model.detach_value_head()
    return Fit(texts=len(scored.returns), states=len(y), explained_variance=explained)


def _scored(texts: list[str], rows: list[Tensor], masks: list[Tensor], states: list[Tensor]) -> Scored:
    def padded(tensors: list[Tensor]) -> Tensor:
        return pad_sequence(tensors, batch_first=True)

    return Scored(padded(rows), padded(masks), padded(states), torch.tensor([judge(text) for text in texts]))


def _ridge(x: Tensor, y: Tensor, held: Tensor) -> tuple[Tensor, float, float]:
    """Weights `[n_embd]`, bias and held-out explained variance, of features `[states, n_embd]` and targets `[states]`.

    One eigendecomposition serves every penalty of the grid (Hastie, Tibshirani and Friedman, "The Elements of
    Statistical Learning", section 3.4.1).
    """
    mean, level = x[~held].mean(0), y[~held].mean()
    scale = x[~held].std(0).clamp(min=1e-6)  # GPT-2 has a few features a hundred times larger than the others
    fitted = (x[~held] - mean) / scale
    spectrum, basis = torch.linalg.eigh(fitted.T @ fitted / len(fitted))
    projected = basis.T @ (fitted.T @ (y[~held] - level) / len(fitted))
    best: tuple[float, Tensor] | None = None
    for penalty in torch.logspace(-5, 1, 13, dtype=torch.float64):
        weight = basis @ (projected / (spectrum + penalty)) / scale
        residual = y[held] - (x[held] - mean) @ weight - level
        explained = float(1 - residual.var() / y[held].var())
        if best is None or explained > best[0]:
            best = explained, weight
    assert best is not None
    return best[1], float(level - mean @ best[1]), best[0]
