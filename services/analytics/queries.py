"""Questions to the prediction store, in SQL. Pure over files and tables; they block, run them in a thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from services.analytics.columns import CORE
from services.common.lifecycle import usable_cores

#: Of one question: half of the processors belong to those who answer requests.
_THREADS = max(1, usable_cores() // 2)

OUTCOMES = pa.schema(
    [
        ("event_id", pa.binary()),
        ("request_id", pa.binary()),
        ("metric", pa.string()),
        ("number", pa.float64()),
        ("text", pa.string()),
        ("row", pa.int64()),
        ("observed_at_us", pa.int64()),
    ]
)

#: The number that the predictions of a version use for a class.
CLASSES = pa.schema([("version", pa.string()), ("name", pa.string()), ("number", pa.float64())])

_ORIGINS = {1: "online", 2: "shadow", 3: "batch"}

_LOGGED = (
    "request_id, batch_id, position, writer, model, version, artifact_digest, variant, experiment, "
    "unit_hash, propensity, revision, code, origin, attempt, cached, answered_at_us, latency_us, queue_us, "
    "compute_us, rows, predicted, predicted_text"
)
#: What segments that were written before there was such a column have in its place.
_SINCE_THEN = {"experiment": "NULL::VARCHAR"}

_VIEWS = """
CREATE TEMP VIEW logged AS
SELECT * FROM everything
WHERE answered_at_us >= getvariable('since_us') AND answered_at_us < getvariable('until_us');

-- Of the rows that one request left, the one its caller's answer came from comes first. A router writes only
-- what it answered itself. Of two workers that were asked at once, one that failed or was cancelled did not
-- answer a request that succeeded. Rows without a request id are requests of their own.
CREATE TEMP TABLE requests AS SELECT * EXCLUDE (place) FROM (
    SELECT *, row_number() OVER (
        PARTITION BY request_id, origin,
                     CASE WHEN request_id = getvariable('no_id') THEN batch_id END,
                     CASE WHEN request_id = getvariable('no_id') THEN position END
        ORDER BY writer DESC, code <> 0, attempt DESC, answered_at_us DESC, batch_id, position) AS place
    FROM logged
) WHERE place = 1;

-- CANCELLED (1) is no error of ours: nobody waited for the answer any more.
CREATE TEMP VIEW online AS SELECT *, code NOT IN (0, 1) AS failed FROM requests WHERE origin = 1;

CREATE TEMP TABLE outcomes AS SELECT request_id, metric, "row", number, text, observed_at_us FROM (
    SELECT *, row_number() OVER (
        PARTITION BY request_id, metric, "row" ORDER BY observed_at_us DESC, event_id DESC) AS place
    FROM given
) WHERE place = 1;

-- A label names a class, or is its number; predictions are either, too. Null: the label is no class of the
-- version, or there is no prediction to hold it against.
CREATE TEMP VIEW labelled AS
SELECT * EXCLUDE (label_text, label_number, answer, answer_text), CASE
    WHEN answer_text IS NULL THEN
        answer = coalesce(label_number, of_label.number, try_cast(label_text AS DOUBLE))
    WHEN label_text IS NULL THEN coalesce(of_answer.number, try_cast(answer_text AS DOUBLE)) = label_number
    WHEN of_label.number IS NULL AND version IN (FROM classes SELECT version) THEN NULL
    ELSE answer_text = label_text END::DOUBLE AS value
FROM (
    SELECT online.*, outcomes.text AS label_text, outcomes.number AS label_number,
           predicted["row" + 1] AS answer, predicted_text["row" + 1] AS answer_text,
           outcomes.observed_at_us
    FROM online JOIN outcomes USING (request_id)
    WHERE code = 0 AND metric = 'label' AND "row" < greatest(1, rows)
)
LEFT JOIN (SELECT version, name AS label_text, number FROM classes) AS of_label
    USING (version, label_text)
LEFT JOIN (SELECT version, name AS answer_text, number FROM classes) AS of_answer
    USING (version, answer_text);
