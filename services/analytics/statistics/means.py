"""Means of two samples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from services.analytics.statistics.effects import Arm, Difference, effect
from services.analytics.statistics.fixed_horizon import Inference, t_test
from services.analytics.statistics.moments import Moments


def welch(
    control: Moments, treatment: Moments, *, alpha: float = 0.05, difference: Difference = "absolute"
) -> Inference:
    """Welch's t-test (1947) of treatment minus control from sufficient statistics."""
    return t_test(effect(Arm.from_moments(control), Arm.from_moments(treatment), difference), alpha=alpha)


@dataclass(frozen=True, slots=True)
class RankTest:
    """`statistic` is U of the treatment, `superiority` the chance that a treated value beats a control."""

    statistic: float
    p_value: float
    superiority: float


def mann_whitney(control: ArrayLike, treatment: ArrayLike) -> RankTest:
    """Two-sided Mann-Whitney U (1947): exact for small samples without ties, else normal with continuity."""
    left, right = np.asarray(control, dtype=np.float64), np.asarray(treatment, dtype=np.float64)
    result = stats.mannwhitneyu(right, left, alternative="two-sided")
    return RankTest(
        float(result.statistic), float(result.pvalue), float(result.statistic) / left.size / right.size
    )
