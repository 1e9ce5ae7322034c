"""The analytics service on a real PostgreSQL and a real broker: every request counted once."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg
import duckdb
import httpx
import numpy as np
import pytest
from headrace.v1.control_pb2 import ServedVersion, ServingConfig
from headrace.v1.events_pb2 import PredictionBatch, ShadowComparison, ShadowVerdict
from headrace.v1.tensor_pb2 import Code, Signature, Tensor
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanContext, TraceFlags
from prometheus_client import CollectorRegistry
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from deploy.embedded.postgres import PostgresServer
from deploy.embedded.tansu import TansuServer
from services import analytics
from services.analytics import queries, reading, repository
from services.analytics.app import analytics_app
from services.analytics.consumers import Consumers
from services.analytics.experiment_schemas import MAX_BODY_BYTES
from services.analytics.flushing import Flusher, Retention, SegmentWriter, Sizes
from services.analytics.metrics import Metrics
from services.analytics.reading import Reader
from services.analytics.segments import SegmentFiles
from services.analytics.settings import Settings
from services.analytics.signatures import Signatures
from services.common.bus.admin import ensure_topics
from services.common.bus.admin import lag as broker_lag
from services.common.bus.delivery import deliver
from services.common.bus.kafka import KafkaBus
from services.common.bus.port import Malformed, Record
from services.common.clock import Clock, ManualClock, SystemClock
from services.common.db import engine, migrate, transaction
from services.common.errors import DeadlineExceeded, NotFound, Unavailable
from services.common.ids import id_text
from services.common.objects import ArtifactStore
from services.common.objects.store import ObjectInfo
from services.common.telemetry import Tracing, kafka_headers
from services.common.topics import DEPLOYMENTS, OUTCOMES, PREDICTIONS, SHADOWS, all_topics, dead_letters
from tests.fixtures.asking import until
from tests.fixtures.prediction_log import START_US, outcome, outcome_batch, prediction_batch, request_id
from tests.fixtures.waiting import PATIENCE_S, eventually, eventually_of

TOKEN = "a-token-for-tests-only"
HEADERS = {"authorization": f"Bearer {TOKEN}"}
#: Everything waits in the inbox.
LAZY: dict[str, Any] = {}
#: Everything becomes Parquet as soon as it can, and is joined soon.
EAGER: dict[str, Any] = {
    "analytics_direct_rows": 100,
    "analytics_flush_rows": 1,
    "analytics_flush_after_s": 0.001,
    "analytics_join_segments": 2,
}


@asynccontextmanager
async def running(
    database_url: str, bootstrap: str, folder: Path, **sizes: Any
) -> AsyncIterator[httpx.AsyncClient]:
    cfg = Settings(
        kafka_session_timeout_s=2.0,
        kafka_bootstrap_servers=bootstrap,
        internal_token=TOKEN,
        database_url=database_url,
        artifact_store_url=f"file://{folder}/store",
        state_dir=folder / "state",
        http_port=0,
        analytics_keep_days=10_000,
        analytics_keep_outcomes_days=10_000,
        **sizes,
    )
    async with analytics_app(cfg, SystemClock()) as service:
        base = f"http://127.0.0.1:{service.port}"
        params = {"since": "2025-01-01T00:00:00Z"}
        async with httpx.AsyncClient(
            base_url=base, headers=HEADERS, params=params, timeout=PATIENCE_S
        ) as client:
            yield client


async def caught_up(bootstrap: str) -> None:
    """Until the group has read everything there is."""
    give_up_at = time.monotonic() + PATIENCE_S
    while time.monotonic() < give_up_at:
        lags = [await broker_lag(bootstrap, topic, "analytics") for topic in (PREDICTIONS, OUTCOMES)]
        if not any(lags):
            return
        await asyncio.sleep(0.1)
    raise AssertionError(lags)


def records(batches: Sequence[PredictionBatch]) -> list[Record]:
    return [
        Record(PREDICTIONS.name, f"{batch.model}/{batch.version}".encode(), batch.SerializeToString())
        for batch in batches
    ]


def traffic() -> list[PredictionBatch]:
    """1,000 requests of two versions, 90/10; request 7 was tried twice, request 11 was lost on its way and
    answered by the router, 20 more were shadows."""
    batches = []
    for start in range(0, 1000, 25):
        numbers = range(start, start + 25)
        version = "2" if start % 250 == 0 else "1"
        share = 0.1 if version == "2" else 0.9
        batches.append(prediction_batch(numbers, version=version, propensities=share))
    batches.append(prediction_batch([7], version="2", attempts=1, source="worker-2", propensities=0.1))
    router = {"writer": PredictionBatch.WRITER_ROUTER, "source": "router", "payload": False}
    batches.append(prediction_batch([11], version="2", codes=Code.CODE_DEADLINE_EXCEEDED, **router))
    batches.append(prediction_batch(range(20), version="3", origins=2))
    return batches


async def publish_all(bus: KafkaBus) -> None:
    batches = traffic()
    rng = np.random.default_rng(1)
    again = [batches[place] for place in rng.integers(0, len(batches), 30)]
    await bus.publish(records([*batches[::-1], *again]))
    broken = Record(PREDICTIONS.name, b"cancer/1", b"\xff\xff")
    await bus.publish([broken, *records(batches[:5])])


async def publish_outcomes(bus: KafkaBus) -> None:
    """True labels for all, each sent twice; request 30 is corrected later; revenue for some."""
    labels = [outcome(number, str(number % 2) if number % 3 else float(number % 2)) for number in range(1000)]
    late = outcome(30, 1.0, event="a correction", observed_at_us=1_760_000_000_000_000)
    revenue = [outcome(number, 2.5 + number % 4, metric="revenue") for number in range(500)]
    sent = [
        outcome_batch(*labels),
        outcome_batch(late),
        outcome_batch(*labels[::-1]),
        outcome_batch(*revenue),
    ]
    await bus.publish([Record(OUTCOMES.name, bytes(16), batch.SerializeToString()) for batch in sent])


def check_counts(body: dict[str, Any]) -> None:
    versions = {row["version"]: row for row in body["versions"]}
    assert body["requests"] == 1000
    assert body["other_origins"] == {"shadow": 20}
    # Each version lost none; request 0 is 2's, 7 went over to 2 within its 25, 11 is an error of 2.
    assert {name: row["requests"] for name, row in versions.items()} == {"1": 900, "2": 100}
    assert versions["2"]["errors_by_code"] == {"DEADLINE_EXCEEDED": 1}
    assert versions["1"]["errors"] == 0
    assert versions["1"]["latency_ms"]["p50"] == 2.0
    low, high = versions["2"]["error_rate_interval"]
    assert low < versions["2"]["error_rate"] == 0.01 < high


async def test_a_thousand_requests_count_a_thousand_whatever_is_redelivered(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> None:
    bootstrap = new_tansu().url
    await ensure_topics(bootstrap, all_topics())
    signature = Signature(prediction_output="label", classes=["benign", "malignant"])
    served = [ServedVersion(version=version, signature=signature) for version in "123"]
    config = ServingConfig(model="cancer", versions=served)
    async with KafkaBus(bootstrap, "test", session_timeout=2.0) as bus:
        await bus.publish([Record(DEPLOYMENTS.name, b"cancer", config.SerializeToString())])
        async with running(database_url, bootstrap, tmp_path, **LAZY) as client:
            await publish_all(bus)
            await publish_outcomes(bus)
            await caught_up(bootstrap)
            body = await until(client, "/v1/analytics/models/cancer", lambda body: body["requests"] >= 1000)
            check_counts(body)
            version = body["versions"][0]
            assert version["outcomes"]["accuracy"]["n"] == 900
            assert version["outcomes"]["accuracy"]["mean"] == 899 / 900
            assert version["outcomes"]["revenue"]["n"] == 450
        # A new process finds everything and turns it into Parquet, joining the small objects.
        async with running(database_url, bootstrap, tmp_path, **EAGER) as client:
            await publish_all(bus)
            await caught_up(bootstrap)
            await inbox_empty(database_url)
            check_counts((await client.get("/v1/analytics/models/cancer")).json())
            await check_prediction(client)
            await check_comparison(client)
            recent = (await client.get("/v1/analytics/query", params={"model": "cancer", "limit": 5})).json()
            assert len(recent["predictions"]) == 5
        assert await broker_lag(bootstrap, dead_letters(PREDICTIONS, "analytics"), "test") == 2
    assert list((tmp_path / "store" / "predictions" / "cancer").rglob("*.parquet"))


async def inbox_empty(database_url: str) -> None:
    connection = await asyncpg.connect(database_url, timeout=PATIENCE_S)

    async def left() -> tuple[int, int]:
        waiting = await connection.fetchval("SELECT count(*) FROM analytics.inbox")
        crowds = await connection.fetchval(
            "SELECT count(*) FROM (SELECT 1 FROM analytics.segments WHERE dropped_at IS NULL "
            "GROUP BY model, version, layout HAVING count(*) > 1) AS crowds"
        )
        return waiting, crowds

    try:
        await eventually_of(left, lambda found: found == (0, 0))
    finally:
        await connection.close()


async def check_prediction(client: httpx.AsyncClient) -> None:
    retried = (await client.get(f"/v1/analytics/predictions/{id_text(request_id(7))}")).json()
    assert (retried["version"], retried["attempt"], retried["code"]) == ("2", 1, "OK")
    assert [row["attempt"] for row in retried["attempts"]] == [1, 0, 0]
    assert retried["attempts"][2]["origin"] == "shadow"
    assert retried["artifact_digest"].startswith("sha256:")
    assert retried["outputs"]["label"] == {"datatype": "INT64", "row_shape": [], "data": [1]}
    assert {one["metric"] for one in retried["outcomes"]} == {"label", "revenue"}
    found = f"/v1/analytics/predictions/{id_text(request_id(7))}"
    assert (await client.get(found, params={"model": "cancer"})).status_code == 200
    assert (await client.get(found, params={"model": "digits"})).status_code == 404
    missing = await client.get(f"/v1/analytics/predictions/{id_text(request_id(5000))}")
    assert missing.status_code == 404
    assert missing.json()["field"] == "request_id"
    assert (await client.get("/v1/analytics/predictions/xyz")).status_code == 422


async def check_comparison(client: httpx.AsyncClient) -> None:
    path = "/v1/analytics/models/cancer/compare"
    errors = (await client.get(path, params={"a": "1", "b": "2"})).json()
    assert (errors["since"], errors["until"]) == ("2025-01-01T00:00:00+00:00", None)
    usual = httpx.AsyncClient(base_url=client.base_url, headers=HEADERS, timeout=PATIENCE_S)
    async with usual:
        month = (
            await usual.get("/v1/analytics/models/cancer", params={"until": "2025-07-31T00:00:00Z"})
        ).json()
        assert (month["since"], month["requests"]) == ("2025-07-01T00:00:00+00:00", 0)
        month = (
            await usual.get("/v1/analytics/models/cancer", params={"until": "2025-07-01T00:00:00Z"})
        ).json()
        assert (month["until"], month["requests"]) == ("2025-07-01T00:00:00+00:00", 1000)
        for last in ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59-12:00"):
            until_then = {"since": "0001-01-01T00:00:00+12:00", "until": last}
            ever = (await usual.get("/v1/analytics/models/cancer", params=until_then)).json()
            assert (ever["since"][:10], ever["until"][:10]) == ("1970-01-01", "9999-12-31")
            assert ever["requests"] == 1000
        first = {"until": "0001-01-01T00:00:00Z"}
        never = (await usual.get("/v1/analytics/models/cancer", params=first)).json()
        assert never["requests"] == 0
    assert errors["method"].startswith("two-proportion z-test")
    assert (errors["a"]["units"], errors["b"]["units"]) == (900, 100)
    assert errors["absolute"]["estimate"] == 0.01
    assert errors["sample_ratio"]["p_value"] > 0.5
    revenue = (await client.get(path, params={"a": "1", "b": "2", "metric": "revenue"})).json()
    assert revenue["method"] == "Welch's t-test"
    assert (revenue["a"]["observations"], revenue["a"]["units"], revenue["a"]["measured"]) == (450, 900, 0.5)
    params = {"a": "1", "b": "2", "metric": "revenue", "missing": "exclude"}
    given = (await client.get(path, params=params)).json()
    assert given["a"]["mean"] == pytest.approx(2 * revenue["a"]["mean"])
    accuracy = (await client.get(path, params={"a": "1", "b": "2", "metric": "accuracy"})).json()
    assert accuracy["a"]["mean"] == 899 / 900
    for params, status, field in (
        ({"a": "1", "b": "9"}, 404, "b"),
        ({"a": "1", "b": "2", "metric": "mood"}, 404, "metric"),
        ({"a": "1", "b": "1"}, 422, "b"),
        ({"a": "1", "b": "2", "metric": "accuracy", "missing": "zero"}, 422, "missing"),
        ({"a": "1"}, 422, "b"),
        ({"a": "1", "b": "2", "since": "2026-01-01T00:00:00"}, 422, "since"),
        ({"a": "1", "b": "2", "metric": "\0"}, 422, "metric"),
        ({"a": "1", "b": "2", "alpha": "5e-324"}, 422, "alpha"),
    ):
        answer = await client.get(path, params=params)
        assert (answer.status_code, answer.json()["field"]) == (status, field), answer.text
    for odd in ("analytics/models/%00", "analytics/models/%00/compare", "shadows/%00"):
        answer = await client.get(f"/v1/{odd}", params={"a": "1", "b": "2"})
        assert (answer.status_code, answer.json()["field"]) == (422, "model"), odd
    answer = await client.get("/v1/shadows/cancer", params={"alpha": "1e-17"})
    assert (answer.status_code, answer.json()["field"]) == (422, "alpha")
    for asked_of_one in ("analytics/query", "experiments/placebo"):
        answer = await client.get(f"/v1/{asked_of_one}", params={"model": "\0"})
        assert (answer.status_code, answer.json()["field"]) == (422, "model"), asked_of_one
    for name in ("model", "metric"):
        for odd in ("\0", "\ud800"):
            asked = {"model": "cancer", "metric": "revenue", "policy": {"weights": {"1": 1}}} | {name: odd}
            answer = await client.post(
                "/v1/experiments/off-policy",
                content=json.dumps(asked),
                headers={"content-type": "application/json"},
            )
            assert (answer.status_code, answer.json()["field"]) == (422, name), answer.text
    mistaken = await client.post("/v1/experiments/plan", content=bytes(MAX_BODY_BYTES + 1))
    assert (mistaken.status_code, mistaken.json()["code"]) == (413, "INVALID_ARGUMENT")
    assert (await client.get("/v1/analytics/models/unknown")).status_code == 404
    assert (await client.get(path, headers={"authorization": "Bearer wrong"})).status_code == 401
    assert (await client.get("/health/ready")).json()["ready"]
    metrics = (await client.get("/metrics")).text
    assert 'headrace_analytics_repeated_records_total{topic="predictions"}' in metrics


@asynccontextmanager
async def wired(
    database_url: str,
    folder: Path,
    direct_rows: int = 1,
    retention: Retention | None = None,
    clock: Clock | None = None,
    **more: int,
) -> AsyncIterator[tuple[Consumers, Reader, Flusher, ArtifactStore, InMemorySpanExporter]]:
    """The parts behind the broker, on a real database."""
    await migrate(database_url, "analytics", Path(analytics.__path__[0]) / "migrations")
    database, store = engine(database_url, "analytics"), ArtifactStore(f"file://{folder}/store")
    metrics, signatures, clock = Metrics(CollectorRegistry()), Signatures(), clock or SystemClock()
    spans = InMemorySpanExporter()
    tracing = Tracing("analytics", 1.0, SimpleSpanProcessor(spans))
    files = SegmentFiles(store, folder / "cache")
    writer = SegmentWriter(database, store, signatures, clock, metrics)
    sizes = Sizes(direct_rows=direct_rows, **{"flush_rows": 1, "join_segments": 2} | more)
    signature = Signature(prediction_output="label", classes=["benign", "malignant"])
    served = [ServedVersion(version=version, signature=signature) for version in "12"]
    signatures.apply(b"cancer", ServingConfig(model="cancer", versions=served).SerializeToString())
    flusher = Flusher(database, writer, files, signatures, sizes, clock, metrics, retention)
    try:
        yield (
            Consumers(database, writer, sizes, clock, tracing, metrics),
            Reader(database, files, signatures, metrics, folder / "spill"),
            flusher,
            store,
            spans,
        )
    finally:
        await store.close()
        await database.dispose()


async def count(reader: Reader) -> int:
    return sum(row["requests"] for row in await reader.ask("cancer", queries.summary))


async def test_consuming_continues_the_trace_of_the_request(database_url: str, tmp_path: Path) -> None:
    context = SpanContext(0xABC, 0xDEF, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    value = prediction_batch([1]).SerializeToString()
    async with wired(database_url, tmp_path) as (consumers, _, _, _, spans):
        record = Record(PREDICTIONS.name, b"cancer/1", value, headers=kafka_headers(context))
        await consumers.on_predictions([record])
    (span,) = spans.get_finished_spans()
    assert span.name == "analytics.predictions"
    assert span.context is not None
    assert span.context.trace_id == 0xABC
    assert span.parent is not None
    assert span.parent.span_id == 0xDEF


async def test_a_store_that_fails_loses_nothing_and_counts_nothing_twice(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object is written, then the process dies before the commit: the same records come again."""
    sent = records([prediction_batch(range(start, start + 10)) for start in range(0, 100, 10)])
    async with wired(database_url, tmp_path) as (consumers, reader, _, store, _):
        put = store.put

        async def put_and_die(path: str, data: bytes | Path) -> None:
            await put(path, data)
            raise Unavailable("the connection is gone")

        monkeypatch.setattr(store, "put", put_and_die)
        with pytest.raises(Unavailable):
            await consumers.on_predictions(sent)
        with pytest.raises(NotFound):
            await count(reader)
        monkeypatch.setattr(store, "put", put)
        await consumers.on_predictions(sent[:7])
        await consumers.on_predictions(sent)
        assert await count(reader) == 100


