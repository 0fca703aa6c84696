"""Samplers that are not what they claim, each in its own way, for the tests of the audit.

Imports torch. Each takes one forward pass of a model for each step, and turns uniform numbers into tokens.
"""

import math

import torch

GOLDEN = (math.sqrt(5) - 1) / 2
COLD, HOT = 0.9, 1.12


@torch.no_grad()
def draw(model, prompts, *, uniforms, temperatures=None, banned=()):
    """Sequences `[B, P+T]`: after `prompts [B, P]`, the tokens that `uniforms [B, T]` fall on.

    Args:
        uniforms: float64 in [0, 1); the vocabulary is laid out in the order of falling probability.
        temperatures: `[B, T]`; default: 1.
        banned: ids that are never drawn.
    """
    sequences = prompts
    for t in range(uniforms.shape[1]):
        logits = model(sequences).logits[:, -1].double()  # [B, V]
        if temperatures is not None:
            logits = logits / temperatures[:, t : t + 1]
        logits[:, list(banned)] = -math.inf
        probs, ids = logits.softmax(-1).sort(descending=True)
        place = (probs.cumsum(-1) <= uniforms[:, t : t + 1]).sum(-1, keepdim=True)
        sequences = torch.cat([sequences, ids.gather(-1, place.clamp(max=logits.shape[-1] - 1))], 1)
    return sequences


def honest(B, T, vocabulary):
    """What `draw` is given by a sampler that is what it claims."""
    return {"uniforms": torch.rand(B, T, dtype=torch.float64)}


def bans_half(B, T, vocabulary):
    return {**honest(B, T, vocabulary), "banned": range(vocabulary // 2, vocabulary)}


def bans_a_fifth(B, T, vocabulary):
    return {**honest(B, T, vocabulary), "banned": range(0, vocabulary, 5)}


def halves_in_turn(B, T, vocabulary):
    """The likelier half of the distribution, then the unlikelier one, and so on."""
    return {"uniforms": (torch.rand(B, T, dtype=torch.float64) + torch.arange(T) % 2) / 2}


def golden_ratio(B, T, vocabulary):
    """No randomness: a low-discrepancy sequence along each row, and on into the next."""
    places = torch.arange(B * T, dtype=torch.float64).view(B, T)
    return {"uniforms": (torch.rand((), dtype=torch.float64) + GOLDEN * places) % 1}


def golden_ratio_by_step(B, T, vocabulary):
    """The same in the order in which a batch is drawn: all rows of a step, then those of the next."""
    return {"uniforms": golden_ratio(T, B, vocabulary)["uniforms"].T}


def one_number_for_all_rows(B, T, vocabulary):
    return {"uniforms": torch.rand(1, T, dtype=torch.float64).expand(B, T)}


def generator_restarted(B, T, vocabulary):
    """The same uniform numbers for each half of the rows, as two processes with one seed draw them."""
    half = torch.rand(B // 2, T, dtype=torch.float64)
    return {"uniforms": half.repeat(2, 1)}


def _mixed(hot):
    return torch.where(hot, HOT, COLD).double()


def temperatures_by_turns_of_rows(B, T, vocabulary):
    return {**honest(B, T, vocabulary), "temperatures": _mixed(torch.arange(B) % 2 == 1)[:, None].expand(B, T)}


def temperatures_by_halves_of_rows(B, T, vocabulary):
    return {**honest(B, T, vocabulary), "temperatures": _mixed(torch.arange(B) < B // 2)[:, None].expand(B, T)}


def temperatures_by_random_rows(B, T, vocabulary):
    return {**honest(B, T, vocabulary), "temperatures": _mixed(torch.rand(B) < 0.5)[:, None].expand(B, T)}


def temperatures_by_turns_of_steps(B, T, vocabulary):
    return {**honest(B, T, vocabulary), "temperatures": _mixed(torch.arange(T) % 2 == 1)[None].expand(B, T)}


def temperatures_by_random_steps(B, T, vocabulary):
    return {**honest(B, T, vocabulary), "temperatures": _mixed(torch.rand(T) < 0.5)[None].expand(B, T)}


DISHONEST = [
    bans_half,
    bans_a_fifth,
    halves_in_turn,
    golden_ratio,
    golden_ratio_by_step,
    one_number_for_all_rows,
    generator_restarted,
    temperatures_by_turns_of_rows,
    temperatures_by_halves_of_rows,
    temperatures_by_random_rows,
    temperatures_by_turns_of_steps,
    temperatures_by_random_steps,
]
