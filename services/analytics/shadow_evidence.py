"""What the answers of a shadow prove. Pure; exact, and right at every look."""

from __future__ import annotations

import math

import numpy as np
from headrace.v1.trials_pb2 import TrialMetric

from services.analytics.pieces import Numbers, Piece
from services.analytics.shadow_totals import ShadowTotals
from services.analytics.shadow_units import DIFFERENT, ONLY_SHADOW_FAILED, ONLY_VERSION_FAILED
from services.analytics.statistics import bets
from services.analytics.statistics.bets import RandomisedCounts, Side

SHADOW_METRICS = ("shadow_disagreement", "shadow_error_rate")


def of_shadow(metric: TrialMetric, totals: ShadowTotals) -> tuple[Numbers, list[Piece]]:
    """The first request of every unit that both versions answered; copies are sent for a random share of
    requests. The means are of all requests."""
    if not totals.requests:
        return Numbers(), []
    whose, weight = _whose(totals), totals.units.weight
    if metric.name == "shadow_error_rate":
        return _of_shadow_errors(totals, whose, weight)
    n, different = _firsts(totals, DIFFERENT, totals.requests - totals.equal)
    share = (totals.requests - totals.equal) / totals.requests

    def wealth(bound: float, side: Side, relative: bool) -> float:
        return bets.share(different, n, min(1.0, max(0.0, bound)), side)

    def limits(alpha: float) -> tuple[float, float]:
        low = bets.confidence_limit(lambda p: wealth(p, "above", False), "above", alpha, 0.0, 1.0)
        high = bets.confidence_limit(lambda p: wealth(p, "below", False), "below", alpha, 0.0, 1.0)
        return low, high

    name = f"exact betting on the share that the shadow answered differently of {whose}"
    numbers = Numbers(totals.requests, totals.requests, 0.0, share, share)
    return numbers, [Piece(name, weight, wealth, limits)]


def _whose(totals: ShadowTotals) -> str:
    """What is bet on, and what that assumes."""
    sample = totals.units
    if not len(sample.units):
        return "all requests (the log names no units: assumes that requests are independent)"
    told = f"the first request of each of {len(sample.units):,} units"
    if sample.level:
        told += f", a random {1 / 2**sample.level:.3g} of all"
    if sample.unnamed:
        told += f" ({sample.unnamed:,} requests name no unit and count as one each: assumes independence)"
    return told


def _firsts(totals: ShadowTotals, flag: int, otherwise: int) -> tuple[float, float]:
    """Units and those whose first request showed `flag`; where no units are known, requests and those of them
    (`otherwise`)."""
    sample = totals.units
    if not len(sample.units):
        return float(totals.requests), float(otherwise)
    return float(len(sample.units)), float(sample.firsts(flag))


def _of_shadow_errors(totals: ShadowTotals, whose: str, weight: float) -> tuple[Numbers, list[Piece]]:
    """Failures of the shadow alone against failures of the version alone, over requests that both were
    asked."""
    n, errors = _firsts(totals, ONLY_VERSION_FAILED, totals.only_errors)
    _, shadow_errors = _firsts(totals, ONLY_SHADOW_FAILED, totals.only_shadow_errors)
    # A fair coin's bet on a difference: half of the requests on either side, of which bounds are half as
    # large.
    pairs = RandomisedCounts(
        np.array([0.5]),
        np.array([n / 2]),
        np.array([errors]),
        np.array([n / 2]),
        np.array([shadow_errors]),
    )

    def wealth(bound: float, side: Side, relative: bool) -> float:
        # A share of the version's rate is less than as many points: beyond them it is beyond that as well,
        # while within them it need not be within that.
        if relative and (bound < 0 if side == "above" else bound > 0):
            return -math.inf
        return float(bets.randomised_share(pairs, 2 * bound, side))

    rates = [count / totals.requests for count in (totals.errors, totals.shadow_errors)]
    shown = Numbers(totals.requests, totals.requests, rates[0], rates[1], rates[1] - rates[0])
    return shown, [Piece(f"exact betting on what one of both failed of {whose}", weight, wealth)]
