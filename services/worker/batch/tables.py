"""Slices of Parquet and Arrow files. Blocks: for a thread, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from services.common.errors import FailedPrecondition, InvalidArgument

#: A group with at most this many bytes stays decoded until another one is read, since its other slices tend
#: to follow; of a larger one only the place is kept.
KEPT_BYTES = 192 << 20
_STEP_ROWS = 65_536
_FIELD = "input_uri"

Columns = Callable[[list[str]], list[str]]


@dataclass(slots=True)
class _Reading:
    """How far a group too large to be kept was read: `rest` are rows from `at` on that were decoded."""

    group: int
    batches: Iterator[pa.RecordBatch]
    at: int = 0
    rest: list[pa.RecordBatch] = field(default_factory=list)


class TableFile:
    """One open file. `columns` picks those that are read out of the names of all.

    Raises InvalidArgument where the file is not what it should be, FailedPrecondition where it has other rows
    than when it was cut."""

    def __init__(self, file: IO[bytes], columns: Columns, *, parquet: bool) -> None:
        self._file = file
        self._kept: tuple[int, pa.Table] | None = None
        self._reading: _Reading | None = None
        self._parquet: pq.ParquetFile | None = None
        try:
            if parquet:
                self._parquet = pq.ParquetFile(pa.PythonFile(file, "r"))
                self._columns = columns(self._parquet.schema_arrow.names)
            else:
                self._arrow = pa.ipc.open_file(pa.PythonFile(file, "r"))
                self._columns = columns(self._arrow.schema.names)
        except (pa.ArrowException, OSError) as error:
            kind = "Parquet" if parquet else "Arrow"
            raise InvalidArgument(f"The input is not an {kind} file: {error}.", field=_FIELD) from error

    def read(self, group: int, offset: int, rows: int) -> pa.Table:
        """`rows` rows from row `offset` of `group` on; they may go on into the next groups."""
        parts: list[pa.Table] = []
        try:
            while rows > 0:
                size = self._rows_of(group)
                taken = min(rows, size - offset)
                if taken > 0:
                    parts.append(self._slice(group, offset, taken, size))
                    rows -= taken
                group, offset = group + 1, 0
            return pa.concat_tables(parts)
        except (pa.ArrowException, OSError) as error:
            self._kept = self._reading = None
            raise InvalidArgument(f"The input cannot be read: {error}.", field=_FIELD) from error

    def close(self) -> None:
        """Let go of the file and of what was decoded."""
        self._kept = self._reading = None
        self._file.close()

    def _rows_of(self, group: int) -> int:
        if self._parquet is not None:
            if group < self._parquet.metadata.num_row_groups:
                return int(self._parquet.metadata.row_group(group).num_rows)
        elif group < self._arrow.num_record_batches:
            return int(self._whole(group).num_rows)
        raise FailedPrecondition("The input has fewer rows than when it was cut.", field=_FIELD)

    def _slice(self, group: int, offset: int, rows: int, size: int) -> pa.Table:
        if self._parquet is None or rows == size:
            return self._whole(group, keep=rows < size).slice(offset, rows)
        if self._parquet.metadata.row_group(group).total_byte_size <= KEPT_BYTES:
            return self._whole(group, keep=offset + rows < size).slice(offset, rows)
        return self._stepped(self._parquet, group, offset, rows)

    def _whole(self, group: int, *, keep: bool = True) -> pa.Table:
        if self._kept is not None and self._kept[0] == group:
            table = self._kept[1]
        else:
            self._kept = None  # before the next one is there: two would take twice the memory
            if self._parquet is not None:
                # A reader that fetches ahead keeps all that it fetched for as long as it lives.
                reader = pq.ParquetFile(
                    pa.PythonFile(self._file, "r"), metadata=self._parquet.metadata, pre_buffer=True
                )
                table = reader.read_row_group(group, columns=self._columns, use_threads=False)
            else:
                table = pa.Table.from_batches([self._arrow.get_batch(group)]).select(self._columns)
        self._kept = (group, table) if keep else None
        return table

    def _stepped(self, parquet: pq.ParquetFile, group: int, offset: int, rows: int) -> pa.Table:
        """Go on from where the last slice ended; begin anew only for one that lies before."""
        reading = self._reading
        if reading is None or reading.group != group or reading.at > offset:
            batches = parquet.iter_batches(_STEP_ROWS, [group], columns=self._columns, use_threads=False)
            reading = self._reading = _Reading(group, batches)
        taken: list[pa.RecordBatch] = []
        while rows > 0:
            batch = reading.rest.pop() if reading.rest else next(reading.batches)
            skipped = min(max(0, offset - reading.at), batch.num_rows)
            used = min(rows, batch.num_rows - skipped)
            if used:
                taken.append(batch.slice(skipped, used))
            if skipped + used < batch.num_rows:
                reading.rest.append(batch.slice(skipped + used))
            reading.at += skipped + used
            rows -= used
        return pa.Table.from_batches(taken)
