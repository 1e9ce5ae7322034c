"""Anytime-valid comparison of a quantile (latency p99, say) between two arms."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from services.analytics.statistics.boundaries import BetaBinomialMixture

Floats = NDArray[np.float64]


def quantile_p_value(
    control: ArrayLike, treatment: ArrayLike, quantile: float, *, t_opt: float, alpha_opt: float = 0.05
) -> float:
    """p-value of equal quantiles, valid at every look (Howard & Ramdas, "Sequential estimation of quantiles
    with applications to A/B testing and best-arm identification", Bernoulli 28(3), 2022, Theorem 5).

    Each arm's count below a common point x is a coin of bias `quantile` under the null; the p-value is the
    inverse of the smallest product of both beta-binomial martingales over x. `t_opt` is the number of values
    an arm at which the test is sharpest. 1 where an arm is empty.
    """
    if not (np.size(control) and np.size(treatment)):
        return 1.0
    variance = quantile * (1 - quantile)
    mixture = BetaBinomialMixture(t_opt * variance, g=quantile, h=1 - quantile, alpha_opt=alpha_opt)
    arms = [
        _Arm(np.sort(np.asarray(side, dtype=np.float64)), quantile, mixture) for side in (control, treatment)
    ]
    first, second = sorted(arms, key=lambda arm: arm.high)
    points = {first.high, second.low}
    start = int(np.searchsorted(second.values, first.high, side="right"))
    end = int(np.searchsorted(second.values, second.low, side="right"))
    points.update(second.values[max(0, start - 1) : end].tolist())
    smallest = min(first.log(point) + second.log(point) for point in points)
    return min(1.0, math.exp(-smallest))


class _Arm:
    """One arm's log martingale as a function of where the common quantile might lie."""

    def __init__(self, values: Floats, quantile: float, mixture: BetaBinomialMixture) -> None:
        self.values = values
        self._quantile, self._mixture = quantile, mixture
        self._best = _minimum(self._log_at_share)
        n = values.size
        self.low = float(values[max(0, math.ceil(self._best * n) - 1)])
        self.high = float(values[min(n - 1, math.floor(self._best * n))])

    def log(self, point: float) -> float:
        if point < self.low:
            return self._log_at_share(np.searchsorted(self.values, point, side="right") / self.values.size)
        if point > self.high:
            return self._log_at_share(np.searchsorted(self.values, point, side="left") / self.values.size)
        return self._log_at_share(self._best)

    def _log_at_share(self, share: float) -> float:
        n, q = self.values.size, self._quantile
        return self._mixture.log((float(share) - q) * n, q * (1 - q) * n)


def _minimum(objective: Callable[[float], float]) -> float:
    return float(
        optimize.minimize_scalar(objective, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-9}).x
    )
