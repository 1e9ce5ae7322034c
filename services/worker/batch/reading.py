"""From the range that a chunk names to its rows, whatever the format."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from headrace.v1.batch_pb2 import BatchChunk, InputFormat, InputRange

from services.common.errors import (
    FailedPrecondition,
    HeadraceError,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from services.common.objects import InputSources
from services.common.tasks import stopped
from services.worker.batch.columns import rows_of_table, wanted_columns
from services.worker.batch.csv_rows import rows_of_csv
from services.worker.batch.images import rows_of_images
from services.worker.batch.json_rows import CUSTOM_ID, lines_of, rows_of_lines
from services.worker.batch.rows import Inputs, Rows
from services.worker.batch.tables import TableFile
from services.worker.batch.threads import batch_thread

# Files of a folder that are fetched at the same time.
_FILES_AT_ONCE = 8
_MAX_IMAGE_BYTES = 32 << 20
_FIELD = "input_uri"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Open:
    """The file that was read last, and for whom: another model takes other columns."""

    key: tuple[str, str, Inputs]
    file: TableFile


class ChunkReader:
    """Reads the rows of chunks in a thread of its own, one chunk at a time. The Parquet or Arrow file of the
    last chunk stays open until `release`, or until a chunk of another one is read."""

    def __init__(self, sources: InputSources) -> None:
        self._sources = sources
        self._thread = batch_thread("batch-read")
        self._open: _Open | None = None

    async def read(self, chunk: BatchChunk, inputs: Inputs) -> Rows:
        """The rows of `chunk`. Raises what is wrong with the input as a whole, with its field, or Unavailable
        where it cannot be read now."""
        rows = await self._rows(chunk, inputs)
        if rows.count != chunk.rows:
            raise FailedPrecondition(
                f"The input has {rows.count} rows where it had {chunk.rows} when it was cut.", field=_FIELD
            )
        return rows

    async def release(self) -> None:
        """Close the file that is open: nothing was read for a while."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)

    async def close(self) -> None:
        """Let go of everything."""
        await self.release()
        self._thread.shutdown(wait=False)

    async def _rows(self, chunk: BatchChunk, inputs: Inputs) -> Rows:
        given, first = chunk.input, chunk.first_row
        match given.format:
            case InputFormat.INPUT_FORMAT_PARQUET | InputFormat.INPUT_FORMAT_ARROW if given.uri:
                return await self._table(chunk, inputs)
            case InputFormat.INPUT_FORMAT_IMAGES:
                files = await self._files(given)
                return await self._in_thread(lambda: rows_of_images(given.names, files, inputs, first))
        text = given.inline
        if given.uri:
            text = await self._sources.read(
                given.uri, given.first_byte, given.end_byte, etag=given.etag or None
            )
            if len(text) < given.end_byte - given.first_byte:
                raise FailedPrecondition("The input is shorter than when it was cut.", field=_FIELD)
        match given.format:
            case InputFormat.INPUT_FORMAT_CSV:
                return await self._in_thread(lambda: rows_of_csv(text, given.columns, inputs, first))
            case InputFormat.INPUT_FORMAT_JSON_LINES:
                return await self._in_thread(lambda: rows_of_lines(lines_of(text), inputs, first))
        raise InvalidArgument("The worker does not read this format.", field="input_format")

    async def _table(self, chunk: BatchChunk, inputs: Inputs) -> Rows:
        given = chunk.input
        key = (given.uri, given.etag, inputs)
        if self._open is None or self._open.key != key:
            await self.release()
            raw = await self._sources.open(given.uri, etag=given.etag or None)
            parquet = given.format == InputFormat.INPUT_FORMAT_PARQUET

            def choose(names: list[str]) -> list[str]:
                chosen = [name for columns in wanted_columns(names, inputs).values() for name in columns]
                return chosen + ([CUSTOM_ID] if CUSTOM_ID in names and CUSTOM_ID not in chosen else [])

            opened = await self._in_thread(lambda: TableFile(raw, choose, parquet=parquet))
            self._open = _Open(key, opened)
        file = self._open.file

        def read() -> Rows:
            return rows_of_table(
                file.read(given.group, given.group_offset, chunk.rows), inputs, chunk.first_row
            )

        return await self._in_thread(read)

    async def _files(self, given: InputRange) -> list[bytes | HeadraceError]:
        gate = asyncio.Semaphore(_FILES_AT_ONCE)

        async def fetch(name: str) -> bytes | HeadraceError:
            async with gate:
                try:
                    content = await self._sources.read(
                        f"{given.uri.rstrip('/')}/{name}", 0, _MAX_IMAGE_BYTES + 1
                    )
                except (Unavailable, ResourceExhausted):
                    raise
                except HeadraceError as error:
                    return error
            if len(content) > _MAX_IMAGE_BYTES:
                return InvalidArgument(f"the file has more than {_MAX_IMAGE_BYTES} bytes.")
            return content

        tasks = [asyncio.create_task(fetch(name)) for name in given.names]
        try:
            return list(await asyncio.gather(*tasks))
        finally:  # of a chunk that is tried again later, or abandoned, nothing goes on meanwhile
            await stopped(*tasks)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _close(self) -> None:
        opened, self._open = self._open, None
        if opened is not None:
            opened.file.close()
