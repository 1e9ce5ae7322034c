"""Statements about an effect that hold at every look, so that looking daily costs nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln, xlogy

from services.analytics.statistics.boundaries import normal_mixture_log
from services.analytics.statistics.effects import Effect
from services.analytics.statistics.fixed_horizon import Inference

DEFAULT_TUNING_N = 5000


def mixture_rate(alpha: float, tuning_n: float) -> float:
    """rho that makes the asymptotic confidence sequence tightest after `tuning_n` units:
    sqrt((-2 ln a + ln(-2 ln a + 1)) / n) (Waudby-Smith et al., arXiv:2103.06476, eq. 161).
    """
    base = -2 * math.log(alpha)
    return math.sqrt((base + math.log(base + 1)) / tuning_n)


def asymptotic_sequence(
    effect: Effect, *, alpha: float = 0.05, tuning_n: float = DEFAULT_TUNING_N
) -> Inference:
    """Asymptotic confidence sequence of an effect (Waudby-Smith et al., arXiv:2103.06476, eq. 9 and 155).

    With N units in both arms and s^2 = N SE^2, the half width is
    s sqrt(2 (N rho^2 + 1) / (N^2 rho^2) ln(sqrt(N rho^2 + 1) / alpha)); the p-value is the smallest level at
    which zero is outside. Asymptotic in the size of the first look: start at some hundred units an arm.
    """
    units = effect.n_control + effect.n_treatment
    rho = mixture_rate(alpha, tuning_n)
    growth = units * rho * rho
    variance = effect.std_error**2 * units
    half = math.sqrt(
        variance * 2 * (growth + 1) / (units * growth) * math.log(math.sqrt(growth + 1) / alpha)
        if units
        else math.inf
    )
    if variance > 0:
        exponent = effect.estimate**2 * units * growth / (2 * variance * (growth + 1))
        p_value = min(1.0, math.exp(0.5 * math.log(growth + 1) - exponent))
    else:
        p_value = 1.0
    return Inference(
        estimate=effect.estimate,
        std_error=effect.std_error,
        ci=(effect.estimate - half, effect.estimate + half),
        p_value=p_value,
        statistic=effect.estimate / effect.std_error if effect.std_error > 0 else 0.0,
        degrees_of_freedom=math.inf,
        alpha=alpha,
        method=f"asymptotic confidence sequence, {effect.difference} difference",
        always_valid=True,
    )


def one_sided_sequence(
    effect: Effect, *, alpha: float = 0.05, tuning_n: float = DEFAULT_TUNING_N
) -> tuple[float, float]:
    """Lower and upper limits of an effect, each an asymptotic confidence sequence of its own at level alpha
    (Waudby-Smith et al., arXiv:2103.06476, Proposition B.1): estimate -/+
    s sqrt(2 (N rho^2 + 1) / (N^2 rho^2) ln(1 + sqrt(N rho^2 + 1) / (2 alpha))), rho tuned for 2 alpha.
    """
    units = effect.n_control + effect.n_treatment
    if not units:
        return -math.inf, math.inf
    growth = units * mixture_rate(2 * alpha, tuning_n) ** 2
    reach = 2 * (growth + 1) / growth * math.log1p(math.sqrt(growth + 1) / (2 * alpha))
    half = effect.std_error * math.sqrt(reach)
    return effect.estimate - half, effect.estimate + half


def msprt_p_values(
    deviations: ArrayLike, variance_times: ArrayLike, *, rho: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mixture sequential probability ratio test over looks (Robbins 1970; Johari et al., "Always valid
    inference", 2022): log likelihood ratios and p = min(1, exp(-log ratio)) at each look.

    `deviations` are S = n (mean - theta0), `variance_times` V = n sigma^2; the mixture N(0, tau^2) over the
    effect has rho = sigma^4 / tau^2. The always-valid p is `running_minimum` of the second.
    """
    ratios = np.array(
        [
            normal_mixture_log(s, v, rho=rho, one_sided=False)
            for s, v in zip(np.atleast_1d(deviations), np.atleast_1d(variance_times), strict=True)
        ]
    )
    return ratios, np.minimum(1.0, np.exp(-ratios))


def running_minimum(p_values: ArrayLike) -> NDArray[np.float64]:
    """The always-valid p-value over looks: the smallest so far, at most 1."""
    return np.minimum(1.0, np.minimum.accumulate(np.asarray(p_values, dtype=np.float64)))


def sequential_sample_ratio(
    counts_per_look: Sequence[Sequence[float]],
    probabilities: Sequence[float],
    *,
    concentration: float = 10_000.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sample ratio mismatch, checked as often as wanted (Lindon & Malek, "Anytime-valid inference for
    multinomial count data", 2022).

    `counts_per_look` are cumulative. Returns the posterior odds of the null at each look (the inverse of a
    Bayes factor with prior Dirichlet(concentration * probabilities)) and the running p-value. A large
    concentration looks for small mismatches.
    """
    null = np.asarray(probabilities, dtype=np.float64)
    used = null > 0
    null = null[used] / null.sum()
    prior = concentration * null
    odds = []
    for everyone in np.atleast_2d(np.asarray(counts_per_look, dtype=np.float64)):
        counts = everyone[used]
        if everyone.sum() > counts.sum():  # units in an arm that was to get none
            odds.append(0.0)
            continue
        total = counts.sum()
        log_alternative = (
            gammaln(prior.sum())
            - gammaln(prior.sum() + total)
            + float(np.sum(gammaln(prior + counts) - gammaln(prior)))
        )
        odds.append(math.exp(min(700.0, float(np.sum(xlogy(counts, null))) - log_alternative)))
    return np.array(odds), running_minimum(odds)
