"""One chunk from its record to its result: read, run, written, logged, told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import TypeVar

import structlog
from headrace.v1.batch_pb2 import BatchChunk, BatchChunkResult
from headrace.v1.tensor_pb2 import Signature

from services.common.bus import Record
from services.common.bus.delivery import Backoff
from services.common.clock import Clock
from services.common.errors import (
    FailedPrecondition,
    HeadraceError,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from services.common.objects import ArtifactStore
from services.common.topics import JOB_RESULTS, PREDICTIONS
from services.worker.backends.port import EXTRA_OUTPUTS
from services.worker.batch.deaths import Deaths
from services.worker.batch.jobs import Jobs
from services.worker.batch.metrics import BatchStats
from services.worker.batch.port import Chunks
from services.worker.batch.reading import ChunkReader
from services.worker.batch.records import ChunkRecords, without_payload
from services.worker.batch.results import errors_bytes, output_shapes, results_bytes
from services.worker.batch.rows import Inputs, Rows
from services.worker.batch.running import ChunkRun, Version, rows_of_a_run
from services.worker.batch.threads import batch_thread
from services.worker.best_batch import UNMEASURED
from services.worker.desired import Desired
from services.worker.loaded_model import LoadedModel
from services.worker.model_host import ModelHost
from services.worker.priorities import Rank, most_of

log = structlog.get_logger(__name__)

#: Results and errors of at most this many bytes travel in the record of the chunk's result.
INLINE_BYTES = 64 << 10

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WorkOptions:
    """Times are seconds: `patience` is how long a chunk waits for a version that is deployed and not loaded
    here, or for an input that cannot be reached; `unknown` how long for a version that no deployment of this
    pool names, since the record of a deployment may come later than the first chunk. `payload_rows` of each
    chunk are logged with their tensors. A chunk that was in work at `deaths` deaths of this worker is not
    begun once more."""

    worker_id: str
    patience: float = 300.0
    unknown: float = 10.0
    payload_rows: int = 8192
    deaths: int = 5


@dataclass(frozen=True, slots=True)
class _Done:
    """What became of the rows, in bytes; those that are too many for a record, with their place in the
    store."""

    results: bytes
    errors: bytes
    results_path: str
    errors_path: str
    records: list[Record]
    rows_done: int
    rows_failed: int


@dataclass(frozen=True, slots=True)
class Shared:
    """What all chunks share."""

    host: ModelHost
    reader: ChunkReader
    store: ArtifactStore
    chunks: Chunks
    jobs: Jobs
    deaths: Deaths
    clock: Clock
    stats: BatchStats


class ChunkWork:
    """Does chunks; several may be at different stages at the same time, in the order in which they came: at
    most one is read and one runs.

    A result is published after its objects are in the store and its predictions in the log."""

    def __init__(self, shared: Shared, options: WorkOptions) -> None:
        self._host = shared.host
        self._reader = shared.reader
        self._store = shared.store
        self._chunks = shared.chunks
        self._jobs = shared.jobs
        self._deaths = shared.deaths
        self._clock = shared.clock
        self._stats = shared.stats
        self._options = options
        self._device = batch_thread("batch-run")
        self._encoder = batch_thread("batch-write")
        self._reading = asyncio.Lock()
        self._running = asyncio.Lock()
        # One chunk runs and one is ready to.
        self._ahead = asyncio.Semaphore(2)

    def close(self) -> None:
        """Take nothing more; what runs ends with its current run."""
        self._device.shutdown(wait=False, cancel_futures=True)
        self._encoder.shutdown(wait=False, cancel_futures=True)

    async def do(self, chunk: BatchChunk) -> None:
        """Return once the result of `chunk` is acknowledged. Raises Unavailable where the broker is away."""
        started = self._clock.unix_us()
        result = BatchChunkResult(
            job_id=chunk.job_id, index=chunk.index, attempt=chunk.attempt, worker_id=self._options.worker_id
        )
        records: list[Record] = []
        try:
            records = await self._fill(chunk, result)
        except HeadraceError as error:
            result.code, result.message, result.field = error.code, error.message, error.field or ""
        except Exception:  # a fault of ours ends the chunk: doing it again would end like this
            log.exception("chunk_failed", job=chunk.job_id, index=chunk.index)
            result.code, result.message = Internal.code, "the worker could not do the chunk"
        finally:
            await asyncio.to_thread(self._deaths.end, chunk)
        result.started_at_us, result.finished_at_us = started, self._clock.unix_us()
        if records:
            await self._log(records)
        await self._publish([Record(JOB_RESULTS.name, chunk.job_id.encode(), result.SerializeToString())])
        self._stats.chunk(result)

    async def _fill(self, chunk: BatchChunk, result: BatchChunkResult) -> list[Record]:
        """Do the rows, keep what they came to, and return what is to be logged of it."""
        async with self._ahead, AsyncExitStack() as reading:
            desired = await self._deployed(chunk)
            signature = desired.served.signature
            inputs = Inputs.of(signature)
            await reading.enter_async_context(self._reading)
            self._check(chunk)
            deaths = await asyncio.to_thread(self._deaths.before, chunk)
            if deaths >= self._options.deaths:
                raise Internal(f"the worker died {deaths} times with this chunk in work")
            async with self._at_risk(chunk):
                rows = await self._patiently(lambda: self._reader.read(chunk, inputs))
            if extra := EXTRA_OUTPUTS.get(desired.served.backend):  # what the tokens of a text cost
                asked = (*(spec.name for spec in signature.outputs), *extra)
                rows = replace(rows, outputs=asked)
            if not deaths:  # else nothing is read beside it, which could be blamed for its doing
                await reading.aclose()
            async with self._running:
                await self._loaded(chunk)
                run_rows = chunk.run_rows or self._run_rows(chunk, inputs)
                run = ChunkRun(rows, inputs, run_rows, self._device, lambda: self._jobs.stop(chunk))
                ended: HeadraceError | None = None
                try:
                    async with self._at_risk(chunk):
                        ended = self._jobs.stop(chunk) or await self._run(chunk, run)
                finally:
                    self._stats.waited_s += run.waited
                    self._stats.ran_s += run.ran
        payload_rows = self._options.payload_rows if desired.policy.payloads.enabled else 0
        done = await asyncio.get_running_loop().run_in_executor(
            self._encoder, self._encode, chunk, rows, run, signature, payload_rows
        )
        result.rows_done, result.rows_failed = done.rows_done, done.rows_failed
        await self._keep(result, done)
        if ended is not None:
            result.code, result.message, result.field = ended.code, ended.message, ended.field or ""
        return done.records

    @asynccontextmanager
    async def _at_risk(self, chunk: BatchChunk) -> AsyncIterator[None]:
        """While this lasts, a death of the worker counts against `chunk`."""
        await asyncio.to_thread(self._deaths.begin, chunk)
        try:
            yield
        finally:
            await asyncio.to_thread(self._deaths.rest, chunk)

    async def _run(self, chunk: BatchChunk, run: ChunkRun) -> HeadraceError | None:
        """Run to the end, or return why not. Waits for a version that is not loaded (any more)."""
        try:
            while True:
                policy = (await self._deployed(chunk)).policy.batching
                most = most_of(Rank.LOW, policy.max_queue_rows, policy.max_rows)
                try:
                    await run.run(lambda: self._version(chunk), most)
                except _NotLoaded:
                    await self._loaded(chunk)
                else:
                    return run.stopped
        except HeadraceError as error:  # what is done is kept
            return error

    def _run_rows(self, chunk: BatchChunk, inputs: Inputs) -> int:
        version = self._host.find(chunk.model, chunk.version)
        return rows_of_a_run(inputs, version.best if isinstance(version, LoadedModel) else UNMEASURED)

    def _version(self, chunk: BatchChunk) -> Version:
        found = self._host.find(chunk.model, chunk.version)
        if found is None:
            raise _NotLoaded("the version is not loaded")
        return found

    async def _deployed(self, chunk: BatchChunk) -> Desired:
        """What the deployments say of the version. Raises NotFound where they do not name it."""

        async def look() -> Desired:
            self._check(chunk)
            desired = self._host.desired(chunk.model, chunk.version)
            if desired is None:
                raise _NotLoaded(f"{chunk.model} version {chunk.version} is not deployed here")
            return desired

        try:
            desired = await self._patiently(look, self._options.unknown)
        except _NotLoaded as error:
            raise NotFound(f"{error.message} any more", field="version") from None
        if chunk.artifact_digest and desired.key.artifact_digest != chunk.artifact_digest:
            raise FailedPrecondition(
                f"{chunk.model} version {chunk.version} stands for another artifact now", field="version"
            )
        return desired

    async def _loaded(self, chunk: BatchChunk) -> None:
        async def look() -> None:
            self._check(chunk)
            self._version(chunk)

        await self._patiently(look)

    def _check(self, chunk: BatchChunk) -> None:
        """Raise where the job is not wanted any more."""
        stop = self._jobs.stop(chunk)
        if stop is not None:
            raise stop

    async def _patiently(self, attempt: Callable[[], Awaitable[T]], patience: float | None = None) -> T:
        """`attempt` again and again while trying again can help, at most for `patience` seconds."""
        backoff = Backoff(0.05, 2.0)
        until = self._clock.monotonic() + (self._options.patience if patience is None else patience)
        while True:
            try:
                return await attempt()
            except (Unavailable, ResourceExhausted):
                wait = backoff.next()
                if self._clock.monotonic() + wait > until:
                    raise
                self._stats.retries += 1
                await asyncio.sleep(wait)

    def _encode(
        self, chunk: BatchChunk, rows: Rows, run: ChunkRun, signature: Signature, payload_rows: int
    ) -> _Done:
        """In a thread."""
        answered = run.answers()
        shapes, now = output_shapes(signature), self._clock.unix_us()
        results = results_bytes([part for part, _ in answered], chunk.first_row, rows.custom_ids, shapes)
        failures = {**rows.failures, **run.failures}
        errors = errors_bytes(failures, chunk.first_row, rows.custom_ids)
        made = ChunkRecords(chunk, signature, self._options.worker_id)
        values = [
            value
            for part, inputs in answered
            for value in made.answered(part, inputs, now, payload_rows)
        ]  # fmt: skip
        values += made.failed(run.failures, now)
        records = [Record(PREDICTIONS.name, made.key, value) for value in values]
        prefix = f"{chunk.output_prefix.rstrip('/')}/{chunk.index:08d}"
        return _Done(
            results, errors, _path(prefix, results, "arrow"), _path(prefix, errors, "errors.jsonl"),
            records, sum(len(part.places) for part, _ in answered), len(failures),
        )  # fmt: skip

    async def _keep(self, result: BatchChunkResult, done: _Done) -> None:
        """Small results go into the record, large ones into the store."""
        if done.results_path:
            result.results_object = done.results_path
            await self._patiently(lambda: self._store.put(done.results_path, done.results))
        else:
            result.results_inline = done.results
        if done.errors_path:
            result.errors_object = done.errors_path
            await self._patiently(lambda: self._store.put(done.errors_path, done.errors))
        else:
            result.errors_inline = done.errors

    async def _log(self, records: list[Record]) -> None:
        """Publish predictions; those that the log does not take because of their size without tensors. A
        chunk that was done again for them would give the same ones."""
        try:
            await self._publish(records)
        except InvalidArgument as error:
            log.warning("predictions_without_payload", reason=error.message)
            await self._publish([replace(one, value=without_payload(one.value or b"")) for one in records])

    async def _publish(self, records: list[Record]) -> None:
        await self._patiently(lambda: self._chunks.publish(records))


def _path(prefix: str, data: bytes, kind: str) -> str:
    """Where in the store `data` is to be, empty where it is small. What it is stands in the name: of two
    deliveries of a chunk one may be cut short, and the other one's rows, counted by now, must stay."""
    if len(data) <= INLINE_BYTES:
        return ""
    return f"{prefix}.{blake2b(data, digest_size=16).hexdigest()}.{kind}"


class _NotLoaded(Unavailable):
    """The version is not here, yet or any more."""
