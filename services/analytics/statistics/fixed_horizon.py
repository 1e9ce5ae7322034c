"""Fixed-horizon statements about an effect: right once, at the size planned for, and only then."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from services.analytics.statistics.effects import Effect

Alternative = Literal["larger", "smaller"]
#: What a test looks for: a difference either way, or one of the two.
Tails = Literal["two-sided", "larger", "smaller"]


@dataclass(frozen=True, slots=True)
class Inference:
    """One test: the estimate is treatment minus control in the unit of the effect (relative: a share).

    `ci` covers the truth with probability 1 - alpha; of a one-sided test it reaches to infinity on the side
    of the alternative. `degrees_of_freedom` is infinite for a normal test.
    `always_valid` says whether estimate, interval and p-value hold at every look.
    """

    estimate: float
    std_error: float
    ci: tuple[float, float]
    p_value: float
    statistic: float
    degrees_of_freedom: float
    alpha: float
    method: str
    always_valid: bool = False


def t_test(
    effect: Effect, *, alpha: float = 0.05, alternative: Tails = "two-sided", null: float = 0.0
) -> Inference:
    """Welch test that the effect is `null`."""
    method = f"Welch's t-test, {effect.difference} difference"
    return _test(effect, effect.degrees_of_freedom, alpha, alternative, null, method)


def z_test(
    effect: Effect, *, alpha: float = 0.05, alternative: Tails = "two-sided", null: float = 0.0
) -> Inference:
    """Normal test that the effect is `null`, unpooled variances."""
    return _test(effect, math.inf, alpha, alternative, null, f"z-test, {effect.difference} difference")


def _test(
    effect: Effect, freedom: float, alpha: float, alternative: Tails, null: float, method: str
) -> Inference:
    statistic = _ratio(effect.estimate - null, effect.std_error)
    return Inference(
        estimate=effect.estimate,
        std_error=effect.std_error,
        ci=_interval(effect.estimate, effect.std_error, freedom, alpha, alternative),
        p_value=tail_probability(statistic, freedom, alternative),
        statistic=statistic,
        degrees_of_freedom=freedom,
        alpha=alpha,
        method=method if alternative == "two-sided" else f"{method}, one-sided",
    )


def tail_probability(statistic: float, degrees_of_freedom: float, alternative: Tails) -> float:
    """p-value of a statistic that follows Student's t (normal for infinite degrees of freedom)."""
    if alternative == "two-sided":
        return min(1.0, 2 * student_tail(abs(statistic), degrees_of_freedom))
    return student_tail(statistic if alternative == "larger" else -statistic, degrees_of_freedom)


def _interval(
    estimate: float, std_error: float, freedom: float, alpha: float, alternative: Tails
) -> tuple[float, float]:
    spread = student_quantile(1 - (alpha / 2 if alternative == "two-sided" else alpha), freedom) * std_error
    return (
        -math.inf if alternative == "smaller" else estimate - spread,
        math.inf if alternative == "larger" else estimate + spread,
    )


@dataclass(frozen=True, slots=True)
class OneSidedResult:
    """`p_value` is small where the data speak for the alternative."""

    statistic: float
    p_value: float
    method: str


def non_inferiority(effect: Effect, margin: float, *, alternative: Alternative = "larger") -> OneSidedResult:
    """Wald test of H0: effect at or beyond `margin`, against a "larger" (or "smaller") one.

    With margin -0.005 and "larger" a small p says: the treatment loses less than half a point. Without any
    spread seen nothing is shown: p = 1.
    """
    if effect.std_error <= 0:
        return OneSidedResult(0.0, 1.0, "Wald non-inferiority test")
    statistic = _ratio(effect.estimate - margin, effect.std_error)
    tail = stats.norm.sf(statistic) if alternative == "larger" else stats.norm.cdf(statistic)
    return OneSidedResult(statistic, float(tail), "Wald non-inferiority test")


@dataclass(frozen=True, slots=True)
class EquivalenceResult:
    """Small `p_value`: the effect lies inside (low, high)."""

    p_value: float
    p_above_low: float
    p_below_high: float
    method: str


def equivalence(effect: Effect, low: float, high: float) -> EquivalenceResult:
    """Two one-sided tests (Schuirmann 1987): the larger of both p-values; 1 without any spread seen."""
    if not low < high:
        raise ValueError("the equivalence region needs low < high")
    if effect.std_error <= 0:
        return EquivalenceResult(1.0, 1.0, 1.0, "two one-sided t-tests (TOST)")
    freedom = effect.degrees_of_freedom
    above = student_tail(_ratio(effect.estimate - low, effect.std_error), freedom)
    below = student_tail(_ratio(high - effect.estimate, effect.std_error), freedom)
    return EquivalenceResult(max(above, below), above, below, "two one-sided t-tests (TOST)")


def student_tail(value: float, degrees_of_freedom: float) -> float:
    """P(T > value); the normal tail for infinite degrees of freedom."""
    if math.isinf(degrees_of_freedom):
        return float(stats.norm.sf(value))
    return float(stats.t.sf(value, degrees_of_freedom))


def student_quantile(share: float, degrees_of_freedom: float) -> float:
    """Quantile of Student's t; the normal one for infinite degrees of freedom."""
    if math.isinf(degrees_of_freedom):
        return float(stats.norm.ppf(share))
    return float(stats.t.ppf(share, degrees_of_freedom))


def _ratio(estimate: float, std_error: float) -> float:
    if std_error > 0:
        return estimate / std_error
    return 0.0 if estimate == 0 else math.copysign(math.inf, estimate)