"""

_SUMMARY = """
SELECT version, variant, experiment, count(*) AS requests, count(DISTINCT unit_hash) AS units,
       count(*) FILTER (failed) AS errors, count(*) FILTER (code = 1) AS cancelled,
       count(*) FILTER (cached) AS cached,
       min(answered_at_us) AS first_at_us, max(answered_at_us) AS last_at_us,
       avg(latency_us) FILTER (code = 0) / 1000 AS latency_mean,
       stddev_samp(latency_us) FILTER (code = 0) / 1000 AS latency_sd,
       quantile_cont(latency_us, [0.5, 0.95, 0.99]) FILTER (code = 0) AS latency_quantiles,
       any_value(artifact_digest) FILTER (artifact_digest <> '') AS artifact_digest
FROM online GROUP BY version, variant, experiment ORDER BY version, variant, experiment NULLS FIRST
"""

_OUTCOME_MEANS = """
SELECT version, variant, experiment, metric, count(*) AS n, avg(number) AS mean, stddev_samp(number) AS sd
FROM online JOIN outcomes USING (request_id) WHERE number IS NOT NULL
GROUP BY version, variant, experiment, metric ORDER BY version, variant, experiment NULLS FIRST, metric
"""

_ACCURACIES = """
SELECT version, variant, experiment, count(value) AS n, sum(value) AS correct,
       count(*) - count(value) AS unmapped
FROM labelled
GROUP BY version, variant, experiment ORDER BY version, variant, experiment NULLS FIRST
"""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that was logged of one model at one moment: objects, and what is still in the inbox.
    `since_us` and `until_us` bound the time of the answer."""

    files: Sequence[str] = ()
    inbox: pa.Table | None = None
    outcomes: pa.Table = field(default_factory=OUTCOMES.empty_table)
    classes: pa.Table = field(default_factory=CLASSES.empty_table)
    since_us: int = 0
    until_us: int = (1 << 63) - 1


def open_snapshot(snapshot: Snapshot, spill: str = "") -> duckdb.DuckDBPyConnection:
    """A connection with `requests` (one row per request), `online` (those that callers sent) and `outcomes`
    (per request, row and metric the value observed last). Close it. What does not fit into 1 GB goes to the
    folder `spill`; without one the query fails."""
    config: dict[str, str | bool | int | float | list[str]] = {
        "threads": _THREADS,
        "memory_limit": "1GB",
        "temp_directory": spill,
    }
    connection = duckdb.connect(":memory:", config=config)
    connection.execute("SET enable_progress_bar = false")
    set_variables(connection, since_us=snapshot.since_us, until_us=snapshot.until_us, no_id=bytes(16))
    core = CORE.empty_table() if snapshot.inbox is None else snapshot.inbox.select(CORE.names)
    connection.register("inbox", core)
    connection.register("given", snapshot.outcomes)
    connection.register("classes", snapshot.classes)
    older = [file for file in snapshot.files if not _complete(file)]
    files = [file for file in snapshot.files if _complete(file)] if older else list(snapshot.files)
    parts = [f"FROM inbox SELECT {_LOGGED}"]
    if files:
        set_variables(connection, files=files)
        parts.append(f"FROM read_parquet(getvariable('files')) SELECT {_LOGGED}")
    if older:
        set_variables(connection, older=older)
        columns = ", ".join(_SINCE_THEN.get(name, name) for name in _LOGGED.split(", "))
        parts.append(f"FROM read_parquet(getvariable('older')) SELECT {columns}")
    connection.execute(f"CREATE TEMP VIEW everything AS {' UNION ALL '.join(parts)}")
    connection.execute(_VIEWS)
    return connection


@lru_cache(maxsize=100_000)
def _complete(file: str) -> bool:
    """Whether the segment has every column of today. What is in a file never changes."""
    return set(_SINCE_THEN) <= set(pq.read_schema(file).names)


