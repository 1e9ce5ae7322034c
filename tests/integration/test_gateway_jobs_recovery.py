"""Jobs go on whatever goes away: a gateway, the broker's data, the database; and they are forgotten in
time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import func, inspect, select, text

from deploy.embedded.postgres import PostgresServer
from services.common.bus import MemoryBus
from services.common.clock import ManualClock, SystemClock
from services.common.db import engine, transaction
from services.common.errors import Fatal
from services.common.objects import ArtifactStore, InputSources
from services.gateway.jobs.backend import Backend
from services.gateway.jobs.changes import JobChanges
from services.gateway.jobs.publishing import output_prefix
from services.gateway.jobs.repository import JobRepository
from services.gateway.jobs.retention import Retention
from services.gateway.jobs.tables import JobRow
from tests.fixtures.gateway import ADMIN, running_gateway
from tests.fixtures.gateway_jobs import Jobs, jobs
from tests.fixtures.jobs import PARTITIONS, lines_of, numbers
from tests.fixtures.waiting import PATIENCE_S, eventually_of

VALUES = numbers(60_000)


async def begun(here: Jobs, **body: Any) -> str:
    """A job of 60,000 rows of which some are done, and which does not go on by itself."""
    here.worker.gate.set()
    if not (here.data / "a.jsonl").exists():  # written again, it would be another input
        (here.data / "a.jsonl").write_bytes(lines_of(VALUES))
    batch_id = await here.submitted(input_uri=f"file://{here.data}/a.jsonl", **body)
    await here.until(batch_id, lambda job: job["counts"]["completed"] > 0)
    here.worker.gate.clear()
    return batch_id


async def check(here: Jobs, batch_id: str) -> None:
    """The job completes, and every row has its result once."""
    job = await here.ended(batch_id)
    assert job["status"] == "completed", job
    assert job["counts"] == {"total": len(VALUES), "completed": len(VALUES), "failed": 0}
    found = await here.lines(f"/v1/batch/{batch_id}/results")
    assert [line["row"] for line in found] == list(range(len(VALUES)))
    assert [line["outputs"]["doubled"] for line in found] == [2 * value for value in VALUES]


async def test_a_broker_that_loses_everything(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path) as here:
        batch_id = await begun(here)
        here.running.bus.lose_everything()
        here.worker.gate.set()
        await check(here, batch_id)


async def test_a_gateway_that_goes_with_its_broker_and_its_worker(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path) as here:
        batch_id = await begun(here)
    async with jobs(database_url, tmp_path) as here:
        await check(here, batch_id)


async def test_two_gateways_share_jobs_and_one_goes(database_url: str, tmp_path: Path) -> None:
    bus = MemoryBus()
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
    shared: dict[str, Any] = {
        "artifact_store_url": f"file://{tmp_path}/artifacts",
        "batch_input_allow": (f"file://{folders[0]}/data/",),
    }
    own: dict[str, Any] = {"database_url": database_url, "batch_partitions": PARTITIONS}
    async with jobs(database_url, folders[0], bus, **shared) as stays:
        stays.worker.store = ArtifactStore(shared["artifact_store_url"])
        async with running_gateway(folders[1] / "state", bus=bus, **own, **shared) as goes:
            headers = {"authorization": f"Bearer {ADMIN}"}
            async with httpx.AsyncClient(base_url=goes.base, headers=headers, timeout=PATIENCE_S) as rest:
                other = Jobs(goes, stays.worker, rest, stays.data)
                await other.reachable()
                many = [await begun(one) for one in (stays, other)]
                stays.worker.gate.set()
                # Followed at either gateway, whichever of them takes the results.
                seen = [
                    line
                    async for line in _lines(rest, f"/v1/batch/{many[0]}/events")
                    if line.startswith("event: ")
                ]
                assert seen[-1] == "event: end"
                many.append(await begun(other))
        stays.worker.gate.set()
        for batch_id in many:
            await check(stays, batch_id)


async def _lines(rest: httpx.AsyncClient, path: str) -> AsyncIterator[str]:
    async with rest.stream("GET", path) as answer:
        async for line in answer.aiter_lines():
            yield line


async def test_a_database_that_goes_away(new_postgres: Any, tmp_path: Path) -> None:
    server: PostgresServer = await asyncio.to_thread(new_postgres)
    async with jobs(server.url, tmp_path) as here:
        batch_id = await begun(here)
        await asyncio.to_thread(server.kill)
        here.worker.gate.set()
        answer = await here.rest.get(f"/v1/batch/{batch_id}")
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        predicted = await here.rest.post("/v1/predict", json={"model": "cancer", "inputs": [[1.0, 2.0, 3.0]]})
        assert predicted.status_code == 200
        assert (await here.rest.get("/health/ready")).status_code == 200
        await asyncio.to_thread(server.start, PATIENCE_S)
        await here.reachable()
        await check(here, batch_id)


async def test_a_gateway_without_a_database_takes_no_jobs_and_serves(tmp_path: Path) -> None:
    headers = {"authorization": f"Bearer {ADMIN}"}
    never = "postgresql://nobody:x@127.0.0.1:1/none"
    store = f"file://{tmp_path}/artifacts"
    cases: tuple[tuple[dict[str, Any], int], ...] = (
        ({}, 501),
        ({"database_url": never, "artifact_store_url": store}, 503),
        ({"database_url": never, "artifact_store_url": "file:///proc/none/x"}, 503),
    )
    for settings, status in cases:
        async with (
            running_gateway(tmp_path / "state", **settings) as running,
            httpx.AsyncClient(base_url=running.base, headers=headers, timeout=PATIENCE_S) as rest,
        ):
            body = {"model": "cancer", "inputs": [[1.0, 2.0, 3.0]]}
            assert (await rest.post("/v1/batch", json=body)).status_code == status
            assert (await rest.post("/v1/predict", json=body)).status_code == 200


async def test_what_is_old_is_forgotten(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path) as here:
        here.worker.inline_bytes = 0
        cancelled = await begun(here)
        await here.rest.delete(f"/v1/batch/{cancelled}")
        here.worker.gate.set()
        await here.ended(cancelled)
        large = [{"x": 1}] * 20_000  # more than travels with the job
        completed = await here.submitted(inputs=large)
        await here.ended(completed)
    store = ArtifactStore(f"file://{tmp_path}/artifacts")
    backend = Backend(engine(database_url, "gateway"), store, InputSources(store, ()))
    clock = ManualClock(SystemClock().unix_us())
    retention = Retention(backend, clock, timedelta(days=30))
    assert {one.path.split("/")[2] for one in await store.list("files")} == {completed}
    # A second attempt wrote other bytes, and its result came too late to be taken.
    await store.put(f"{output_prefix(completed)}/00000000.of-no-record.arrow", b"rows")
    assert len(await store.list("jobs")) > 2
    assert await retention.look() == 0
    clock.advance(2 * 24 * 3600)
    assert await retention.look() == 0
    async with transaction(backend.engine) as session:
        assert all(row.is_forgotten for row in await JobRepository(session).jobs([cancelled, completed]))
    assert len(await store.list("jobs")) > 2
    clock.advance(29 * 24 * 3600)
    assert await retention.look() == 2
    assert await retention.look() == 0
    async with transaction(backend.engine) as session:
        assert await JobRepository(session).jobs([cancelled, completed]) == []
    assert [one.path for folder in ("files", "jobs") for one in await store.list(folder)] == []
    await backend.engine.dispose()
    await backend.sources.close()
    await store.close()


async def test_where_many_jobs_are_looked_at_no_rows_come_along(database_url: str, tmp_path: Path) -> None:
    """Up to 64 KB each: two thousand that are followed would be 128 MB a look."""
    async with jobs(database_url, tmp_path) as here:
        here.worker.gate.clear()
        job_id = await here.submitted(inputs=[{"x": 1}])
    database = engine(database_url, "gateway")

    def bare(rows: Iterable[JobRow]) -> bool:
        return ["inline_input" in inspect(row).unloaded for row in rows] == [True]

    async with transaction(database) as session:
        assert bare(await JobRepository(session).jobs([job_id]))
    async with transaction(database) as session:
        assert bare(await JobRepository(session).page(None, (), {}, None, 10))
    async with transaction(database) as session:
        changes = JobChanges(session, SystemClock().now())
        locked = await changes.repository.locked([job_id])
        assert bare(locked.values())
        await changes.end(locked[job_id], "failed")
        await changes.finish()
    async with transaction(database) as session:
        job = await JobRepository(session).job(job_id)
        assert job is not None
        assert (job.state, job.inline_input) == ("failed", None)
    await database.dispose()


async def test_however_many_jobs_have_ended_workers_forget_them_in_time(
    database_url: str, tmp_path: Path
) -> None:
    """A look takes fifty, and the next one comes five minutes later: 14,400 jobs a day."""
    async with jobs(database_url, tmp_path) as here:
        ended = await here.submitted(inputs=[{"x": 1}])
        await here.ended(ended)
    store = ArtifactStore(f"file://{tmp_path}/artifacts")
    backend = Backend(engine(database_url, "gateway"), store, InputSources(store, ()))
    columns = [column.name for column in JobRow.__table__.columns]
    copied = ", ".join("'copy-' || n" if name == "job_id" else f'"{name}"' for name in columns)
    named = ", ".join(f'"{name}"' for name in columns)
    async with transaction(backend.engine) as session:
        await session.execute(
            text(f"INSERT INTO jobs ({named}) SELECT {copied} FROM jobs, generate_series(1, 120) AS n")
        )

    async def remembered() -> int:
        async with transaction(backend.engine) as session:
            left = select(func.count()).select_from(JobRow).where(JobRow.is_forgotten.is_(False))
            return int((await session.execute(left)).scalar_one())

    clock = ManualClock(SystemClock().unix_us() + 2 * 24 * 3600 * 1_000_000)
    assert await remembered() == 121
    async with Retention(backend, clock, timedelta(days=30)):
        await eventually_of(remembered, lambda left: left == 0)
    await backend.engine.dispose()
    await backend.sources.close()
    await store.close()


async def test_the_key_of_a_job_that_was_removed_makes_another(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path) as here:

        async def submitted() -> str:
            body = {"model": "cancer", "inputs": [{"x": 1}]}
            answer = await here.rest.post("/v1/batch", json=body, headers={"idempotency-key": "once"})
            assert answer.status_code == 202, answer.text
            return str(answer.json()["batch_id"])

        first = await submitted()
        await here.ended(first)
        assert await submitted() == first
        store = ArtifactStore(f"file://{tmp_path}/artifacts")
        backend = Backend(engine(database_url, "gateway"), store, InputSources(store, ()))
        clock = ManualClock(SystemClock().unix_us() + 2 * 3600 * 1_000_000)
        assert await Retention(backend, clock, timedelta(hours=1)).look() == 1
        assert await submitted() != first
        await backend.engine.dispose()
        await backend.sources.close()
        await store.close()


async def test_a_gateway_does_not_start_with_a_wrong_allow_list(tmp_path: Path) -> None:
    store = f"file://{tmp_path}/artifacts"
    settings: dict[str, Any] = {
        "database_url": "postgresql://nobody:x@127.0.0.1:1/none",
        "artifact_store_url": store,
        "batch_input_allow": ("http://inputs/",),
    }
    with pytest.raises(Fatal, match="BATCH_INPUT_ALLOW"):
        async with running_gateway(tmp_path / "state", **settings):
            pass
