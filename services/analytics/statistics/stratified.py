"""One effect over strata whose weights differed, with the unit as what varies independently.

A unit is counted in every stratum it came in, with the arm it had there: a change of weights moves units from
one arm to another, and leaving those out would leave almost nobody in a growing canary. Within a stratum
chance divided the units; between strata nothing is compared, so a world that changes together with the
weights moves no estimate (Simpson's paradox).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from services.analytics.statistics.boundaries import best_rho, normal_mixture_log

Floats = NDArray[np.float64]

#: Units an arm, and units that contribute about equally to the smaller arm's variance, below which a normal
#: approximation says nothing here.
FEWEST_UNITS = 100
FEWEST_CONTRIBUTING = 4.0
#: Sizes at which evidence is sharp: a third of the wealth on each.
TUNINGS = (500.0, 5_000.0, 50_000.0)


@dataclass(frozen=True, slots=True)
class Cells:
    """What units did, an entry per unit, stratum and arm (0: control): the sum of their values and how many
    there were. `covariate` is known from before the trial and centred; NaN where it is not known."""

    units: NDArray[np.uint64]
    arms: NDArray[np.int64]
    strata: NDArray[np.int64]
    totals: Floats
    counts: Floats
    covariate: Floats | None = None

    def where(self, chosen: NDArray[np.bool_]) -> Cells:
        """Some of the entries."""
        covariate = None if self.covariate is None else self.covariate[chosen]
        return Cells(
            self.units[chosen],
            self.arms[chosen],
            self.strata[chosen],
            self.totals[chosen],
            self.counts[chosen],
            covariate,
        )

    def scaled_control(self, factor: float) -> Cells:
        """The same with the control's values multiplied: what a margin relative to the control asks about."""
        return replace(self, totals=np.where(self.arms == 0, self.totals * factor, self.totals))


@dataclass(frozen=True, slots=True)
class StratifiedEffect:
    """Treatment minus control. Means are over the strata that have both arms, each weighted alike in both.

    `size` is the information in units: how many units, evenly divided, would say as much. `contributing` is
    how many units of the smaller arm the variance rests on. `theta` is the covariate's coefficient.
    """

    estimate: float
    std_error: float
    control_mean: float
    mean: float
    control_units: int
    units: int
    size: float
    contributing: float
    theta: float = 0.0

    @property
    def normal(self) -> bool:
        """Whether there is enough for a normal approximation."""
        return (
            min(self.control_units, self.units) >= FEWEST_UNITS
            and self.contributing >= FEWEST_CONTRIBUTING
            and self.std_error > 0
        )


def stratified_effect(cells: Cells) -> StratifiedEffect | None:
    """Difference of ratios of sums (of means, where every count is 1), None while no stratum has both arms,
    and where values are too large to be added.

    Least squares of value on arm with an intercept per stratum, an entry weighted by its count: strata weigh
    n_a n_b / (n_a + n_b), which is least variance. The variance is the sandwich clustered by unit (Liang &
    Zeger 1986), or, where it is larger, the one that gives both arms the same spread: an arm in which a rare
    event has not happened yet would seem to have none. With a covariate, its coefficient is estimated within
    strata and arms (Deng et al. 2013), which chance makes unbiased.
    """
    _, strata = np.unique(cells.strata, return_inverse=True)
    count = int(strata.max()) + 1 if strata.size else 0
    treated = cells.arms > 0
    weight = _sums(strata, treated, cells.counts, count)
    both = np.all(weight > 0, axis=0)
    if not both.any():
        return None
    kept = both[strata] & (cells.counts > 0)
    inner, treated = strata[kept], treated[kept]
    totals, counts, units = cells.totals[kept], cells.counts[kept], cells.units[kept]
    theta = 0.0
    if cells.covariate is not None:
        theta, totals = _adjusted(inner, treated, totals, counts, cells.covariate[kept], count)
    sums = _sums(inner, treated, totals, count)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(both, sums / weight, 0.0)
        overlap = np.where(both, weight[0] * weight[1] / weight.sum(axis=0), 0.0)
        share = np.where(both, weight[1] / weight.sum(axis=0), 0.0)
    information = float(overlap.sum())
    control_mean, mean = (float(overlap @ side) / information for side in ratios)
    estimate = mean - control_mean
    if not math.isfinite(estimate):
        return None  # sums beyond what a float holds
    level = ratios[0] + share * (ratios[1] - ratios[0] - estimate)
    residuals = totals - counts * (level[inner] + estimate * treated)
    members = _sums(inner, treated, np.ones(inner.size), count)
    both_members = members[:, both]
    # A mean fitted to m entries takes 1 / m of their spread away, which counts where strata are small.
    size_of = np.maximum(2.0, members.sum(axis=0))
    residuals *= np.sqrt(size_of / (size_of - 1))[inner]
    influence = (treated - share[inner]) * residuals
    _, owners = np.unique(units, return_inverse=True)
    clustered = np.bincount(owners, influence)
    sandwich = float(clustered @ clustered) / information**2
    pooled, contributing = _pooled(inner, treated, residuals, count)
    size = 4 * float(np.sum(both_members[0] * both_members[1] / both_members.sum(axis=0)))
    mean_count = float(counts.sum()) / inner.size
    even = pooled / mean_count**2 * 4 / size
    return StratifiedEffect(
        estimate=estimate,
        std_error=math.sqrt(max(sandwich, even)),
        control_mean=control_mean,
        mean=mean,
        control_units=int(np.unique(units[~treated]).size),
        units=int(np.unique(units[treated]).size),
        size=size,
        contributing=contributing,
        theta=theta,
    )


