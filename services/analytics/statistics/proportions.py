"""Shares of successes: one interval, two arms, k arms."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from services.analytics.statistics.counts import CountTest
from services.analytics.statistics.fixed_horizon import Tails, tail_probability


def wilson(successes: float, n: float, *, alpha: float = 0.05) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share: honest for small n and for shares near 0 and 1.

    (0, 1) where n is 0.
    """
    if n == 0:
        return 0.0, 1.0
    z = float(stats.norm.isf(alpha / 2))
    share, square = successes / n, z * z
    centre = (share + square / (2 * n)) / (1 + square / n)
    spread = z / (1 + square / n) * math.sqrt(share * (1 - share) / n + square / (4 * n * n))
    return max(0.0, centre - spread), min(1.0, centre + spread)


@dataclass(frozen=True, slots=True)
class TwoProportions:
    """Treatment minus control. `z` and `p_value` pool the variance, as fits the null hypothesis; `wald_ci`
    and `newcombe_ci` do not, so at the edge interval and p-value may disagree by a hair.
    """

    estimate: float
    z: float
    p_value: float
    wald_ci: tuple[float, float]
    newcombe_ci: tuple[float, float]
    p_control: float
    p_treatment: float
    alpha: float
    method: str = "two-proportion z-test, pooled"


def two_proportion_z_test(
    control: tuple[float, int],
    treatment: tuple[float, int],
    *,
    alpha: float = 0.05,
    continuity: bool = False,
    alternative: Tails = "two-sided",
) -> TwoProportions:
    """z-test of equal shares; each side is (successes, n). An empty side says nothing: p = 1. Intervals of
    a one-sided test reach to -1 or 1 on the side of the alternative.

    Interval: unpooled Wald, and Newcombe's hybrid of two Wilson intervals (1998, method 10). `continuity`
    applies Yates' correction to z and the Wald interval, as R's prop.test does by default.
    """
    (s_c, n_c), (s_t, n_t) = control, treatment
    if not (n_c and n_t):
        everything = (-1.0, 1.0)
        shares = [s / n if n else 0.0 for s, n in (control, treatment)]
        return TwoProportions(0.0, 0.0, 1.0, everything, everything, shares[0], shares[1], alpha)
    p_c, p_t = s_c / n_c, s_t / n_t
    gap, harmonic = p_t - p_c, 1 / n_c + 1 / n_t
    pooled = (s_c + s_t) / (n_c + n_t)
    yates = min(0.5, abs(gap) / harmonic) * harmonic if continuity else 0.0
    error = math.sqrt(pooled * (1 - pooled) * harmonic)
    z = math.copysign(abs(gap) - yates, gap) / error if error > 0 else 0.0
    level = alpha if alternative == "two-sided" else 2 * alpha
    quantile = float(stats.norm.isf(level / 2))
    spread = quantile * math.sqrt(p_c * (1 - p_c) / n_c + p_t * (1 - p_t) / n_t) + yates
    low_c, high_c = wilson(s_c, n_c, alpha=level)
    low_t, high_t = wilson(s_t, n_t, alpha=level)
    wald = max(-1.0, gap - spread), min(1.0, gap + spread)
    newcombe = gap - math.hypot(p_t - low_t, high_c - p_c), gap + math.hypot(high_t - p_t, p_c - low_c)
    return TwoProportions(
        estimate=gap,
        z=z,
        p_value=tail_probability(z, math.inf, alternative),
        wald_ci=_opened(wald, alternative),
        newcombe_ci=_opened(newcombe, alternative),
        p_control=p_c,
        p_treatment=p_t,
        alpha=alpha,
    )


def relative_risk(
    control: tuple[float, int], treatment: tuple[float, int], *, alpha: float = 0.05
) -> tuple[float, float]:
    """Interval of p_treatment / p_control - 1 from two Wilson intervals (Donner & Zou, "Closed-form
    confidence intervals for functions of the normal mean and standard deviation", 2012, eq. 9), the ratio's
    companion of Newcombe's. Infinite above where the control may be 0.
    """
    (s_c, n_c), (s_t, n_t) = control, treatment
    if not (n_c and n_t):
        return -1.0, math.inf
    p_c, p_t = s_c / n_c, s_t / n_t
    (low_c, high_c), (low_t, high_t) = (wilson(s, n, alpha=alpha) for s, n in (control, treatment))
    low = _mover(p_c, p_t, high_c, low_t, -1)
    return low - 1, (_mover(p_c, p_t, low_c, high_t, 1) if low_c > 0 else math.inf) - 1


def _mover(p_c: float, p_t: float, limit_c: float, limit_t: float, sign: int) -> float:
    """The root of (p_t - r p_c)^2 = (p_t - limit_t)^2 + r^2 (p_c - limit_c)^2 on that side."""
    square, rest = limit_c * (2 * p_c - limit_c), limit_t * (2 * p_t - limit_t)
    centre = p_c * p_t
    spread = math.sqrt(max(0.0, centre**2 - square * rest))
    if sign > 0:
        return (centre + spread) / square
    return max(0.0, rest / (centre + spread)) if centre + spread > 0 else 0.0


def _opened(ci: tuple[float, float], alternative: Tails) -> tuple[float, float]:
    return -1.0 if alternative == "smaller" else ci[0], 1.0 if alternative == "larger" else ci[1]


def k_proportions(successes: ArrayLike, totals: ArrayLike) -> CountTest:
    """Chi-square test that k groups share one proportion, k - 1 degrees of freedom, empty groups left out."""
    wins, sizes = np.asarray(successes, dtype=np.float64), np.asarray(totals, dtype=np.float64)
    pooled = wins.sum() / sizes.sum() if sizes.sum() else 0.0
    if np.any(sizes == 0):
        return k_proportions(wins[sizes > 0], sizes[sizes > 0])
    if wins.size < 2 or pooled in (0.0, 1.0):
        return CountTest(0.0, max(0, wins.size - 1), 1.0)
    statistic = float(np.sum((wins - sizes * pooled) ** 2 / (sizes * pooled * (1 - pooled))))
    return CountTest(statistic, wins.size - 1, float(stats.chi2.sf(statistic, wins.size - 1)))
