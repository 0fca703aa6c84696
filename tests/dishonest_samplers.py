"""Samplers that are not what they claim, each in its own way, for the tests of the audit.

Each takes one forward pass of a model for each step, and turns uniform numbers into tokens.
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


def samplers(B, T, vocabulary):
    """Name -> what `draw` is given, for `[B, T]` tokens. The first is honest, and none of the others."""
    uniforms = torch.rand(B, T, dtype=torch.float64)
    rows, steps = torch.arange(B)[:, None], torch.arange(T)[None]
    start = torch.rand((), dtype=torch.float64)
    hot = {
        "turns of rows": rows % 2 == 1,
        "halves of rows": rows < B // 2,
        "random rows": torch.rand(B, 1) < 0.5,
        "turns of steps": steps % 2 == 1,
        "random steps": torch.rand(1, T) < 0.5,
    }
    return {
        "honest": {"uniforms": uniforms},
        "bans half": {"uniforms": uniforms, "banned": range(vocabulary // 2, vocabulary)},
        "bans a fifth": {"uniforms": uniforms, "banned": range(0, vocabulary, 5)},
        # the likelier half of the distribution, then the unlikelier one, and so on
        "halves in turn": {"uniforms": (uniforms + steps % 2) / 2},
        # no randomness: a low-discrepancy sequence along each row, and on into the next
        "golden ratio": {"uniforms": (start + GOLDEN * (rows * T + steps)) % 1},
        # the same in the order in which a batch is drawn: all rows of a step, then those of the next
        "golden ratio by step": {"uniforms": (start + GOLDEN * (steps * B + rows)) % 1},
        "one number for all rows": {"uniforms": uniforms[:1].expand(B, T)},
        # as two processes with one seed draw them
        "generator restarted": {"uniforms": uniforms[: B // 2].repeat(2, 1)},
        **{
            f"temperatures by {name}": {
                "uniforms": uniforms,
                "temperatures": torch.where(where, HOT, COLD).double().expand(B, T),
            }
            for name, where in hot.items()
        },
    }


DISHONEST = list(samplers(2, 2, 10))[1:]
