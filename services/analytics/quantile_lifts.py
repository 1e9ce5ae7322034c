"""Quantiles of two arms of a trial, for people. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from services.analytics.quantile_evidence import QuantileEvidence
from services.analytics.trial_queries import LATENCY_BASE, Histogram
from services.analytics.trial_strata import BEFORE

Json = dict[str, Any]
#: By (stratum, arm).
Histograms = Mapping[tuple[int, int], Histogram]


def compared_quantiles(
    histograms: Histograms, place: int, shares: Sequence[float], alpha: float
) -> list[Json]:
    """Quantiles of units' values in both arms, with the exact always-valid interval of their difference and
    the fixed-horizon one from order statistics of each arm."""
    strata = sorted({stratum for stratum, _ in histograms if stratum < BEFORE})
    pairs = [
        (histograms[stratum, 0], histograms[stratum, place])
        for stratum in strata
        if (stratum, 0) in histograms and (stratum, place) in histograms
    ]
    if not pairs:
        return []
    shown = []
    for share in shares:
        found = QuantileEvidence(pairs, share)
        fixed = _order_statistics(pairs, share, alpha)
        shown.append(
            {
                "quantile": share,
                "control": found.control_value,
                "value": found.value,
                "difference": found.value - found.control_value,
                "relative_difference": found.value / found.control_value - 1 if found.control_value else None,
                "fixed_horizon_interval": fixed,
                "always_valid_interval": found.limits(alpha / 2),
                "units": found.units,
                "control_units": found.control_units,
            }
        )
    return shown


def _order_statistics(
    pairs: Sequence[tuple[Histogram, Histogram]], share: float, alpha: float
) -> tuple[float, float] | None:
    """Of the difference: both arms' distribution-free intervals, their half widths added in squares
    (MOVER)."""
    limits = []
    for arm in (0, 1):
        joined: dict[int, float] = {}
        for pair in pairs:
            for bucket, units in zip(pair[arm].buckets.tolist(), pair[arm].units.tolist(), strict=True):
                joined[bucket] = joined.get(bucket, 0.0) + units
        buckets = np.array(sorted(joined))
        below = np.cumsum([joined[bucket] for bucket in buckets.tolist()])
        n = float(below[-1])
        if n < 2:
            return None
        spread = float(stats.norm.isf(alpha / 2)) * math.sqrt(share * (1 - share) / n)
        if share + spread >= 1 or share - spread <= 0:
            return None
        places = [int(np.searchsorted(below, n * s)) for s in (share - spread, share, share + spread)]
        limits.append([LATENCY_BASE ** float(buckets[min(place, buckets.size - 1)]) for place in places])
    (low_c, mid_c, high_c), (low_t, mid_t, high_t) = limits
    gap = mid_t - mid_c
    return gap - math.hypot(mid_t - low_t, high_c - mid_c), gap + math.hypot(high_t - mid_t, mid_c - low_c)
