"""What a trial's units did, in SQL over an open snapshot: counts for exact evidence, sums per unit for the
rest.

The tables are those of `trial_strata.open_trial`. Everything blocks, run it in a thread.
"""

from __future__ import annotations

from dataclasses import dataclass

import duckdb
import numpy as np
import pyarrow as pa
from headrace.v1.trials_pb2 import TrialMetric
from numpy.typing import NDArray

from services.analytics.statistics.stratified import Cells
from services.analytics.trial_strata import BAKE, BEFORE, Strata, TrialQuestion
from services.analytics.trial_values import is_built_in, values_before, values_of

Floats = NDArray[np.float64]

#: Latencies are told apart by 1%.
LATENCY_BASE = 1.01

# Evidence that needs no approximation takes one request of a unit in each period: later ones are no
# independent draw. Periods of five minutes at first, then of a sixteenth to an eighth of the trial's age. Of
# several at one moment, as one batch answers them, it is the same one at every look.
_VISITS = """
CREATE TEMP TABLE visits AS
SELECT unit_hash, stratum, period, min(answered_at_us) AS came_us,
       arg_min(struct_pack(arm := arm, failed := failed), (answered_at_us, request_id)) AS seen
FROM (
    SELECT *, CASE WHEN age < 4800 THEN floor(age / 300)
        ELSE 16 + floor(8 * (octave + age / (4800 * pow(2, octave)) - 1)) END AS period
    FROM (
        SELECT *, floor(log2(greatest(age, 4800) / 4800)) AS octave
        FROM (
            SELECT *, greatest(0, answered_at_us - getvariable('started_us')) / 1e6 AS age FROM exposed
        )
        WHERE code <> 1
    )
)
GROUP BY unit_hash, stratum, period;

CREATE TEMP TABLE firsts AS
SELECT unit_hash,
       arg_min(struct_pack(stratum := stratum, arm := seen.arm, failed := seen.failed), (came_us, stratum))
           AS seen,
       min(came_us) AS came_us
FROM visits WHERE stratum < getvariable('undivided') GROUP BY unit_hash;
"""

# The first request of every unit in one stratum.
_FIRSTS_IN = """
SELECT seen.arm, count(*), count(*) FILTER (seen.failed) FROM (
    SELECT unit_hash, arg_min(seen, (came_us, period)) AS seen FROM visits WHERE stratum = $stratum
    GROUP BY unit_hash
) GROUP BY seen.arm
"""
_FIRSTS = """
SELECT seen.stratum, seen.arm, count(*), count(*) FILTER (seen.failed) FROM firsts GROUP BY ALL ORDER BY ALL
"""
_PERIODS = """
SELECT min(came_us), stratum, period, seen.arm, count(*), count(*) FILTER (seen.failed)
FROM visits GROUP BY stratum, period, seen.arm ORDER BY stratum, period, seen.arm
"""

_ARM_COUNTS = """
SELECT arm, count(*), count(DISTINCT unit_hash), count(*) FILTER (failed),
       count(*) FILTER (revision >= coalesce(latest.since, 0))
FROM mine LEFT JOIN latest USING (arm) WHERE code <> 1 GROUP BY arm
"""

_CELLS = """
SELECT unit_hash, arm, stratum, sum(value) AS total, count(*)::DOUBLE AS n
FROM ({values}) WHERE value IS NOT NULL GROUP BY unit_hash, arm, stratum
"""
_ZERO_CELLS = """
SELECT unit_hash, arm, stratum, coalesce(total, 0) AS total, 1::DOUBLE AS n
FROM (SELECT DISTINCT unit_hash, arm, stratum FROM exposed)
LEFT JOIN ({cells}) USING (unit_hash, arm, stratum)
"""
_WITH_BEFORE = """
SELECT cells.*, before.value AS covariate FROM ({cells}) AS cells
LEFT JOIN ({before}) AS before USING (unit_hash)
"""

# The first value of every unit, as a share of the range that values lie in; what lies outside is cut off.
_BOUNDED = """
SELECT seen.stratum, seen.arm, count(*), sum(least(1, greatest(0, seen.share))),
       count(*) FILTER (seen.share < 0 OR seen.share > 1)
FROM (
    SELECT arg_min(
        struct_pack(stratum := stratum, arm := arm, share := (value - $low) / ($high - $low)),
        (answered_at_us, request_id)
    ) AS seen
    FROM ({values}) WHERE value IS NOT NULL AND stratum < getvariable('undivided') GROUP BY unit_hash
) GROUP BY ALL
"""

