"""Chi-square tests of counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


@dataclass(frozen=True, slots=True)
class CountTest:
    """Pearson's chi-square (1900)."""

    chi2: float
    degrees_of_freedom: int
    p_value: float


#: Below it the split is not the configured one: assignment or logging is broken, no result means anything.
SAMPLE_RATIO_LEVEL = 0.001


def sample_ratio(units: ArrayLike, weights: ArrayLike) -> CountTest:
    """Sample ratio mismatch: do the units per arm follow the weights (of any scale)? Fixed horizon.

    An arm of weight zero that got units makes the statistic infinite.
    """
    observed, shares = np.asarray(units, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    if observed.sum() == 0:
        return CountTest(0.0, observed.size - 1, 1.0)
    if shares.sum() <= 0:
        raise ValueError("some weight must be above zero")
    expected = shares / shares.sum() * observed.sum()
    if np.any((expected == 0) & (observed > 0)):
        return CountTest(float("inf"), observed.size - 1, 0.0)
    used = expected > 0
    statistic = float(np.sum((observed[used] - expected[used]) ** 2 / expected[used]))
    freedom = int(used.sum()) - 1
    return CountTest(statistic, freedom, float(stats.chi2.sf(statistic, freedom)) if freedom > 0 else 1.0)


def contingency(table: ArrayLike, *, continuity: bool = False) -> CountTest:
    """Independence of rows and columns, empty ones left out. `continuity` is Yates' correction, applied to 2
    by 2 tables only."""
    cells = np.asarray(table, dtype=np.float64)
    cells = cells[cells.sum(axis=1) > 0][:, cells.sum(axis=0) > 0]
    if min(cells.shape) < 2:
        return CountTest(0.0, 0, 1.0)
    result = stats.chi2_contingency(cells, correction=continuity)
    return CountTest(float(result.statistic), int(result.dof), float(result.pvalue))
