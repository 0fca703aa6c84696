"""What an audit found: `print(audit)` is one line, `audit.plot("audit.png")` the picture."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import torch

from .statistics import Outcome

BINS = 20  # of the picture; the test has its own


@dataclasses.dataclass(frozen=True, eq=False)
class SamplerAudit:
    """What the audit of some tokens found. `print(audit)` is one line, `audit.plot("audit.png")` the picture.

    Attributes:
        tests: the four tests by name: `"calibration"` (are probabilities right?), `"identity"` (is each
            token drawn as often as it should be?), `"order"` (does one draw depend on another?), `"spread"` (are all
            rows and all steps drawn alike?). One for which there were too few tokens has 0 degrees of freedom.
        p_value: of the smallest of their p-values, given how many there are: how often an honest sampler does as
            badly. 0 if a token was `impossible`.
        alpha: the level of the verdict: one honest sampler in 1 / alpha is called dishonest.
        bias_nats: what the mismatch adds to a KL penalty, in nats per token: the mean over drawn tokens of
            log p(x) + H(p), about 0 for honest draws; -inf if a token was `impossible`.
        standard_error: of `bias_nats`, for honest draws, whose terms are uncorrelated; NaN if one was `impossible`.
        tokens: how many drawn tokens were tested.
        impossible: how many of them have probability zero under the claim.
        transforms: `[tokens]` float64 on the CPU, in the order of rows and columns; uniform on [0, 1] if honest.
    """

    tests: dict[str, Outcome]
    p_value: float
    alpha: float
    bias_nats: float
    standard_error: float
    tokens: int
    impossible: int
    transforms: torch.Tensor = dataclasses.field(repr=False)

    @property
    def honest(self) -> bool:
        """Whether the tokens pass for draws from the claimed distribution at the level `alpha`."""
        return self.p_value >= self.alpha

    @property
    def verdict(self) -> str:
        """`"honest"` or `"dishonest"`, as `honest`."""
        return "honest" if self.honest else "dishonest"

    @property
    def failed(self) -> tuple[str, ...]:
        """The tests by which the sampler is dishonest, the clearest first."""
        level = -math.expm1(math.log1p(-self.alpha) / sum(test.was_made for test in self.tests.values()))
        by_p_value = sorted(self.tests.items(), key=lambda item: item[1].p_value)
        return tuple(name for name, outcome in by_p_value if outcome.p_value < level)

    def __str__(self) -> str:
        by = f" ({', '.join(self.failed)})" if self.failed else ""
        facts = [f"p = {self.p_value:.2g}{by}", f"{self.tokens:,} tokens"]
        if self.impossible:
            facts.append(f"{self.impossible:,} of them impossible under the claim")
        else:
            facts.append(f"bias {self.bias_nats:+.4f} ± {self.standard_error:.4f} nats per token")
        return f"{self.verdict}: " + ", ".join(facts)

    def to_json(self) -> dict[str, Any]:
        """The findings without the transforms, as plain JSON values; what is not finite is None."""
        found: dict[str, Any] = {"verdict": self.verdict}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            found[field.name] = None if isinstance(value, float) and not math.isfinite(value) else value
        del found["transforms"]
        return {**found, "tests": {name: outcome._asdict() for name, outcome in self.tests.items()}}

    def plot(self, where: Any) -> Any:
        """Draw the histogram of the transforms, flat for an honest sampler, with the band that chance allows.

        Args:
            where: a file to write (its suffix decides the format), or a matplotlib `Axes` to draw into.

        Returns:
            The `Axes`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        to_file = isinstance(where, (str, os.PathLike))
        axes: Any = Figure(figsize=(6, 3.4), layout="constrained").subplots() if to_file else where
        heights = (torch.histc(self.transforms, BINS, 0, 1) * BINS / self.tokens).tolist()
        chance = 2.576 * math.sqrt((BINS - 1) / self.tokens)  # 99% of a bin's density: normal approximation
        axes.axhspan(max(0.0, 1 - chance), 1 + chance, color="#d9d9d9", label="99% of honest bins")
        color = "#2a78b5" if self.honest else "#c8452f"
        axes.bar((torch.arange(0.5, BINS) / BINS).tolist(), heights, width=0.92 / BINS, color=color)
        if to_file:
            axes.set_xlabel("probability of the more probable tokens (randomised); 1 = the rarest")
            axes.set_title(str(self), fontsize=9)
            axes.legend(loc="lower left", fontsize=8)
            axes.figure.savefig(where, dpi=150)
        return axes
