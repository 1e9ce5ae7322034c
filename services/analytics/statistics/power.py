"""How many units a test needs, and how often it will find the effect that is there."""

from __future__ import annotations

import math

from scipy import optimize, stats
from statsmodels.stats.power import NormalIndPower


def power_two_proportions(n: float, p1: float, p2: float, *, alpha: float = 0.05, sides: int = 2) -> float:
    """Power with `n` units an arm: pooled variance under the null, unpooled under the alternative, the far
    tail neglected (as R's power.prop.test; Fleiss, Levin & Paik 2003).
    """
    critical = float(stats.norm.isf(alpha / sides))
    null = math.sqrt((p1 + p2) * (1 - (p1 + p2) / 2))
    spread = math.sqrt(p1 * (1 - p1) + p2 * (1 - p2))
    return float(stats.norm.cdf((math.sqrt(n) * abs(p1 - p2) - critical * null) / spread))


def sample_size_two_proportions(
    p1: float, p2: float, *, power: float = 0.8, alpha: float = 0.05, sides: int = 2
) -> float:
    """Units an arm (not rounded) for that power."""
    if p1 == p2:
        raise ValueError("no sample finds an effect of zero")
    critical, wanted = float(stats.norm.isf(alpha / sides)), float(stats.norm.ppf(power))
    null = math.sqrt((p1 + p2) * (1 - (p1 + p2) / 2))
    spread = math.sqrt(p1 * (1 - p1) + p2 * (1 - p2))
    return ((critical * null + wanted * spread) / (p1 - p2)) ** 2


def sample_size_arcsine(
    p1: float, p2: float, *, power: float = 0.8, alpha: float = 0.05, sides: int = 2
) -> float:
    """Units an arm by Cohen's variance-stabilised effect 2 asin(sqrt p2) - 2 asin(sqrt p1)."""
    size = 2 * math.asin(math.sqrt(p2)) - 2 * math.asin(math.sqrt(p1))
    alternative = "two-sided" if sides == 2 else ("larger" if size > 0 else "smaller")
    return float(
        NormalIndPower().solve_power(effect_size=size, power=power, alpha=alpha, alternative=alternative)
    )


def power_mean(
    n: float, delta: float, sd: float, *, alpha: float = 0.05, sides: int = 2, samples: int = 2
) -> float:
    """Power of the t-test with `n` units an arm, by the noncentral t (as R's power.t.test, far tail
    neglected). `samples` 1 is the one-sample or paired test, sd then that of the differences.
    """
    freedom = max(1e-7, n - 1) * samples
    critical = float(stats.t.isf(alpha / sides, freedom))
    return float(stats.nct.sf(critical, freedom, math.sqrt(n / samples) * abs(delta) / sd))


def sample_size_mean(
    delta: float,
    sd: float,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    sides: int = 2,
    samples: int = 2,
) -> float:
    """Units an arm (not rounded) for that power."""
    if delta == 0:
        raise ValueError("no sample finds an effect of zero")

    def short(n: float) -> float:
        return power_mean(n, delta, sd, alpha=alpha, sides=sides, samples=samples) - power

    start = 2.0 + samples * ((stats.norm.isf(alpha / sides) + stats.norm.ppf(power)) * sd / delta) ** 2
    return float(optimize.brentq(short, 2.0, 4 * start + 10))
