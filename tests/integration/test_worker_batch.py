"""Batch chunks through a whole worker: a real ONNX model, real files, chunks in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from headrace.v1.batch_pb2 import BatchChunk, BatchChunkResult, BatchControl, InputFormat, InputRange
from headrace.v1.dataplane_pb2 import Origin
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code

from services.common.bus import MemoryBus, Record, port
from services.common.clock import SystemClock
from services.common.errors import DeadlineExceeded, HeadraceError
from services.common.objects.local_files import etag_of
from services.common.topics import JOB_CONTROL, PREDICTIONS
from services.worker.app import Worker, worker_app
from services.worker.batch.jobs import Jobs
from services.worker.batch.reading import ChunkReader
from services.worker.batch.rows import Inputs, Rows
from services.worker.batch.running import ChunkRun
from services.worker.batch.work import ChunkWork
from services.worker.settings import Settings
from tests.fixtures.batch import MemoryChunks, chunk_of, table_of
from tests.fixtures.deployments import config, put_artifact, record, served
from tests.fixtures.onnx_models import lookup, mlp
from tests.fixtures.waiting import PATIENCE_S, eventually


class Rig:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bus = MemoryBus()
        self.chunks = MemoryChunks()

    @asynccontextmanager
    async def worker(self, **changes: object) -> AsyncIterator[Worker]:
        given = {
            "kafka_bootstrap_servers": "unused:1",
            "internal_token": "a-token-for-tests-only",
            "artifact_store_url": f"file://{self.directory}/store",
            "state_dir": self.directory / "state",
            "frames_port": 0, "grpc_port": 0, "ops_port": 0,
            "linger_s": 0.05, "heartbeat_s": 0.2, "drain_s": 10.0,
            "batch_input_allow": (f"file://{self.directory}/data/", "store://files/"),
        }  # fmt: skip
        cfg = Settings.model_validate(given | changes)
        async with worker_app(cfg, SystemClock(), self.bus, lambda _topic, _group: self.chunks) as worker:
            yield worker

    async def deploy(self, built: tuple[bytes, object], model: str = "net", revision: int = 1) -> bytes:
        data, signature = built
        digest, _ = put_artifact(self.directory / "store", {"model.onnx": data})
        await self.bus.publish([record(config(model, revision, served("1", digest, signature)))])  # type: ignore[arg-type]  # a pair from onnx_models
        return data

    async def done(self, *chunks: BatchChunk) -> list[BatchChunkResult]:
        before = len(self.chunks.results())
        for chunk in chunks:
            self.chunks.put(chunk.SerializeToString())
        await eventually(lambda: len(self.chunks.results()) >= before + len(chunks))
        return self.chunks.results()[before:]

    def bytes_of(self, result: BatchChunkResult) -> bytes:
        if result.results_object:
            return (self.directory / "store" / result.results_object).read_bytes()
        return result.results_inline

    def logged(self) -> list[PredictionBatch]:
        return [PredictionBatch.FromString(value) for value in self.chunks.logged(PREDICTIONS.name)]


@pytest.fixture
async def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def expected(model: bytes, x: np.ndarray) -> np.ndarray:
    (answer,) = ort.InferenceSession(model).run(None, {"x": x})[:1]
    return np.asarray(answer)


def parquet_chunks(path: Path, x: np.ndarray, rows: int, **more: object) -> list[BatchChunk]:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({f"f{i}": x[:, i] for i in range(x.shape[1])}), path, row_group_size=len(x))
    return [
        BatchChunk(
            job_id="job", index=index, model="net", version="1", first_row=first,
            rows=min(rows, len(x) - first), output_prefix="jobs/job",
            input=InputRange(
                uri=f"file://{path}", format=InputFormat.INPUT_FORMAT_PARQUET,
                etag=etag_of(path.stat()), group=0, group_offset=first,
            ),
            **more,  # type: ignore[arg-type]  # fields of the message
        )
        for index, first in enumerate(range(0, len(x), rows))
    ]  # fmt: skip


async def test_a_parquet_file_is_answered_row_by_row_and_logged(rig: Rig, tmp_path: Path) -> None:
    model = await rig.deploy(mlp(features=8))
    x = np.random.default_rng(3).standard_normal((30_000, 8)).astype(np.float32)
    given = parquet_chunks(tmp_path / "data" / "in.parquet", x, 12_000, run_rows=512, exclude_from_drift=True)
    async with rig.worker(batch_payload_rows=8192):
        results = await rig.done(*given)

    results.sort(key=lambda result: result.index)  # two are written at the same time
    assert [(r.index, r.code, r.rows_done, r.rows_failed) for r in results] == [
        (0, Code.CODE_OK, 12_000, 0), (1, Code.CODE_OK, 12_000, 0), (2, Code.CODE_OK, 6000, 0),
    ]  # fmt: skip
    tables = pa.concat_tables([table_of(rig.bytes_of(result)) for result in results])
    assert tables["row"].to_pylist() == list(range(30_000))
    found = np.array(tables["y"].to_pylist(), np.float32)
    np.testing.assert_allclose(found, expected(model, x), rtol=1e-5)
    assert sorted(rig.chunks.settled) == [0, 1, 2]

    logged = rig.logged()
    assert sum(len(batch.codes) for batch in logged) == 30_000
    ids = b"".join(batch.request_ids for batch in logged)
    assert len({ids[at : at + 16] for at in range(0, len(ids), 16)}) == 30_000
    assert {origin for batch in logged for origin in batch.origins} == {Origin.ORIGIN_BATCH}
    assert all(batch.exclude_from_drift and not batch.exclude_from_experiments for batch in logged)
    assert sum(len(batch.codes) for batch in logged if batch.inputs) == 8192 * 2 + 6000


async def test_a_chunk_done_again_by_another_worker_gives_the_same_bytes(rig: Rig, tmp_path: Path) -> None:
    await rig.deploy(mlp(features=8))
    x = np.random.default_rng(4).standard_normal((20_000, 8)).astype(np.float32)
    given = parquet_chunks(tmp_path / "data" / "in.parquet", x, 20_000, run_rows=300)
    bodies, ids = [], []
    for worker in ("one", "two"):
        async with rig.worker(worker_id=worker):
            (result,) = await rig.done(*given)
            bodies.append(rig.bytes_of(result))
        ids.append([batch.batch_id for batch in rig.logged()])
        rig.chunks.published.clear()

    assert bodies[0] == bodies[1]
    assert ids[0] == ids[1]


async def test_a_second_attempt_that_is_cut_short_leaves_the_rows_of_the_first(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.deploy(mlp(features=8))
    x = np.random.default_rng(5).standard_normal((40_000, 8)).astype(np.float32)
    (whole,) = parquet_chunks(tmp_path / "data" / "in.parquet", x, 40_000, run_rows=500)
    async with rig.worker():
        (first,) = await rig.done(whole)
        kept = rig.bytes_of(first)
        looks = 0

        def expired(_jobs: Jobs, _chunk: BatchChunk) -> HeadraceError | None:
            nonlocal looks
            looks += 1
            return DeadlineExceeded("the job has expired") if looks > 50 else None

        monkeypatch.setattr(Jobs, "stop", expired)
        (second,) = await rig.done(whole)

    assert (first.code, first.rows_done) == (Code.CODE_OK, 40_000)
    assert second.code == Code.CODE_DEADLINE_EXCEEDED
    assert 0 < second.rows_done < 40_000
    assert second.results_object
    assert len(table_of(rig.bytes_of(second))) == second.rows_done
    assert rig.bytes_of(first) == kept


async def test_poisoned_rows_fail_alone_with_their_ids(rig: Rig) -> None:
    await rig.deploy(lookup(entries=10))
    lines = [f'{{"custom_id": "r{i}", "index": {i % 10}}}' for i in range(200)]
    lines[17] = '{"custom_id": "r17", "index": 99}'
    lines[18] = '{"custom_id": "r18", "index": "x"}'
    async with rig.worker():
        (result,) = await rig.done(chunk_of(lines, first_row=1000))

    assert (result.code, result.rows_done, result.rows_failed) == (Code.CODE_OK, 198, 2)
    table = table_of(result.results_inline)
    assert table["custom_id"].to_pylist() == [f"r{i}" for i in range(200) if i not in (17, 18)]
    assert table["value"].to_pylist() == [100.0 * (i % 10) for i in range(200) if i not in (17, 18)]
    errors = result.errors_inline.decode().splitlines()
    assert ['"row":1017' in errors[0], '"custom_id":"r17"' in errors[0]] == [True, True]
    assert '"field":"inputs[1018].index"' in errors[1]
    codes = [code for batch in rig.logged() for code in batch.codes]
    # The row that could not be read never ran.
    assert sorted(codes) == [Code.CODE_OK] * 198 + [Code.CODE_INVALID_ARGUMENT]


@pytest.mark.parametrize(
    ("change", "code", "field"),
    [
        ({"uri": "file:///etc/passwd"}, Code.CODE_PERMISSION_DENIED, "input_uri"),
        ({"uri": "store://files/none.parquet"}, Code.CODE_NOT_FOUND, "input_uri"),
        ({"etag": "other"}, Code.CODE_FAILED_PRECONDITION, "input_uri"),
        ({"group": 7}, Code.CODE_FAILED_PRECONDITION, "input_uri"),
        ({"format": InputFormat.INPUT_FORMAT_ARROW}, Code.CODE_INVALID_ARGUMENT, "input_uri"),
    ],
)
async def test_an_input_that_is_wrong_ends_the_chunk(
    rig: Rig, tmp_path: Path, change: dict[str, object], code: Code, field: str
) -> None:
    await rig.deploy(mlp(features=8))
    (chunk,) = parquet_chunks(tmp_path / "data" / "in.parquet", np.zeros((10, 8), np.float32), 10)
    chunk.input.MergeFrom(InputRange(**change))  # type: ignore[arg-type]  # fields of the message
    async with rig.worker():
        (result,) = await rig.done(chunk)

    assert (result.code, result.field) == (code, field)
    assert result.message
    assert rig.chunks.settled == [0]


async def test_columns_that_are_not_the_models_end_the_chunk(rig: Rig, tmp_path: Path) -> None:
    await rig.deploy(mlp(features=8))
    async with rig.worker():
        (result,) = await rig.done(
            *parquet_chunks(tmp_path / "data" / "in.parquet", np.zeros((10, 7), np.float32), 10)
        )
    assert (result.code, result.field) == (Code.CODE_INVALID_ARGUMENT, "inputs.x")


async def test_a_version_that_is_not_deployed_ends_the_chunk(rig: Rig) -> None:
    await rig.deploy(mlp(features=8))
    async with rig.worker() as worker:
        await eventually(lambda: worker.host.find("net", "1") is not None)
        chunk = chunk_of(["[1]"])
        chunk.version = "9"
        (result,) = await rig.done(chunk)
    assert (result.code, result.field) == (Code.CODE_NOT_FOUND, "version")


async def test_a_cancelled_job_is_not_begun_and_an_expired_one_is_not_either(rig: Rig) -> None:
    await rig.deploy(lookup())
    control = BatchControl(job_id="job", state=BatchControl.STATE_CANCELLED)
    await rig.bus.publish([Record(JOB_CONTROL.name, b"job", control.SerializeToString())])
    expired = chunk_of(["1"], index=1, expires_at_us=1)
    expired.job_id = "other"
    async with rig.worker():
        results = await rig.done(chunk_of(["1"]), expired)
    assert {(r.job_id, r.code, r.rows_done) for r in results} == {
        ("job", Code.CODE_CANCELLED, 0), ("other", Code.CODE_DEADLINE_EXCEEDED, 0),
    }  # fmt: skip


async def test_a_record_that_is_no_chunk_goes_to_the_dead_letters_and_the_next_is_done(rig: Rig) -> None:
    await rig.deploy(lookup())
    rig.chunks.put(b"\xff\xff\xff")
    rig.chunks.put(b"")
    async with rig.worker():
        (result,) = await rig.done(chunk_of(["3"]))
        await eventually(lambda: len(rig.chunks.settled) == 3)
    assert table_of(result.results_inline)["value"].to_pylist() == [300.0]
    letters = [r for r in rig.chunks.published if r.topic == "batch.chunks.default.v1.default.dlq"]
    assert [dict(letter.headers)["dlq-offset"] for letter in letters] == [b"0", b"1"]
    assert [bool(dict(letter.headers)["dlq-reason"]) for letter in letters] == [True, True]


async def test_a_result_is_published_until_the_broker_takes_it(rig: Rig) -> None:
    await rig.deploy(lookup())
    rig.chunks.away = 3
    async with rig.worker():
        (result,) = await rig.done(chunk_of(["3"]))
        await eventually(lambda: rig.chunks.settled == [0])
    assert result.rows_done == 1


async def test_predictions_too_large_for_the_log_are_logged_without_tensors(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await rig.deploy(mlp(features=8))
    x = np.zeros((8192, 8), np.float32)
    (chunk,) = parquet_chunks(tmp_path / "data" / "in.parquet", x, 8192)
    monkeypatch.setattr(port, "MAX_RECORD_BYTES", 200_000)
    async with rig.worker():
        (result,) = await rig.done(chunk)
        await eventually(lambda: rig.chunks.settled == [0])
    assert (result.code, result.rows_done) == (Code.CODE_OK, 8192)
    (logged,) = rig.logged()
    assert (len(logged.codes), len(logged.inputs), len(logged.outputs)) == (8192, 0, 0)


@pytest.mark.parametrize("stage", ["reading", "running"])
async def test_a_chunk_that_kills_this_worker_is_given_up_and_those_beside_it_are_done(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    await rig.deploy(lookup())
    given = [chunk_of([str(index)], index=index) for index in range(4)]
    folder = tmp_path / "state" / "worker-worker-0" / "chunks"
    killing = asyncio.Event()

    async def kills(index: int) -> None:
        if index == 0:
            killing.set()
            await asyncio.Event().wait()

    read, run = ChunkReader.read, ChunkWork._run

    async def reading(self: ChunkReader, chunk: BatchChunk, inputs: Inputs) -> Rows:
        await kills(chunk.index if stage == "reading" else -1)
        return await read(self, chunk, inputs)

    async def running(self: ChunkWork, chunk: BatchChunk, of: ChunkRun) -> HeadraceError | None:
        await kills(chunk.index if stage == "running" else -1)
        return await run(self, chunk, of)

    monkeypatch.setattr(ChunkReader, "read", reading)
    monkeypatch.setattr(ChunkWork, "_run", running)
    for _ in range(5):
        killing.clear()
        async with rig.worker(drain_s=0.05):
            for chunk in given:
                rig.chunks.put(chunk.SerializeToString())
            await asyncio.wait_for(killing.wait(), PATIENCE_S)
            await asyncio.sleep(0.1)  # those behind it come as far as they can
            left = {path: path.read_bytes() for path in folder.iterdir()}
        # A death tidies nothing up.
        for path, content in left.items():
            path.write_bytes(content)
    assert rig.chunks.results() == []
    async with rig.worker():
        results = await rig.done(*given)
    results.sort(key=lambda result: result.index)
    assert [result.code for result in results] == [Code.CODE_INTERNAL] + 3 * [Code.CODE_OK]
    assert "died 5 times" in results[0].message
    assert list(folder.iterdir()) == []


async def test_a_worker_that_leaves_finishes_its_chunk_and_takes_no_other(rig: Rig) -> None:
    await rig.deploy(lookup())
    async with rig.worker():
        await rig.done(chunk_of(["1"]))
        rig.chunks.put(chunk_of(["2"], index=1).SerializeToString())
        await eventually(lambda: len(rig.chunks.results()) == 2)
    rig.chunks.put(chunk_of(["3"], index=2).SerializeToString())
    await asyncio.sleep(0.05)
    assert len(rig.chunks.results()) == 2
