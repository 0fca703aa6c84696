"""Prompts and sampling settings that the tests of the remote code share."""

import itertools

import torch

RAGGED = [torch.tensor(prompt) for prompt in ([5, 17, 3], [80], [41, 9, 7, 2, 64], [33, 12])]
EOS = [1, 2, 3, 4, 5, 6, 7, 8]  # several, so that rows of a random model end early
# One for each thing that settings do: nothing, ids or bits as kept sets, few tokens, ends, and everything at once.
SETTINGS = [
    {"eos_token_id": None},
    {"top_k": 20, "temperature": 0.7, "eos_token_id": None},
    {"top_p": 0.8, "eos_token_id": EOS},
    {"top_p": 0.3, "eos_token_id": None},
    {"top_k": 40, "top_p": 0.9, "temperature": 1.3, "eos_token_id": EOS, "min_new_tokens": 4},
]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def checkpoint_layers(model, reentrant):
    """Compute activations again in the backward pass. transformers 5.24 has renamed it."""
    names = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    next(getattr(model, name) for name in names if hasattr(model, name))({"use_reentrant": reentrant})


def covering(**levels):
    """A list of choices of one level for each name, few of them, in which every pair of two levels occurs together."""
    names = list(levels)
    every = [dict(zip(names, choice, strict=True)) for choice in itertools.product(*levels.values())]
    left = {pair for choice in every for pair in _pairs(choice)}
    chosen = []
    while left:
        best = max(every, key=lambda choice: len(_pairs(choice) & left))
        left -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(choice):
    return set(itertools.combinations([(name, repr(level)) for name, level in choice.items()], 2))
