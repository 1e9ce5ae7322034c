"""Jobs through a whole gateway, on a real PostgreSQL: submitted, cut, published, counted, read, cancelled."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from services.common.objects import ArtifactStore, InputSources
from tests.fixtures.gateway import (
    ADMIN,
    Running,
    running_gateway,
)
from tests.fixtures.jobs import PARTITIONS, StandInWorker, arrow_of, lines_of, numbers, parquet_of
from tests.fixtures.servers import database_url as database_url
from tests.fixtures.servers import postgres_server as postgres_server
from tests.fixtures.servers import servers_directory as servers_directory

SECRET = "secret-of-callbacks"


@dataclass
class Jobs:
    """A gateway, a worker, and a client with the admin's key."""

    running: Running
    worker: StandInWorker
    rest: httpx.AsyncClient
    data: Path

    async def ended(self, batch_id: str, within_s: float = 20.0) -> dict[str, Any]:
        """The job once it has ended."""
        async with asyncio.timeout(within_s):
            while True:
                job: dict[str, Any] = (await self.rest.get(f"/v1/batch/{batch_id}")).json()
                if job["ended_at"] is not None:
                    return job
                await asyncio.sleep(0.05)

    async def submitted(self, **body: Any) -> str:
        """The id of a job."""
        answer = await self.rest.post("/v1/batch", json={"model": "cancer", **body})
        assert answer.status_code == 202, answer.text
        batch_id: str = answer.json()["batch_id"]
        return batch_id

    async def lines(self, path: str) -> list[dict[str, Any]]:
        """JSON Lines from a path."""
        answer = await self.rest.get(path)
        assert answer.status_code == 200, answer.text
        return [json.loads(line) for line in answer.text.splitlines()]


@asynccontextmanager
async def jobs(database_url: str, folder: Path, **settings: Any) -> AsyncIterator[Jobs]:
    """Once jobs can be taken."""
    data = folder / "data"
    data.mkdir(exist_ok=True)
    url = f"file://{folder}/artifacts"
    allow = ("store://files/", f"file://{data}/")
    store = ArtifactStore(url)
    sources = InputSources(store, allow)
    own = {
        "database_url": database_url,
        "artifact_store_url": url,
        "batch_input_allow": allow,
        "batch_partitions": PARTITIONS,
        "callback_secret": SECRET,
        "callback_allow": ("127.0.0.1",),
    }
    async with running_gateway(folder / "state", **(own | settings)) as running:
        headers = {"authorization": f"Bearer {ADMIN}"}
        async with httpx.AsyncClient(base_url=running.base, headers=headers, timeout=20) as rest:
            async with asyncio.timeout(30):
                while (await rest.get("/v1/batch")).status_code != 200:
                    await asyncio.sleep(0.05)
            async with StandInWorker(running.bus, store, sources).running() as worker:
                yield Jobs(running, worker, rest, data)
    await sources.close()
    await store.close()


async def test_every_format_gives_every_row_once(database_url: str, tmp_path: Path) -> None:
    values = numbers(5000)
    async with jobs(database_url, tmp_path) as here:
        (here.data / "a.jsonl").write_bytes(lines_of(values))
        (here.data / "a.csv").write_bytes(b"note,x\r\n" + b"".join(b'"a\nb",%d\r\n' % int(v) for v in values))
        (here.data / "a.parquet").write_bytes(parquet_of(values))
        (here.data / "a.arrow").write_bytes(arrow_of(values))
        for name in ("a.jsonl", "a.csv", "a.parquet", "a.arrow"):
            batch_id = await here.submitted(input_uri=f"file://{here.data}/{name}")
            job = await here.ended(batch_id)
            assert job["status"] == "completed", (name, job)
            assert job["counts"] == {"total": 5000, "completed": 5000, "failed": 0}, name
            assert job["rows_per_s"] > 0
            found = await here.lines(f"/v1/batch/{batch_id}/results")
            assert [line["row"] for line in found] == list(range(5000)), name
            assert [line["outputs"]["doubled"] for line in found] == [2 * value for value in values], name
            assert await here.lines(f"/v1/batch/{batch_id}/errors") == []
