"""Experiments whose truth is known, simulated unit by unit and put through the functions that results and
verdicts use (`services.analytics.lifts`, `quantile_lifts`): false positives under peeking, power at the
planned size, coverage of every interval. Each is told its seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from services.analytics.lifts import lift
from services.analytics.planning import Question, plan
from services.analytics.quantile_lifts import compared_quantiles
from services.analytics.statistics import group_sequential, power
from services.analytics.statistics.boundaries import normal_mixture
from services.analytics.statistics.fixed_horizon import tail_probability
from services.analytics.statistics.proportions import two_proportion_z_test
from services.analytics.statistics.stratified import FEWEST_CONTRIBUTING, FEWEST_UNITS, Cells
from services.analytics.trial_queries import LATENCY_BASE, Histogram

Floats = NDArray[np.float64]

ALPHA, LOOKS = 0.05, 20


@dataclass(frozen=True, slots=True)
class World:
    """Draws `n` units an arm: sums, counts and perhaps a covariate, an entry per unit. `absolute` and
    `relative` are the true effects."""

    name: str
    draw: Callable[[np.random.Generator, int], Cells]
    absolute: float
    relative: float


@dataclass(frozen=True, slots=True)
class FalsePositives:
    """Shares of A/A runs in which something was found: by the deciding method, by a fixed-horizon test read
    at every look, and by it at the last look only."""

    deciding: float
    naive: float
    fixed: float


@dataclass(frozen=True, slots=True)
class Coverage:
    """Shares of runs in which the truth lay inside: fixed-horizon at one look, sequences at all looks at
    once."""

    fixed: float
    relative: float
    sequence: float
    relative_sequence: float


def cells(
    control: Sequence[Floats], treatment: Sequence[Floats], covariates: Sequence[Floats] | None = None
) -> Cells:
    """Of two arms given as (totals, counts); units of both alternate, so that the first 2k entries are k an
    arm."""
    n = control[0].size

    def woven(one: Floats, other: Floats) -> Floats:
        both = np.empty(2 * n)
        both[0::2], both[1::2] = one, other
        return both

    return Cells(
        units=np.arange(2 * n, dtype=np.uint64),
        arms=np.tile(np.array([0, 1]), n),
        strata=np.zeros(2 * n, dtype=np.int64),
        totals=woven(control[0], treatment[0]),
        counts=woven(control[1], treatment[1]),
        covariate=None if covariates is None else woven(covariates[0], covariates[1]),
    )


def shares(base: float, treated: float) -> World:
    """Zeros and ones."""

    def draw(rng: np.random.Generator, n: int) -> Cells:
        sides = [(rng.random(n) < p).astype(np.float64) for p in (base, treated)]
        return cells([sides[0], np.ones(n)], [sides[1], np.ones(n)])

    return World(f"share, {base:g} and {treated:g}", draw, treated - base, treated / base - 1)


def means(lift_: float = 0.0) -> World:
    """Log-normal values, skewed as money is."""

    def draw(rng: np.random.Generator, n: int) -> Cells:
        sides = [rng.lognormal(0.0, 1.0, n) * factor for factor in (1.0, 1 + lift_)]
        return cells([sides[0], np.ones(n)], [sides[1], np.ones(n)])

    mean = math.exp(0.5)
    return World(f"skewed mean, lift {lift_:g}", draw, mean * lift_, lift_)


def ratios(lift_: float = 0.0) -> World:
    """Clicks of views: a unit has several views, and some units click more."""

    def draw(rng: np.random.Generator, n: int) -> Cells:
        sides = []
        for factor in (1.0, 1 + lift_):
            views = rng.poisson(4.0, n) + 1
            own = rng.beta(2.0, 18.0, n) * factor
            sides.append([rng.binomial(views, own).astype(np.float64), views.astype(np.float64)])
        return cells(sides[0], sides[1])

    return World(f"ratio of sums, lift {lift_:g}", draw, 0.1 * lift_, lift_)


def adjusted(lift_: float = 0.0) -> World:
    """A mean with a covariate from before that explains three quarters of it."""

    def draw(rng: np.random.Generator, n: int) -> Cells:
        sides, before = [], []
        for factor in (0.0, lift_):
            known = rng.gamma(2.0, 3.0, n)
            sides.append([0.8 * known + rng.normal(1.0, 2.0, n) + factor * 5.8, np.ones(n)])
            before.append(known)
        return cells(sides[0], sides[1], before)

    return World(f"mean adjusted by a covariate, lift {lift_:g}", draw, 5.8 * lift_, lift_)


@dataclass(frozen=True, slots=True)
class Look:
    """What `lift` says of `units` an arm, in a fraction of its time: tests hold both against each other.
    `radius` times the standard error is the sequence's half width."""

    units: int
    means: tuple[float, float]
    std_error: float
    radius: float
    p_value: float

    def outside(self, truth: float) -> bool:
        """Whether the sequence of the difference excludes it."""
        return abs(self.means[1] - self.means[0] - truth) > self.radius * self.std_error


