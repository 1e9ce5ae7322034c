"""Two versions on one metric: which test fits, what it says, and what speaks against believing it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import stats

from services.analytics.arm_queries import Arms, Observations, Quantile
from services.analytics.statistics.counts import SAMPLE_RATIO_LEVEL, CountTest, contingency
from services.analytics.statistics.effects import Arm, Effect, effect
from services.analytics.statistics.fixed_horizon import Inference, t_test, z_test
from services.analytics.statistics.moments import Moments, PairedMoments
from services.analytics.statistics.proportions import two_proportion_z_test, wilson
from services.analytics.statistics.sequential import asymptotic_sequence

#: What a unit counts as that was exposed and has no value: nothing, or not at all.
Missing = Literal["zero", "exclude"]

#: Below so many units an arm, normal approximations are a courtesy.
_FEW_UNITS = 100
_FEW_EVENTS = 10


@dataclass(frozen=True, slots=True)
class ArmEstimate:
    """One arm: the mean over `units` with its 95% interval. Of `exposed` units the share `measured` has
    observations, `observations` of them together."""

    name: str
    exposed: int
    measured: float | None
    units: int
    observations: int
    mean: float | None
    ci: tuple[float, float] | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """b minus a. `fixed` holds at one look planned beforehand, `sequential` at every look; `relative` is the
    fixed result as a share of a. They are None where an arm has too little or no value differs, which a
    warning says; `sequential` needs 100 units an arm. `sample_ratio` tests the
    units per arm against the logged propensities, None where those are not known.
    """

    a: ArmEstimate
    b: ArmEstimate
    fixed: Inference | None
    relative: Inference | None
    sequential: Inference | None
    sample_ratio: CountTest | None
    assumptions: list[str]
    warnings: list[str]


def compare(
    everybody: Arms,
    metric: str,
    names: tuple[str, str],
    *,
    missing: Missing = "exclude",
    alpha: float = 0.05,
) -> Comparison:
    """Two-proportion z-test or Welch's t-test where every unit has one value, else the same question by the
    delta method with the unit as what was randomised.

    `missing="zero"`: the value of a unit is the sum of its observations, 0 where there is none; "exclude":
    units without one are left out, and the mean is over observations.
    """
    arms = replace(everybody, a=_counted(everybody.a, missing), b=_counted(everybody.b, missing))
    clustered = bool(np.any(arms.a.counts > 1) or np.any(arms.b.counts > 1))
    binary = arms.a.binary and arms.b.binary
    sides = [_summary(side, binary=binary, clustered=clustered) for side in (arms.a, arms.b)]
    estimates = [
        _estimate(name, all_, side, summary, binary=binary, clustered=clustered, alpha=alpha)
        for name, all_, side, summary in zip(
            names, (everybody.a, everybody.b), (arms.a, arms.b), sides, strict=True
        )
    ]
    ratio = sample_ratio(everybody) if everybody.randomised else None
    warnings = _warnings(arms, ratio, binary=binary) + _population_warnings(everybody, missing)
    assumptions = _assumptions(everybody, metric, missing, binary=binary, clustered=clustered)
    if min(estimates[0].units, estimates[1].units) < 2 or sides[0] is None or sides[1] is None:
        warnings.append("An arm has fewer than two units: nothing can be said yet.")
        return Comparison(estimates[0], estimates[1], None, None, None, ratio, assumptions, warnings)
    absolute = effect(sides[0], sides[1])
    if not math.isfinite(absolute.std_error):
        warnings.append("Values are so large that their spread is beyond what a float holds.")
        return Comparison(estimates[0], estimates[1], None, None, None, ratio, assumptions, warnings)
    varies = absolute.std_error > 0
    enough = min(estimates[0].units, estimates[1].units) >= _FEW_UNITS
    if not varies:
        warnings.append(
            "No value differs within an arm: nothing is known about the spread of this metric, so there is "
            "no sequential result, and no p-value of a mean."
        )
    elif not enough:
        warnings.append(f"There is no sequential result below {_FEW_UNITS} units an arm.")
    relative = None
    if varies and absolute.baseline != 0:
        relative = t_test(effect(sides[0], sides[1], "relative"), alpha=alpha)
    return Comparison(
        a=estimates[0],
        b=estimates[1],
        fixed=_fixed(arms, absolute, binary=binary, clustered=clustered, alpha=alpha),
        relative=relative,
        sequential=asymptotic_sequence(absolute, alpha=alpha) if varies and enough else None,
        sample_ratio=ratio,
        assumptions=assumptions,
        warnings=warnings,
    )


@dataclass(frozen=True, slots=True)
class QuantileComparison:
    """A quantile of both arms, and b's minus a's."""

    a: Quantile
    b: Quantile
    difference: Inference


def compare_quantiles(
    a: Sequence[Quantile], b: Sequence[Quantile], *, alpha: float = 0.05
) -> list[QuantileComparison]:
    """The same quantiles of both arms; none where an arm has none."""
    found = []
    for one, other in zip(a, b, strict=False):
        sides = [Arm.quantile(side.value, side.low, side.high, side.units) for side in (one, other)]
        test = z_test(effect(sides[0], sides[1]), alpha=alpha)
        found.append(QuantileComparison(one, other, replace(test, method="quantiles per unit, delta method")))
    return found


def sample_ratio(arms: Arms) -> CountTest | None:
    """Exposed units per arm against what their logged propensities promised, revision by revision (weights
    may have changed); None where propensities are missing or an arm was given no share."""
    revisions = np.union1d(arms.a.revisions, arms.b.revisions)
    observed, expected = np.zeros(2), np.zeros(2)
    for revision in revisions:
        sides = [side.propensities[side.revisions == revision] for side in (arms.a, arms.b)]
        if not (sides[0].size and sides[1].size):
            continue
        shares = np.array([float(np.median(side)) for side in sides])
        if not np.all((shares > 0) & (shares < 1)):  # NaN is neither
            continue
        sizes = np.array([side.size for side in sides], dtype=np.float64)
        observed += sizes
        expected += shares / shares.sum() * sizes.sum()
    if observed.sum() == 0:
        return None
    statistic = float(np.sum((observed - expected) ** 2 / expected))
    return CountTest(statistic, 1, float(stats.chi2.sf(statistic, 1)))


def _counted(side: Observations, missing: Missing) -> Observations:
    if missing == "zero":
        binary = bool(np.all((side.totals == 0) | (side.totals == 1)))
        return replace(side, counts=np.ones(side.units.size), binary=binary)
    seen = side.counts > 0
    return Observations(
        units=side.units[seen],
        totals=side.totals[seen],
        counts=side.counts[seen],
        revisions=side.revisions[seen],
        propensities=side.propensities[seen],
        binary=side.binary,
    )


def _summary(side: Observations, *, binary: bool, clustered: bool) -> Arm | None:
    if side.units.size == 0:
        return None
    with np.errstate(over="ignore", invalid="ignore"):  # of huge values, which have no spread then
        if clustered:
            return Arm.ratio(PairedMoments.of(side.totals, side.counts))
        if binary:
            return Arm.proportion(float(side.totals.sum()), side.units.size)
        return Arm.from_moments(Moments.of(side.totals))


def _estimate(
    name: str,
    everybody: Observations,
    side: Observations,
    summary: Arm | None,
    *,
    binary: bool,
    clustered: bool,
    alpha: float,
) -> ArmEstimate:
    exposed, observations = int(everybody.units.size), int(everybody.counts.sum())
    measured = float(np.mean(everybody.counts > 0)) if exposed else None
    if summary is None:
        return ArmEstimate(name, exposed, measured, 0, 0, None, None)
    if binary and not clustered:
        ci = wilson(float(side.totals.sum()), side.units.size, alpha=alpha)
    else:
        spread = float(stats.norm.isf(alpha / 2)) * summary.error_variance**0.5
        ci = (summary.mean - spread, summary.mean + spread)
    shown = ci if summary.n > 1 and all(map(math.isfinite, ci)) else None
    mean = summary.mean if math.isfinite(summary.mean) else None
    return ArmEstimate(name, exposed, measured, summary.n, observations, mean, shown)


def _fixed(arms: Arms, absolute: Effect, *, binary: bool, clustered: bool, alpha: float) -> Inference | None:
    if clustered or not binary:
        method = "ratio of sums per unit, delta method, Welch's t-test" if clustered else "Welch's t-test"
        result = replace(t_test(absolute, alpha=alpha), method=method)
        # Without any spread a mean has neither p-value nor interval: that would be zero wide.
        return result if absolute.std_error > 0 else None
    counts = [(float(side.totals.sum()), int(side.units.size)) for side in (arms.a, arms.b)]
    found = two_proportion_z_test(counts[0], counts[1], alpha=alpha)
    if any(min(successes, n - successes) == 0 for successes, n in counts):
        return replace(
            z_test(absolute, alpha=alpha),
            ci=found.newcombe_ci,
            p_value=found.p_value,
            statistic=found.z,
            method="two-proportion z-test (pooled), Newcombe's interval",
        )
    return replace(
        z_test(absolute, alpha=alpha),
        ci=found.wald_ci,
        p_value=found.p_value,
        statistic=found.z,
        method="two-proportion z-test (pooled), unpooled Wald interval",
    )


def _assumptions(
    everybody: Arms, metric: str, missing: Missing, *, binary: bool, clustered: bool
) -> list[str]:
    unit = (
        "The unit is the user or session: all its observations count together, units are independent."
        if clustered
        else "Every unit has one value; units are independent."
    )
    who = (
        f"An arm is the units that the split sent there by chance; {everybody.left_out} requests that named "
        "their version, or came while one version had all traffic, are left out."
        if everybody.randomised
        else "An arm is every unit that a version answered, whatever sent it there."
    )
    without = (
        f"missing=zero: {metric} is summed per unit, and units without a value count as 0."
        if missing == "zero"
        else f"missing=exclude: units without a value of {metric} are left out of its mean."
    )
    kind = f"{metric} is {'a share of zeros and ones' if binary else 'a mean'}; its mean is about normal."
    return [
        unit,
        who,
        without,
        kind,
        "The fixed result holds at one look, at a size planned beforehand; the sequential one at every look.",
    ]


def _population_warnings(everybody: Arms, missing: Missing) -> list[str]:
    """What speaks against taking the arms for two samples of the same users."""
    warnings = []
    if everybody.experiments:
        told = ", ".join(f"{requests:,} of {name}" for name, requests in everybody.experiments)
        warnings.append(
            f"Requests that experiments assigned are left out ({told}): they have weights of their own, "
            "and GET /v1/experiments/{id}/results compares the variants."
        )
    if not everybody.randomised:
        warnings.append(
            "No split sent users to both versions by chance: who asked for which may differ in more than the "
            "version, so no difference here is an effect of it."
        )
    if everybody.unmapped:
        warnings.append(
            f"{everybody.unmapped} labels are left out: they name no class of the version that answered, or "
            "what it predicted is not in the log."
        )
    measured = [[np.sum(side.counts > 0), np.sum(side.counts == 0)] for side in (everybody.a, everybody.b)]
    if missing == "exclude" and np.all(np.sum(measured, axis=0) > 0) and np.all(np.sum(measured, axis=1) > 0):
        found = contingency(measured)
        if found.p_value < SAMPLE_RATIO_LEVEL:
            warnings.append(
                f"One arm lacks values more often than the other (p = {found.p_value:.2g}): those who have "
                "one may be other users in either arm."
            )
    return warnings


def _warnings(arms: Arms, ratio: CountTest | None, *, binary: bool) -> list[str]:
    warnings = ["Peeking: looking at `fixed` again and again makes false positives; decide by `sequential`."]
    if ratio is None and arms.randomised:
        warnings.append("The split was not checked: the log holds no propensities of both arms.")
    elif ratio is not None and ratio.p_value < SAMPLE_RATIO_LEVEL:
        warnings.append(
            f"Sample ratio mismatch (p = {ratio.p_value:.2g}): the arms do not hold the shares that the "
            "split promised, so the comparison may be biased. Look for the cause first."
        )
    if arms.crossed:
        warnings.append(
            f"{arms.crossed} units met both versions and count for the one they met first; "
            "a split that changed, or versions asked for by name, do that."
        )
    for name, side in (("a", arms.a), ("b", arms.b)):
        if side.units.size < _FEW_UNITS:
            warnings.append(
                f"Arm {name} has {side.units.size} units: intervals are rough below {_FEW_UNITS}."
            )
        elif binary:
            events = float(side.totals.sum())
            if min(events, float(side.counts.sum()) - events) < _FEW_EVENTS:
                warnings.append(
                    f"Arm {name} has fewer than {_FEW_EVENTS} events of a kind: its interval is rough."
                )
    return warnings
