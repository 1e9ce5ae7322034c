"""Units of one control for placebos, in SQL over an open snapshot. They block, run them in a thread."""

from __future__ import annotations

import duckdb
import numpy as np
from headrace.v1.trials_pb2 import Trial, TrialMetric

from services.analytics import trial_queries, trial_strata
from services.analytics.placebo import MOST_UNITS, ControlUnits
from services.analytics.trial_strata import BEFORE, TrialQuestion

LATENCY = TrialMetric(name="latency_ms")

#: Everybody, as if all versions were one arm, each of them a stratum.
_EVERYBODY = """
CREATE TEMP TABLE exposed AS
SELECT 0 AS arm, (dense_rank() OVER (ORDER BY version))::INTEGER AS stratum, unit_hash, request_id, code,
       failed, cached, latency_us, version, predicted, predicted_text, rows, answered_at_us
FROM online WHERE answered_at_us >= getvariable('started_us')
"""
_UNITS = """
SELECT unit_hash, seen.failed AS failed FROM firsts WHERE seen.arm = 0
ORDER BY came_us, unit_hash LIMIT $most
"""


def mean_metric(trial: Trial) -> TrialMetric:
    """The trial's first metric that is a mean and no share of errors, else latency."""
    wanted = [
        metric
        for metric in trial.metrics
        if metric.name not in ("error_rate", "shadow_disagreement", "shadow_error_rate")
        and not metric.quantile
    ]
    return wanted[0] if wanted else LATENCY


def of_trial(connection: duckdb.DuckDBPyConnection, trial: Trial) -> ControlUnits:
    """The first units that chance sent to the trial's control."""
    strata = trial_strata.open_trial(connection, TrialQuestion.of(trial))
    trial_queries.open_visits(connection)
    return _units(connection, mean_metric(trial)) if strata.shares.size else _units(connection, LATENCY)


def of_everybody(connection: duckdb.DuckDBPyConnection, started_us: int) -> ControlUnits:
    """The first units that came since then, whichever version answered them."""
    connection.execute("SET VARIABLE started_us = $value", {"value": started_us})
    connection.execute("SET VARIABLE undivided = $value", {"value": BEFORE})
    connection.execute(_EVERYBODY)
    trial_queries.open_visits(connection)
    return _units(connection, LATENCY)


def _units(connection: duckdb.DuckDBPyConnection, metric: TrialMetric) -> ControlUnits:
    found = connection.execute(_UNITS, {"most": MOST_UNITS}).fetchnumpy()
    units = np.asarray(found["unit_hash"], dtype=np.uint64)
    cells = trial_queries.cells(connection, metric)
    chosen = (cells.arms == 0) & (cells.strata < BEFORE) & np.isin(cells.units, units)
    return ControlUnits(units, np.asarray(found["failed"], dtype=np.bool_), cells.where(chosen))