# Every unit weighs the same however much it asked.
_HISTOGRAMS = """
SELECT stratum, arm, bucket, sum(weight) AS units FROM (
    SELECT stratum, arm, ceil(ln(greatest(value, 1e-9)) / ln({base}))::BIGINT AS bucket,
           1.0 / count(*) OVER (PARTITION BY unit_hash, arm, stratum) AS weight
    FROM ({values}) WHERE value IS NOT NULL
) GROUP BY ALL ORDER BY ALL
"""
_BELOW_ZERO = "SELECT 1 FROM ({values}) WHERE value < 0 LIMIT 1"


@dataclass(frozen=True, slots=True)
class Tally:
    """Units and those of them whose request failed, shape (strata, arms)."""

    units: Floats
    failed: Floats


@dataclass(frozen=True, slots=True)
class Visits:
    """Requests that count one by one: `first` the first one of every unit in the trial, `periods` the first
    one of every unit in each period, in the order of periods, each with a single stratum: (stratum, tally of
    shape (arms,)). `before` and `bake` are the last stratum in which the control had traffic and what came
    after it."""

    first: Tally
    periods: list[tuple[int, Tally]]
    before: Tally
    bake: Tally


@dataclass(frozen=True, slots=True)
class Bounded:
    """Units with a value and the sum of their first ones as shares of the known range, shape (strata, arms);
    of `outside` units the value lay beyond the range and counts as its end."""

    units: Floats
    shares: Floats
    outside: int = 0


@dataclass(frozen=True, slots=True)
class Histogram:
    """Values of one arm in one stratum: `units[i]` is the sum over units of the share of their values in
    bucket `buckets[i]`, which ends at LATENCY_BASE ** bucket."""

    buckets: NDArray[np.int64]
    units: Floats


@dataclass(frozen=True, slots=True)
class Counts:
    """Of one arm: every request and unit it answered, and requests since its weight changed last."""

    requests: int
    units: int
    errors: int
    requests_since: int


def visits(connection: duckdb.DuckDBPyConnection, strata: Strata) -> Visits:
    """Exact counts of units and failures, after `open_trial`; once per connection."""
    open_visits(connection)
    count, arms = strata.shares.shape
    first = Tally(np.zeros((count, arms)), np.zeros((count, arms)))
    for stratum, arm, units, failed in connection.execute(_FIRSTS).fetchall():
        first.units[stratum, arm], first.failed[stratum, arm] = units, failed
    before, bake = (
        _firsts_in(connection, stratum, arms) for stratum in (strata.last if count else BEFORE, BAKE)
    )
    periods: dict[tuple[int, int], tuple[int, Tally]] = {}
    for at, stratum, period, arm, units, failed in connection.execute(_PERIODS).fetchall():
        if stratum >= BEFORE:
            continue
        began, tally = periods.get((stratum, period), (at, Tally(np.zeros(arms), np.zeros(arms))))
        tally.units[arm], tally.failed[arm] = units, failed
        periods[stratum, period] = (min(at, began), tally)
    ordered = sorted(periods.items(), key=lambda item: (item[1][0], item[0]))
    return Visits(first, [(stratum, tally) for (stratum, _), (_, tally) in ordered], before, bake)


def known_firsts(connection: duckdb.DuckDBPyConnection, before_us: int) -> tuple[int, int]:
    """How many units came first before that time, and a digest of who came when to which arm; after
    `visits`."""
    ((units, digest),) = connection.execute(
        "SELECT count(*), coalesce(bit_xor(hash(unit_hash, came_us, seen.arm)), 0) FROM firsts "
        "WHERE came_us < $before_us",
        {"before_us": before_us},
    ).fetchall()
    return units, digest


def open_visits(connection: duckdb.DuckDBPyConnection) -> None:
    """Make the tables of requests that count one by one, from `exposed`."""
    connection.execute(_VISITS)


def counts(connection: duckdb.DuckDBPyConnection, question: TrialQuestion) -> list[Counts]:
    """Of every arm, whatever sent the requests there."""
    _latest(connection, question)
    found = {row[0]: Counts(*row[1:]) for row in connection.execute(_ARM_COUNTS).fetchall()}
    return [found.get(arm, Counts(0, 0, 0, 0)) for arm in range(len(question.names))]


