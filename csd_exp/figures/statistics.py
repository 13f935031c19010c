"""What seeds allow to be said of a mean and of a difference: Student's t, for samples and for pairs."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from csd_exp.figures.results import summary

LEVEL = 0.95


class Paired(NamedTuple):
    """The difference of two configurations over the seeds that both have, second minus first.

    half: half the width of its 95 % interval. t, p: of the two-sided paired t-test, n - 1 degrees of freedom.
    """

    difference: float
    half: float
    t: float
    p: float
    seeds: int


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % interval of a mean, t_{0.975, n-1} s / sqrt(n); None for fewer than two."""
    of = summary(values)
    if of is None or of.error is None:
        return None
    return float(stats.t.ppf((1 + LEVEL) / 2, of.seeds - 1)) * of.error


def paired(first: Sequence[float], second: Sequence[float]) -> Paired | None:
    """The paired t-test (Student 1908) of values seed by seed; None for fewer than two pairs.

    Where all differences are the same there is no spread to judge by: p is then 1 for no difference at all,
    and 0 otherwise. Raises ValueError for sequences of different lengths.
    """
    pairs = list(zip(first, second, strict=True))
    if len(pairs) < 2:
        return None
    differences = np.array([b - a for a, b in pairs])
    mean, half = float(differences.mean()), half_width(list(differences))
    assert half is not None
    if np.ptp(differences) == 0:
        t = float(np.copysign(np.inf, mean)) if mean else 0.0
        return Paired(mean, 0.0, t, float(mean == 0), len(pairs))
    test = stats.ttest_1samp(differences, 0.0)
    return Paired(mean, half, float(test.statistic), float(test.pvalue), len(pairs))


def holm(p: Sequence[float]) -> list[float]:
    """p-values of so many tests at once, adjusted by Holm's step-down method (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    scaled = np.asarray(p, float)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(value) for value in adjusted]
