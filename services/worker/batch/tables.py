"""Slices of Parquet and Arrow files. Blocks: for a thread, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from services.common.errors import FailedPrecondition, InvalidArgument
from services.worker.batch.arrow_sizes import DecodedSizes

#: A group with at most this many bytes stays decoded until another one is read, since its other slices tend
#: to follow; of a larger one only the place is kept.
KEPT_BYTES = 192 << 20
#: What the rows of one chunk, or one record batch of an Arrow file, may take once they are decoded.
MAX_BYTES = 1 << 30
_STEP_ROWS = 65_536
_STEP_BYTES = 64 << 20
# Texts in lists may be a few bytes of file each and any size in memory.
_STEP_ROWS_OPEN = 256
_WIDTHS = {"BOOLEAN": 1, "INT32": 4, "FLOAT": 4, "INT64": 8, "DOUBLE": 8, "INT96": 12}
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
        #: By group, what `_estimate` said of it.
        self._estimates: dict[int, int | None] = {}
        try:
            if parquet:
                metadata = pq.read_metadata(pa.PythonFile(file, "r"))
                self._texts = _texts(metadata)
                self._parquet = self._opened(metadata)
                self._columns = columns(self._parquet.schema_arrow.names)
            else:
                self._arrow = pa.ipc.open_file(pa.PythonFile(file, "r"))
                self._sizes = DecodedSizes(file)
                _check(self._sizes.dictionaries(), "The dictionaries of the input take")
                self._columns = columns(self._arrow.schema.names)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            kind = "Parquet" if parquet else "Arrow"
            raise InvalidArgument(f"The input is not an {kind} file: {error}.", field=_FIELD) from error

    def read(self, group: int, offset: int, rows: int) -> pa.Table:
        """`rows` rows from row `offset` of `group` on; they may go on into the next groups."""
        parts: list[pa.Table] = []
        taking = 0
        try:
            while rows > 0:
                size = self._rows_of(group)
                taken = min(rows, size - offset)
                if taken > 0:
                    part = self._slice(group, offset, taken, size)
                    if part.num_rows != taken:  # what a damaged file says of itself need not fit together
                        raise _fewer()
                    taking += _plain_bytes(part)
                    _check(taking, "Rows of a chunk of the input take")
                    parts.append(_plain(part))
                    rows -= taken
                group, offset = group + 1, 0
            return pa.concat_tables(parts)
        # pyarrow's KeyError: of damaged names two may be the same.
        except (pa.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:
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
        if self._parquet is None:
            return self._whole(group, keep=rows < size).slice(offset, rows)
        decoded = self._decoded(self._parquet, group)
        if decoded is not None and decoded <= KEPT_BYTES:
            return self._whole(group, keep=offset + rows < size).slice(offset, rows)
        step = _STEP_ROWS_OPEN if decoded is None else max(1, _STEP_BYTES * size // decoded)
        return self._stepped(self._parquet, group, offset, rows, min(step, _STEP_ROWS))

    def _opened(self, metadata: pq.FileMetaData, **more: bool) -> pq.ParquetFile:
        # Texts stay references into their dictionaries, which is what the file's size says something of.
        return pq.ParquetFile(
            pa.PythonFile(self._file, "r"), metadata=metadata, read_dictionary=self._texts, **more
        )

    def _decoded(self, parquet: pq.ParquetFile, group: int) -> int | None:
        """Bytes that the chosen columns of `group` take in memory, None where its metadata do not say."""
        if group not in self._estimates:
            self._estimates[group] = self._estimate(parquet, group)
        return self._estimates[group]

    def _estimate(self, parquet: pq.ParquetFile, group: int) -> int | None:
        """By the metadata. The size that the group itself states is that of its encoding: a million equal
        values are a few bytes."""
        # Asked for a column whose metadata contradict themselves pyarrow ends the process; to read fails.
        next(parquet.iter_batches(1, [group], columns=self._columns, use_threads=False), None)
        metadata = parquet.metadata.row_group(group)
        total = 0
        for index in range(len(parquet.schema)):
            name = parquet.schema.column(index).path
            if not any(name == chosen or name.startswith(f"{chosen}.") for chosen in self._columns):
                continue
            column = metadata.column(index)
            kind = column.physical_type
            if kind == "BYTE_ARRAY" and name in self._texts:
                total += column.total_uncompressed_size + 4 * column.num_values
            elif kind == "FIXED_LEN_BYTE_ARRAY":
                total += column.num_values * parquet.schema.column(index).length
            elif kind in _WIDTHS:
                total += column.num_values * _WIDTHS[kind]
            else:
                return None
        return total

    def _whole(self, group: int, *, keep: bool = True) -> pa.Table:
        if self._kept is not None and self._kept[0] == group:
            table = self._kept[1]
        else:
            self._kept = None  # before the next one is there: two would take twice the memory
            if self._parquet is not None:
                # A reader that fetches ahead keeps all that it fetched for as long as it lives.
                reader = self._opened(self._parquet.metadata, pre_buffer=True)
                table = reader.read_row_group(group, columns=self._columns, use_threads=False)
            else:
                _check(self._sizes.batch(group), f"Record batch {group} of the input takes")
                table = pa.Table.from_batches([self._arrow.get_batch(group)]).select(self._columns)
                # pyarrow believes the file: offsets that lead out of a buffer would be followed.
                table.validate(full=True)
        self._kept = (group, table) if keep else None
        return table

    def _stepped(self, parquet: pq.ParquetFile, group: int, offset: int, rows: int, step: int) -> pa.Table:
        """Go on from where the last slice ended; begin anew only for one that lies before."""
        reading = self._reading
        if reading is None or reading.group != group or reading.at > offset:
            batches = parquet.iter_batches(step, [group], columns=self._columns, use_threads=False)
            reading = self._reading = _Reading(group, batches)
        taken: list[pa.RecordBatch] = []
        taking = 0
        while rows > 0:
            batch = reading.rest.pop() if reading.rest else next(reading.batches, None)
            if batch is None:  # as above; and a StopIteration would never get out of a thread
                raise _fewer()
            skipped = min(max(0, offset - reading.at), batch.num_rows)
            used = min(rows, batch.num_rows - skipped)
            if used:
                taken.append(batch.slice(skipped, used))
                taking += taken[-1].nbytes
                _check(taking, "Rows of a chunk of the input take")
            if skipped + used < batch.num_rows:
                reading.rest.append(batch.slice(skipped + used))
            reading.at += skipped + used
            rows -= used
        return pa.Table.from_batches(taken)


def _texts(metadata: pq.FileMetaData) -> list[str]:
    """Columns of texts or bytes that are not inside of others."""
    schema = metadata.schema
    columns = [schema.column(index) for index in range(len(schema))]
    return [
        column.name
        for column in columns
        if column.physical_type == "BYTE_ARRAY" and column.path == column.name and not _is_number(column)
    ]


def _is_number(column: pq.ColumnSchema) -> bool:
    return bool(column.logical_type.type == "DECIMAL")


def _plain_bytes(table: pa.Table) -> int:
    """What `table` takes with every reference into a dictionary replaced by what it stands for."""
    total = 0
    for column in table.columns:
        if not pa.types.is_dictionary(column.type):
            total += column.nbytes
            continue
        for chunk in column.chunks:
            try:
                lengths = pc.binary_length(chunk.dictionary)
            except pa.ArrowNotImplementedError:  # numbers
                total += 8 * len(chunk)
            else:
                total += (pc.sum(lengths.take(chunk.indices)).as_py() or 0) + 4 * len(chunk)
    return total


def _plain(table: pa.Table) -> pa.Table:
    for index, column in enumerate(table.columns):
        if pa.types.is_dictionary(column.type):
            name = table.column_names[index]
            table = table.set_column(index, name, column.cast(column.type.value_type))
    return table


def _fewer() -> InvalidArgument:
    return InvalidArgument("The input has fewer rows than it says.", field=_FIELD)


def _check(size: int, what: str) -> None:
    if size > MAX_BYTES:
        raise InvalidArgument(f"{what} more than {MAX_BYTES} bytes in memory.", field=_FIELD)
