"""What a job came to, chunk after chunk in the order of the rows, a record batch at a time."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from headrace.v1.tensor_pb2 import Code

from services.common.db import transaction
from services.common.errors import DataLoss, NotFound
from services.common.objects import ArtifactStore
from services.common.objects.sources import RangeFile
from services.gateway.jobs.backend import Backend
from services.gateway.jobs.decisions import OF_THE_JOB
from services.gateway.jobs.repository import JobRepository
from services.gateway.jobs.tables import ChunkRow
from services.gateway.jobs.views import JobError, error_json

_CHUNKS_AT_ONCE = 16
_READ_AHEAD = 1 << 20
#: How the names of outputs begin that no signature names: a backend gives them beside the model's own.
_EXTRA = "headrace."
#: Errors that are held as objects at once; a single request (async_requests.MAX_ROWS) has fewer.
PARSED_AT_ONCE = 1024
_NOT_OF_ROWS = frozenset((Code.CODE_OK, Code.CODE_CANCELLED, Code.CODE_DEADLINE_EXCEEDED)) | OF_THE_JOB


async def done_chunks(backend: Backend, job_id: str) -> AsyncIterator[ChunkRow]:
    """The chunks of a job that are done, in order. No transaction is open while the caller works."""
    index = 0
    while True:
        async with transaction(backend.engine) as session:
            chunks = await JobRepository(session).chunks_from(job_id, index, _CHUNKS_AT_ONCE)
        for chunk in chunks:
            if chunk.state == "done":
                yield chunk
        if len(chunks) < _CHUNKS_AT_ONCE:
            return
        index = chunks[-1].index + 1


async def result_batches(
    backend: Backend, job_id: str, *, extra: bool = False
) -> AsyncIterator[pa.RecordBatch]:
    """The results: `row`, `custom_id` where the chunk has one, and a column per output; rows without a result
    are absent. With `extra`, also what the signature does not name, such as `headrace.tokens`. Raises
    DataLoss where results are damaged or gone, Unavailable."""
    async for chunk in done_chunks(backend, job_id):
        async for batch in _chunk_batches(backend.store, chunk):
            if extra:
                yield batch
            else:
                yield batch.select([name for name in batch.schema.names if not name.startswith(_EXTRA)])


async def error_lines(backend: Backend, job_id: str) -> AsyncIterator[bytes]:
    """JSON Lines `{"row", "custom_id"?, "error": {"code", "message", "field"?}}` of the rows that failed, in
    pieces of whole lines."""
    async for chunk in done_chunks(backend, job_id):
        lines = await _chunk_errors(backend.store, chunk)
        if lines:
            yield lines if lines.endswith(b"\n") else lines + b"\n"


async def _chunk_batches(store: ArtifactStore, chunk: ChunkRow) -> AsyncIterator[pa.RecordBatch]:
    if chunk.results_inline is not None:
        source: Any = io.BytesIO(chunk.results_inline)
    elif chunk.results_object:
        source = await _opened(store, chunk.results_object)
    else:
        return
    try:
        reader = await asyncio.to_thread(pa.ipc.open_stream, source)
        batches: Iterator[pa.RecordBatch] = iter(reader)
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            yield batch
    except (pa.ArrowException, OSError) as error:
        raise DataLoss(f"The results of chunk {chunk.index} are damaged.") from error


async def _opened(store: ArtifactStore, path: str) -> io.BufferedReader:
    try:
        info = await store.stat(path)
    except NotFound:
        raise DataLoss("The results of this job were removed.") from None
    return io.BufferedReader(RangeFile(store, path, info.size, info.etag or ""), _READ_AHEAD)


async def _chunk_errors(store: ArtifactStore, chunk: ChunkRow) -> bytes:
    if chunk.errors_inline is not None:
        told = chunk.errors_inline
    elif chunk.errors_object:
        try:
            told = await store.get(chunk.errors_object)
        except NotFound:
            raise DataLoss("The errors of this job were removed.") from None
    else:
        told = b""
    if chunk.code in _NOT_OF_ROWS or not chunk.rows_failed:
        return told
    answered = [batch.column("row").to_numpy() async for batch in _chunk_batches(store, chunk)]
    return await asyncio.to_thread(_with_the_rest, chunk, told, answered)


def _with_the_rest(chunk: ChunkRow, told: bytes, answered: Sequence[np.ndarray[Any, Any]]) -> bytes:
    """`told`, and the lines of rows that have neither result nor error of their own: their chunk failed."""
    known = {int(row) for rows in answered for row in rows}
    known |= {orjson.loads(line)["row"] for line in told.split(b"\n") if line}
    error = error_json(JobError(chunk.code, chunk.message, chunk.field))  # type: ignore[arg-type]  # a code
    rows = range(chunk.first_row, chunk.first_row + chunk.rows)
    lines = [orjson.dumps({"row": row, "error": error}) for row in rows if row not in known]
    return b"\n".join([told.removesuffix(b"\n"), *lines] if told else lines)


async def parsed_errors(lines: bytes) -> AsyncIterator[Sequence[dict[str, Any]]]:
    """The errors of a piece of `error_lines`, which may be a chunk's 65,536, some at a time."""
    texts = await asyncio.to_thread(lines.split, b"\n")
    for start in range(0, len(texts), PARSED_AT_ONCE):
        errors = await asyncio.to_thread(_parsed, texts[start : start + PARSED_AT_ONCE])
        if errors:
            yield errors


def _parsed(lines: Sequence[bytes]) -> Sequence[dict[str, Any]]:
    return [orjson.loads(line) for line in lines if line]
