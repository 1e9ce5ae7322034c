"""Results as JSON Lines and Parquet, and progress as events."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from headrace.v1.batch_pb2 import InputFormat, OutputFormat
from headrace.v1.control_pb2 import LoadedVersion, WorkerStatus
from headrace.v1.dataplane_pb2 import Priority
from headrace.v1.tensor_pb2 import Code

from services.common.clock import ManualClock
from services.common.errors import ResourceExhausted
from services.gateway.jobs.backend import Availability
from services.gateway.jobs.events import as_events
from services.gateway.jobs.formats import as_json_lines, as_parquet, json_lines
from services.gateway.jobs.views import Job, JobError, job_json
from services.gateway.jobs.watching import Watching
from services.gateway.pools import Pools, Speed
from tests.fixtures.followed import Followed

ROWS = 1500


def batch(first: int = 0, ids: list[str | None] | None = None) -> pa.RecordBatch:
    """Every kind of column that a worker writes."""
    numbers = np.arange(first, first + ROWS)
    flat = pa.array((numbers[:, None] + np.linspace(0, 0.9, 6, dtype=np.float32)).reshape(-1), pa.float32())
    columns: dict[str, Any] = {"row": pa.array(numbers, pa.uint64())}
    if ids is not None:
        columns["custom_id"] = pa.array(ids, pa.string())
    columns |= {
        "label": pa.array(numbers % 3, pa.int64()),
        "odd": pa.array(numbers % 2 == 1),
        "score": pa.array([0.1, float("nan"), float("inf")] * (ROWS // 3), pa.float32()),
        "half": pa.array(np.full(ROWS, 0.5, np.float16)),
        "grid": pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, 3), 2),
        "tokens": pa.array([list(range(n % 4)) for n in range(ROWS)], pa.list_(pa.int64())),
        "text": pa.array(["é"] * ROWS),
        "raw": pa.array([b"\xff\x00a"] * ROWS, pa.binary()),
    }
    return pa.record_batch(columns)


async def stream(*batches: pa.RecordBatch) -> AsyncIterator[pa.RecordBatch]:
    for one in batches:
        yield one


async def test_json_lines_hold_every_kind_of_output() -> None:
    told = b"".join([piece async for piece in as_json_lines(stream(batch(), batch(ROWS)))])
    lines = [json.loads(line) for line in told.splitlines()]
    assert [line["row"] for line in lines] == list(range(2 * ROWS))
    for row in (0, 1, 511, 512, 1499, 1500, 2999):
        outputs = lines[row]["outputs"]
        assert outputs["label"] == row % 3
        assert outputs["odd"] is (row % 2 == 1)
        assert outputs["score"] == [0.1, None, None][row % 3]
        assert outputs["half"] == 0.5
        assert np.allclose(outputs["grid"], row + np.linspace(0, 0.9, 6).reshape(2, 3), rtol=1e-6)
        assert outputs["tokens"] == list(range((row % ROWS) % 4))
        assert outputs["text"] == "é"
        assert outputs["raw"] == "\ufffd\x00a"
    assert b'"score":0.1,' in told  # FP32 as it was meant, not 0.10000000149


def test_ids_stand_where_a_row_has_one() -> None:
    lines = [json.loads(line) for line in json_lines(batch(ids=["a", None] * (ROWS // 2))).splitlines()]
    assert lines[0]["custom_id"] == "a"
    assert "custom_id" not in lines[1]


async def test_parquet_has_the_same_columns_whatever_chunks_had_ids() -> None:
    some = batch(ROWS, ids=["a", None] * (ROWS // 2))
    for batches in ([batch(), some], [some, batch()], [some]):
        told = b"".join([piece async for piece in as_parquet(stream(*batches))])
        table = pq.read_table(io.BytesIO(told))
        assert table.column_names[:2] == ["row", "custom_id"]
        wanted = [row for one in batches for row in one.column("row").to_pylist()]
        assert table.column("row").to_pylist() == wanted
        assert table.column("custom_id").to_pylist().count("a") == ROWS // 2
        assert table.column("grid").type == some.column("grid").type or table.num_rows


async def test_no_results_are_a_file_too() -> None:
    told = b"".join([piece async for piece in as_parquet(stream())])
    assert pq.read_table(io.BytesIO(told)).num_rows == 0
    assert [piece async for piece in as_json_lines(stream())] == []


async def test_parquet_is_written_while_it_is_read() -> None:
    wide = pa.record_batch({"row": pa.array(range(8192), pa.uint64()), "v": pa.array([b"x" * 512] * 8192)})
    read, pieces = 0, 0

    async def counted() -> AsyncIterator[pa.RecordBatch]:
        nonlocal read
        for _ in range(40):
            read += 1
            yield wide

    async for _piece in as_parquet(counted()):
        pieces += 1
        assert read <= 6 * pieces  # no more than a row group is held
    assert read == 40


NOW = datetime(2026, 1, 1, tzinfo=UTC)
JOB = Job(
    job_id="j",
    key_id="k",
    kind="batch",
    model="m",
    version="1",
    pool="default",
    state="in_progress",
    total=10,
    rows=10,
    completed=1,
    failed=0,
    rows_per_s=1.0,
    time_left_s=9.0,
    input_uri="",
    input_format=InputFormat.INPUT_FORMAT_JSON_LINES,
    output_format=OutputFormat.OUTPUT_FORMAT_JSON_LINES,
    priority=Priority.PRIORITY_NORMAL,
    callback_url="",
    metadata={},
    exclude_from=("drift",),
    error=None,
    created_at=NOW,
    in_progress_at=NOW,
    cancelling_at=None,
    ended_at=None,
    expires_at=NOW,
    revision=4,
)


def test_a_job_of_another_release_is_shown() -> None:
    """Older releases took any number for an enumeration, and newer ones may know more of them."""
    odd = replace(JOB, priority=7, input_format=99, output_format=0)  # type: ignore[arg-type]
    shown = job_json(odd)
    assert [shown[name] for name in ("priority", "input_format", "output_format")] == [None] * 3
    assert shown.keys() == job_json(JOB).keys()


def test_a_job_is_shown_with_its_error() -> None:
    failed = replace(JOB, state="failed", error=JobError(Code.CODE_NOT_FOUND, "Gone.", "input_uri"))
    shown = job_json(failed)
    assert shown["error"] == {"code": "NOT_FOUND", "message": "Gone.", "field": "input_uri"}
    assert shown["created_at"] == "2026-01-01T00:00:00.000Z"
    assert "callback_url" not in shown
    assert "error" not in job_json(JOB)


async def test_events_beat_while_nothing_happens_and_end_with_the_job() -> None:
    go = asyncio.Event()
    closed = []

    async def changes() -> AsyncGenerator[Job, None]:
        try:
            yield JOB
            await go.wait()
            yield replace(JOB, state="completed", ended_at=NOW, revision=5)
        finally:
            closed.append(True)

    told = []
    async for piece in as_events(changes(), heartbeat_s=0.01):
        told.append(piece)
        if len(told) == 3:
            go.set()
    assert told[0].startswith(b"retry: 2000\n\nid: 4\nevent: progress\ndata: {")
    assert told[1] == told[2] == b": still there\n\n"
    assert told[-1].startswith(b"id: 5\nevent: end\n")
    assert closed == [True]


async def test_a_reader_that_goes_ends_its_source() -> None:
    closed = asyncio.Event()

    async def changes() -> AsyncGenerator[Job, None]:
        try:
            yield JOB
            await asyncio.sleep(60)
        finally:
            closed.set()

    events = as_events(changes())
    await anext(events)
    await events.aclose()
    assert closed.is_set()


async def test_followers_end_with_the_process() -> None:
    watching = Watching(Availability(is_configured=True), ManualClock())
    early, late = watching.follow(JOB), watching.follow(JOB)
    assert await anext(early) is JOB
    waiting = asyncio.ensure_future(anext(early, None))
    await asyncio.sleep(0)
    watching.close()
    assert await waiting is None
    assert [job async for job in late] == [JOB]  # it is told how things stand, and no more


async def test_followers_are_bounded() -> None:
    watching = Watching(Availability(is_configured=True), ManualClock())
    ended = replace(JOB, ended_at=NOW)
    for _ in range(3000):  # one after the other they are no crowd
        assert [job async for job in watching.follow(ended)] == [ended]
    followers = [watching.follow(JOB) for _ in range(2001)]
    for one in followers[:2000]:
        await anext(one)
    with pytest.raises(ResourceExhausted):
        await anext(followers[-1])
    for one in followers:
        await one.aclose()


def heartbeat(name: str, rate: float, **changes: Any) -> bytes:
    loaded = LoadedVersion(model="m", version="1", best_rows=64, best_rows_per_s=rate)
    values: dict[str, Any] = {"worker_id": name, "pool": "gpu", "interval_ms": 1000} | changes
    return WorkerStatus(versions=[loaded], **values).SerializeToString()


def test_a_pool_is_as_fast_as_its_median_worker() -> None:
    clock = ManualClock()
    pools = Pools(clock)
    pools.table = Followed()

    def beat(name: str, rate: float, **changes: Any) -> None:
        pools.apply(name.encode(), heartbeat(name, rate, **{"sent_at_us": clock.unix_us()} | changes))

    assert pools.speed("gpu", "m", "1") == Speed(0, 0, 0.0)
    for name, rate in (("a", 100.0), ("b", 300.0), ("c", 200.0)):
        beat(name, rate)
    beat("gone", 1.0, state=WorkerStatus.STATE_GONE)
    beat("other", 1.0, pool="cpu")
    assert pools.speed("gpu", "m", "1") == Speed(3, 64, 200.0)
    assert pools.speed("gpu", "m", "2") == Speed(3, 0, 0.0)
    clock.advance(10)
    beat("b", 300.0)
    assert pools.workers("gpu") == 1
    pools.apply(b"b", None)
    assert pools.workers("gpu") == 0


def test_who_is_alive_is_told_by_what_is_heard_not_by_what_clocks_say() -> None:
    clock = ManualClock()
    pools = Pools(clock)
    now_us = clock.unix_us()
    left = heartbeat("a", 1.0, sent_at_us=now_us)
    pools.apply(b"a", left)
    assert pools.workers("gpu") == 0, "nobody had listened: it may be long dead"
    pools.table = Followed()
    pools.apply(b"a", left)
    assert pools.workers("gpu") == 0, "the same words again are no heartbeat"
    for clocks_apart_us in (3600 * 10**6, -3600 * 10**6):
        pools.apply(b"a", heartbeat("a", 1.0, sent_at_us=now_us + clocks_apart_us))
        assert pools.workers("gpu") == 1, "its clock says something else"
        clock.set(3600)
        assert pools.workers("gpu") == 1, "ours was set meanwhile"
        clock.advance(2.9)
        assert pools.workers("gpu") == 1
        clock.advance(0.2)
        assert pools.workers("gpu") == 0


def held_by(pools: Pools) -> int:
    """Bytes of heartbeats, read or not."""
    held = 0
    for one in pools._heartbeats.values():
        held += len(one.value or b"") + (one.said.status.ByteSize() if one.said is not None else 0)
    return held


def test_nothing_is_kept_of_what_workers_said_who_have_left() -> None:
    """In containers each has a name of its own, and says last what it had loaded."""
    clock = ManualClock()
    pools = Pools(clock)
    pools.apply(b"before", heartbeat("before", 1.0))
    pools.table = Followed()
    for number in range(20):
        name = f"w{number}"
        pools.apply(name.encode(), heartbeat(name, 1.0))
        assert held_by(pools) <= 2 * len(heartbeat("w10", 1.0)), "nobody has asked yet"
        if number % 2:
            pools.apply(name.encode(), heartbeat(name, 1.0, state=WorkerStatus.STATE_GONE))
        clock.advance(10)
    last = heartbeat("last", 2.0)
    pools.apply(b"last", last)
    pools.apply(b"nonsense", b"\xff")
    assert pools.speed("gpu", "m", "1") == Speed(1, 64, 2.0)
    assert held_by(pools) == len(last)
    pools.apply(b"w1", heartbeat("w1", 1.0, state=WorkerStatus.STATE_GONE))
    pools.apply(b"w2", heartbeat("w2", 1.0))
    assert pools.workers("gpu") == 1, "the same words again are no heartbeat"


@pytest.mark.parametrize("kind", ["uint8", "int8", "float64", "uint64"])
def test_integers_of_every_width(kind: str) -> None:
    column = np.array([0, 1], kind)
    line = json_lines(pa.record_batch({"row": pa.array([5, 6], pa.uint64()), "v": pa.array(column)}))
    assert [json.loads(one) for one in line.splitlines()] == [
        {"row": 5, "outputs": {"v": 0}},
        {"row": 6, "outputs": {"v": 1}},
    ]
