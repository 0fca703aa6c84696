"""Prompts, sampling settings and bounds that the tests of the remote code share."""

import itertools
import math

import torch

RAGGED = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]
EOS = [1, 2, 3, 4, 5, 6, 7, 8]  # several, so that rows of a random model end early
# One for each thing that settings do: nothing, few or many tokens that are kept, ends, and everything at once.
SETTINGS = [
    {"eos_token_id": None},
    {"top_k": 20, "temperature": 0.7, "eos_token_id": None},
    {"top_p": 0.8, "eos_token_id": EOS},
    {"top_p": 0.3, "eos_token_id": None},
    {"top_k": 40, "top_p": 0.9, "temperature": 1.3, "eos_token_id": EOS, "min_new_tokens": 4},
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_close(found, expected, atol=1e-5):
    """Equal within the contract's bound."""
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def assert_as_drawn(scored, drawn, atol=1e-5):
    """A score, or another rollout, has the log-probabilities and values of this rollout."""
    for name in ("logprobs", "values"):
        assert_close(getattr(scored, name), getattr(drawn, name), atol)


def own_logits(model, drawn):
    """Logits `[B, T, V]` before each token of the responses, by one call of the model as a user would make it."""
    places = (drawn.attention_mask.cumsum(-1) - 1).clamp(min=0)
    output = model(input_ids=drawn.sequences, attention_mask=drawn.attention_mask, position_ids=places)
    return output.logits[:, -drawn.responses.shape[1] - 1 : -1]


def by_hand(logits, sampling):
    """Log-probabilities `[B, T, V]` float64 that the settings make of `logits [B, T, V]`, by code of the tests only."""
    logits = logits.double().clone()
    logits[:, : sampling.min_new_tokens, list(sampling.eos_token_id)] = -math.inf
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[..., -1:], -math.inf)
    if sampling.top_p < 1:
        probs, order = logits.softmax(-1).sort(descending=True)
        dropped = probs.cumsum(-1) - probs >= sampling.top_p
        logits = logits.masked_fill(dropped.scatter(-1, order, dropped), -math.inf)
    return logits.log_softmax(-1)


def of_drawn(logprobs, drawn):
    """Those of `logprobs [B, T, V]` that belong to the drawn tokens: `[B, T]` float32, 0 where nothing was drawn."""
    taken = logprobs.gather(-1, drawn.responses[..., None]).squeeze(-1)
    return torch.where(drawn.response_mask, taken, 0.0).float()


def checkpoint_layers(model, reentrant):
    """Compute activations again in the backward pass. transformers 5.24 has renamed it."""
    names = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    next(getattr(model, name) for name in names if hasattr(model, name))({"use_reentrant": reentrant})


def covering(**levels):
    """A list of choices of one level for each name, few of them, in which every pair of two levels occurs together."""
    every = [dict(zip(levels, choice, strict=True)) for choice in itertools.product(*levels.values())]
    left = {pair for choice in every for pair in _pairs(choice)}
    chosen = []
    while left:
        chosen.append(max(every, key=lambda choice: len(_pairs(choice) & left)))
        left -= _pairs(chosen[-1])
    return chosen


def _pairs(choice):
    return set(itertools.combinations([(name, repr(level)) for name, level in choice.items()], 2))
