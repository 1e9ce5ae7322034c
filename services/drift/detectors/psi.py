"""Population stability index, with what it would be by chance alone beside it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from services.drift.detectors.binning import SHARE_FLOOR, count_bins, quantile_cuts

#: The customary thresholds of credit scoring: below the first stable, above the second shifted.
WARNING = 0.1
CRITICAL = 0.2


@dataclass(frozen=True, slots=True)
class PsiResult:
    """PSI between a reference and a current sample.

    Without drift PSI / (1/n + 1/m) follows a chi-square distribution with bins - 1 degrees of freedom
    (Yurdakul & Naranjo, "Statistical properties of the population stability index", J. Risk Model
    Validation 14(4), 2020). `critical_95` and `critical_99` are its quantiles on the scale of PSI,
    `p_value` its tail at `value`, `expected_under_null` its mean (bins - 1)(1/n + 1/m).
    """

    value: float
    bins: int
    n_reference: int
    n_current: int
    critical_95: float
    critical_99: float
    p_value: float
    expected_under_null: float

    def exceeds(self, threshold: float) -> bool:
        """Whether the shift is at least `threshold` and more than chance explains at the 99% level."""
        return self.value >= threshold and self.value >= self.critical_99


def index(reference_shares: ArrayLike, current_shares: ArrayLike) -> float:
    """Sum of (c - r) ln(c / r) over the bins: KL(c|r) + KL(r|c). Every share must be above zero."""
    reference = np.asarray(reference_shares, dtype=np.float64)
    current = np.asarray(current_shares, dtype=np.float64)
    if reference.shape != current.shape or reference.size == 0:
        raise ValueError("reference and current need the same bins, at least one")
    if not (np.all(reference > 0) and np.all(current > 0)):
        raise ValueError("every share must be above zero; fill zero shares first")
    return float(np.sum((current - reference) * np.log(current / reference)))


def critical_value(bins: int, n_reference: int, n_current: int, level: float = 0.95) -> float:
    """PSI that chance alone stays below with probability `level`: (1/n + 1/m) chi2(level, bins - 1)."""
    if bins < 2:
        return 0.0
    return (1 / n_reference + 1 / n_current) * _chi_square(bins - 1, level)


@lru_cache(maxsize=4096)
def _chi_square(degrees: int, level: float) -> float:
    return float(special.chdtri(degrees, 1 - level))


def psi_from_shares(
    reference_shares: ArrayLike, current_shares: ArrayLike, n_reference: int, n_current: int
) -> PsiResult:
    """PSI of shares that are all above zero. The sizes give the critical values."""
    value = index(reference_shares, current_shares)
    bins = int(np.asarray(reference_shares).size)
    scale = 1 / n_reference + 1 / n_current
    return PsiResult(
        value=value,
        bins=bins,
        n_reference=n_reference,
        n_current=n_current,
        critical_95=critical_value(bins, n_reference, n_current, 0.95),
        critical_99=critical_value(bins, n_reference, n_current, 0.99),
        p_value=float(special.chdtrc(bins - 1, value / scale)) if bins > 1 else 1.0,
        expected_under_null=(bins - 1) * scale,
    )


def psi_from_counts(
    reference_counts: ArrayLike, current_counts: ArrayLike, *, floor: float = SHARE_FLOOR
) -> PsiResult:
    """PSI of counts per bin. Shares below `floor` are raised to it; bins empty in both are left out.

    Raises ValueError where either side holds nothing.
    """
    reference = np.asarray(reference_counts, dtype=np.float64)
    current = np.asarray(current_counts, dtype=np.float64)
    if reference.shape != current.shape:
        raise ValueError("reference and current need the same bins")
    n_reference, n_current = reference.sum(), current.sum()
    if n_reference <= 0 or n_current <= 0:
        raise ValueError("PSI needs at least one value on either side")
    used = (reference > 0) | (current > 0)
    return psi_from_shares(
        np.maximum(reference[used] / n_reference, floor),
        np.maximum(current[used] / n_current, floor),
        round(n_reference),
        round(n_current),
    )


def psi(reference: ArrayLike, current: ArrayLike, *, bins: int = 10) -> PsiResult:
    """PSI of two samples in bins that hold equal shares of the reference (`binning.quantile_cuts`)."""
    cuts = quantile_cuts(reference, bins)
    return psi_from_counts(count_bins(reference, cuts), count_bins(current, cuts))


def share_above_under_null(
    n_reference: int,
    n_current: int,
    thresholds: ArrayLike,
    *,
    bins: int = 10,
    draws: int = 4000,
    rng: np.random.Generator,
    floor: float = SHARE_FLOOR,
) -> tuple[float, list[float]]:
    """Simulated mean PSI of `draws` pairs of samples from one uniform distribution over `bins`, and the
    share of them above each threshold: how often the threshold would alarm without any drift.
    """
    probabilities = [1 / bins] * bins
    values = np.empty(draws)
    for draw in range(draws):
        reference = np.maximum(rng.multinomial(n_reference, probabilities) / n_reference, floor)
        current = np.maximum(rng.multinomial(n_current, probabilities) / n_current, floor)
        values[draw] = index(reference, current)
    return float(values.mean()), [float(np.mean(values > limit)) for limit in np.atleast_1d(thresholds)]
