"""Two arms of a trial on one metric: every number that a person may want beside the verdict. Pure.

Estimates are treatment minus control. The unit is the trial's: its observations count together. While the
weights never changed and every unit has one value this is the textbook's test; otherwise strata of weights
are compared within themselves (`statistics.stratified`). The relative lift's interval is the set of ratios
that the same test does not reject (Fieller 1954), so that it does not need the control's mean to be far from
zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from services.analytics.statistics.boundaries import normal_mixture
from services.analytics.statistics.effects import Arm, Effect, effect
from services.analytics.statistics.fixed_horizon import student_quantile, tail_probability
from services.analytics.statistics.moments import Moments, PairedMoments
from services.analytics.statistics.proportions import relative_risk, two_proportion_z_test, wilson
from services.analytics.statistics.stratified import (
    Cells,
    StratifiedEffect,
    half_width,
    log_evidence,
    stratified_effect,
)

Floats = NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Measured:
    """What one arm measured: `mean` is the sum of values over the number of observations, `sd` the spread of
    the units' values (of their sums, where a unit has several)."""

    units: int
    observations: float
    mean: float
    sd: float
    interval: Interval | None


@dataclass(frozen=True, slots=True)
class Fixed:
    """Right once, at the size planned for, and only then."""

    interval: Interval | None
    relative_interval: Interval | None
    p_value: float | None
    method: str


@dataclass(frozen=True, slots=True)
class AlwaysValid:
    """Right at every look. `log_e` is against "no difference", p = min(1, 1 / e). Infinite limits: not enough
    seen yet."""

    interval: Interval
    relative_interval: Interval | None
    log_e: float
    method: str

    @property
    def p_value(self) -> float:
        """The always-valid p-value at this look."""
        return min(1.0, math.exp(-self.log_e))


@dataclass(frozen=True, slots=True)
class Lift:
    """One arm against the control. `std_error` is of the absolute estimate; `relative` is None where the
    control's mean is 0. `binary`: every unit has one value, 0 or 1."""

    estimate: float
    std_error: float
    relative: float | None
    control_mean: float
    mean: float
    fixed: Fixed
    sequence: AlwaysValid
    line: Line | None
    freedom: float
    binary: bool
    strata: int


@dataclass(frozen=True, slots=True)
class Line:
    """Mean of the treatment minus k times the control's, as a function of k: zero at `root`, falling by
    `slope` (the control's mean), with variance a + b k + c k^2. Lifts are shares of the control's size, so
    that more is above zero for a control below zero, too."""

    slope: float
    root: float
    a: float
    b: float
    c: float

    def difference(self, k: float) -> tuple[float, float]:
        """Estimate and standard error at k."""
        return self.slope * (self.root - k), math.sqrt(max(0.0, self.a + self.b * k + self.c * k * k))

    @property
    def lift(self) -> float:
        """The estimate."""
        return math.copysign(1.0, self.slope) * (self.root - 1)

    def within(self, radius: float) -> Interval | None:
        """The lifts at which the estimate is at most `radius` standard errors from zero; None where
        they have no bound."""
        if not math.isfinite(radius):
            return None
        # Divided twice: the square of a large or small slope is beyond what a float holds.
        a, b, c = (radius * radius * one / self.slope / self.slope for one in (self.a, self.b, self.c))
        lead = 1 - c
        middle = self.root + b / 2
        rest = self.root * self.root - a
        inside = middle * middle - lead * rest
        if lead <= 0 or inside < 0:
            return None
        spread = math.sqrt(inside)
        low, high = (middle - spread) / lead - 1, (middle + spread) / lead - 1
        return (low, high) if self.slope > 0 else (-high, -low)


def measured(cells: Cells, arm: int, *, alpha: float) -> Measured:
    """One arm on its own, all strata together."""
    mine = cells.where(cells.arms == arm)
    _, owners = np.unique(mine.units, return_inverse=True)
    totals, counts = np.bincount(owners, mine.totals), np.bincount(owners, mine.counts)
    n, observations = int(totals.size), float(counts.sum())
    if observations == 0:
        return Measured(n, 0.0, 0.0, 0.0, None)
    mean = float(totals.sum()) / observations
    if n < 2:
        return Measured(n, observations, mean, 0.0, None)
    pairs = PairedMoments.of(totals, counts)
    summary = Arm.ratio(pairs)
    if _is_binary(mine) and np.all(counts == 1):
        interval = wilson(float(totals.sum()), n, alpha=alpha)
    else:
        spread = student_quantile(1 - alpha / 2, n - 1) * math.sqrt(max(0.0, summary.error_variance))
        interval = (mean - spread, mean + spread)
    return Measured(n, observations, mean, math.sqrt(pairs.x.variance), interval)