async def test_a_backlog_is_taken_in_piece_by_piece(database_url: str, tmp_path: Path) -> None:
    sent = records([prediction_batch(range(start, start + 10)) for start in range(0, 100, 10)])
    sent[7] = Record(PREDICTIONS.name, b"cancer/1", b"no record")
    most = 2 * max(len(record.value or b"") for record in sent)
    async with wired(database_url, tmp_path, taken_bytes=most) as (consumers, reader, _, store, _):
        put, written = store.put, []

        async def counting(path: str, data: bytes | Path) -> None:
            written.append(path)
            await put(path, data)

        store.put = counting  # type: ignore[method-assign]  # counts what is written
        with pytest.raises(Malformed) as found:
            await consumers.on_predictions(sent)
        assert found.value.index == 7
        assert (await count(reader), len(written)) == (60, 3)
        await consumers.on_predictions(sent[:7] + sent[8:])
        assert await count(reader) == 90


async def execute(database_url: str, statement: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def test_no_transaction_waits_for_the_object_store(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two replicas get the same records at the same time: both write, one counts, the other leaves it."""
    async with (
        wired(database_url, tmp_path) as (one, reader, _, store, _),
        wired(database_url, tmp_path) as (other, _, _, _, _),
    ):
        put = store.put
        open_transactions = []

        async def slow(path: str, data: bytes | Path) -> None:
            connection = await asyncpg.connect(database_url)
            try:
                open_transactions.append(
                    await connection.fetchval(
                        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                        "AND state LIKE 'idle in transaction%'"
                    )
                )
            finally:
                await connection.close()
            await other.on_predictions(sent)
            await put(path, data)

        sent = records([prediction_batch(range(5)), prediction_batch(range(5, 9))])
        monkeypatch.setattr(store, "put", slow)
        await one.on_predictions(sent)
        assert open_transactions == [0]
        assert await count(reader) == 9


async def test_what_the_database_refuses_is_buried_alone(database_url: str, tmp_path: Path) -> None:
    """Whatever the checks here miss: one record leaves, the others behind it do not wait for ever."""
    buried: list[Record] = []

    async def bury(record: Record, _reason: str) -> None:
        buried.append(record)

    said = [
        Record(OUTCOMES.name, bytes(16), outcome_batch(outcome(n, float(n))).SerializeToString())
        for n in range(9)
    ]
    sent = records([prediction_batch([n], rows=1) for n in range(9)])
    async with wired(database_url, tmp_path, direct_rows=10_000) as (consumers, reader, _, _, _):
        await execute(database_url, "ALTER TABLE analytics.outcomes ADD CHECK (number <> 6)")
        refused = prediction_batch([4], rows=1).batch_id.hex()
        await execute(
            database_url, f"ALTER TABLE analytics.claims ADD CHECK (batch_id <> '\\x{refused}'::bytea)"
        )
        await deliver(said, consumers.on_outcomes, bury)
        await deliver(sent, consumers.on_predictions, bury)
        assert buried == [said[6], sent[4]]
        assert await count(reader) == 8
        means = await reader.ask("cancer", queries.accuracies)
        assert [row["n"] for row in means] == [7]


async def test_what_was_said_last_counts_also_where_it_was_said_before(
    database_url: str, tmp_path: Path
) -> None:
    """1, then 0, then 1 again, each known by what it says; redelivered in any order."""
    said = [
        outcome(1, value, event=f"said {value}", observed_at_us=10 * place)
        for place, value in enumerate([1.0, 0.0, 1.0], 1)
    ]
    orders = [said, said[::-1], [said[1], said[0], said[2]], said[:2]]
    async with wired(database_url, tmp_path) as (consumers, reader, _, _, _):
        await consumers.on_predictions(records([prediction_batch([1])]))
        for order in orders:
            batches = [outcome_batch(one) for one in order] + [outcome_batch(*order)]
            await consumers.on_outcomes(
                [Record(OUTCOMES.name, bytes(16), batch.SerializeToString()) for batch in batches]
            )
            (mean,) = await reader.ask("cancer", queries.outcome_means)
            assert (mean["n"], mean["mean"]) == (1, 1.0)


async def test_records_wait_for_the_signature_that_says_which_output_is_the_answer(
    database_url: str, tmp_path: Path
) -> None:
    batch = prediction_batch(range(10), version="9")
    batch.outputs.insert(0, Tensor(name="a", datatype=batch.outputs[0].datatype, shape=[10], data=bytes(80)))
    labels = outcome_batch(*(outcome(n, "malignant" if n % 2 else "benign") for n in range(10)))
    swapped = Signature(prediction_output="label", classes=["malignant", "benign"])
    config = ServingConfig(model="cancer", versions=[ServedVersion(version="9", signature=swapped)])
    async with wired(database_url, tmp_path) as (consumers, reader, flusher, _, _):
        await consumers.on_predictions(records([batch]))
        await consumers.on_outcomes([Record(OUTCOMES.name, bytes(16), labels.SerializeToString())])
        assert await flusher.flush_due() == 0
        (before,) = await reader.ask("cancer", queries.accuracies)
        assert (before["n"], before["unmapped"]) == (0, 10)
        reader._signatures.apply(b"cancer", config.SerializeToString())
        await reader._signatures.save(reader._engine)
        await flusher.flush_due()
        (after,) = await reader.ask("cancer", queries.accuracies)
        assert (after["n"], after["correct"], after["unmapped"]) == (10, 0.0, 0)
    async with wired(database_url, tmp_path) as (_, reader, _, _, _):
        await reader._signatures.load(reader._engine)
        assert await reader.ask("cancer", queries.accuracies) == [after]


async def test_only_time_that_passed_makes_records_due(database_url: str, tmp_path: Path) -> None:
    clock, most = ManualClock(), 1_000_000
    async with wired(database_url, tmp_path, most, clock=clock, flush_rows=most) as (
        consumers,
        _,
        flusher,
        *_,
    ):
        await consumers.on_predictions(records([prediction_batch(range(10))]))
        clock.set(-3600)
        assert await flusher.flush_due() == 0, "they seem to come in an hour"
        clock.advance(11)
        assert await flusher.flush_due() == 1
        await consumers.on_predictions(records([prediction_batch(range(10, 20), version="9")]))
        clock.set(7200)
        assert await flusher.flush_due() == 0, "nobody waited two hours for the signature"
        clock.advance(599)
        assert await flusher.flush_due() == 0
        clock.advance(2)
        assert await flusher.flush_due() == 1


async def test_a_question_that_takes_too_long_is_ended_and_the_next_one_answered(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(connection: duckdb.DuckDBPyConnection) -> int:
        connection.execute("SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b")
        return 0

    async with wired(database_url, tmp_path) as (consumers, reader, _, _, _):
        await consumers.on_predictions(records([prediction_batch([1, 2])]))
        monkeypatch.setattr(reading, "_QUERY_S", 0.5)
        with pytest.raises(DeadlineExceeded):
            await reader.ask("cancer", endless)
        monkeypatch.undo()
        gone = asyncio.ensure_future(reader.ask("cancer", endless))
        await asyncio.sleep(0.5)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert await count(reader) == 2


async def test_flushing_and_joining_keep_every_row(database_url: str, tmp_path: Path) -> None:
    """Records with and without payload, of two layouts, some of them tried again in another object."""
    async with wired(database_url, tmp_path, direct_rows=10_000) as (consumers, reader, flusher, _, _):
        for start in range(0, 100, 10):
            batches = [
                prediction_batch(range(start, start + 10), payload=start % 20 == 0),
                prediction_batch([start], attempts=1, version="2", latency_us=7_000),
            ]
            await consumers.on_predictions(records(batches))
            assert await flusher.flush_due() == 2
        assert await flusher.join_small() == 3
        assert await flusher.join_small() == 0
        assert await flusher.flush_due() == 0
        found = {row["version"]: row["requests"] for row in await reader.ask("cancer", queries.summary)}
        assert found == {"1": 90, "2": 10}
        lookup = await reader.find(request_id(20))
        assert [(row["version"], row["attempt"]) for row in lookup.rows] == [("2", 1), ("1", 0)]
        assert lookup.rows[1]["output:label"][0] == [0]


async def test_what_is_written_at_once_is_bounded_in_bytes(database_url: str, tmp_path: Path) -> None:
    batches = [prediction_batch(range(start, start + 10)) for start in range(0, 50, 10)]
    sizes = [len(batch.SerializeToString()) for batch in batches]
    async with wired(
        database_url, tmp_path, direct_rows=10_000, flush_bytes=2 * max(sizes), join_bytes=4 * 8_000
    ) as (consumers, reader, flusher, _, _):
        await consumers.on_predictions(records(batches))
        written = [await flusher.flush_due() for _ in range(4)]
        assert written == [1, 1, 1, 0]
        connection = await asyncpg.connect(database_url)
        try:
            sizes = [row["size"] for row in await connection.fetch("SELECT size FROM analytics.segments")]
            assert len(sizes) == 3
            await connection.execute("UPDATE analytics.segments SET size = 15000")
            await flusher.join_small()
            live = "SELECT count(*) FROM analytics.segments WHERE dropped_at IS NULL"
            assert await connection.fetchval(live) == 2
        finally:
            await connection.close()
        assert await count(reader) == 50


async def test_questions_fetch_nothing_before_it_is_their_turn(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetching, most, go = 0, 0, asyncio.Event()
    read = repository.inbox

    async def counted(session: AsyncSession, model: str) -> list[bytes]:
        nonlocal fetching, most
        fetching += 1
        most = max(most, fetching)
        await go.wait()
        fetching -= 1
        return await read(session, model)

    monkeypatch.setattr(repository, "inbox", counted)
    async with wired(database_url, tmp_path, direct_rows=10_000) as (consumers, reader, _, _, _):
        await consumers.on_predictions(records([prediction_batch([1])]))
        asked = [asyncio.ensure_future(count(reader)) for _ in range(8)]
        await eventually(lambda: fetching == 2)
        await asyncio.sleep(0.3)  # for a third
        go.set()
        assert await asyncio.gather(*asked) == [1] * 8
        assert most == 2


async def test_one_version_that_cannot_be_written_stops_no_other(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with wired(database_url, tmp_path, direct_rows=10_000) as (consumers, reader, flusher, store, _):
        put = store.put

        async def refusing(path: str, data: bytes | Path) -> None:
            if "/1/" in path:
                raise OSError("no space left")
            await put(path, data)

        monkeypatch.setattr(store, "put", refusing)
        batches = [prediction_batch(range(n, n + 5), version=str(1 + n % 2)) for n in range(0, 80, 5)]
        await consumers.on_predictions(records(batches))
        assert await flusher.flush_due() == 1
        monkeypatch.setattr(store, "put", put)
        assert await flusher.flush_due() == 1
        assert await count(reader) == 80


async def test_old_claims_are_forgotten_in_pieces(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "AT_ONCE", 1)
    async with wired(database_url, tmp_path) as (_, _, flusher, _, _):
        await execute(
            database_url,
            "INSERT INTO analytics.claims SELECT decode(md5(n::text), 'hex'), now() - interval '1 day' * n "
            "FROM generate_series(1, 45) AS n",
        )
        assert await flusher.forget_claims() == 4
        connection = await asyncpg.connect(database_url)
        try:
            assert await connection.fetchval("SELECT count(*) FROM analytics.claims") in (13, 14)
        finally:
            await connection.close()


async def test_a_statement_that_takes_too_long_says_try_again(database_url: str) -> None:
    database = engine(database_url, "public", statement_timeout_s=0.05)
    try:
        with pytest.raises(Unavailable, match="too long"):
            async with transaction(database) as session:
                await session.execute(text("SELECT pg_sleep(5)"))
    finally:
        await database.dispose()


async def test_a_question_looks_again_where_an_object_has_just_been_joined_away(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with wired(database_url, tmp_path) as (consumers, reader, flusher, store, _):
        for start in (0, 10):
            await consumers.on_predictions(records([prediction_batch(range(start, start + 10))]))
        segments = repository.segments
        joined: list[int] = []

        async def then_joined(*given: Any) -> list[Any]:
            found = await segments(*given)
            if not joined:
                joined.append(await flusher.join_small())
                for row in found:
                    await store.delete(row.object)
            return found

        monkeypatch.setattr(repository, "segments", then_joined)
        assert await count(reader) == 20
        assert joined == [1]


async def test_without_its_database_it_is_not_ready_and_says_why(
    new_postgres: Callable[[], PostgresServer], new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> None:
    database, bootstrap = await asyncio.to_thread(new_postgres), new_tansu().url
    await ensure_topics(bootstrap, all_topics())
    async with running(database.database_url("postgres"), bootstrap, tmp_path) as client:
        assert (await client.get("/health/ready")).json()["ready"]
        await asyncio.to_thread(database.kill)
        answer = await eventually_of(
            lambda: client.get("/health/ready"), lambda said: said.status_code == 503
        )
        assert answer.json()["reasons"] == {"database": "The database does not answer."}


async def test_two_replicas_count_together(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> None:
    bootstrap = new_tansu().url
    await ensure_topics(bootstrap, all_topics())
    async with (
        KafkaBus(bootstrap, "test", session_timeout=2.0) as bus,
        running(database_url, bootstrap, tmp_path, **EAGER) as one,
        running(database_url, bootstrap, tmp_path, **LAZY) as other,
    ):
        for start in range(0, 600, 20):
            batch = prediction_batch(range(start, start + 20), model=f"model-{start % 7}")
            await bus.publish(records([batch, batch]))
        await caught_up(bootstrap)
        for client in (one, other):
            bodies = [
                await until(client, f"/v1/analytics/models/model-{number}", lambda body: body["requests"] > 0)
                for number in range(7)
            ]
            assert sum(body["requests"] for body in bodies) == 600


def shadow_record(batch: int, requests: int, *, equal: int) -> Record:
    verdicts = [ShadowVerdict.SHADOW_VERDICT_EQUAL] * equal
    verdicts += [ShadowVerdict.SHADOW_VERDICT_DIFFERENT] * (requests - equal)
    value = ShadowComparison(
        batch_id=batch.to_bytes(16, "big"),
        model="cancer",
        version="1",
        shadow_version="2",
        compared_at_us=START_US,
        request_ids=bytes(16 * requests),
        codes=[Code.CODE_OK] * requests,
        shadow_codes=[Code.CODE_OK] * requests,
        latency_us=[1_000] * requests,
        shadow_latency_us=[1_500] * requests,
        verdicts=verdicts,
        rows=[1] * requests,
        rows_equal=[2 - verdict for verdict in verdicts],
    )
    return Record(SHADOWS.name, b"cancer/2", value.SerializeToString())


async def test_shadow_comparisons_are_counted_once_and_reported(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> None:
    bootstrap = new_tansu().url
    await ensure_topics(bootstrap, all_topics())
    async with (
        KafkaBus(bootstrap, "test", session_timeout=2.0) as bus,
        running(database_url, bootstrap, tmp_path, **LAZY) as client,
    ):
        assert (await client.get("/v1/shadows/cancer")).status_code == 404
        sent = [shadow_record(number, 100, equal=95) for number in range(1, 11)]
        await bus.publish([*sent, *sent[:4], Record(SHADOWS.name, b"cancer/2", b"\xff\xff")])
        body = await until(client, "/v1/shadows/cancer", lambda body: body["shadows"][0]["requests"] >= 1000)
        (shadow,) = body["shadows"]
        assert (shadow["version"], shadow["shadow_version"]) == ("1", "2")
        assert shadow["requests"] == 1000
        assert shadow["verdicts"] == {"equal": 950, "different": 50, "failed": 0, "incomparable": 0}
        assert shadow["match"]["rate"] == 0.95
        assert shadow["latency_ms"]["mean_difference"] == pytest.approx(0.5)
        only = await client.get("/v1/shadows/cancer", params={"shadow_version": "3"})
        assert only.status_code == 404


async def test_what_is_too_old_or_too_much_goes_its_object_after_its_row(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repository, "KEPT_DROPPED", timedelta(0))
    monkeypatch.setattr(repository, "AT_ONCE", 2)
    now_us = SystemClock().unix_us()
    async with wired(database_url, tmp_path, retention=Retention(timedelta(days=30))) as (
        consumers,
        reader,
        flusher,
        store,
        _,
    ):
        for number in range(8):
            age_us = 40 * 86_400_000_000 if number < 5 else 0
            batch = prediction_batch([number], answered_at_us=now_us - age_us + number)
            await consumers.on_predictions(records([batch]))
            await flusher.flush_due()
        assert len(await store.list("predictions")) == 8
        assert await flusher.forget_old() == 5
        assert await count(reader) == 3
        assert len(await store.list("predictions")) == 8
        while await flusher.forget():
            pass
        assert len(await store.list("predictions")) == 3
    sizes = [info.size for info in await _objects(tmp_path)]
    room = Retention(prediction_bytes=sum(sizes) - 1)
    async with wired(database_url, tmp_path, retention=room) as (_, reader, flusher, _, _):
        assert await flusher.forget_old() == 1
        assert await count(reader) == 2


async def _objects(folder: Path) -> Sequence[ObjectInfo]:
    store = ArtifactStore(f"file://{folder}/store")
    try:
        return await store.list("predictions")
    finally:
        await store.close()


async def test_objects_of_a_crashed_write_are_swept_and_never_counted_afterwards(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with wired(database_url, tmp_path, direct_rows=10_000) as (consumers, reader, flusher, store, _):
        await consumers.on_predictions(records([prediction_batch(range(10))]))
        name = SegmentWriter.name

        async def late(self: SegmentWriter, *given: Any) -> None:
            monkeypatch.setattr(repository, "KEPT_UNNAMED", timedelta(0))
            assert await flusher.sweep() == 1
            await name(self, *given)

        monkeypatch.setattr(SegmentWriter, "name", late)
        assert await flusher.flush_due() == 0
        assert not await store.list("predictions")
        assert await count(reader) == 10
        monkeypatch.setattr(SegmentWriter, "name", name)
        assert await flusher.flush_due() == 1
        assert await flusher.sweep() == 0
        assert await count(reader) == 10
        assert len(await store.list("predictions")) == 1


async def test_no_transaction_is_open_while_the_inbox_is_written(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with wired(database_url, tmp_path, direct_rows=10_000) as (consumers, reader, flusher, store, _):
        put, opened = store.put, []

        async def watched(path: str, data: bytes | Path) -> None:
            connection = await asyncpg.connect(database_url)
            try:
                opened.append(
                    await connection.fetchval(
                        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                        "AND state LIKE 'idle in transaction%'"
                    )
                )
            finally:
                await connection.close()
            await put(path, data)

        monkeypatch.setattr(store, "put", watched)
        for start in range(0, 20, 10):
            await consumers.on_predictions(records([prediction_batch(range(start, start + 10))]))
            await flusher.flush_due()
        await flusher.join_small()
        assert opened == [0, 0, 0]
        assert await count(reader) == 20


async def test_one_replica_at_a_time_keeps_house(database_url: str, tmp_path: Path) -> None:
    async with (
        wired(database_url, tmp_path) as (_, _, one, _, _),
        wired(database_url, tmp_path) as (_, _, other, _, _),
    ):
        lease = timedelta(seconds=30)
        assert [await one._hold(lease), await other._hold(lease), await one._hold(lease)] == [1, 0, 1]
        assert await one._hold(-lease) == 1
        assert [await other._hold(lease), await one._hold(lease)] == [1, 0]


async def test_a_lease_of_before_the_clock_was_set_back_is_over(database_url: str, tmp_path: Path) -> None:
    async with wired(database_url, tmp_path) as (_, _, one, _, _):
        now, lease = datetime(2026, 1, 1, tzinfo=UTC), timedelta(seconds=30)

        async def held(holder: bytes, since: datetime, lasts: timedelta = lease) -> bool:
            async with transaction(one._engine) as session:
                return await repository.hold(session, "what", holder, since, since + lasts)

        assert await held(b"dead", now)
        assert not await held(b"other", now - timedelta(seconds=60))  # clocks of two replicas
        assert not await held(b"other", now, -lease)
        assert await held(b"other", now - timedelta(hours=1))
        assert not await held(b"dead", now - timedelta(hours=1))
