"""Does a difference fade, or grow, with the time that units have known it? People try out what is new, and
what is better may need to be learnt: the lift of units' first time in a trial is held against that of their
time after it. A warning for readers; no decision rests on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import duckdb
import numpy as np
from headrace.v1.trials_pb2 import TrialMetric

from services.analytics.statistics.stratified import Cells, stratified_effect
from services.analytics.trial_values import values_of

Json = dict[str, Any]

#: A unit's first time: a day, or a quarter of a run that is shorter than four.
_DAY_US: Final = 86_400_000_000
_PART: Final = 4
#: A change that chance alone makes so seldom is told. Results are looked at often, so it is a small share.
_LEVEL: Final = 0.001

_BY_TIME = """
SELECT unit_hash, arm, stratum, {counted},
       answered_at_us - first_us >= $first_us AS later
FROM ({values}) JOIN (SELECT unit_hash, min(answered_at_us) AS first_us FROM exposed GROUP BY unit_hash)
    USING (unit_hash)
WHERE value IS NOT NULL AND stratum < getvariable('undivided')
GROUP BY ALL
"""
_EACH = "sum(value) AS total, count(*)::DOUBLE AS n"
# What a unit did in that time altogether, nothing included.
_ALTOGETHER = "sum(value) AS total, 1::DOUBLE AS n"
_OR_ZERO = """
SELECT exposed.*, coalesce(given.value, 0) AS value FROM exposed LEFT JOIN (
    SELECT request_id, sum(number) AS value FROM outcomes WHERE metric = $metric GROUP BY request_id
) AS given USING (request_id)
"""


@dataclass(frozen=True, slots=True)
class Tenure:
    """What units did in their first `first_s` seconds in the trial, and after them."""

    first_s: float
    first: Cells
    later: Cells


def tenure(connection: duckdb.DuckDBPyConnection, metric: TrialMetric, ran_us: int) -> Tenure:
    """Of a trial that has run so long, after `open_trial`. Blocks."""
    first_us = min(_DAY_US, ran_us // _PART)
    values, given = values_of(metric)
    counted = _EACH
    if metric.missing_is_zero and "metric" in given:
        values, counted = _OR_ZERO, _ALTOGETHER
    found = connection.execute(
        _BY_TIME.format(values=values, counted=counted), given | {"first_us": first_us}
    ).fetchnumpy()
    everything = Cells(
        units=np.asarray(found["unit_hash"], dtype=np.uint64),
        arms=np.asarray(found["arm"], dtype=np.int64),
        strata=np.asarray(found["stratum"], dtype=np.int64),
        totals=np.asarray(found["total"], dtype=np.float64),
        counts=np.asarray(found["n"], dtype=np.float64),
    )
    later = np.asarray(found["later"], dtype=np.bool_)
    return Tenure(first_us / 1e6, everything.where(~later), everything.where(later))


def novelty(seen: Tenure, arm: int) -> Json | None:
    """The lift of an arm in units' first time and after it, and whether they differ; None where either rests
    on too little for the normal law.

    The standard error takes both lifts for independent. Who is in both is alike in both, which makes the
    truth smaller: the test is careful.
    """
    found = []
    for cells in (seen.first, seen.later):
        effect = stratified_effect(cells.where((cells.arms == 0) | (cells.arms == arm)))
        if effect is None or not effect.normal:
            return None
        found.append(effect)
    first, later = found
    error = math.hypot(first.std_error, later.std_error)
    p_value = math.erfc(abs(later.estimate - first.estimate) / error / math.sqrt(2))
    return {
        "first_s": seen.first_s,
        "first_lift": first.estimate,
        "later_lift": later.estimate,
        "p_value": p_value,
        "changes": p_value < _LEVEL,
        "method": (
            "z-test of the lift in units' first time in the trial against the lift after it, taken for "
            "independent (careful); at one look; no decision rests on it"
        ),
    }


def warning(name: str, arm: str, found: Json) -> str:
    """In words, of a lift that changes."""
    first, later = found["first_lift"], found["later_lift"]
    kind = "novelty wears off" if abs(later) < abs(first) else "it takes time to show"
    return (
        f"{name}: the lift of {arm} is {first:+.4g} in units' first {_time(found['first_s'])} and "
        f"{later:+.4g} after that (z-test at one look, p = {found['p_value']:.2g}): perhaps {kind}. The lift "
        "over all time is no forecast then; no decision rests on this."
    )


def _time(seconds: float) -> str:
    for size, word in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {word}"
    return f"{seconds:.3g} s"
