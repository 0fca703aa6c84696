"""The four tests of an audit: calibration, identity, order, spread. Each gives a p-value that is uniform if honest.

For honest draws the transforms are independent and uniform on [0, 1], so their normal scores are
independent standard normal numbers; how often a token is drawn has a known mean and variance.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

LEAST_EXPECTED = 10  # in a bin: below, the distribution of G is not near enough to chi-square
LEAST_PAIRS = 20  # of transforms, to correlate them
LEAST_VARIANCE = 5.0  # of a count: below, its distribution is not near enough to a normal one


class Outcome(NamedTuple):
    """One test: its statistic, the degrees of freedom of the distribution that an honest sampler gives it, its p."""

    statistic: float
    degrees_of_freedom: float
    p_value: float

    @property
    def was_made(self) -> bool:
        """Whether there was enough to test."""
        return self.degrees_of_freedom > 0


def calibration(transforms: torch.Tensor) -> Outcome:
    """Are probabilities right? A likelihood-ratio test (G-test) that the transforms `[n]` are uniform.

    With Williams' correction (1976, "Improved likelihood ratio tests for complete contingency tables", Biometrika 63).
    There are ten even bins (five below 100 tokens), the last of which is halved as often as at least 10 are expected in
    each: the rare tokens are where truncation and padding show.
    """
    n = len(transforms)
    even = 10 if n >= 10 * LEAST_EXPECTED else 5
    starts, tail = [bin / even for bin in range(even)], 1.0 / even
    while n * tail / 2 >= LEAST_EXPECTED:
        tail /= 2
        starts.append(1.0 - tail)
    edges = torch.tensor([*starts, 1.0], dtype=torch.float64)
    widths, freedom = edges.diff(), len(starts) - 1
    observed = torch.histogram(transforms, edges).hist
    g = 2.0 * torch.special.xlogy(observed, observed / (n * widths)).sum()
    williams = 1.0 + ((1.0 / widths).sum() - 1.0) / (6.0 * n * freedom)
    statistic = float((g / williams).clamp(min=0.0))
    return Outcome(statistic, freedom, chi_square_tail(statistic, freedom))


def identity(observed: torch.Tensor, expected: torch.Tensor, covariance: torch.Tensor) -> Outcome:
    """Which tokens? Pearson's chi-square of counts `[G]` of groups of ids, whose covariance `[G, G]` is known.

    Counts of different groups are correlated, so the deviation is measured along the principal axes of the covariance,
    those on which hardly anything can vary left out.
    """
    variances, axes = torch.linalg.eigh(covariance)
    used = variances >= LEAST_VARIANCE
    freedom = int(used.sum())
    if not freedom:
        return Outcome(0.0, 0, 1.0)
    variances, axes = variances[used], axes[:, used]
    statistic = (((observed - expected) @ axes) ** 2 / variances).sum()
    # Small counts are nearly Poisson numbers, whose squares vary more than those of normal ones. The gamma
    # distribution with this variance stands for chi-square's.
    excess = (expected * (axes**2 / variances).sum(1) ** 2).sum() / (2.0 * freedom)
    p_value = chi_square_tail(statistic / (1.0 + excess), freedom / (1.0 + float(excess)))
    return Outcome(float(statistic), freedom, p_value)


def order(transforms: torch.Tensor, drawn: torch.Tensor) -> Outcome:
    """Is each draw independent of the others? Of the transforms `[B, T]` where `drawn [B, T]`, by two tests.

    Patterns: the strongest line in the two-dimensional periodogram of the normal scores (Fisher, 1929, "Tests of
    significance in harmonic analysis"): neighbours that are alike, alternation, drift, a sequence that repeats from row
    to row. Repeats: the strongest correlation of each row with the one so many rows later, as of processes that began
    with one seed.
    """
    scores = normal_scores(transforms, drawn)
    power = torch.fft.fft2(scores).abs() ** 2 / int(drawn.sum())
    # Real and imaginary part have the variances (1 +- r) / 2, with r from the mask: P(power > x) <= exp(-x / (1 + r)).
    mask = torch.fft.fft2(drawn.double()).abs() / int(drawn.sum())
    rows, steps = (torch.arange(size) * 2 % size for size in drawn.shape)
    strongest = float((power / (1.0 + mask[rows][:, steps])).amax())
    lines = (drawn.numel() + 1) // 2  # a real signal has every line twice
    pattern = -math.expm1(lines * math.log1p(-math.exp(-strongest))) if strongest > 0 else 1.0
    return Outcome(strongest, lines, both(pattern, _repeats(2.0 * transforms - 1.0, drawn)))


def _repeats(scores, drawn):
    """The p-value of the strongest correlation of `scores [B, T]` with those of the same step some rows later."""

    def of_later_rows(x):  # [B - 1], by a Fourier transform: a batch may have thousands of rows
        spectrum = torch.fft.rfft(x, 2 * len(x), dim=0)  # twice the rows: the last ones do not meet the first
        return torch.fft.irfft(spectrum.abs() ** 2, 2 * len(x), dim=0)[1 : len(x)].sum(1)

    used = of_later_rows(drawn.double()) >= LEAST_PAIRS
    strengths = of_later_rows(scores * drawn)[used] ** 2 / of_later_rows(scores**2 * drawn)[used]
    return both(*(chi_square_tail(strength, 1) for strength in strengths.tolist())) if len(strengths) else 1.0


def spread(transforms: torch.Tensor, variances: torch.Tensor, drawn: torch.Tensor, *, evenness: float) -> Outcome:
    """Is it one sampler? Whether sums of normal scores `[B, T]` over rows, and over steps, vary as they should.

    Too much: some rows, or some steps, were drawn at another temperature than others. Too little: draws were balanced
    against each other. A temperature moves a token in proportion to the standard deviation of its log-probability, so
    that is the weight of its score.

    Args:
        transforms: `[B, T]`, where `drawn [B, T]`.
        variances: `[B, T]`, of the log-probability of a token that is drawn there.
        evenness: the probability that honest transforms are spread over the unit interval as evenly as these, or more.
    """
    scores = normal_scores(transforms, drawn) * variances.sqrt()
    results = []
    for dim in (1, 0):
        sums, expected = scores.sum(dim), variances.masked_fill(~drawn, 0.0).sum(dim)  # of each row, or step
        mean = float(expected.sum())
        if mean <= 0:
            continue
        # A sum of weighted chi-square numbers is nearly a gamma number with the same mean and variance (Satterthwaite,
        # 1946, "An approximate distribution of estimates of variance components").
        freedom = mean**2 / float((expected**2).sum())
        statistic = float((sums**2).sum()) / mean * freedom
        upper = chi_square_tail(statistic, freedom)
        results.append(Outcome(statistic, freedom, min(1.0, 2.0 * min(upper, 1.0 - upper))))
    if not results:
        return Outcome(0.0, 0, 1.0)
    return Outcome(*results[0][:2], both(evenness, *(result.p_value for result in results)))


def normal_scores(transforms: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
    """Uniform numbers as standard normal ones; 0 where nothing was drawn."""
    return torch.special.ndtri(transforms.clamp(1e-12, 1 - 1e-12)).masked_fill(~drawn, 0.0)


def both(*p_values: float) -> float:
    """The p-value of the smallest of independent ones (Sidak, 1967, "Rectangular confidence regions")."""
    return -math.expm1(len(p_values) * math.log1p(-min(p_values))) if min(p_values) < 1.0 else 1.0


def chi_square_tail(statistic, freedom: float) -> float:
    """P(chi-square with `freedom` degrees of freedom > statistic), a regularised incomplete gamma function."""
    a, x = (torch.as_tensor(value, dtype=torch.float64) / 2.0 for value in (freedom, statistic))
    return float(torch.special.gammaincc(a, x))
