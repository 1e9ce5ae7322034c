"""Posteriors of an effect: chance to win and what a wrong choice would cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import integrate, stats
from scipy.special import betaln

from services.analytics.statistics.effects import Effect


@dataclass(frozen=True, slots=True)
class NormalPrior:
    """Prior of the effect. With scale "relative" mean and sd are shares of the control's mean."""

    mean: float = 0.0
    sd: float = 0.3
    scale: Literal["relative", "absolute"] = "relative"


@dataclass(frozen=True, slots=True)
class Posterior:
    """Normal posterior of the effect.

    `risk_control` is what is lost on average by choosing the control, E max(effect, 0); `risk_treatment` by
    choosing the treatment, E max(-effect, 0). `chance_to_win` is P(effect > 0).
    """

    estimate: float
    sd: float
    ci: tuple[float, float]
    chance_to_win: float
    risk_control: float
    risk_treatment: float


def posterior(effect: Effect, prior: NormalPrior | None = None, *, level: float = 0.95) -> Posterior:
    """Conjugate update of a normal prior (None: flat) by the estimate and its standard error."""
    if effect.std_error <= 0:
        raise ValueError("a posterior needs an effect with a positive standard error")
    mean, variance = effect.estimate, effect.std_error**2
    if prior is not None:
        factor = _prior_factor(effect, prior)
        prior_mean, prior_variance = prior.mean * factor, (prior.sd * factor) ** 2
        precision = 1 / variance + 1 / prior_variance
        mean = (mean / variance + prior_mean / prior_variance) / precision
        variance = 1 / precision
    sd = math.sqrt(variance)
    spread = float(stats.norm.isf((1 - level) / 2)) * sd
    density = sd * float(stats.norm.pdf(mean / sd))
    win = float(stats.norm.cdf(mean / sd))
    return Posterior(
        estimate=mean,
        sd=sd,
        ci=(mean - spread, mean + spread),
        chance_to_win=win,
        risk_control=mean * win + density,
        risk_treatment=density - mean * float(stats.norm.sf(mean / sd)),
    )


def _prior_factor(effect: Effect, prior: NormalPrior) -> float:
    if prior.scale == effect.difference:
        return 1.0
    if effect.baseline == 0:
        raise ValueError("a relative prior needs a control other than zero")
    return abs(effect.baseline) if prior.scale == "relative" else 1 / abs(effect.baseline)


def beta_chance_to_win(
    control: tuple[float, int], treatment: tuple[float, int], prior: tuple[float, float] = (1.0, 1.0)
) -> float:
    """P(p_treatment > p_control) with independent beta posteriors, by numerical integration.

    Each side is (successes, n), the prior Beta(a, b) on both.
    """
    left = stats.beta(prior[0] + control[0], prior[1] + control[1] - control[0])
    right = stats.beta(prior[0] + treatment[0], prior[1] + treatment[1] - treatment[0])
    low, high = right.ppf(1e-15), right.isf(1e-15)
    value, _ = integrate.quad(lambda p: right.pdf(p) * left.cdf(p), low, high, epsabs=1e-12, limit=400)
    return float(min(1.0, max(0.0, value)))


def beta_chance_to_win_closed(
    control: tuple[int, int], treatment: tuple[int, int], prior: tuple[int, int] = (1, 1)
) -> float:
    """The same as a finite sum (Miller, "Formulas for Bayesian A/B testing", 2014); whole numbers only."""
    a_c, b_c = prior[0] + control[0], prior[1] + control[1] - control[0]
    a_t, b_t = prior[0] + treatment[0], prior[1] + treatment[1] - treatment[0]
    i = np.arange(a_t, dtype=np.float64)
    terms = betaln(a_c + i, b_c + b_t) - np.log(b_t + i) - betaln(1 + i, b_t) - betaln(a_c, b_c)
    return float(np.exp(terms).sum())