def lift(cells: Cells, *, alpha: float, tuning: float) -> Lift | None:
    """The arm that is not 0 against arm 0; None before both have been seen in one stratum. `tuning` is the
    number of units in both arms at which the sequence is sharpest."""
    whole = stratified_effect(cells)
    if whole is None:
        return None
    strata = int(np.unique(cells.strata).size)
    once = bool(np.all(cells.counts == 1)) and np.unique(cells.units).size == cells.units.size
    plain = strata == 1 and once and cells.covariate is None
    binary = plain and _is_binary(cells)
    line = _plain_line(cells) if plain else _line(cells, whole)
    relative = line.lift if line is not None else None
    if plain:
        fixed, error, freedom = _textbook(cells, line, binary=binary, alpha=alpha)
    else:
        error, freedom = whole.std_error, float(max(1, whole.control_units + whole.units - 2))
        fixed = _stratified(whole, line, strata, freedom, alpha=alpha)
    return Lift(
        estimate=whole.estimate,
        std_error=error,
        relative=relative,
        control_mean=whole.control_mean,
        mean=whole.mean,
        fixed=fixed,
        sequence=_sequence(whole, line, alpha=alpha, tuning=tuning),
        line=line,
        freedom=freedom,
        binary=binary,
        strata=strata,
    )


@dataclass(frozen=True, slots=True)
class Guarded:
    """Of a margin that the arm must not lose: p-values of "worse by the margin or more" (non-inferiority) and
    of "the difference is the margin or more, either way" (equivalence, two one-sided tests). Fixed
    horizon."""

    margin: float
    relative: bool
    non_inferiority_p: float
    equivalence_p: float


def guarded(found: Lift, margin: float, *, relative: bool, larger_is_better: bool) -> Guarded | None:
    """None where a relative margin has no control to relate to, or nothing varies."""
    if margin <= 0 or (relative and found.line is None) or found.std_error <= 0:
        return None
    low, high = (_beyond(found, sign * margin, relative=relative) for sign in (-1, 1))
    above_low = tail_probability(low, found.freedom, "larger")
    below_high = tail_probability(high, found.freedom, "smaller")
    return Guarded(
        margin, relative, above_low if larger_is_better else below_high, max(above_low, below_high)
    )


def as_effect(found: Lift, control: Measured, treatment: Measured) -> Effect:
    """For what takes an effect: posteriors."""
    return Effect(
        estimate=found.estimate,
        std_error=found.std_error,
        degrees_of_freedom=found.freedom,
        n_control=control.units,
        n_treatment=treatment.units,
        baseline=found.control_mean,
        difference="absolute",
    )


def units_to_exclude(gap: float, found: StratifiedEffect, *, alpha: float, tuning: float) -> float | None:
    """Units in both arms at which the sequence of level alpha excludes a difference of `gap`, at the spread
    seen so far; None where nothing is known or it takes more than a thousand million."""
    if gap == 0 or not found.normal:
        return None
    spread = found.std_error * math.sqrt(found.size)

    def half(size: float) -> float:
        return normal_mixture(size, alpha / 2, v_opt=tuning, one_sided=True) / size * spread

    low = high = 100.0
    while half(high) > abs(gap):
        low, high = high, high * 2
        if high > 1e9:
            return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if half(middle) > abs(gap) else (low, middle)
    return high


