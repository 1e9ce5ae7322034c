"""The values of a metric in SQL: of the requests that a trial exposed (`exposed`), and of those before it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from headrace.v1.trials_pb2 import TrialMetric

#: Outcomes that a metric needs; the rest are the names of outcomes themselves.
_OF_REQUESTS = {"error_rate", "latency_ms", "shadow_disagreement", "shadow_error_rate"}

_VALUES = {
    "error_rate": "SELECT *, failed::DOUBLE AS value FROM exposed WHERE code <> 1",
    "latency_ms": "SELECT *, latency_us / 1000.0 AS value FROM exposed WHERE code = 0 AND NOT cached",
    "accuracy": "SELECT exposed.*, labelled.value FROM exposed JOIN labelled USING (request_id)",
}
_OUTCOME_VALUES = """
SELECT exposed.*, number AS value FROM exposed JOIN outcomes USING (request_id)
WHERE metric = $metric AND number IS NOT NULL
"""
# What became known after the start may depend on the arm, and is no covariate.
_BEFORE = {
    "error_rate": "SELECT unit_hash, avg(failed::DOUBLE) AS value FROM before WHERE code <> 1 GROUP BY ALL",
    "latency_ms": """
        SELECT unit_hash, avg(latency_us / 1000.0) AS value FROM before WHERE code = 0 AND NOT cached
        GROUP BY ALL
    """,
    "accuracy": """
        SELECT unit_hash, avg(value) AS value FROM labelled JOIN before USING (request_id, unit_hash)
        WHERE observed_at_us < getvariable('started_us') GROUP BY ALL
    """,
}
_OUTCOME_BEFORE = """
SELECT unit_hash, {aggregate}(number) AS value FROM before JOIN outcomes USING (request_id)
WHERE metric = $metric AND number IS NOT NULL AND observed_at_us < getvariable('started_us')
GROUP BY unit_hash
"""


def outcome_names(metrics: Mapping[str, TrialMetric] | list[str]) -> list[str]:
    """The outcomes that these metrics are made of."""
    return sorted({"label" if name == "accuracy" else name for name in metrics} - _OF_REQUESTS)


def is_bounded(metric: TrialMetric) -> bool:
    """Whether the mean of a metric is one of values in a known range. What a unit without a value counts as
    may still change, so nothing of such a metric is exact; error rates are counted by `visits`."""
    return (
        0 < metric.high - metric.low < math.inf  # of two floats, the difference need not be one
        and not metric.quantile
        and not metric.missing_is_zero
        and metric.name not in {"error_rate", "shadow_disagreement", "shadow_error_rate"}
    )


def values_of(metric: TrialMetric) -> tuple[str, dict[str, str | float]]:
    """A query for the values of a metric, with the request each is of, and its parameters."""
    if is_built_in(metric):
        return _VALUES[metric.name], {}
    return _OUTCOME_VALUES, {"metric": metric.name}


def values_before(metric: TrialMetric) -> str:
    """A query for what each unit's value was before the trial; its parameters are those of `values_of`."""
    built_in = _BEFORE.get(metric.name)
    return built_in or _OUTCOME_BEFORE.format(aggregate="sum" if metric.missing_is_zero else "avg")


def is_built_in(metric: TrialMetric) -> bool:
    """Whether it is of requests and labels, and no outcome with a name of its own."""
    return metric.name in _VALUES
