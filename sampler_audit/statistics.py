"""The four tests of an audit: calibration, identity, order, spread. Each gives a p-value that is uniform if honest.

Imports torch. Transforms are independent and uniform on [0, 1] for honest draws; surprises are martingale differences
with known moments.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

EVEN_BINS = 10
LEAST_VARIANCE = 5.0  # of a count: below, its distribution is not near enough to a normal one


class Outcome(NamedTuple):
    """One test: its statistic, the degrees of freedom of the distribution that an honest sampler gives it, its p."""

    statistic: float
    degrees_of_freedom: float
    p_value: float


def calibration(transforms: torch.Tensor) -> tuple[Outcome, torch.Tensor, torch.Tensor]:
    """Are probabilities right? A likelihood-ratio test (G-test) that the transforms `[n]` are uniform.

    With Williams' correction (1976, "Improved likelihood ratio tests for complete contingency tables", Biometrika 63).

    Returns:
        the result; the edges of the bins: even ones, the last halved while at least 10 are expected in each half, since
        the rare tokens are where truncation and padding show; and the count in each bin.
    """
    n = len(transforms)
    edges = [bin / EVEN_BINS for bin in range(EVEN_BINS)]
    tail = 1.0 / EVEN_BINS
    while n * tail / 2 >= 10:
        tail /= 2
        edges.append(1.0 - tail)
    edges = torch.tensor([*edges, 1.0], dtype=torch.float64)
    widths = edges.diff()
    observed = torch.bincount(torch.bucketize(transforms, edges[1:-1], right=True), minlength=len(widths)).double()
    g = 2.0 * torch.special.xlogy(observed, observed / (n * widths)).sum()
    freedom = len(widths) - 1
    statistic = (g / (1.0 + ((1.0 / widths).sum() - 1.0) / (6.0 * n * freedom))).clamp(min=0.0)
    return Outcome(float(statistic), freedom, chi_square_tail(statistic, freedom)), edges, observed


def identity(observed: torch.Tensor, expected: torch.Tensor, covariance: torch.Tensor) -> Outcome:
    """Which tokens? Pearson's chi-square of counts `[G]` of groups of ids, whose covariance `[G, G]` is known.

    Counts of different groups are correlated, so the deviation is measured along the principal axes of the covariance,
    those on which hardly anything can vary left out.
    """
    variances, axes = torch.linalg.eigh(covariance)
    used = variances >= LEAST_VARIANCE
    if not used.any():
        return Outcome(0.0, 0, 1.0)
    deviations = (axes.T @ (observed - expected))[used]
    statistic = (deviations**2 / variances[used]).sum()
    return Outcome(float(statistic), int(used.sum()), chi_square_tail(statistic, int(used.sum())))


def order(transforms: torch.Tensor, drawn: torch.Tensor) -> Outcome:
    """Is each draw independent of the others? Of the transforms `[B, T]` where `drawn [B, T]`, by two tests.

    Neighbours: correlations of the first two Legendre polynomials of each transform with those of the next in the row,
    and of the same step in the next row; under independence they are uncorrelated with variance 1 (Neyman, 1937,
    "Smooth test for goodness of fit"). Patterns: the strongest line in the two-dimensional periodogram of the normal
    scores, after Fisher (1929, "Tests of significance in harmonic analysis"): alternation, drift, a sequence that
    repeats from row to row.
    """
    x = 2.0 * transforms - 1.0
    scores = torch.stack([math.sqrt(3.0) * x, math.sqrt(5.0) * (3.0 * x**2 - 1.0) / 2.0], -1)  # [B, T, 2]
    squares, terms = torch.zeros((), dtype=torch.float64), 0
    for here, there, pairs in (
        (scores[:, :-1], scores[:, 1:], drawn[:, :-1] & drawn[:, 1:]),
        (scores[:-1], scores[1:], drawn[:-1] & drawn[1:]),
    ):
        if pairs.sum() >= 20:
            products = here[pairs].T @ there[pairs] / math.sqrt(int(pairs.sum()))  # [2, 2]
            squares, terms = squares + (products**2).sum(), terms + 4
    neighbours = chi_square_tail(squares, terms) if terms else 1.0

    n = int(drawn.sum())
    normal = torch.special.ndtri(transforms.clamp(1e-12, 1 - 1e-12)).masked_fill(~drawn, 0.0)
    power = torch.fft.fft2(normal).abs() ** 2 / n
    # Real and imaginary part have the variances (1 +- r) / 2, with r from the mask; P(power > x) <= exp(-x / (1 + r)).
    mask = torch.fft.fft2(drawn.double()).abs() / n
    rows, steps = (torch.arange(size) * 2 % size for size in drawn.shape)
    logs = -power / (1.0 + mask[rows][:, steps])
    lines = (drawn.numel() + 1) // 2  # a real signal has every line twice
    pattern = min(1.0, lines * math.exp(float(logs.amin())))
    return Outcome(float(squares), terms, both(neighbours, pattern))


def spread(surprises, variances, fourths, drawn) -> Outcome:
    """Is it one sampler? Whether sums of the surprises `[B, T]` over rows, and over steps, vary as they should.

    Too much: some rows, or some steps, were drawn by another temperature than others. Too little: draws were balanced
    against each other.
    """
    fields = [field.masked_fill(~drawn, 0.0) for field in (surprises, variances, fourths)]
    results = []
    for dim in (1, 0):
        sums, variance, fourth = (field.sum(dim) for field in fields)
        second = (fields[1] ** 2).sum(dim)
        mean = variance.sum()
        spread_of_squares = (2.0 * variance**2 + fourth - 3.0 * second).sum()  # variance of the sum of squares
        if mean <= 0 or spread_of_squares <= 0:
            continue
        # A gamma distribution with that mean and variance.
        shape, scale = mean**2 / spread_of_squares, spread_of_squares / mean
        statistic = (sums**2).sum()
        upper = chi_square_tail(2.0 * statistic / scale, 2.0 * float(shape))
        results.append(Outcome(float(statistic / mean), len(sums), min(1.0, 2.0 * min(upper, 1.0 - upper))))
    if not results:
        return Outcome(0.0, 0, 1.0)
    return Outcome(results[0].statistic, results[0].degrees_of_freedom, both(*(result.p_value for result in results)))


def both(*p_values: float) -> float:
    """The p-value of the smallest of independent ones (Sidak, 1967, "Rectangular confidence regions")."""
    return -math.expm1(len(p_values) * math.log1p(-min(p_values))) if min(p_values) < 1.0 else 1.0


def chi_square_tail(statistic, freedom: float) -> float:
    """P(chi-square with `freedom` degrees of freedom > statistic), a regularised incomplete gamma function."""
    a, x = (torch.as_tensor(value, dtype=torch.float64) / 2.0 for value in (freedom, statistic))
    return float(torch.special.gammaincc(a, x))
