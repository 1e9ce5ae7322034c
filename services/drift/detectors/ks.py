"""Kolmogorov-Smirnov two-sample test over arrays and over cumulative shares (sketches)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from services.drift.detectors.binning import finite

Method = Literal["auto", "exact", "asymp", "limit"]

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


def ks_two_sample(reference: ArrayLike, current: ArrayLike, *, method: Method = "auto") -> KsResult:
    """Two-sided test that both samples come from one continuous distribution. NaN is left out.

    "auto" is exact up to 10,000 values a side and asymptotic above (scipy.stats.ks_2samp); "limit" takes
    Kolmogorov's limiting law instead, as R does without `exact`. Raises ValueError where either side holds
    nothing.
    """
    left, right = finite(reference), finite(current)
    if left.size == 0 or right.size == 0:
        raise ValueError("KS needs at least one value on either side")
    # It takes half a second to import, and no window needs it.
    from scipy import stats  # noqa: PLC0415

    result = stats.ks_2samp(left, right, method="asymp" if method == "limit" else method)
    distance, p_value = float(result.statistic), float(result.pvalue)
    if method == "limit":
        effective = left.size * right.size / (left.size + right.size)
        p_value = float(special.kolmogorov(distance * np.sqrt(effective)))
    return KsResult(distance, p_value, int(left.size), int(right.size))


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
