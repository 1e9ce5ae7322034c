"""Means of two samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from services.analytics.statistics.effects import Arm, Difference, Effect, effect
from services.analytics.statistics.fixed_horizon import Inference, Tails, t_test
from services.analytics.statistics.moments import Moments


def welch(
    control: Moments,
    treatment: Moments,
    *,
    alpha: float = 0.05,
    difference: Difference = "absolute",
    alternative: Tails = "two-sided",
    null: float = 0.0,
) -> Inference:
    """Welch's t-test (1947) of treatment minus control from sufficient statistics."""
    found = effect(Arm.from_moments(control), Arm.from_moments(treatment), difference)
    return t_test(found, alpha=alpha, alternative=alternative, null=null)


def pooled_effect(control: Moments, treatment: Moments) -> Effect:
    """Treatment minus control where both arms are taken to vary alike (Student 1908): one variance from both,
    n + m - 2 degrees of freedom."""
    found = effect(Arm.from_moments(control), Arm.from_moments(treatment))
    freedom = control.n + treatment.n - 2
    if freedom < 1:
        return found
    variance = (control.m2 + treatment.m2) / freedom
    error = math.sqrt(variance * (1 / control.n + 1 / treatment.n))
    return replace(found, std_error=error, degrees_of_freedom=float(freedom))


def paired_effect(differences: Moments) -> Effect:
    """Mean of the differences within pairs, n - 1 degrees of freedom."""
    arm = Arm.from_moments(differences)
    return Effect(
        estimate=arm.mean,
        std_error=math.sqrt(arm.error_variance),
        degrees_of_freedom=float(max(1, differences.n - 1)),
        n_control=differences.n,
        n_treatment=differences.n,
        baseline=0.0,
        difference="absolute",
    )


_SCIPY = {"two-sided": "two-sided", "larger": "greater", "smaller": "less"}


@dataclass(frozen=True, slots=True)
class RankTest:
    """`statistic` is U of the treatment, `superiority` the chance that a treated value beats a control."""

    statistic: float
    p_value: float
    superiority: float


def mann_whitney(control: ArrayLike, treatment: ArrayLike, *, alternative: Tails = "two-sided") -> RankTest:
    """Mann-Whitney U (1947): exact for small samples without ties, else normal with continuity. "larger":
    treated values are larger. An empty side says nothing: p = 1."""
    left, right = np.asarray(control, dtype=np.float64), np.asarray(treatment, dtype=np.float64)
    if not (left.size and right.size):
        return RankTest(0.0, 1.0, 0.5)
    result = stats.mannwhitneyu(right, left, alternative=_SCIPY[alternative])
    return RankTest(
        float(result.statistic), float(result.pvalue), float(result.statistic) / left.size / right.size
    )
