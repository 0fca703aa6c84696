"""What an audit found: `print(audit)` is one line, `audit.plot("audit.png")` the picture.

Imports torch and `statistics`; matplotlib only to plot.
"""

from __future__ import annotations

import dataclasses
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .statistics import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True, eq=False)
class SamplerAudit:
    """What the audit of some tokens found. `print(audit)` is one line, `audit.plot("audit.png")` the picture.

    Attributes:
        statistic: G of the likelihood-ratio test that the transforms are uniform, with Williams' correction.
        degrees_of_freedom: of the chi-square distribution that G has for an honest sampler.
        tests: the four tests by name: `"calibration"` (that G test: are probabilities right?), `"identity"` (is each
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
        edges: of the bins of the G test, K + 1 numbers from 0 to 1. The last of ten even bins (five below 100 tokens)
            is halved as often as the number of tokens allows: the rare tokens are where truncation and padding show.
        histogram: transforms in each bin, K numbers.
        transforms: `[tokens]` float64 on the CPU, in the order of rows and columns; uniform on [0, 1] if honest.
    """

    statistic: float
    degrees_of_freedom: float
    tests: dict[str, Outcome]
    p_value: float
    alpha: float
    bias_nats: float
    standard_error: float
    tokens: int
    impossible: int
    edges: tuple[float, ...]
    histogram: tuple[int, ...]
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
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["transforms"]
        fields["edges"], fields["histogram"] = list(self.edges), list(self.histogram)
        fields["tests"] = {name: outcome._asdict() for name, outcome in self.tests.items()}
        numbers = {
            name: None for name, value in fields.items() if isinstance(value, float) and not math.isfinite(value)
        }
        return {"verdict": self.verdict, **fields, **numbers}

    def plot(self, where: str | os.PathLike[str] | Axes, *, bins: int = 20) -> Axes:
        """Draw the histogram of the transforms, flat for an honest sampler, with the band that chance allows.

        Args:
            where: a file to write (its suffix decides the format), or a matplotlib `Axes` to draw into.
            bins: even bins of the picture; the test has its own.

        Returns:
            The `Axes`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "SamplerAudit.plot() needs matplotlib, which is not installed: pip install matplotlib"
            ) from error

        file = Path(where) if isinstance(where, (str, os.PathLike)) else None
        axes: Any = where if file is None else Figure(figsize=(6, 3.4), layout="constrained").subplots()
        counts = torch.histc(self.transforms, bins, 0, 1)
        chance = 2.576 * math.sqrt((bins - 1) / self.tokens)  # 99% of a bin's density: normal approximation
        color = "#2a78b5" if self.honest else "#c8452f"
        axes.axhspan(max(0.0, 1 - chance), 1 + chance, color="#d9d9d9", linewidth=0, label="99% of honest bins")
        centers = [(bin + 0.5) / bins for bin in range(bins)]
        axes.bar(centers, (counts * bins / self.tokens).tolist(), width=0.92 / bins, color=color, alpha=0.85)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xlim(0, 1)
        if file is not None:
            axes.set_xlabel("probability of the more probable tokens (randomised); 1 = the rarest")
            axes.set_ylabel("density")
            axes.set_title(str(self), fontsize=9)
            axes.legend(loc="lower left", fontsize=8)
            axes.figure.savefig(file, dpi=150)
        return axes