def summary(connection: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """Per version, variant and experiment of online requests: counts, `codes` other than OK, latency of OK
    answers (mean and sd in ms, quantiles 0.5, 0.95, 0.99 in µs)."""
    rows = _dicts(connection, _SUMMARY)
    codes = connection.execute(
        "SELECT version, variant, experiment, code, count(*) FROM online WHERE code <> 0 "
        "GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    by_row: dict[tuple[str, ...], dict[int, int]] = {}
    for *of, code, n in codes:
        by_row.setdefault(tuple(of), {})[code] = n
    for row in rows:
        row["codes"] = by_row.get((row["version"], row["variant"], row["experiment"]), {})
    return rows


def other_origins(connection: duckdb.DuckDBPyConnection) -> dict[str, int]:
    """Requests that were not online, which no other number here counts."""
    rows = connection.execute(
        "SELECT origin, count(*) FROM requests WHERE origin <> 1 GROUP BY origin ORDER BY origin"
    ).fetchall()
    return {_ORIGINS.get(origin, str(origin)): count for origin, count in rows}


def outcome_means(connection: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """Per version, variant, experiment and metric: how many outcomes with a number were joined, their mean
    and sd."""
    return _dicts(connection, _OUTCOME_MEANS)


def accuracies(connection: duckdb.DuckDBPyConnection) -> list[dict[str, Any]]:
    """Per version, variant and experiment: labelled rows, how many of them were predicted right, and how many
    more have a label that is no class of the version or no prediction to hold it against (`unmapped`)."""
    return _dicts(connection, _ACCURACIES)


def recent(connection: duckdb.DuckDBPyConnection, limit: int) -> list[dict[str, Any]]:
    """The newest requests of the snapshot, of every origin."""
    return _dicts(
        connection,
        "SELECT * FROM requests ORDER BY answered_at_us DESC, request_id DESC LIMIT $limit",
        {"limit": limit},
    )


def rows_of_request(
    files: Sequence[str], inbox: Sequence[pa.Table], request_id: bytes
) -> list[dict[str, Any]]:
    """Every row that the request left, payload included, online and the caller's answer first. Tensors come
    as `(values, datatype, row shape)`."""
    found: list[dict[str, Any]] = []
    for file in files:
        with pq.ParquetFile(file) as objects:
            for group in range(objects.num_row_groups):
                limits = objects.metadata.row_group(group).column(0).statistics
                if limits is None or not limits.has_min_max or limits.min <= request_id <= limits.max:
                    found += _rows_with(objects.read_row_group(group), request_id)
    for table in inbox:
        found += _rows_with(table, request_id)
    return sorted(
        found,
        key=lambda row: (
            row["origin"],
            -row["writer"],
            row["code"] != 0,
            -row["attempt"],
            -row["answered_at_us"],
            row["batch_id"],
            row["position"],
        ),
    )


def _rows_with(everything: pa.Table, request_id: bytes) -> list[dict[str, Any]]:
    wanted = pc.equal(everything["request_id"], pa.scalar(request_id, pa.binary(16)))
    table, schema = everything.filter(wanted), everything.schema
    rows: list[dict[str, Any]] = table.to_pylist()
    for name in table.column_names:
        if not name.startswith(("input:", "output:")):
            continue
        details = schema.field(name).metadata or {}
        datatype = int(details.get(b"datatype", b"0"))
        shape = [int(size) for size in details.get(b"row_shape", b"").decode().split(",") if size]
        for row in rows:
            if row[name] is not None:
                row[name] = (row[name], datatype, shape)
    return rows


def set_variables(connection: duckdb.DuckDBPyConnection, **variables: object) -> None:
    """What SQL reads by `getvariable`."""
    for name, value in variables.items():
        connection.execute(f"SET VARIABLE {name} = $value", {"value": value})


def _dicts(
    connection: duckdb.DuckDBPyConnection, sql: str, values: dict[str, object] | None = None
) -> list[dict[str, Any]]:
    found = connection.execute(sql, values or {})
    names = [column[0] for column in found.description or []]
    return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