def cells(connection: duckdb.DuckDBPyConnection, metric: TrialMetric) -> Cells:
    """Sums per unit, stratum (BAKE for what came after the last weights) and arm."""
    values, given = values_of(metric)
    sql = _CELLS.format(values=values)
    if metric.missing_is_zero and not is_built_in(metric):
        sql = _ZERO_CELLS.format(cells=sql)
    covariate = None
    if metric.covariate == TrialMetric.COVARIATE_PRE_PERIOD:
        sql = _WITH_BEFORE.format(cells=sql, before=values_before(metric))
    found = connection.execute(sql, given).fetchnumpy()
    if "covariate" in found:
        covariate = np.ma.filled(np.ma.asarray(found["covariate"], dtype=np.float64), np.nan)
    return Cells(
        units=np.asarray(found["unit_hash"], dtype=np.uint64),
        arms=np.asarray(found["arm"], dtype=np.int64),
        strata=np.asarray(found["stratum"], dtype=np.int64),
        totals=np.asarray(found["total"], dtype=np.float64),
        counts=np.asarray(found["n"], dtype=np.float64),
        covariate=covariate,
    )


def bounded(connection: duckdb.DuckDBPyConnection, metric: TrialMetric, strata: Strata) -> Bounded:
    """First values of units within the metric's range, after `open_trial`."""
    units, shares, outside = np.zeros_like(strata.shares), np.zeros_like(strata.shares), 0
    values, given = values_of(metric)
    limits = {"low": metric.low, "high": metric.high}
    found = connection.execute(_BOUNDED.format(values=values), given | limits).fetchall()
    for stratum, arm, count, total, beyond in found:
        units[stratum, arm], shares[stratum, arm] = count, total
        outside += beyond
    return Bounded(units, shares, outside)


def histograms(
    connection: duckdb.DuckDBPyConnection, metric: TrialMetric
) -> dict[tuple[int, int], Histogram]:
    """The values of a metric by (stratum, arm); none of one with values below zero, which no bucket holds."""
    values, given = values_of(metric)
    if not is_built_in(metric):
        below = connection.execute(_BELOW_ZERO.format(values=values), given).fetchall()
        if below:
            return {}
    found = connection.execute(_HISTOGRAMS.format(values=values, base=LATENCY_BASE), given).fetchnumpy()
    stratum, arm = (np.asarray(found[name], dtype=np.int64) for name in ("stratum", "arm"))
    made = {}
    for place in sorted(set(zip(stratum.tolist(), arm.tolist(), strict=True))):
        chosen = (stratum == place[0]) & (arm == place[1])
        made[place] = Histogram(
            np.asarray(found["bucket"], dtype=np.int64)[chosen],
            np.asarray(found["units"], dtype=np.float64)[chosen],
        )
    return made


def _firsts_in(connection: duckdb.DuckDBPyConnection, stratum: int, arms: int) -> Tally:
    tally = Tally(np.zeros(arms), np.zeros(arms))
    for arm, units, failed in connection.execute(_FIRSTS_IN, {"stratum": stratum}).fetchall():
        tally.units[arm], tally.failed[arm] = units, failed
    return tally


def _latest(connection: duckdb.DuckDBPyConnection, question: TrialQuestion) -> None:
    """`latest`: since which revision each arm has the weight of now; beyond every revision where no request
    came with it yet. A rollout's revisions are those of the deployment."""
    never = (1 << 64) - 1
    since: list[int] = []
    for arm, weight in enumerate(question.weights):
        if question.rollout:
            since.append(question.revision)
            continue
        ((other, newest),) = connection.execute(
            "SELECT max(revision) FILTER (chance <> $weight), max(revision) FILTER (chance = $weight) FROM "
            "(SELECT revision, mode(round(propensity * 10000)) AS chance FROM mine "
            "WHERE arm = $arm AND propensity > 0 AND propensity < 1 GROUP BY revision)",
            {"arm": arm, "weight": weight},
        ).fetchall()
        current = newest is not None and (other is None or newest > other)
        since.append((other + 1 if other is not None else 0) if current else never)
    table = pa.table({"arm": pa.array(range(len(since)), pa.int32()), "since": pa.array(since, pa.uint64())})
    connection.register("latest", table)
