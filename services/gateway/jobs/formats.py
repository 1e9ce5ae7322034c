"""Results as files, written while they are read."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from typing import Any, Literal

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq

Format = Literal["jsonl", "parquet"]
MEDIA_TYPES: dict[Format, str] = {
    "jsonl": "application/x-ndjson",
    "parquet": "application/vnd.apache.parquet",
}
#: A row group gathers so many rows or bytes.
_GROUP_ROWS, _GROUP_BYTES = 65_536, 16 << 20
_LINES_AT_ONCE = 512
_ROW, _CUSTOM_ID = "row", "custom_id"


async def as_json_lines(batches: AsyncIterator[pa.RecordBatch]) -> AsyncIterator[bytes]:
    """One line a row: `{"row", "custom_id"?, "outputs": {name: value}}`. NaN and the infinities become
    null."""
    async for batch in batches:
        # Python holds its lock while it writes lines: short turns, or online requests would wait for them.
        for first in range(0, batch.num_rows, _LINES_AT_ONCE):
            yield await asyncio.to_thread(json_lines, batch.slice(first, _LINES_AT_ONCE))


async def as_parquet(batches: AsyncIterator[pa.RecordBatch]) -> AsyncIterator[bytes]:
    """One Parquet file: `row`, `custom_id` (null where a row has none), and a column per output."""
    sink = _Pieces()
    writer: pq.ParquetWriter | None = None
    gathered: list[pa.RecordBatch] = []

    def write() -> bytes:
        nonlocal writer
        table = pa.Table.from_batches(gathered, gathered[0].schema)
        gathered.clear()
        if writer is None:
            writer = pq.ParquetWriter(sink, table.schema, compression="zstd")
        writer.write_table(table.cast(writer.schema))
        return sink.taken()

    def finish() -> bytes:
        last = write() if gathered else b""
        if writer is None:
            empty = pa.schema([(_ROW, pa.uint64()), (_CUSTOM_ID, pa.string())])
            pq.ParquetWriter(sink, empty).close()
        else:
            writer.close()
        return last + sink.taken()

    async for batch in batches:
        gathered.append(_with_custom_id(batch))
        full = sum(one.num_rows for one in gathered) >= _GROUP_ROWS
        if full or sum(one.nbytes for one in gathered) >= _GROUP_BYTES:
            yield await asyncio.to_thread(write)
    yield await asyncio.to_thread(finish)


def json_lines(batch: pa.RecordBatch) -> bytes:
    """The rows of one batch, each with its newline."""
    names = [name for name in batch.schema.names if name not in (_ROW, _CUSTOM_ID)]
    columns = [elements(batch.column(name)) for name in names]
    rows = batch.column(_ROW).to_pylist()
    has_ids = _CUSTOM_ID in batch.schema.names
    ids = batch.column(_CUSTOM_ID).to_pylist() if has_ids else [None] * len(rows)
    lines = []
    for row, custom_id, *values in zip(rows, ids, *columns, strict=True):
        line: dict[str, Any] = {"row": row}
        if custom_id is not None:
            line["custom_id"] = custom_id
        line["outputs"] = dict(zip(names, values, strict=True))
        lines.append(
            orjson.dumps(line, _bytes_as_text, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
        )
    return b"".join(lines)


def elements(column: pa.Array) -> Any:
    """The values of a column as orjson writes them: numbers stay in numpy, so that FP32 keeps its short
    form."""
    shape = []
    inner = column
    while pa.types.is_fixed_size_list(inner.type):
        if inner.null_count:
            return column.to_pylist()
        shape.append(inner.type.list_size)
        inner = inner.flatten()
    fits = pa.types.is_integer(inner.type) or pa.types.is_floating(inner.type)
    if not fits or inner.null_count:
        return column.to_pylist()
    numbers = inner.to_numpy(zero_copy_only=False)
    if numbers.dtype == np.float16:  # orjson knows no halves; FP32 holds each of them
        numbers = numbers.astype(np.float32)
    return numbers.reshape((len(column), *shape))


def _with_custom_id(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Every batch with the same columns: an input may name some of its rows only."""
    if _CUSTOM_ID in batch.schema.names:
        return batch
    at = batch.schema.get_field_index(_ROW) + 1
    return batch.add_column(at, _CUSTOM_ID, pa.nulls(batch.num_rows, pa.string()))


def _bytes_as_text(value: object) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    raise TypeError


class _Pieces(io.RawIOBase):
    """What was written and not taken yet."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._at = 0

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def write(self, data: Any, /) -> int:
        piece = bytes(data)
        self._pieces.append(piece)
        self._at += len(piece)
        return len(piece)

    def taken(self) -> bytes:
        """Everything since the last time."""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces)