def log_evidence(
    effect: StratifiedEffect, bound: float, *, above: bool, tunings: Sequence[float] = TUNINGS
) -> float:
    """Log evidence against "no more than `bound`" (not `above`: "no less"), asymptotically valid at every
    look from FEWEST_UNITS on (Waudby-Smith et al., arXiv:2103.06476). `tunings` are sizes at which it is
    sharp. Minus infinity without enough units: nothing has been bet yet, and a maximum over time ignores it.
    """
    if not effect.normal:
        return -math.inf
    gap = effect.estimate - bound if above else bound - effect.estimate
    return log_of_score(gap / effect.std_error, effect.size, tunings)


def log_of_score(score: float, size: float, tunings: Sequence[float] = TUNINGS) -> float:
    """Log of the mean over `tunings` of one-sided normal mixtures (Robbins 1970; Howard et al. 2021, Prop. 6)
    at a z-score that `size` units made."""
    logs = [
        normal_mixture_log(
            score * math.sqrt(size), size, rho=best_rho(tuning, 0.05, one_sided=True), one_sided=True
        )
        for tuning in tunings
    ]
    largest = max(logs)
    return largest + math.log(sum(math.exp(one - largest) for one in logs) / len(logs))


def half_width(effect: StratifiedEffect, alpha: float, *, tunings: Sequence[float] = TUNINGS) -> float:
    """Of the confidence sequence that misses on one side with probability `alpha`, ever."""
    if not effect.normal:
        return math.inf
    threshold = math.log(1 / alpha)

    def excess(score: float) -> float:
        return log_of_score(score, effect.size, tunings) - threshold

    most = 4.0
    while excess(most) < 0:
        most *= 2
    return float(optimize.brentq(excess, 0.0, most, xtol=1e-6)) * effect.std_error


def _sums(strata: NDArray[np.int64], treated: NDArray[np.bool_], values: Floats, count: int) -> Floats:
    """Sums per arm (rows: control, treatment) and stratum."""
    return np.bincount(strata + count * treated, values, 2 * count).reshape(2, count).astype(np.float64)


def _adjusted(
    strata: NDArray[np.int64],
    treated: NDArray[np.bool_],
    totals: Floats,
    counts: Floats,
    covariate: Floats,
    count: int,
) -> tuple[float, Floats]:
    """The covariate's coefficient, and totals without what it explains. Unknown covariates stand for none."""
    known = np.isfinite(covariate)
    offset = float(np.average(covariate[known], weights=counts[known])) if known.any() else 0.0
    centred = np.where(known, covariate - offset, 0.0)
    group = strata + count * treated
    weight = np.bincount(group, counts, 2 * count)
    with np.errstate(divide="ignore", invalid="ignore"):
        means = [
            np.nan_to_num(np.bincount(group, side, 2 * count) / weight) for side in (totals, centred * counts)
        ]
    within = centred - means[1][group]
    spread = float(np.sum(counts * within**2))
    theta = float(np.sum(within * (totals - counts * means[0][group]))) / spread if spread > 0 else 0.0
    return theta, totals - theta * counts * centred


def _pooled(
    strata: NDArray[np.int64], treated: NDArray[np.bool_], residuals: Floats, count: int
) -> tuple[float, float]:
    """Variance of an entry with both arms thrown together, and how many entries of the smaller arm it rests
    on: (sum e^2)^2 / sum e^4 of them all, times the smaller arm's share. k rare events among many units count
    as k."""
    square = residuals**2
    largest = float(square.max(initial=0.0))
    # As shares of the largest: the squares of squares of large values are beyond what a float holds.
    shares = square / largest if 0 < largest < math.inf else np.zeros_like(square)
    everybody = float(shares.sum()) ** 2 / float(shares @ shares) if shares.any() else 0.0
    smaller = min(int(treated.sum()), int((~treated).sum())) / max(1, treated.size)
    return float(square.mean()) if square.size else 0.0, everybody * smaller
