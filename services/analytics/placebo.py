"""Placebos: halves of one control that nothing tells apart, judged as real arms are. What they cross is
false.

A salt divides the units of a control by a coin of their hash. Of K salts about the error budget's share may
ever be told apart by the method that decides, however often one looks; a fixed-horizon test looked at as
often is counted beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.analytics.statistics.bets import RandomisedCounts, Side, randomised_share
from services.analytics.statistics.stratified import FEWEST_CONTRIBUTING, FEWEST_UNITS, Cells, log_of_score

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

SALTS = 100
ALPHA = 0.05
#: Later units than so many are left out: what has come so far decides nothing any more.
MOST_UNITS = 20_000

_NAIVE = 1.959963984540054


@dataclass(frozen=True, slots=True)
class ControlUnits:
    """Units of one control: whether the first request of each failed, and what they did in a mean's cells."""

    units: NDArray[np.uint64]
    failed: NDArray[np.bool_]
    cells: Cells


@dataclass(frozen=True, slots=True)
class Crossings:
    """Which salts one look tells apart: by the method that decides, and by a z-test that holds at one look
    only."""

    decided: Flags
    naive: Flags


def halves(units: NDArray[np.uint64], salts: int = SALTS) -> NDArray[np.float32]:
    """+1 or -1 for every salt and unit, shape (salts, units): bits of the unit's hash mixed with a number per
    64 salts (the finalizer of SplitMix64: Steele, Lea & Flood, OOPSLA 2014)."""
    columns = []
    for word in range((salts + 63) // 64):
        mixed = units + np.uint64(((word + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        columns.append(np.unpackbits(mixed.view(np.uint8).reshape(-1, 8), axis=1))
    bits = np.concatenate(columns, axis=1)[:, :salts].T
    return bits.astype(np.float32) * 2 - 1


def crossings(control: ControlUnits, *, salts: int = SALTS, alpha: float = ALPHA) -> Crossings:
    """One look at all salts. The budget is shared by the error rate, by exact betting on first requests, and
    the mean of the cells, by the asymptotic mixture from 100 units a half; half of each share on either
    side."""
    threshold = math.log(4 / alpha)
    decided, naive = np.zeros(salts, dtype=np.bool_), np.zeros(salts, dtype=np.bool_)
    if control.units.size:
        signs = halves(control.units, salts)
        # Whole numbers below 2^24, which single precision holds.
        gaps = [signs @ column for column in (control.failed.astype(np.float32), np.ones_like(signs[0]))]
        totals = (float(control.failed.sum()), float(control.units.size))
        events, units = (
            [(total - gap.astype(np.float64)) / 2, (total + gap.astype(np.float64)) / 2]
            for total, gap in zip(totals, gaps, strict=True)
        )
        counts = RandomisedCounts(
            np.array([0.5]), units[0][:, None], events[0][:, None], units[1][:, None], events[1][:, None]
        )
        both: tuple[Side, Side] = ("above", "below")
        for side in both:
            decided |= randomised_share(counts, 0.0, side) >= threshold
        pooled = float(control.failed.mean())
        both_have = (units[0] > 0) & (units[1] > 0)  # of a half without a unit nothing can be told
        left, right = (np.where(both_have, half, 1.0) for half in units)
        spread = np.sqrt(max(1e-300, pooled * (1 - pooled)) * (1 / left + 1 / right))
        naive |= both_have & (np.abs(events[1] / right - events[0] / left) > _NAIVE * spread)
    size, scores, contributing = _scores(control.cells, salts)
    naive |= np.abs(scores) > _NAIVE
    if size >= 2 * FEWEST_UNITS and contributing >= FEWEST_CONTRIBUTING:
        for place, score in enumerate(np.abs(scores).tolist()):
            decided[place] |= log_of_score(score, size) >= threshold
    return Crossings(decided, naive)


def _scores(cells: Cells, salts: int) -> tuple[int, Floats, float]:
    """How many units there are with the z-score of every salt, and how many units of a half the variance
    rests on. Units are weighed by what they differ from the mean of their strata."""
    if not cells.units.size:
        return 0, np.zeros(salts), 0.0
    _, strata = np.unique(cells.strata, return_inverse=True)
    weight = np.bincount(strata, cells.counts)
    means = np.bincount(strata, cells.totals) / np.maximum(weight, 1e-300)
    owners, place = np.unique(cells.units, return_inverse=True)
    unusual = np.bincount(place, cells.totals - cells.counts * means[strata])
    square = float(unusual @ unusual)
    if square <= 0:
        return 0, np.zeros(salts), 0.0
    contributing = square**2 / float(np.sum(unusual**4)) / 2
    scores = halves(owners, salts) @ unusual.astype(np.float32) / math.sqrt(square)
    return int(owners.size), scores.astype(np.float64), contributing
