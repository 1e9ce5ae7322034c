"""Tests for features that take a few values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from services.drift.detectors.binning import category_counts
from services.drift.detectors.ks import Alternative


@dataclass(frozen=True, slots=True)
class CategoricalResult:
    """`statistic` is chi-square, Cramer-von Mises T, or the odds ratio of Fisher's test.

    `degrees_of_freedom` is 0 where the test has none.
    """

    statistic: float
    p_value: float
    degrees_of_freedom: int = 0


def chi_square_fit(reference_counts: ArrayLike, current_counts: ArrayLike) -> CategoricalResult:
    """Pearson's test of the current counts against the reference's shares, taken as known.

    A category that the reference never held makes the statistic infinite. For a reference not much larger
    than the current sample `chi_square_two_sample` is the one to use: it counts the noise of both.
    """
    reference = np.asarray(reference_counts, dtype=np.float64)
    current = np.asarray(current_counts, dtype=np.float64)
    expected = reference / reference.sum() * current.sum()
    if np.any((expected == 0) & (current > 0)):
        return CategoricalResult(float("inf"), 0.0, max(0, reference.size - 1))
    used = expected > 0
    statistic = float(np.sum((current[used] - expected[used]) ** 2 / expected[used]))
    freedom = int(used.sum()) - 1
    return CategoricalResult(statistic, float(stats.chi2.sf(statistic, freedom)) if freedom else 1.0, freedom)


def chi_square_two_sample(reference_counts: ArrayLike, current_counts: ArrayLike) -> CategoricalResult:
    """Pearson's test that two rows of a contingency table share one distribution, without continuity
    correction. Categories empty in both are left out.
    """
    table = np.vstack((np.asarray(reference_counts, np.float64), np.asarray(current_counts, np.float64)))
    table = table[:, table.sum(axis=0) > 0]
    if table.shape[1] < 2:
        return CategoricalResult(0.0, 1.0, 0)
    result = stats.chi2_contingency(table, correction=False)
    return CategoricalResult(float(result.statistic), float(result.pvalue), int(result.dof))


def fisher_exact(
    reference: ArrayLike, current: ArrayLike, *, alternative: Alternative = "two-sided"
) -> CategoricalResult:
    """Fisher's exact test of two samples of zeros and ones (or any two values). "greater": the current sample
    holds the larger value more often. A feature with one value only shows nothing: p = 1."""
    left, right = category_counts(reference, current)
    if left.size == 1:
        return CategoricalResult(1.0, 1.0)
    if left.size != 2:
        raise ValueError("Fisher's exact test needs a feature with exactly two values")
    result = stats.fisher_exact(np.vstack((left, right)), alternative)
    return CategoricalResult(float(result.statistic), float(result.pvalue))


def cramer_von_mises(reference: ArrayLike, current: ArrayLike) -> CategoricalResult:
    """Two-sample Cramer-von Mises test for continuous values (Anderson 1962; scipy's automatic method)."""
    result = stats.cramervonmises_2samp(np.asarray(reference, float), np.asarray(current, float))
    return CategoricalResult(float(result.statistic), float(result.pvalue))
