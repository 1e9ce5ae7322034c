"""Two arms become one effect with a standard error, whatever kind of metric they measure.

The relative effect (treatment - control) / control and ratios get their variance by the delta method (Deng,
Knoblich & Lu, "Applying the delta method in metric analytics", KDD 2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from services.analytics.statistics.moments import Moments, PairedMoments

Difference = Literal["absolute", "relative"]

_Z95 = float(stats.norm.ppf(0.975))


@dataclass(frozen=True, slots=True)
class Arm:
    """What one arm measured: `variance / n` is the variance of `mean` over repetitions."""

    n: int
    mean: float
    variance: float

    @classmethod
    def from_moments(cls, moments: Moments) -> Arm:
        """Mean of a continuous metric, sample variance."""
        return cls(moments.n, moments.mean, moments.variance)

    @classmethod
    def proportion(cls, successes: float, n: int) -> Arm:
        """Share of successes, variance p(1 - p)."""
        share = successes / n if n else 0.0
        return cls(n, share, share * (1 - share))

    @classmethod
    def ratio(cls, pairs: PairedMoments) -> Arm:
        """Sum of x over sum of y where the unit is the randomised one, by the delta method:
        (Var x - 2 R Cov(x, y) + R^2 Var y) / mean(y)^2.
        """
        if pairs.y.mean == 0:
            raise ValueError("the denominator of a ratio adds up to zero")
        value = pairs.x.mean / pairs.y.mean
        spread = pairs.x.variance - 2 * value * pairs.covariance + value * value * pairs.y.variance
        return cls(pairs.n, value, _no_less_than_none(spread) / pairs.y.mean**2)

    @classmethod
    def quantile(
        cls, estimate: float, low: float, high: float, n: int, evaluated_n: int | None = None
    ) -> Arm:
        """A quantile with the order statistics `low` and `high` around it that make its 95% interval.

        The interval's width gives the variance; `evaluated_n` is the sample size for which its ranks were
        chosen, where that is not `n` (GrowthBook's quantile tests; the asymptotics are in the paper above).
        """
        if n <= 1:
            return cls(n, estimate, 0.0)
        spread = (evaluated_n or n) / n * (n - 1) * ((high - low) / (2 * _Z95)) ** 2
        return cls(n, estimate, spread if n < 100 else max(spread, 1e-5))

    @property
    def error_variance(self) -> float:
        """Variance of the mean."""
        return self.variance / self.n if self.n else 0.0


@dataclass(frozen=True, slots=True)
class Effect:
    """Treatment minus control (or that over control) with its standard error.

    `degrees_of_freedom` are Welch-Satterthwaite's. `baseline` is the control's mean.
    """

    estimate: float
    std_error: float
    degrees_of_freedom: float
    n_control: int
    n_treatment: int
    baseline: float
    difference: Difference


def effect(control: Arm, treatment: Arm, difference: Difference = "absolute") -> Effect:
    """The effect of independent arms.

    Relative: variance Vt / c^2 + Vc t^2 / c^4 with c, t the means and V the variances of the means.
    Raises ValueError for a relative effect on a control of zero.
    """
    gap = treatment.mean - control.mean
    if difference == "relative":
        if control.mean == 0:
            raise ValueError("a relative effect needs a control other than zero")
        base = control.mean
        ratio = treatment.mean / base
        # Divided twice: the square of a large or small base is beyond what a float holds.
        variance = (treatment.error_variance + control.error_variance * ratio * ratio) / base / base
        gap = gap / base
    else:
        variance = treatment.error_variance + control.error_variance
    return Effect(
        estimate=gap,
        std_error=variance**0.5,
        degrees_of_freedom=welch_degrees_of_freedom(control, treatment),
        n_control=control.n,
        n_treatment=treatment.n,
        baseline=control.mean,
        difference=difference,
    )


def welch_degrees_of_freedom(control: Arm, treatment: Arm) -> float:
    """Satterthwaite (1946), Welch (1947). Infinite where neither arm varies."""
    whole = control.error_variance + treatment.error_variance
    if not 0 < whole < math.inf or control.n < 2 or treatment.n < 2:
        return math.inf
    left, right = control.error_variance / whole, treatment.error_variance / whole
    return 1 / (left * left / (control.n - 1) + right * right / (treatment.n - 1))


def _no_less_than_none(variance: float) -> float:
    """A variance that was taken as a difference: where nothing varies, rounding leaves a little on either
    side of zero, and which one depends on the processor."""
    return max(variance, 0.0)


@dataclass(frozen=True, slots=True)
class CupedEffect:
    """The adjusted effect beside the plain one. `variance_reduction` is 1 - (adjusted / plain variance)."""

    adjusted: Effect
    unadjusted: Effect
    theta: float

    @property
    def variance_reduction(self) -> float:
        """Share of the variance that the covariate explained."""
        plain = self.unadjusted.std_error
        return 1 - (self.adjusted.std_error / plain) ** 2 if plain > 0 else 0.0


def cuped(
    control: PairedMoments, treatment: PairedMoments, difference: Difference = "absolute"
) -> CupedEffect:
    """Effect on x adjusted by the covariate y, known before the treatment (Deng, Xu, Kohavi & Walker,
    "Improving the sensitivity of online controlled experiments by utilizing pre-experiment data", 2013).

    theta = Cov(x, y) / Var(y) over both arms together; x - theta y replaces x. The relative effect divides by
    the control's plain mean, whose covariance with the adjusted difference the delta method keeps.
    """
    joint = control + treatment
    theta = joint.covariance / joint.y.variance if joint.y.variance > 0 and joint.x.variance > 0 else 0.0
    arms = [
        Arm(
            side.n,
            side.x.mean - theta * side.y.mean,
            _no_less_than_none(side.x.variance + theta**2 * side.y.variance - 2 * theta * side.covariance),
        )
        for side in (control, treatment)
    ]
    plain = effect(Arm.from_moments(control.x), Arm.from_moments(treatment.x), difference)
    estimate, variance = arms[1].mean - arms[0].mean, arms[0].error_variance + arms[1].error_variance
    if difference == "relative":
        base = control.x.mean
        lift = treatment.x.mean / base
        spread = (
            control.x.variance * lift**2
            - 2 * theta * control.covariance * lift
            + theta**2 * control.y.variance
        )
        variance = (arms[1].error_variance + _no_less_than_none(spread) / control.n) / base**2
        estimate = estimate / base
    adjusted = Effect(
        estimate=estimate,
        std_error=variance**0.5,
        degrees_of_freedom=welch_degrees_of_freedom(arms[0], arms[1]),
        n_control=control.n,
        n_treatment=treatment.n,
        baseline=control.x.mean,
        difference=difference,
    )
    return CupedEffect(adjusted, plain, theta)
