"""A/A experiments in memory: what error rate a way of looking really has."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from services.analytics.statistics.effects import Arm, effect
from services.analytics.statistics.sequential import asymptotic_sequence


@dataclass(frozen=True, slots=True)
class FalsePositives:
    """Shares of A/A runs that found a difference: by a z-test at any look, by one at the last look only, by
    the asymptotic confidence sequence at any look.
    """

    naive: float
    fixed_horizon: float
    sequential: float
    runs: int


def false_positives(
    rng: np.random.Generator,
    *,
    runs: int = 2000,
    units: int = 5000,
    look_every: int = 250,
    alpha: float = 0.05,
    tuning_n: float = 5000,
) -> FalsePositives:
    """`runs` A/A experiments on standard normal units, `units` an arm, looked at every `look_every`."""
    critical = float(stats.norm.isf(alpha / 2))
    sizes = np.arange(look_every, units + 1, look_every)
    naive = fixed = sequential = 0
    for _ in range(runs):
        left, right = rng.normal(0, 1, units), rng.normal(0, 1, units)
        effects = [
            effect(Arm(int(n), m_l, v_l), Arm(int(n), m_r, v_r))
            for n, (m_l, v_l), (m_r, v_r) in zip(
                sizes, _running(left, sizes), _running(right, sizes), strict=True
            )
        ]
        crossed = [abs(found.estimate) > critical * found.std_error for found in effects]
        naive += any(crossed)
        fixed += crossed[-1]
        sequential += any(
            asymptotic_sequence(found, alpha=alpha, tuning_n=tuning_n).p_value < alpha for found in effects
        )
    return FalsePositives(naive / runs, fixed / runs, sequential / runs, runs)


def _running(values: NDArray[np.float64], sizes: NDArray[np.int64]) -> list[tuple[float, float]]:
    """Mean and sample variance of the first n values for each n of `sizes`."""
    totals, squares = np.cumsum(values)[sizes - 1], np.cumsum(values * values)[sizes - 1]
    means = totals / sizes
    variances = (squares - totals * means) / (sizes - 1)
    return list(zip(means.tolist(), variances.tolist(), strict=True))
