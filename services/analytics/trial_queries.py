"""What a trial's units did, in SQL over an open snapshot: counts for exact evidence, sums per unit for the
rest.

A stratum is a set of weights: revisions under which every arm was assigned with the same chance. Requests
whose version nobody's dice chose (asked for by name, an override, all traffic on one version) are in no
stratum, nor are those that another version answered instead. Everything blocks, run it in a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import duckdb
import numpy as np
import pyarrow as pa
from headrace.v1.trials_pb2 import Trial, TrialMetric
from numpy.typing import NDArray

from services.analytics.statistics.stratified import Cells
from services.analytics.trial_values import is_built_in, values_before, values_of

Floats = NDArray[np.float64]

#: What is served after the last weights that left the control any traffic, and, where no weights ever divided
#: it, what the control served before.
BAKE, BEFORE = 1_000_000, 999_999

#: Latencies are told apart by 1%.
LATENCY_BASE = 1.01

_WHOLE = 10_000

# By intention to treat: a fallback that answers does so for the variant that the unit was given, and that
# variant failed. A rollout's variants are named as versions are, unless a deployment gives them names of its
# own (and has no fallback then): of those the version tells the arm.
_MINE = """
CREATE TEMP TABLE mine AS
SELECT online.* EXCLUDE (failed), arms.arm,
       online.failed OR (online.version <> '' AND online.version <> arms.version) AS failed
FROM online JOIN arms ON arms.name = CASE
    WHEN $rollout AND online.variant NOT IN (SELECT name FROM arms) THEN online.version
    ELSE online.variant END
WHERE answered_at_us >= getvariable('started_us') AND coalesce(experiment, '') = $of
"""

_EXPOSED = """
CREATE TEMP TABLE exposed AS
SELECT strata.arm AS arm, strata.stratum AS stratum, unit_hash, online.request_id, code, failed, cached,
       latency_us, version, predicted, predicted_text, rows, answered_at_us
FROM mine AS online JOIN strata ON strata.arm = online.arm AND strata.revision = online.revision
    AND strata.propensity = round(online.propensity * 10000)
