"""PPO for language models, after "Fine-Tuning Language Models from Human Preferences" (Ziegler et al., 2019,
arXiv:1909.08593).

The arithmetic needs torch alone. Tensors are `[B, T]`: one row a response, one column a token; `mask` (bool) is True
for the tokens that the policy drew. A mask may have holes: tokens that somebody else wrote between two turns. What
stands where the mask is False is ignored, whatever it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpt2_value import Rollout

# The arithmetic


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean `[]` of `x [B, T]` over the drawn tokens."""
    _check(mask, x=x)
    return torch.where(mask, x, 0).sum() / mask.sum()


def whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Return `x [B, T]` with standard deviation 1 over the drawn tokens, and mean 0 or (without `shift_mean`) its own.

    0 where masked. As `whiten` of OpenAI's lm-human-preferences (utils/core.py), which divides the variance by n.
    """
    mean = masked_mean(x, mask)
    centred = torch.where(mask, x - mean, 0)
    white = centred * torch.rsqrt(masked_mean(centred**2, mask) + 1e-8)
    return white if shift_mean else torch.where(mask, white + mean, 0)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Return estimates `[B, T]` of KL(policy || reference) in nats from drawn tokens.

    k1 is unbiased, k3 never negative (Schulman, "Approximating KL Divergence", 2020,
    http://joschu.net/blog/kl-approx.html). For the exact KL over the vocabulary, see `rescore(..., reference=)`.
    """
    if kind not in ("k1", "k3"):
        raise ValueError(f"kind={kind!r}; expected k1 or k3.")
    log_ratio = logprobs - ref_logprobs
    return log_ratio if kind == "k1" else torch.expm1(-log_ratio) + log_ratio


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    kl_coef: float,
    kl: Tensor | None = None,
) -> Tensor:
    """Return rewards `[B, T]`: the scores, less a penalty for the KL to the reference (Ziegler et al., equation 2).

    Args:
        scores: `[B]`, one for each response, which goes to its last drawn token; or `[B, T]`, one for each token.
        logprobs, ref_logprobs: of the drawn tokens under policy and reference; their difference is the KL.
        kl_coef: units of reward a nat.
        kl: `[B, T]`, another estimate of the KL; the log-probabilities are then not used.

    Raises ValueError where the shapes do not fit.
    """
    penalty = logprobs - ref_logprobs if kl is None else kl  # type: ignore[operator]
    _check(mask, penalty=penalty)
    if scores.shape == mask.shape[:1]:
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).amax(1, keepdim=True)  # [B, 1]
        scores = torch.zeros_like(penalty).scatter(1, last, scores.unsqueeze(1).to(penalty.dtype))
    _check(mask, scores=scores)
    return torch.where(mask, scores - kl_coef * penalty, 0)


class Advantages(NamedTuple):
    """What the policy and the critic learn from, `[B, T]` both, 0 where masked."""

    advantages: Tensor
    returns: Tensor


def advantages_and_returns(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap: Tensor | None = None,
    lam_critic: float | Tensor | None = None,
) -> Advantages:
    """Return generalised advantage estimates (Schulman et al., 2016, arXiv:1506.02438, equation 16) and returns.

    The value that follows a token is that of the next drawn token of its row.

    Args:
        rewards: `[B, T]`, on any of the drawn tokens.
        values: `[B, T]`, of the state before each token.
        gamma: discount from one drawn token to the next.
        lam: one number, or `[B]`, one for each row: see `length_adaptive_lambda`.
        bootstrap: `[B]`, the value of the state after a row's last token; 0 where the text has ended. None ends all
            rows: a response is scored as a whole also where it was cut off, so nothing is left to come.
        lam_critic: the lambda of the returns, where it is another than that of the advantages ("decoupled GAE", VC-PPO,
            arXiv:2503.01491); 1 makes them Monte Carlo returns.

    Raises ValueError where the shapes do not fit.
    """
    _check(mask, rewards=rewards, values=values)
    following = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap.to(values.dtype)  # [B]
    _check(mask[:, 0], bootstrap=following)
    after = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        after[:, t] = following
        following = torch.where(mask[:, t], values[:, t], following)
    errors = torch.where(mask, rewards + gamma * after - values, 0)

    def summed(lam: float | Tensor) -> Tensor:
        if isinstance(lam, Tensor) and lam.dim() > 0:
            _check(mask[:, 0], lam=lam)
        sums, running = torch.zeros_like(errors), torch.zeros_like(errors[:, 0])
        for t in reversed(range(errors.shape[1])):
            running = torch.where(mask[:, t], errors[:, t] + gamma * lam * running, running)
            sums[:, t] = running
        return torch.where(mask, sums, 0)

    advantages = summed(lam)
    of_critic = advantages if lam_critic is None else summed(lam_critic)
    return Advantages(advantages, torch.where(mask, of_critic + values, 0))


