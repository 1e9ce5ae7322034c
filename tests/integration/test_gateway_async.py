"""Predictions that are answered later, on a real PostgreSQL; the worker stands in."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
from headrace.v1.batch_pb2 import BatchChunk, BatchChunkResult

from services.common.bus import Record
from services.common.db import engine, transaction
from services.common.topics import DEPLOYMENTS
from services.gateway.jobs.specs import SHOWN
from services.gateway.jobs.tables import JobRow
from tests.fixtures.gateway import configs
from tests.fixtures.gateway_jobs import Jobs, jobs
from tests.fixtures.waiting import eventually_of


def says_one(chunk: BatchChunk) -> BatchChunkResult:
    """What a worker makes of one row of `cancer`."""
    table = pa.table({"row": np.array([0], np.uint64), "label": np.array([1])})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return BatchChunkResult(rows_done=1, results_inline=sink.getvalue())


async def deployed(here: Jobs, value: bytes | None, path: str, wanted: int) -> None:
    """Deploy `cancer` anew; return once the gateway answers `wanted` at `path`."""
    await here.running.bus.publish([Record(DEPLOYMENTS.name, b"cancer", value)])

    async def asked() -> httpx.Response:
        return await here.rest.get(path)

    await eventually_of(asked, lambda said: said.status_code == wanted)


async def test_an_answer_is_that_of_the_version_that_gave_it(database_url: str, tmp_path: Path) -> None:
    async with jobs(database_url, tmp_path) as here:
        here.worker.instead = says_one
        asked = await here.rest.post(
            "/v1/models/cancer/predict:async", json={"input": [10, 2, 3], "version": "1"}
        )
        assert asked.status_code == 202, asked.text
        request_id = asked.json()["id"]

        async def result() -> dict[str, Any]:
            answer = await here.rest.get(f"/v1/async/{request_id}?wait_s=10")
            assert answer.status_code == 200, answer.text
            said: dict[str, Any] = answer.json()
            return said

        first = await result()
        assert (first["status"], first["result"]["prediction"]) == ("completed", "benign")
        assert (await here.ended(request_id))["metadata"] == {"headrace.single": "true"}
        config = configs()[0]
        config.revision += 1
        del config.versions[1:], config.aliases["champion"], config.aliases["challenger"]
        config.versions[0].version = "3"
        config.versions[0].signature.classes[:] = ["benign", "malignant"]
        await deployed(here, config.SerializeToString(), "/v2/models/cancer/versions/3", 200)
        assert await result() == first
        await deployed(here, None, "/v2/models/cancer", 404)
        assert await result() == first


async def test_labels_are_never_those_of_another_version(database_url: str, tmp_path: Path) -> None:
    """Older releases kept nothing of the signature beside the job."""
    async with jobs(database_url, tmp_path) as here:
        here.worker.instead = says_one
        asked = await here.rest.post(
            "/v1/models/cancer/predict:async", json={"input": [10, 2, 3], "version": "1"}
        )
        assert asked.status_code == 202, asked.text
        request_id = asked.json()["id"]
        await here.ended(request_id)
        database = engine(database_url, "gateway")
        async with transaction(database) as session:
            job = await session.get_one(JobRow, request_id)
            job.version = "0"  # which this gateway has never heard of
            job.job_metadata = {name: value for name, value in job.job_metadata.items() if name != SHOWN}
        await database.dispose()
        said = (await here.rest.get(f"/v1/async/{request_id}")).json()
        assert (said["result"]["prediction"], said["result"]["outputs"]) == (None, {"label": [1]})
        await deployed(here, None, "/v2/models/cancer", 404)
        assert (await here.rest.get(f"/v1/async/{request_id}")).json() == said
