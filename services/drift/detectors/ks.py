"""Kolmogorov-Smirnov two-sample test over arrays and over cumulative shares (sketches)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from services.drift.detectors.binning import finite

Method = Literal["auto", "exact", "asymp", "limit"]
#: As scipy has them: "greater" looks for a distribution function of the reference above the current one's.
Alternative = Literal["two-sided", "greater", "less"]

#: Smallest distance worth a person's attention: at a million rows a shift of 0.005 sd is "significant".
EFFECT_FLOOR = 0.05


@dataclass(frozen=True, slots=True)
class KsResult:
    """`statistic` is D, the largest distance between the two distribution functions (0 … 1)."""

    statistic: float
    p_value: float
    n_reference: int
    n_current: int

    def is_material(
        self, *, q_value: float | None = None, level: float = 0.05, floor: float = EFFECT_FLOOR
    ) -> bool:
        """Whether the shift is both beyond chance and large enough to matter.

        `q_value` is the p-value adjusted for the other features tested beside it; without it the p-value
        itself is compared with `level`.
        """
        return (self.p_value if q_value is None else q_value) < level and self.statistic >= floor


def ks_two_sample(
    reference: ArrayLike,
    current: ArrayLike,
    *,
    method: Method = "auto",
    alternative: Alternative = "two-sided",
) -> KsResult:
    """Test that both samples come from one distribution. NaN is left out.

    "auto" is exact up to 10,000 values a side and asymptotic above (scipy.stats.ks_2samp); "exact" counts
    with ties, too; "limit" takes the limiting law instead, as R does without `exact`. Raises ValueError where
    either side holds nothing.
    """
    left, right = finite(reference), finite(current)
    if left.size == 0 or right.size == 0:
        raise ValueError("KS needs at least one value on either side")
    # It takes half a second to import, and no window needs it.
    from scipy import stats  # noqa: PLC0415

    result = stats.ks_2samp(
        left, right, alternative, method="auto" if method == "auto" else _SCIPY_METHODS[method]
    )
    distance, p_value = float(result.statistic), float(result.pvalue)
    if method == "limit":
        effective = left.size * right.size / (left.size + right.size)
        if alternative == "two-sided":
            p_value = float(special.kolmogorov(distance * np.sqrt(effective)))
        else:
            p_value = math.exp(-2 * effective * distance * distance)
    elif method == "exact" and np.unique(np.concatenate((left, right))).size < left.size + right.size:
        p_value = tied_tail(distance, left, right, alternative)
    return KsResult(distance, p_value, int(left.size), int(right.size))


_SCIPY_METHODS = {"exact": "exact", "asymp": "asymp", "limit": "asymp"}


def tied_tail(
    distance: float,
    reference: NDArray[np.float64],
    current: NDArray[np.float64],
    alternative: Alternative = "two-sided",
) -> float:
    """Probability of at least `distance` over all ways to deal the pooled values to two samples of these
    sizes, ties as they are (Schroeer & Trenkler, "Exact and randomization distributions of
    Kolmogorov-Smirnov tests two or three samples", Comput. Stat. Data Anal. 20, 1995). Time n x m.
    """
    pooled = np.sort(np.concatenate((reference, current)))
    whole = np.append(pooled[1:] != pooled[:-1], True)  # is the k-th value the last of its ties?
    n, m = reference.size, current.size
    limit = distance - 1e-7 / (n * m)
    tail = 0.0
    row = np.zeros(m + 1)
    for i in range(n + 1):
        for j in range(m + 1):
            left = n + m - i - j + 1
            reached = 1.0 if i + j == 0 else 0.0
            if i:
                reached += row[j] * (n - i + 1) / left
            if j:
                reached += row[j - 1] * (m - j + 1) / left
            gap = i / n - j / m
            beyond = {"two-sided": abs(gap), "greater": gap, "less": -gap}[alternative] >= limit
            if i + j and beyond and whole[i + j - 1]:
                tail, reached = tail + reached, 0.0
            row[j] = reached
    return min(1.0, tail)


def ks_from_cumulative(
    reference_cdf: ArrayLike, current_cdf: ArrayLike, n_reference: int, n_current: int
) -> KsResult:
    """The same from cumulative shares of both sides at the same points, as two sketches give them.

    D is at most what the samples themselves would give, short of it by what hides between the points (and
    by the rank error of the sketches). The p-value is asymptotic: the one-sample law at the effective size
    nm / (n + m), as scipy's `method="asymp"` takes it, by `limit_tail`.
    """
    reference = np.asarray(reference_cdf, dtype=np.float64)
    current = np.asarray(current_cdf, dtype=np.float64)
    if reference.shape != current.shape or reference.size == 0 or n_reference < 1 or n_current < 1:
        raise ValueError("KS needs both sides at the same points, with at least one value each")
    distance = float(np.max(np.abs(reference - current)))
    effective = n_reference * n_current / (n_reference + n_current)
    return KsResult(distance, limit_tail(distance, max(1, round(effective))), n_reference, n_current)


def limit_tail(distance: float, size: int) -> float:
    """Probability that `size` values lie at least `distance` from their distribution function: Kolmogorov's
    limiting law with the correction of Vrbik ("Small-sample corrections to Kolmogorov-Smirnov test
    statistic", Pioneer J. Theor. Appl. Stat. 15, 2018), within 0.0005 of the exact law from 25 values on."""
    root = math.sqrt(size)
    scaled = distance * root
    corrected = scaled + 1 / (6 * root) + (scaled - 1) / (4 * size)
    return float(special.kolmogorov(max(0.0, corrected)))