def sizes_of(units: int, looks: int) -> list[int]:
    """Units an arm at each look, the first at 100 or later."""
    found: list[int] = np.unique(np.linspace(max(100, units // looks), units, looks).astype(int)).tolist()
    return found


@cache
def _radius(units: int, tuning: float) -> float:
    size = 2.0 * units
    return normal_mixture(size, ALPHA / 2, v_opt=tuning, one_sided=True) / math.sqrt(size)


def look_at(seen: Cells, units: int, tuning: float) -> Look:
    """One stratum, no covariate, arms of equal size."""
    arms = []
    for arm in (0, 1):
        totals, counts = seen.totals[arm : 2 * units : 2], seen.counts[arm : 2 * units : 2]
        weight = float(counts.sum())
        mean = float(totals.sum()) / weight
        square = (totals - mean * counts) ** 2
        arms.append((mean, weight, float(square.sum()), float(square @ square)))
    (m0, w0, q0, f0), (m1, w1, q1, f1) = arms
    own = q0 / w0**2 + q1 / w1**2
    even = (q0 + q1) / (2 * units) / ((w0 + w1) / (2 * units)) ** 2 * 2 / units
    error = math.sqrt(max(own, even) * 2 * units / (2 * units - 1))
    normal = error > 0 and (q0 + q1) ** 2 / (f0 + f1) / 2 >= FEWEST_CONTRIBUTING
    once = w0 == w1 == units
    totals = seen.totals[: 2 * units]
    if once and bool(np.all((totals == 0) | (totals == 1))):
        p_value = two_proportion_z_test((m0 * units, units), (m1 * units, units)).p_value
    elif once:
        a, b = (q / (units - 1) / units for q in (q0, q1))
        freedom = (a + b) ** 2 / (a * a + b * b) * (units - 1)
        p_value = tail_probability((m1 - m0) / math.sqrt(a + b), freedom, "two-sided")
    else:
        p_value = tail_probability((m1 - m0) / error, 2 * units - 2, "two-sided")
    radius = _radius(units, tuning) if normal else math.inf
    return Look(units, (m0, m1), error, radius, p_value)


def false_positives(world: World, *, runs: int, units: int, seed: int) -> FalsePositives:
    """Of a world without an effect and without a covariate."""
    rng = np.random.default_rng(seed)
    deciding = naive = fixed = 0
    for _ in range(runs):
        whole = world.draw(rng, units)
        found = [look_at(whole, size, 2.0 * units) for size in sizes_of(units, LOOKS)]
        deciding += any(one.outside(0.0) for one in found)
        naive += any(one.p_value < ALPHA for one in found)
        fixed += found[-1].p_value < ALPHA
    return FalsePositives(deciding / runs, naive / runs, fixed / runs)


def coverage(world: World, *, runs: int, units: int, seed: int, looks: int = LOOKS) -> Coverage:
    """Fixed-horizon intervals at the last look, sequences at every look."""
    rng = np.random.default_rng(seed)
    hits = np.zeros(4)
    for _ in range(runs):
        whole = world.draw(rng, units)
        always = [True, True]
        for size in sizes_of(units, looks):
            found = lift(_first(whole, size), alpha=ALPHA, tuning=2.0 * units)
            if found is None:
                continue
            always[0] &= _inside(found.sequence.interval, world.absolute)
            always[1] &= _inside(found.sequence.relative_interval, world.relative)
            if size == units:
                fixed = found.fixed
                hits[:2] += [
                    _inside(fixed.interval, world.absolute),
                    _inside(fixed.relative_interval, world.relative),
                ]
        hits[2:] += always
    return Coverage(*(hits / runs).tolist())


def _first(seen: Cells, units: int) -> Cells:
    return seen.where(np.arange(seen.units.size) < 2 * units)


def quantile_coverage(
    share: float, *, runs: int, units: int, seed: int, looks: int = LOOKS
) -> tuple[float, float]:
    """Of the difference of a quantile of log-normal latencies, the treatment 10% slower: fixed-horizon at the
    last look, and the exact sequence at every look."""
    rng = np.random.default_rng(seed)
    base = math.exp(3 + 0.5 * float(stats.norm.ppf(share)))
    truth = 0.1 * base
    fixed = always = 0
    for _ in range(runs):
        sides = [np.exp(rng.normal(3.0, 0.5, units)) * factor for factor in (1.0, 1.1)]
        held, last = True, None
        for size in np.linspace(units // looks, units, looks).astype(int).tolist():
            pair = [_histogram(side[:size]) for side in sides]
            (found,) = compared_quantiles({(0, 0): pair[0], (0, 1): pair[1]}, 1, (share,), ALPHA)
            low, high = found["always_valid_interval"]
            held &= low <= truth <= high
            last = found["fixed_horizon_interval"]
        always += held
        fixed += _inside(last, truth)
    return fixed / runs, always / runs


def fixed_power(*, runs: int, seed: int) -> list[tuple[str, int, float]]:
    """(method, units an arm, share of runs that find the planned effect) at sizes planned for 80%."""
    rng = np.random.default_rng(seed)
    n = plan(Question("proportion", 0.2, 0.05, sequential=False))["units_per_variant"]
    left, right = rng.binomial(n, 0.2, runs), rng.binomial(n, 0.25, runs)
    found = np.mean(
        [
            two_proportion_z_test((a, n), (b, n)).p_value < ALPHA
            for a, b in zip(left.tolist(), right.tolist(), strict=True)
        ]
    )
    size = math.ceil(power.sample_size_mean(0.2, 1.0))
    a, b = rng.normal(0.0, 1.0, (runs, size)), rng.normal(0.2, 1.0, (runs, size))
    p_values = stats.ttest_ind(b, a, axis=1, equal_var=False).pvalue
    return [
        ("two-proportion z-test, 20% to 25%", n, float(found)),
        ("Welch's t-test, 0.2 standard deviations", size, float(np.mean(p_values < ALPHA))),
    ]


def sequential_power(*, runs: int, seed: int) -> tuple[int, float]:
    """Units an arm that `plan` names for looking all the time, and the share of runs that find 20% to 25% by
    then, looked at 50 times."""
    n = plan(Question("proportion", 0.2, 0.05))["always_valid"]["at_most"]["units_per_variant"]
    fixed_size = plan(Question("proportion", 0.2, 0.05, sequential=False))["units_per_variant"]
    rng = np.random.default_rng(seed)
    world = shares(0.2, 0.25)
    found = 0
    for _ in range(runs):
        whole = world.draw(rng, n)
        for size in np.linspace(n // 50, n, 50).astype(int).tolist():
            one = look_at(whole, size, 2.0 * fixed_size)
            if size >= FEWEST_UNITS and one.outside(0.0) and one.means[1] > one.means[0]:
                found += 1
                break
    return n, found / runs


def planned_looks(
    name: str, *, runs: int, seed: int, looks: int = 5, factor: float = 1.0
) -> tuple[float, float]:
    """False positives, and power at `factor` times the fixed-horizon size, of group-sequential bounds."""
    spending = {
        "O'Brien-Fleming": group_sequential.obrien_fleming_spending,
        "Pocock": group_sequential.pocock_spending,
    }[name]
    times = np.arange(1, looks + 1) / looks
    limits = np.array(group_sequential.bounds(times.tolist(), alpha=ALPHA, spending=spending))
    rng = np.random.default_rng(seed)
    walks = np.cumsum(rng.standard_normal((runs, looks)) / math.sqrt(looks), axis=1) / np.sqrt(times)
    drift = float(stats.norm.isf(ALPHA / 2) + stats.norm.ppf(0.8)) * np.sqrt(factor * times)
    return tuple(float(np.mean(np.any(np.abs(walks + d) >= limits, axis=1))) for d in (0.0, drift))  # type: ignore[return-value] # two


def _histogram(values: Floats) -> Histogram:
    buckets = np.ceil(np.log(values) / math.log(LATENCY_BASE)).astype(np.int64)
    found, counts = np.unique(buckets, return_counts=True)
    return Histogram(found, counts.astype(np.float64))


def _inside(interval: tuple[float, float] | None, truth: float) -> bool:
    """An interval that is not given has no limits."""
    return interval is None or interval[0] <= truth <= interval[1]
