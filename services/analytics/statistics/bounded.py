"""Confidence sequences for the mean of values in [0, 1], exact at every sample size.

Betting and empirical Bernstein: Waudby-Smith & Ramdas, "Estimating means of bounded random variables by
betting", JRSS B 86(1), 2024. Rescale other bounded metrics to [0, 1] first.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from services.analytics.statistics.boundaries import BetaBinomialMixture

Floats = NDArray[np.float64]


def bernoulli(
    successes: float, trials: int, *, alpha: float = 0.05, t_opt: float = 1000, alpha_opt: float = 0.05
) -> tuple[float, float]:
    """Confidence sequence for a success probability at its present length: the p at which the beta-binomial
    mixture stays below 1 / alpha. Tightest about `t_opt` trials. (0, 1) without any.
    """
    if trials == 0:
        return 0.0, 1.0
    share, threshold = successes / trials, math.log(1 / alpha)

    def excess(p: float) -> float:
        mixture = BetaBinomialMixture(p * (1 - p) * t_opt, g=p, h=1 - p, alpha_opt=alpha_opt)
        return mixture.log((share - p) * trials, p * (1 - p) * trials) - threshold

    edge = 1e-12
    low, high = 0.0, 1.0
    if share > 0 and excess(edge) > 0:
        low = float(optimize.brentq(excess, edge, min(share, 1 - edge), xtol=1e-13))
    if share < 1 and excess(1 - edge) > 0:
        high = float(optimize.brentq(excess, max(share, edge), 1 - edge, xtol=1e-13))
    return low, high


def predictable_bets(values: ArrayLike, *, alpha: float, most: float = math.inf) -> Floats:
    """The bets lambda_t = sqrt(2 ln(1/alpha) / (var_{t-1} t ln(1 + t))), each known before its value
    (eq. 15 of the paper), with the variance started at 1/4 by one made-up observation at 1/2.
    """
    x = np.asarray(values, dtype=np.float64)
    t = np.arange(1, x.size + 1)
    means = (0.5 + np.cumsum(x)) / (t + 1)
    variances = (0.25 + np.cumsum((x - means) ** 2)) / (t + 1)
    before = np.concatenate(([0.25], variances[:-1]))
    return np.minimum(most, np.sqrt(2 * math.log(1 / alpha) / (t * np.log1p(t) * before)))


def empirical_bernstein(values: ArrayLike, *, alpha: float = 0.05) -> tuple[Floats, Floats]:
    """Predictable plug-in empirical-Bernstein confidence sequence (Theorem 2 of the paper), alpha / 2 a side.

    Lower and upper limits after each value; they may lie outside [0, 1] at first.
    """
    x = np.asarray(values, dtype=np.float64)
    return _empirical_bernstein_lower(x, alpha / 2), 1 - _empirical_bernstein_lower(1 - x, alpha / 2)


def _empirical_bernstein_lower(x: Floats, alpha: float) -> Floats:
    t = np.arange(1, x.size + 1)
    before = np.concatenate(([0.0], (np.cumsum(x) / t)[:-1]))
    bets = predictable_bets(x, alpha=alpha, most=0.5)
    weight = np.cumsum(bets)
    penalty = np.cumsum((x - before) ** 2 * (-np.log1p(-bets) - bets))
    return np.asarray((np.cumsum(bets * x) - math.log(1 / alpha) - penalty) / weight)


def betting(
    values: ArrayLike, *, alpha: float = 0.05, breaks: int = 1000, most: float = 0.5
) -> tuple[Floats, Floats]:
    """Hedged capital confidence sequence (Theorem 3 of the paper): the means on a grid of `breaks` against
    which betting never turned 1 into 1 / alpha, half the money on either side, widened by one grid step.

    Bets are cut at `most` / m and `most` / (1 - m). Lower and upper limits after each value. Memory
    breaks x 8 bytes, time breaks x n.
    """
    x = np.asarray(values, dtype=np.float64)
    grid = np.linspace(0.0, 1.0, breaks + 1)
    bets = predictable_bets(x, alpha=alpha)
    with np.errstate(divide="ignore"):
        most_up, most_down = most / grid, most / (1 - grid)
    log_up, log_down = np.zeros(grid.size), np.zeros(grid.size)
    threshold = math.log(2 / alpha)
    low, high = np.zeros(x.size), np.ones(x.size)
    with np.errstate(divide="ignore"):
        for place, (value, bet) in enumerate(zip(x, bets, strict=True)):
            log_up += np.log1p(np.minimum(bet, most_up) * (value - grid))
            log_down += np.log1p(-np.minimum(bet, most_down) * (value - grid))
            inside = np.flatnonzero(np.maximum(log_up, log_down) <= threshold)
            if inside.size:
                low[place], high[place] = grid[inside[0]], grid[inside[-1]]
    step = 1 / breaks
    return np.maximum(0.0, low - step), np.minimum(1.0, high + step)
