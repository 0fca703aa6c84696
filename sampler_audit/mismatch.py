"""How far another engine's log-probabilities are from the trainer's, and the weights that correct for it.

An engine that serves the same weights computes other log-probabilities, by its rounding, its kernels, or by what it
means by the word; a trainer that takes its tokens is then slightly off-policy (Yao et al., 2025, "Your efficient RL
framework secretly brings you off-policy RL training"). With the ratio r = exp(ours - the engine's) of each drawn token,
whose mean is 1 if the engine's numbers are those that it drew by:

- effective sample size: (sum r)^2 / sum r^2 (Kish, 1965, "Survey Sampling");
- kl: the mean of r - 1 - log r, an estimate of KL(engine || ours) (k3 of Schulman, 2020, "Approximating KL
  divergence");
- weights: min(r, cap), "truncated importance sampling" (Ionides, 2008, Journal of Computational and Graphical
  Statistics 17), of a token, or of a sequence, whose ratio is the product of its tokens'.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch

from generation_gpt2_value import Rollout
from sampling_gpt2_value import Sampling
from scoring_gpt2_value import Rescored, rescore

from .engine import check_is_rollout

CLAIMED = "the sampling settings"


@dataclasses.dataclass(frozen=True, eq=False)
class Mismatch:
    """How far an engine's log-probabilities are from those of a scoring pass; `print` it. `weights` corrects for it.

    Attributes:
        tokens: how many drawn tokens were compared.
        mean_ratio: of exp(scored - engine's); 1 within its error if the engine drew by the numbers that it gave.
        standard_error: of `mean_ratio`. Ratios of one row are uncorrelated too: each has the mean 1, whatever was drawn
            before it.
        effective_sample_size: how many tokens of our own distribution would estimate a mean as well; at most `tokens`.
        kl: an estimate of KL(engine || ours), in nats a token.
        distances: mean absolute difference, in nats, between the engine's numbers and the model's under these readings
            of what the engine meant; None where no model was given.
        log_ratios: `[B, T]` float64 on the CPU, scored - engine's; 0 where masked.
        response_mask: `[B, T]` bool.
    """

    tokens: int
    mean_ratio: float
    standard_error: float
    effective_sample_size: float
    kl: float
    distances: dict[str, float] | None
    log_ratios: torch.Tensor = dataclasses.field(repr=False)
    response_mask: torch.Tensor = dataclasses.field(repr=False)

    @property
    def reports(self) -> str | None:
        """What the engine's numbers are log-probabilities under: the key of `distances` that is clearly the nearest.

        Another reading than the sampling settings is named where it is less than half as far. None without `distances`.
        """
        if self.distances is None:
            return None
        nearest = min(self.distances, key=self.distances.__getitem__)
        return nearest if 2 * self.distances[nearest] < self.distances[CLAIMED] else CLAIMED

    def weights(self, level: str = "token", *, cap: float = 2.0) -> torch.Tensor:
        """Truncated importance weights `[B, T]` float32 on the rollout's device, for a loss of the engine's tokens.

        Args:
            level: `"token"`, min(r, cap) of each token; or `"sequence"`, the same of the product of a row's ratios,
                given to each of its tokens. Weights of tokens vary less; those of sequences are without bias where they
                are not truncated.
            cap: the largest weight, at least 1; `math.inf` truncates nothing.

        Masked tokens have the weight 0: sums over `[B, T]` need no mask, and means must divide by its sum. There is no
        gradient.

        Raises:
            ValueError: these arguments are others, or `reports` says that the engine's numbers are not what it drew by,
                so that no weight follows from them.
        """
        if level not in ("token", "sequence") or not cap >= 1:
            raise ValueError(f'level={level!r}, cap={cap!r}; expected "token" or "sequence", and a cap of at least 1.')
        if self.reports not in (None, CLAIMED):
            raise ValueError(f"{self._reading()} No weights follow from them: train on rescore(...).logprobs.")
        logs = self.log_ratios if level == "token" else self.log_ratios.sum(1, keepdim=True)
        weights = logs.exp().clamp(max=cap).float().to(self.response_mask.device)
        return torch.where(self.response_mask, weights, 0.0)

    def __str__(self) -> str:
        ratio = f"ratio (ours / engine's) {self.mean_ratio:.5f} ± {self.standard_error:.1e} over {self.tokens:,} tokens"
        size = f"effective sample size {self.effective_sample_size:,.0f}"
        found = f"{ratio}, {size}, KL(engine || ours) {self.kl:.2e} nats a token"
        return found if self.distances is None else f"{found}\n{self._reading()}"

    def _reading(self) -> str:
        distances: Any = self.distances
        away = f"those of the sampling settings ({distances[CLAIMED]:.1e} nats apart)"
        if self.reports == CLAIMED:
            return f"the engine's numbers are {away}."
        return f"the engine's numbers are NOT {away} but of {self.reports} ({distances[self.reports]:.1e} apart)."


@torch.no_grad()
def mismatch(rollout: Rollout, rescored: Rescored, *, model: Any = None) -> Mismatch:
    """Compare an engine's log-probabilities, `rollout.logprobs`, with those of a scoring pass of the same tokens.

    Args:
        rollout: of `rollout_from_tokens(..., logprobs=...)`.
        rescored: of `rescore(model, rollout)`, with the weights that the engine served.
        model: this model. With it, the tokens are also scored over the full vocabulary, at temperature 1 and at the
            sampling temperature, which many engines report whatever they draw by; `Mismatch.reports` says which it was.

    Returns:
        `Mismatch`.

    Raises:
        TypeError, ValueError: the rollout has no log-probabilities, or none that are finite, or the two do not fit each
            other.
    """
    check_is_rollout(rollout)
    theirs, ours = rollout.logprobs, rescored.logprobs
    if theirs is None or ours is None or ours.shape != theirs.shape:
        shapes = [None if numbers is None else [*numbers.shape] for numbers in (theirs, ours)]
        raise ValueError(f"log-probabilities of the rollout and rescored: {shapes}; expected both, of one shape.")
    mask = rollout.response_mask.cpu()
    engine, scored = (column.detach().cpu()[mask].double() for column in (theirs, ours))  # [n]
    if not len(engine) or not engine.isfinite().all():
        raise ValueError("the rollout has no drawn token, or log-probabilities that are NaN or infinite.")
    logs = scored - engine
    ratios, n = logs.exp(), len(logs)
    return Mismatch(
        tokens=n,
        mean_ratio=float(ratios.mean()),
        standard_error=float(ratios.std() / math.sqrt(n)),
        effective_sample_size=float(ratios.sum() ** 2 / (ratios**2).sum()),
        kl=float((ratios - 1 - logs).mean()),
        distances=None if model is None else _distances(model, rollout, engine, scored),
        log_ratios=torch.zeros(mask.shape, dtype=torch.float64).masked_scatter(mask, logs),
        response_mask=rollout.response_mask,
    )


def _distances(model, rollout, engine, scored):
    """Mean absolute differences of the engine's numbers `[n]` from each reading of them, by its name."""
    found = {CLAIMED: float((scored - engine).abs().mean())}
    for temperature in {1.0, rollout.sampling.temperature}:
        plain = dataclasses.replace(rollout, sampling=Sampling(temperature), kept=None)
        if plain.sampling == rollout.sampling and rollout.kept is None:
            continue
        logprobs = rescore(model, plain).logprobs.cpu()[rollout.response_mask.cpu()]
        found[f"temperature {temperature:g} over the full vocabulary"] = float(
            (logprobs.double() - engine).abs().mean()
        )
    return found