def length_adaptive_lambda(mask: Tensor, alpha: float) -> Tensor:
    """Return a lambda `[B]` for each row, 1 - 1 / (alpha * its drawn tokens), and not below 0 (VAPO,
    arXiv:2504.05118, equation 7): a longer response is credited over more tokens."""
    return (1 - 1 / (alpha * mask.sum(1).clamp(min=1))).clamp(min=0)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
    clip_high: float | None = None,
) -> Tensor:
    """Return the clipped surrogate `[]`, a mean over drawn tokens.

    Schulman et al., 2017, arXiv:1707.06347, equation 7. The ratio is clipped to 1 - `clip` and 1 + `clip_high`, by
    default `clip` too ("Clip-Higher", DAPO, arXiv:2503.14476).
    """
    _check(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    ratio = torch.where(mask, logprobs - old_logprobs, 0).exp()
    clipped = ratio.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return masked_mean(torch.maximum(-advantages * ratio, -advantages * clipped), mask)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2) -> Tensor:
    """Return half the mean `[]` over drawn tokens of the larger squared error, of the value and of the value clipped.

    A value is clipped to within `clip` of that of the rollout, as in OpenAI's lm-human-preferences.
    """
    _check(mask, values=values, old_values=old_values, returns=returns)
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    clipped = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    return 0.5 * masked_mean(torch.maximum((values - returns) ** 2, (clipped - returns) ** 2), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """Return 1 - Var[returns - values] / Var[returns] over the drawn tokens; 0 where the returns do not vary."""
    _check(mask, values=values, returns=returns)
    values, returns = values[mask].double(), returns[mask].double()
    variance = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / variance) if variance > 0 else 0.0


class AdaptiveKLController:
    """The coefficient of the KL penalty, steered towards `target` nats a response (Ziegler et al., section 2.2)."""

    def __init__(self, init: float, target: float | None, horizon: int) -> None:
        self.value, self.target, self.horizon = init, target, horizon

    def update(self, kl: float, n_steps: int) -> None:
        """Take note of a mean KL over `n_steps` responses. Without a target the coefficient stays."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -0.2), 0.2)
            self.value *= 1 + error * n_steps / self.horizon


def _check(mask: Tensor, **tensors: Tensor) -> None:
    """Refuse what torch would broadcast in silence, such as scores `[B, 1]`."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; expected torch.bool, True for drawn tokens: try mask.bool().")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} has shape {[*tensor.shape]}; expected {[*mask.shape]}, as the mask.")


# The critic and the reference


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
    from gpt2_value import rescore

    is_one = isinstance(returns, Tensor)
    pairs: Any = [(rollouts, returns)] if is_one else list(zip(rollouts, returns, strict=True))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    learnt, measured = [], []
    for drawn, targets in pairs:
        _check(drawn.response_mask, returns=targets)
        order = torch.randperm(len(drawn), generator=generator)
        first = int(held_out * len(drawn))
        learnt.append((drawn[order[first:]], targets[order[first:]]))
        measured.append((drawn[order[:first]], targets[order[:first]]) if first else learnt[-1])

    def values_of(part: Rollout) -> Tensor:
        return rescore(model, part).values

    @torch.no_grad()
    def explained() -> float:
        masks = [part.response_mask for part, _ in measured]
        values = torch.cat([values_of(part)[mask] for (part, _), mask in zip(measured, masks, strict=True)])
        targets = torch.cat([targets[mask] for (_, targets), mask in zip(measured, masks, strict=True)])
        return explained_variance(values, targets.to(values.device), torch.ones_like(values, dtype=torch.bool))

    everything = [weight for weight in model.parameters() if weight.requires_grad]
    head = {id(weight) for name, weight in model.named_parameters() if "v_head." in name}
    trained = [weight for weight in everything if body or id(weight) in head]
    if not trained:
        raise ValueError("the model has no v_head that requires a gradient; pass body=True to train all its weights.")
    before = explained()
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    model.requires_grad_(False)
    try:
        for weight in trained:
            weight.requires_grad_(True)
        for _ in range(epochs):
            for drawn, targets in learnt:
                for rows in torch.randperm(len(drawn), generator=generator).split(minibatch_size):
                    values, mask = values_of(drawn[rows]), drawn.response_mask[rows]
                    mask = mask.to(values.device)
                    (0.5 * masked_mean((values - targets[rows].to(values.device)) ** 2, mask)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
    finally:
        for weight in everything:
            weight.requires_grad_(True)
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
