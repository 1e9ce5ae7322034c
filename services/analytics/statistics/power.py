"""Units that a test needs, its power at a size, and the least effect that it can find."""

from __future__ import annotations

import math
from collections.abc import Callable

from scipy import optimize, stats
from statsmodels.stats.power import NormalIndPower


def power_two_proportions(
    n: float,
    p1: float,
    p2: float,
    *,
    alpha: float = 0.05,
    sides: int = 2,
    ratio: float = 1.0,
    strict: bool = False,
) -> float:
    """Power with `n` units in the first arm and `ratio` times as many in the second: pooled variance under
    the null, unpooled under the alternative (as R's power.prop.test; Fleiss, Levin & Paik 2003). `strict`
    counts a rejection in the wrong direction, too, which is neglected otherwise.
    """
    critical = float(stats.norm.isf(alpha / sides))
    null, spread = _errors(p1, p2, ratio)
    reach = math.sqrt(n) * abs(p1 - p2)
    if spread == 0:
        return float(reach > critical * null)
    power = float(stats.norm.cdf((reach - critical * null) / spread))
    if strict and sides == 2:
        power += float(stats.norm.sf((reach + critical * null) / spread))
    return power


def sample_size_two_proportions(
    p1: float,
    p2: float,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    sides: int = 2,
    ratio: float = 1.0,
    strict: bool = False,
) -> float:
    """Units in the first arm (not rounded) for that power; the second has `ratio` times as many."""
    if p1 == p2:
        raise ValueError("no sample finds an effect of zero")
    critical, wanted = float(stats.norm.isf(alpha / sides)), float(stats.norm.ppf(power))
    null, spread = _errors(p1, p2, ratio)
    size = ((critical * null + wanted * spread) / (p1 - p2)) ** 2
    if not (strict and sides == 2):
        return size
    return _solved(
        lambda n: power_two_proportions(n, p1, p2, alpha=alpha, ratio=ratio, strict=True) - power,
        1e-6,
        2 * size + 10,
    )


def _errors(p1: float, p2: float, ratio: float) -> tuple[float, float]:
    """Standard error of the difference times the root of the first arm's size, under null and alternative."""
    pooled = (p1 + ratio * p2) / (1 + ratio)
    null = math.sqrt(pooled * (1 - pooled) * (1 + 1 / ratio))
    return null, math.sqrt(p1 * (1 - p1) + p2 * (1 - p2) / ratio)


def sample_size_arcsine(
    p1: float, p2: float, *, power: float = 0.8, alpha: float = 0.05, sides: int = 2, ratio: float = 1.0
) -> float:
    """Units in the first arm by Cohen's variance-stabilised effect 2 asin(sqrt p2) - 2 asin(sqrt p1)."""
    size = 2 * math.asin(math.sqrt(p2)) - 2 * math.asin(math.sqrt(p1))
    if size == 0:
        raise ValueError("no sample finds an effect of zero")
    alternative = "two-sided" if sides == 2 else ("larger" if size > 0 else "smaller")
    return float(
        NormalIndPower().solve_power(
            effect_size=size, power=power, alpha=alpha, ratio=ratio, alternative=alternative
        )
    )


#: Beside a larger shift the means' own chance is nothing, and the power is that of their estimated spread.
#: SciPy's noncentral t takes seconds there, and is far off from 1e5 on.
_LARGE_SHIFT = 1e3


def power_mean(
    n: float,
    delta: float,
    sd: float,
    *,
    alpha: float = 0.05,
    sides: int = 2,
    samples: int = 2,
    ratio: float = 1.0,
    strict: bool = False,
) -> float:
    """Power of the t-test with `n` units in the first arm and `ratio` times as many in the second, by the
    noncentral t (as R's power.t.test). `samples` 1 is the one-sample or paired test, sd then that of the
    differences. `strict` as in `power_two_proportions`.
    """
    if samples == 1:
        freedom, scale = max(1e-7, n - 1), n
    else:
        freedom, scale = max(1e-7, n * (1 + ratio) - 2), n * ratio / (1 + ratio)
    critical = float(stats.t.isf(alpha / sides, freedom))
    shift = math.sqrt(scale) * abs(delta) / sd
    if shift > _LARGE_SHIFT:
        return float(stats.chi2.cdf(freedom * (shift / critical) ** 2, freedom))
    power = float(stats.nct.sf(critical, freedom, shift))
    if strict and sides == 2:
        power += float(stats.nct.cdf(-critical, freedom, shift))
    return power


def sample_size_mean(
    delta: float,
    sd: float,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    sides: int = 2,
    samples: int = 2,
    ratio: float = 1.0,
    strict: bool = False,
) -> float:
    """Units in the first arm (not rounded) for that power; at least 2."""
    if delta == 0:
        raise ValueError("no sample finds an effect of zero")

    def excess(n: float) -> float:
        reached = power_mean(
            n, delta, sd, alpha=alpha, sides=sides, samples=samples, ratio=ratio, strict=strict
        )
        return reached - power

    if excess(2.0) >= 0:
        return 2.0
    share = 1.0 if samples == 1 else 1 + 1 / ratio
    normal = share * ((stats.norm.isf(alpha / sides) + stats.norm.ppf(power)) * sd / delta) ** 2
    return _solved(excess, 2.0, 4 * float(normal) + 10)


def detectable_proportion(
    n: float,
    baseline: float,
    *,
    power: float = 0.8,
    alpha: float = 0.05,
    ratio: float = 1.0,
    rise: bool = True,
) -> float | None:
    """The least absolute change of a share that `n` units in the first arm find with that power; None where
    not even a change to 1 (or, without `rise`, to 0) is found."""
    most = 1 - baseline if rise else baseline
    sign = 1.0 if rise else -1.0

    def excess(gap: float) -> float:
        return power_two_proportions(n, baseline, baseline + sign * gap, alpha=alpha, ratio=ratio) - power

    if most <= 0 or excess(most) < 0:
        return None
    return sign * _solved(excess, 0.0, most)


def detectable_mean(
    n: float, sd: float, *, power: float = 0.8, alpha: float = 0.05, ratio: float = 1.0
) -> float:
    """The least absolute change of a mean that `n` >= 2 units in the first arm find with that power."""
    high = sd
    while power_mean(n, high, sd, alpha=alpha, ratio=ratio) < power:
        high *= 2
    return _solved(lambda gap: power_mean(n, gap, sd, alpha=alpha, ratio=ratio) - power, 0.0, high)


def _solved(excess: Callable[[float], float], low: float, high: float) -> float:
    while excess(high) < 0:
        high *= 2
    return float(optimize.brentq(excess, low, high, xtol=1e-12, rtol=1e-12))
