"""A quantile of two arms from histograms per stratum of weights. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from services.analytics.statistics import bets
from services.analytics.statistics.bets import Side
from services.analytics.trial_queries import LATENCY_BASE, Histogram

Floats = NDArray[np.float64]

_LOG_BASE = math.log(LATENCY_BASE)
#: Halvings of the range that a limit is sought in.
_LIMIT_STEPS = 12


class QuantileEvidence:
    """What pairs (control, treatment) of histograms say about the difference of a quantile. A unit weighs the
    same however many values it has: the quantile is the place below which that share of a unit's values lies,
    on average over units. Values are rounded by 1%, against every claim."""

    def __init__(self, pairs: Sequence[tuple[Histogram, Histogram]], quantile: float) -> None:
        self._exceeding = 1 - quantile
        everything = np.concatenate([side.buckets for pair in pairs for side in pair])
        self._low, self._high = int(everything.min()) - 1, int(everything.max()) + 1
        width = self._high - self._low + 1
        self._above = [tuple(_above(side, self._low, width) for side in pair) for pair in pairs]
        self._units = [tuple(float(side.units.sum()) for side in pair) for pair in pairs]
        self.control_units, self.units = (round(sum(pair[arm] for pair in self._units)) for arm in (0, 1))
        self.control_value, self.value = (self._quantile(arm) for arm in (0, 1))

    def wealth(self, bound: float, side: Side, relative: bool) -> float:
        """Log wealth against "the treatment's quantile exceeds the control's by at most (`below`: at least)
        `bound`", in units of the values or as a share of the control's."""
        if relative and bound <= -1:
            return 0.0  # no value lies below nothing: there is nothing to bet on
        edges = self._edges(bound, relative)
        if side == "above":
            places, others = edges[1:], np.floor(self._moved(edges[:-1], bound, relative))
        else:
            places, others = edges[:-1], np.ceil(self._moved(edges[1:], bound, relative))
        treated = [(_at(pair[1], places, self._low), n[1]) for pair, n in self._both()]
        control = [(_at(pair[0], others, self._low), n[0]) for pair, n in self._both()]
        return bets.two_quantiles(treated, control, self._exceeding, side)

    def limits(self, alpha: float) -> tuple[float, float]:
        """Of the difference, on either side at `alpha`; infinite where nothing is excluded."""
        reach = LATENCY_BASE**self._high
        found = []
        sides: tuple[Side, Side] = ("above", "below")
        for side in sides:
            threshold, sign = math.log(1 / alpha), 1.0 if side == "above" else -1.0
            # From what is easily refuted towards the estimate and beyond it.
            nothing, refuted = sign * reach, -sign * reach
            if self.wealth(refuted, side, False) < threshold:
                found.append(refuted * math.inf)
                continue
            for _ in range(_LIMIT_STEPS):
                middle = (nothing + refuted) / 2
                if self.wealth(middle, side, False) < threshold:
                    nothing = middle
                else:
                    refuted = middle
            found.append(refuted)
        return found[0], found[1]

    def _both(self) -> list[tuple[tuple[Floats, ...], tuple[float, ...]]]:
        return list(zip(self._above, self._units, strict=True))

    def _edges(self, bound: float, relative: bool) -> Floats:
        """Places that the treatment's quantile may have: everywhere where either arm has values."""
        factor = abs(math.log1p(bound)) / _LOG_BASE if relative else 0.0
        reach = LATENCY_BASE**self._high + (0.0 if relative else abs(bound))
        high = max(self._high + math.ceil(factor), math.ceil(math.log(reach) / _LOG_BASE)) + 1
        return np.arange(self._low - math.ceil(factor) - 1, high + 1, dtype=np.float64)

    def _moved(self, edges: Floats, bound: float, relative: bool) -> Floats:
        """The control's place, as an edge, that goes with the treatment's under the null hypothesis."""
        if relative:
            return edges - math.log1p(bound) / _LOG_BASE
        with np.errstate(divide="ignore", invalid="ignore"):
            moved = np.log(np.exp(edges * _LOG_BASE) - bound) / _LOG_BASE
        return np.asarray(np.nan_to_num(np.where(np.isnan(moved), -1e9, moved), neginf=-1e9, posinf=1e9))

    def _quantile(self, arm: int) -> float:
        """Strata weighted alike in both arms, as means are."""
        total, weight = np.zeros_like(self._above[0][arm]), 0.0
        for pair, (control, treated) in self._both():
            overlap = control * treated / (control + treated)
            total += overlap * pair[arm] / (control, treated)[arm]
            weight += overlap
        place = int(np.argmax(total / weight <= self._exceeding + 1e-12))
        return float(LATENCY_BASE ** (self._low + place))


def _above(histogram: Histogram, low: int, width: int) -> Floats:
    """Units' shares of values above each edge."""
    counts = np.bincount(histogram.buckets - low, histogram.units, width)
    return np.asarray(counts.sum() - np.cumsum(counts))


def _at(above: Floats, edges: Floats, low: int) -> Floats:
    places = np.clip(edges - low, -1, above.size - 1).astype(np.int64)
    everybody = float(above[0])
    return np.where(places < 0, everybody, above[np.maximum(places, 0)])