def _textbook(cells: Cells, line: Line | None, *, binary: bool, alpha: float) -> tuple[Fixed, float, float]:
    sides = [cells.totals[cells.arms == 0], cells.totals[cells.arms > 0]]
    if binary:
        control, treatment = ((float(side.sum()), int(side.size)) for side in sides)
        test = two_proportion_z_test(control, treatment, alpha=alpha)
        error = effect(Arm.proportion(*control), Arm.proportion(*treatment)).std_error
        ratio = relative_risk(control, treatment, alpha=alpha) if control[0] else None
        method = "two-proportion z-test (pooled); intervals from Wilson's, by Newcombe and by Donner & Zou"
        return Fixed(test.newcombe_ci, ratio, test.p_value, method), error, math.inf
    arms = [Arm.from_moments(Moments.of(side)) for side in sides]
    found = effect(arms[0], arms[1])
    freedom = found.degrees_of_freedom
    if found.std_error <= 0 or min(side.size for side in sides) < 2:
        return Fixed(None, None, None, "nothing varies, so nothing can be tested"), found.std_error, freedom
    radius = student_quantile(1 - alpha / 2, freedom)
    fixed = Fixed(
        (found.estimate - radius * found.std_error, found.estimate + radius * found.std_error),
        line.within(radius) if line else None,
        tail_probability(found.estimate / found.std_error, freedom, "two-sided"),
        "Welch's t-test; relative interval by Fieller",
    )
    return fixed, found.std_error, freedom


def _stratified(
    whole: StratifiedEffect, line: Line | None, strata: int, freedom: float, *, alpha: float
) -> Fixed:
    if whole.std_error <= 0 or min(whole.control_units, whole.units) < 2:
        return Fixed(None, None, None, "nothing varies, so nothing can be tested")
    radius = student_quantile(1 - alpha / 2, freedom)
    half = radius * whole.std_error
    how = "ratio of sums, variance clustered by unit"
    if strata > 1:
        how = f"least squares within {strata} strata of weights, variance clustered by unit"
    return Fixed(
        (whole.estimate - half, whole.estimate + half),
        line.within(radius) if line else None,
        tail_probability(whole.estimate / whole.std_error, freedom, "two-sided"),
        f"{how}; relative interval by Fieller",
    )


def _sequence(whole: StratifiedEffect, line: Line | None, *, alpha: float, tuning: float) -> AlwaysValid:
    """Two one-sided mixtures, alpha / 2 each; e against no difference is their mean."""
    half = half_width(whole, alpha / 2, tunings=(tuning,))
    logs = [log_evidence(whole, 0.0, above=above, tunings=(tuning,)) for above in (True, False)]
    radius = half / whole.std_error if whole.std_error > 0 else math.inf
    log_e = float(np.logaddexp(logs[0], logs[1])) - math.log(2) if math.isfinite(half) else 0.0
    return AlwaysValid(
        interval=(whole.estimate - half, whole.estimate + half),
        relative_interval=line.within(radius) if line else None,
        log_e=log_e,
        method="asymptotic confidence sequence (normal mixture), from 100 units an arm on",
    )


def _plain_line(cells: Cells) -> Line | None:
    arms = [
        Arm.from_moments(Moments.of(cells.totals[chosen])) for chosen in (cells.arms == 0, cells.arms > 0)
    ]
    control, treatment = arms
    if control.mean == 0:
        return None
    return Line(
        control.mean, treatment.mean / control.mean, treatment.error_variance, 0.0, control.error_variance
    )


def _line(cells: Cells, whole: StratifiedEffect) -> Line | None:
    """Residuals are linear in k, so their sandwich is a parabola through any three points."""
    if whole.control_mean == 0 or whole.std_error <= 0:
        return None
    middle = whole.mean / whole.control_mean
    step = max(0.05, whole.std_error / abs(whole.control_mean))
    points = [middle - step, middle, middle + step]
    found = [stratified_effect(cells.scaled_control(point)) for point in points]
    if any(one is None for one in found):
        return None
    seen = [one for one in found if one is not None]
    slope = (seen[0].estimate - seen[2].estimate) / (2 * step)
    errors = np.array([one.std_error for one in seen])
    # Huge values overflow when they are squared.
    if slope == 0 or not np.all(np.isfinite([slope, *points, *errors**2])):
        return None
    c, b, a = np.polyfit(points, errors**2, 2)
    return Line(slope, middle + seen[1].estimate / slope, float(a), float(b), float(c))


def _beyond(found: Lift, margin: float, *, relative: bool) -> float:
    """How many standard errors the treatment lies above the margin."""
    if relative and found.line is not None:
        gap, error = found.line.difference(1 + math.copysign(1.0, found.line.slope) * margin)
        return gap / error if error > 0 else 0.0
    return (found.estimate - margin) / found.std_error


def _is_binary(cells: Cells) -> bool:
    return bool(np.all((cells.totals == 0) | (cells.totals == 1))) and bool(np.all(cells.counts == 1))


def unadjusted(cells: Cells) -> Cells:
    """The same without its covariate."""
    return replace(cells, covariate=None)
