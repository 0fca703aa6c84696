"""The critic before PPO: values fitted to stored rollouts. And the reference: a frozen copy of the policy.

Imports torch, and of the project what is named in the functions.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpt2_value import Rollout


class FittedValues(NamedTuple):
    """How much of the returns' variance the values explain, on rows that were not learnt from."""

    explained_variance_before: float
    explained_variance_after: float


def fit_values(
    model: torch.nn.Module,
    rollouts: Rollout | Sequence[Rollout],
    returns: Tensor | Sequence[Tensor],
    *,
    body: bool = False,
    epochs: int = 4,
    minibatch_size: int = 16,
    learning_rate: float = 1e-2,
    held_out: float = 0.2,
    seed: int = 0,
) -> FittedValues:
    """Train the critic on stored rollouts, so that PPO does not begin with one that knows nothing.

    The returns are best those with `lam=1`, which do not depend on the values of the untrained critic (VC-PPO,
    arXiv:2503.01491, section 3.2). The loss is half the mean squared error over drawn tokens.

    Args:
        model: any model that `rescore` gives values for; with a module `v_head`, unless `body`.
        rollouts, returns: one `Rollout` and its returns `[B, T]`, or a sequence of each.
        body: train all weights that require a gradient, and not the head alone.
        learning_rate: of Adam. For the body take what the policy would be trained with, such as 1e-5.
        held_out: share of the rows of each rollout that explained variance is measured on, and nothing is learnt from;
            0 measures it on the rows that were learnt from.

    Raises ValueError where the returns do not fit the rollouts, or nothing can be trained.
    """
    from gpt2_value import explained_variance, rescore

    if isinstance(returns, Tensor):
        rollouts, returns = [rollouts], [returns]  # type: ignore[list-item]
    generator = torch.Generator().manual_seed(seed)
    learnt, measured = [], []
    for drawn, targets in zip(rollouts, returns, strict=True):  # type: ignore[arg-type]
        if targets.shape != drawn.response_mask.shape:
            found = f"returns have shape {[*targets.shape]}, the rollout's responses {[*drawn.response_mask.shape]}"
            raise ValueError(f"{found}; expected the same.")
        order = torch.randperm(len(drawn), generator=generator)
        test, rest = order[: int(held_out * len(drawn))], order[int(held_out * len(drawn)) :]
        learnt.append((drawn[rest], targets[rest]))
        measured.append((drawn[test], targets[test]) if held_out else learnt[-1])

    def pairs(drawn: Rollout, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The value and the return `[n]` of each drawn token."""
        mask = drawn.response_mask
        return rescore(model, drawn, values_only=True).values[mask], targets[mask]

    @torch.no_grad()
    def explained() -> float:
        values, targets = map(torch.cat, zip(*(pairs(*part) for part in measured), strict=True))
        return explained_variance(values, targets, torch.ones_like(values, dtype=torch.bool))

    weights = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    trained = [weight for name, weight in weights if body or "v_head." in name]
    if not trained:
        raise ValueError("the model has no v_head that requires a gradient; pass body=True to train all its weights.")
    before, optimizer = explained(), torch.optim.Adam(trained, lr=learning_rate)
    for _ in range(epochs):
        for drawn, targets in learnt:
            for rows in torch.randperm(len(drawn), generator=generator).split(minibatch_size):
                values, goals = pairs(drawn[rows], targets[rows])
                (0.5 * (values - goals) ** 2).mean().backward(inputs=trained)
                optimizer.step()
                optimizer.zero_grad()
    return FittedValues(before, explained())


def create_reference(model: Any, shared_layers: int = 0) -> Any:
    """Return a frozen copy of the model, to measure the KL to.

    With `shared_layers` the embeddings and so many of the lowest layers are not copied: they are the model's own, and
    are frozen in it, too. Create the reference before the optimizer, and do not unfreeze them.

    Raises ValueError for more layers than there are.
    """
    layers = model.config.num_hidden_layers
    lists = (part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == layers)
    blocks = next(lists, torch.nn.ModuleList())
    if not 0 <= shared_layers <= len(blocks):
        raise ValueError(f"shared_layers={shared_layers}; expected 0 to {len(blocks)}, the layers of the model.")
    below = [*blocks[:shared_layers], *(m for m in model.modules() if isinstance(m, torch.nn.Embedding))]
    shared = {id(weight): weight for part in below for weight in part.parameters()} if shared_layers else {}
    return copy.deepcopy(model, dict(shared)).requires_grad_(False).eval()
