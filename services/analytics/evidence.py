"""What the units of a trial prove about its arms. Pure; everything here holds whenever and however often one
looks.

The error budget alpha of a trial is shared equally by its statements, one per metric and arm other than the
control; of a statement's share, half guards against saying that the arm is worse than it is, half against
saying that it is better. "Harmful", "safe" and "better" are bounds on one difference, so they need no shares
of their own: each is wrong only if the difference lies beyond the confidence sequence on that side. A
statement may rest on several pieces of evidence, each with a fixed weight: a piece proves it at its weight
times the share (a union bound), so no piece has to be chosen by looking at the data.

- Error rates, `_FIRST`: every unit's first request in the trial, by betting (`statistics.bets`), exact from
  the first unit on. Later requests of a unit are no independent draws: a user whose requests always fail
  would condemn whatever version chance gave them.
- `_PERIODS`: the same in each period on its own (five minutes, later longer), the g-th with 1 / (g (g + 1))
  of the weight: finds a version that breaks after everybody has been seen.
- `_BOUNDED`: means of values in a known range, by the same bets on every unit's first value.
- `_ALL`: all requests, clustered by unit (`statistics.stratified`), asymptotically, from 100 units an arm.
  The only piece that other metrics have while weights divide the traffic. Quantiles: exact per unit
  (`bets.two_quantiles`).
- `_BAKE`: what came once the arm had all traffic against the control's last time. Nothing randomises that: it
  assumes that the world stayed, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from headrace.v1.trials_pb2 import Evidence, Trial, TrialMetric

from services.analytics.pieces import Numbers, Piece
from services.analytics.quantile_evidence import QuantileEvidence
from services.analytics.shadow_evidence import SHADOW_METRICS, of_shadow
from services.analytics.shadow_totals import ShadowTotals
from services.analytics.statistics import bets
from services.analytics.statistics.bets import RandomisedCounts, Side
from services.analytics.statistics.stratified import (
    TUNINGS,
    Cells,
    StratifiedEffect,
    half_width,
    log_evidence,
    stratified_effect,
)
from services.analytics.trial_queries import Bounded, Histogram, Tally, Visits
from services.analytics.trial_strata import BAKE, BEFORE, Strata
from services.analytics.trial_values import is_bounded

_FIRST, _PERIODS, _ALL = 0.5, 0.2, 0.2
#: Of rollouts only: their experiments end with no bake.
_BAKE = 0.1
#: Of metrics whose values lie in a known range.
_BOUNDED = 0.2

_NOTHING = np.zeros(0)
_NO_CELLS = Cells(
    _NOTHING.astype(np.uint64), _NOTHING.astype(np.int64), _NOTHING.astype(np.int64), _NOTHING, _NOTHING
)


@dataclass(frozen=True, slots=True)
class Observed:
    """What a trial's units did: by metric name cells, or of metrics with a quantile histograms by (stratum,
    arm)."""

    strata: Strata
    visits: Visits
    cells: dict[str, Cells] = field(default_factory=dict)
    histograms: dict[str, dict[tuple[int, int], Histogram]] = field(default_factory=dict)
    shadows: ShadowTotals = field(default_factory=ShadowTotals)
    #: By metric name, of those whose values lie in a known range.
    bounded: dict[str, Bounded] = field(default_factory=dict)


def metric_key(metric: TrialMetric) -> str:
    """Tells a metric's statements apart: its mean and its quantiles are several."""
    return f"{metric.name}:p{metric.quantile * 100:g}" if metric.quantile else metric.name


def statement_alpha(trial: Trial) -> float:
    """The share of the error budget that every statement of the trial has."""
    return trial.alpha / max(1, len(trial.metrics) * (len(trial.arms) - 1))


def weigh(trial: Trial, observed: Observed) -> list[Evidence]:
    """One per metric and arm other than the control. `log_e_*` are of this moment, at least 0, and `finding`
    is open: `verdicts.settle` decides by the largest ever seen. Infinite limits: nothing is known yet."""
    found = []
    for metric in trial.metrics:
        for arm in range(1, len(trial.arms)):
            if metric.name in SHADOW_METRICS:
                if trial.arms[arm].version == trial.shadow_version:
                    numbers, pieces = of_shadow(metric, observed.shadows)
                else:
                    numbers, pieces = Numbers(), []
            elif metric.quantile:
                numbers, pieces = _of_quantile(trial, metric, arm, observed)
            else:
                numbers, pieces = _of_mean(trial, metric, arm, observed)
            found.append(_statement(trial, metric, arm, numbers, pieces))
    return found