"""

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
class TrialQuestion:
    """Which requests a trial is about. `versions` (rollouts) or `variants` (experiments) name the arms, the
    control first; `weights` are those of now, in 1/10,000."""

    trial_id: str
    revision: int
    rollout: bool
    names: tuple[str, ...]
    versions: tuple[str, ...]
    weights: tuple[int, ...]
    started_us: int

    @classmethod
    def of(cls, trial: Trial) -> Self:
        """Of an experiment arms are its variants, of a rollout versions."""
        rollout = trial.kind == Trial.KIND_ROLLOUT
        return cls(
            trial_id=trial.trial_id,
            revision=trial.revision,
            rollout=rollout,
            names=tuple(arm.version if rollout else arm.name for arm in trial.arms),
            versions=tuple(arm.version for arm in trial.arms),
            weights=tuple(arm.weight for arm in trial.arms),
            started_us=trial.started_at_us,
        )

    @property
    def baking(self) -> int | None:
        """The arm that has all traffic, if it is not the control."""
        whole = [arm for arm, weight in enumerate(self.weights) if arm and weight == _WHOLE]
        return whole[0] if self.rollout and whole else None


@dataclass(frozen=True, slots=True)
class Strata:
    """Chances of every arm per stratum, shape (strata, arms); NaN where nothing says one. Strata are numbered
    in the order in which they came; `last` is the newest in which the control had traffic."""

    shares: Floats
    last: int

    def share(self, arm: int) -> Floats:
        """Chance of the arm among the control and itself, per stratum; NaN where one of them is not known or
        is 0."""
        pair = self.shares[:, [0, arm]]
        pair = np.where(pair > 0, pair, np.nan)
        return np.asarray(pair[:, 1] / pair.sum(axis=1))


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


def open_trial(connection: duckdb.DuckDBPyConnection, question: TrialQuestion) -> Strata:
    """Make the tables that the other functions read, from a snapshot that reaches back to the start (and to
    the pre-period). Once per connection."""
    _prepare(connection, question)
    found = connection.execute(
        "SELECT revision, arm, mode(round(propensity * 10000))::BIGINT FROM mine "
        "WHERE propensity > 0 AND propensity < 1 GROUP BY revision, arm ORDER BY revision, arm"
    ).fetchall()
    arms = len(question.names)
    chances: dict[int, list[int | None]] = {}
    for revision, arm, chance in found:
        chances.setdefault(revision, [None] * arms)[arm] = chance
    numbers: dict[tuple[int | None, ...], int] = {}
    rows: list[tuple[int, int, int, int]] = []
    last = -1
    for revision, seen in chances.items():
        key = tuple(_completed(seen, question.weights))
        stratum = numbers.setdefault(key, len(numbers))
        rows += [(revision, arm, chance, stratum) for arm, chance in enumerate(key) if chance is not None]
        if seen[0] is not None:
            last = stratum
    rows += _bake_rows(connection, question, last)
    table = pa.table(
        {
            name: pa.array([row[place] for row in rows], kind)
            for place, (name, kind) in enumerate(
                (
                    ("revision", pa.uint64()),
                    ("arm", pa.int32()),
                    ("propensity", pa.int64()),
                    ("stratum", pa.int32()),
                )
            )
        }
    )
    connection.register("strata", table)
    connection.execute(_EXPOSED)
    shares = np.full((len(numbers), arms), np.nan)
    for key, stratum in numbers.items():
        shares[stratum] = [np.nan if chance is None else chance / _WHOLE for chance in key]
    return Strata(shares, last)


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


def _prepare(connection: duckdb.DuckDBPyConnection, question: TrialQuestion) -> None:
    """`mine`: the trial's requests with their arms; `before`: everybody's before it began."""
    connection.execute("SET VARIABLE started_us = $value", {"value": question.started_us})
    connection.execute("SET VARIABLE undivided = $value", {"value": BEFORE})
    connection.register(
        "arms",
        pa.table(
            {
                "name": pa.array(question.names, pa.string()),
                "version": pa.array(question.versions, pa.string()),
                "arm": pa.array(range(len(question.names)), pa.int32()),
            }
        ),
    )
    of = "" if question.rollout else question.trial_id
    connection.execute(_MINE, {"of": of, "rollout": question.rollout})
    connection.execute(
        "CREATE TEMP VIEW before AS SELECT * FROM online WHERE answered_at_us < getvariable('started_us')"
    )


def _firsts_in(connection: duckdb.DuckDBPyConnection, stratum: int, arms: int) -> Tally:
    tally = Tally(np.zeros(arms), np.zeros(arms))
    for arm, units, failed in connection.execute(_FIRSTS_IN, {"stratum": stratum}).fetchall():
        tally.units[arm], tally.failed[arm] = units, failed
    return tally


def _completed(seen: list[int | None], weights: Sequence[int]) -> list[int | None]:
    """The chance of the one arm that logged nothing is what the others leave, and of all that did not, where
    they leave nothing, 0. Of several it is as configured, where it is for all others: an arm that ought to
    get units and gets none has to be counted, with none."""
    missing = [arm for arm, chance in enumerate(seen) if chance is None]
    left = _WHOLE - sum(chance or 0 for chance in seen)
    if left == 0 or (len(missing) == 1 and left > 0):
        return [left if chance is None else chance for chance in seen]
    as_configured = all(chance in (None, weight) for chance, weight in zip(seen, weights, strict=True))
    if as_configured and sum(weights) == _WHOLE:
        return list(weights)
    return list(seen)


def _bake_rows(
    connection: duckdb.DuckDBPyConnection, question: TrialQuestion, last: int
) -> list[tuple[int, int, int, int]]:
    """What has all traffic now; and where no weights ever divided it, the control's time before."""
    arm = question.baking
    if arm is None:
        return []
    rows = connection.execute(
        "SELECT DISTINCT revision, arm FROM mine WHERE round(propensity * 10000) = 10000 "
        "AND ((arm = $arm AND revision >= $since) OR (arm = 0 AND revision < $since AND $alone))",
        {"arm": arm, "since": question.revision, "alone": last < 0},
    ).fetchall()
    return [(revision, found, _WHOLE, BAKE if found else BEFORE) for revision, found in rows]


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