def _statement(
    trial: Trial, metric: TrialMetric, arm: int, numbers: Numbers, pieces: Sequence[Piece]
) -> Evidence:
    alpha = statement_alpha(trial)
    relative, more = metric.margin_is_relative, metric.direction == TrialMetric.DIRECTION_INCREASE
    margin = -metric.margin if more else metric.margin
    worse: Side = "below" if more else "above"
    other: Side = "above" if more else "below"

    def largest(bound: float, side: Side, *, relative: bool) -> float:
        return max(
            (math.log(piece.weight) + piece.wealth(bound, side, relative) for piece in pieces), default=0.0
        )

    low, high = -math.inf, math.inf
    for piece in pieces:
        if piece.limits is not None:
            limits = piece.limits(alpha / 2 * piece.weight)
            low, high = max(low, limits[0]), min(high, limits[1])
    return Evidence(
        metric=metric_key(metric),
        role=metric.role,
        arm=trial.arms[arm].name,
        control_units=numbers.control_units,
        units=numbers.units,
        control_mean=numbers.control_mean,
        mean=numbers.mean,
        estimate=numbers.estimate,
        low=min(low, numbers.estimate),
        high=max(high, numbers.estimate),
        alpha=alpha,
        log_e_harm=max(0.0, largest(margin, worse, relative=relative)),
        log_e_safe=max(0.0, largest(margin, other, relative=relative)),
        log_e_better=max(0.0, largest(0.0, other, relative=False)),
        finding=Evidence.FINDING_UNDECIDED,
        method="; ".join(piece.name for piece in pieces) or "nothing to weigh yet",
    )


def _of_mean(trial: Trial, metric: TrialMetric, arm: int, observed: Observed) -> tuple[Numbers, list[Piece]]:
    baking = trial.kind == Trial.KIND_ROLLOUT
    cells = observed.cells.get(metric.name, _NO_CELLS)
    chosen = cells.where((cells.arms == 0) | (cells.arms == arm))
    randomised = chosen.where(chosen.strata < BEFORE)
    pieces = []
    all_share = 1.0 - (_BAKE if baking else 0.0)
    if metric.name == "error_rate":
        pieces += _exact(observed, arm)
        all_share = _ALL
    if is_bounded(metric):
        pieces += _exact_mean(metric, arm, observed)
        all_share -= _BOUNDED
    tunings = (2.0 * trial.planned_units,) if trial.planned_units else TUNINGS
    effect = stratified_effect(randomised)
    if effect is not None:
        how = "asymptotic confidence sequence over strata of weights, clustered by unit"
        pieces.append(_asymptotic(how, all_share, randomised, effect, tunings))
    after = _bake_cells(chosen, observed.strata.last) if baking else None
    baked = stratified_effect(after) if after is not None else None
    if after is not None and baked is not None:
        how = "all traffic against the control's last time (not randomised: assumes that the world stays)"
        if metric.name == "error_rate":
            pieces.append(_baked_share(how, observed.visits, arm))
        else:
            pieces.append(_asymptotic(how, _BAKE, after, baked, tunings))
    shown = effect or baked
    if shown is None:
        return Numbers(), pieces
    return (
        Numbers(shown.control_units, shown.units, shown.control_mean, shown.mean, shown.estimate),
        pieces,
    )


def _asymptotic(
    name: str, weight: float, cells: Cells, effect: StratifiedEffect, tunings: Sequence[float]
) -> Piece:
    @cache
    def against(ratio: float) -> StratifiedEffect | None:
        return stratified_effect(cells.scaled_control(ratio))

    # A share of a control below zero is a share of its size: the bound stays on the side it is meant for.
    sign = -1.0 if effect.control_mean < 0 else 1.0

    def wealth(bound: float, side: Side, relative: bool) -> float:
        found = against(1 + sign * bound) if relative else effect
        if found is None:
            return -math.inf
        return log_evidence(found, 0.0 if relative else bound, above=side == "above", tunings=tunings)

    def limits(alpha: float) -> tuple[float, float]:
        half = half_width(effect, alpha, tunings=tunings)
        return effect.estimate - half, effect.estimate + half

    return Piece(name, weight, wealth, limits)


def _exact(observed: Observed, arm: int) -> list[Piece]:
    """Bets on the first request of every unit, and of every unit in each period."""
    shares, first = observed.strata.share(arm), observed.visits.first
    known = np.isfinite(shares)
    once = RandomisedCounts(
        shares[known],
        first.units[known, 0],
        first.failed[known, 0],
        first.units[known, arm],
        first.failed[known, arm],
    )

    def wealth(bound: float, side: Side, relative: bool) -> float:
        return float(bets.randomised_share(once, bound, side, relative=relative))

    def limits(alpha: float) -> tuple[float, float]:
        sides: tuple[Side, Side] = ("above", "below")
        low, high = (
            bets.confidence_limit(lambda bound: wealth(bound, side, False), side, alpha, -1.0, 1.0)  # noqa: B023
            for side in sides
        )
        return low, high

    periods = _period_counts(observed, arm)

    def wealth_of_periods(bound: float, side: Side, relative: bool) -> float:
        best = -math.inf
        for number, counts in periods:
            found = float(bets.randomised_share(counts, bound, side, relative=relative))
            best = max(best, found - math.log(number * (number + 1)))
        return best

    return [
        Piece("exact betting on each unit's first request", _FIRST, wealth, limits),
        Piece("the same in each period", _PERIODS, wealth_of_periods),
    ]


def _exact_mean(metric: TrialMetric, arm: int, observed: Observed) -> list[Piece]:
    """Bets on the first value of every unit as a share of the range. A bet on an event may be made in part:
    the wealth of betting on x of it is no more than x of the wealth, as logarithms are concave."""
    found = observed.bounded.get(metric.name)
    if found is None:
        return []
    shares, span = observed.strata.share(arm), metric.high - metric.low
    known = np.isfinite(shares)
    once = RandomisedCounts(
        shares[known],
        found.units[known, 0],
        found.shares[known, 0],
        found.units[known, arm],
        found.shares[known, arm],
    )

    def wealth(bound: float, side: Side, relative: bool) -> float:
        if relative and metric.low:
            return -math.inf  # a share of the value is none of what lies above the range's low end
        scaled = bound if relative else bound / span
        if abs(scaled) >= 1:
            return 0.0  # as far apart as the ends of the range
        return float(bets.randomised_share(once, scaled, side, relative=relative))

    def limits(alpha: float) -> tuple[float, float]:
        sides: tuple[Side, Side] = ("above", "below")
        low, high = (
            bets.confidence_limit(
                lambda bound: wealth(bound * span, side, False),  # noqa: B023 - called before the next one
                side, alpha, -0.999, 0.999,
            ) * span
            for side in sides
        )  # fmt: skip
        return low, high

    name = f"exact betting on each unit's first value in {metric.low:g} to {metric.high:g}"
    return [Piece(name, _BOUNDED, wealth, limits)]


def _period_counts(observed: Observed, arm: int) -> list[tuple[int, RandomisedCounts]]:
    shares = observed.strata.share(arm)
    found = []
    for number, (stratum, tally) in enumerate(observed.visits.periods, start=1):
        if not math.isfinite(shares[stratum]):
            continue
        counts = RandomisedCounts(
            shares[stratum : stratum + 1],
            tally.units[:1],
            tally.failed[:1],
            tally.units[arm : arm + 1],
            tally.failed[arm : arm + 1],
        )
        found.append((number, counts))
    return found


def _baked_share(name: str, visits: Visits, arm: int) -> Piece:
    def counted(tally: Tally, place: int) -> tuple[float, float]:
        return float(tally.failed[place]), float(tally.units[place])

    control = counted(visits.before, 0)
    treatment = counted(visits.bake, arm)

    def wealth(bound: float, side: Side, relative: bool) -> float:
        return bets.two_shares(control, treatment, bound, side, relative=relative)

    return Piece(name, _BAKE, wealth)


def _bake_cells(cells: Cells, last: int) -> Cells | None:
    """The arm's cells of the bake beside the control's of its last stratum, as one stratum."""
    baked = cells.strata == BAKE
    if not np.any(baked & (cells.arms > 0)):
        return None
    both = cells.where(baked | (np.isin(cells.strata, (last, BEFORE)) & (cells.arms == 0)))
    return Cells(both.units, both.arms, np.zeros_like(both.strata), both.totals, both.counts, both.covariate)


def _of_quantile(
    trial: Trial, metric: TrialMetric, arm: int, observed: Observed
) -> tuple[Numbers, list[Piece]]:
    baking = trial.kind == Trial.KIND_ROLLOUT
    by_place = observed.histograms.get(metric_key(metric), {})
    strata = sorted({stratum for stratum, _ in by_place if stratum < BEFORE})
    pairs = [
        (by_place[stratum, 0], by_place[stratum, arm])
        for stratum in strata
        if (stratum, 0) in by_place and (stratum, arm) in by_place
    ]
    pieces, shown = [], None
    if pairs:
        shown = QuantileEvidence(pairs, metric.quantile)
        weight = 1.0 - (_BAKE if baking else 0.0)
        name = "exact betting on the shares of units' values above a quantile, per stratum of weights"
        pieces.append(Piece(name, weight, shown.wealth, shown.limits))
    before = by_place.get((observed.strata.last, 0)) or by_place.get((BEFORE, 0))
    after = by_place.get((BAKE, arm))
    if baking and before is not None and after is not None:
        baked = QuantileEvidence([(before, after)], metric.quantile)
        name = "all traffic against the control's last time (not randomised: assumes that the world stays)"
        pieces.append(Piece(name, _BAKE, baked.wealth))
        shown = shown or baked
    if shown is None:
        return Numbers(), pieces
    control, value = shown.control_value, shown.value
    return Numbers(shown.control_units, shown.units, control, value, value - control), pieces
