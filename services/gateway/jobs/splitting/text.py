"""JSON Lines, CSV and OpenAI lines: one pass over the bytes, a few megabytes at a time."""

from __future__ import annotations

import asyncio
import codecs
import csv
import io
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from headrace.v1.batch_pb2 import InputFormat, InputRange

from services.gateway.jobs.sizing import ChunkLimits
from services.gateway.jobs.splitting.lines import Ends, csv_ends, json_ends
from services.gateway.jobs.splitting.port import CHUNKS_AT_ONCE, Chunk, Cursor, Cut, Cuts, TextSource, refused

_PIECE = 4 << 20
_TURN = 1 << 20
_MAX_COLUMNS = 100_000
_MARK_BYTES = 4
_WIDE_BOMS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)

#: Makes the range of the rows that lie from one byte to before another, in these columns.
RangeOf = Callable[[int, int, list[str]], InputRange]


async def cut_text(
    source: TextSource, kind: InputFormat, limits: ChunkLimits, cursor: Cursor | None, range_of: RangeOf
) -> Cuts:
    """Cut lines into chunks. A line longer than `limits.line_bytes` is refused by its number, without reading
    on."""
    is_csv = kind == InputFormat.INPUT_FORMAT_CSV
    cutter = _Cutter(limits, range_of)
    if cursor is not None:
        cutter.go_on(cursor)
    tail, position = b"", cutter.start
    is_marked = position == 0
    while True:
        piece = await source.read(position, min(position + _PIECE, source.size))
        position += len(piece)
        if not piece and position < source.size:
            raise refused("The input ends before its size.")
        last = position >= source.size
        # In short turns: numpy holds Python's lock, and online requests would wait for it.
        for begin in range(0, max(1, len(piece)), _TURN):
            text = tail + piece[begin : begin + _TURN]
            is_end = last and begin + _TURN >= len(piece)
            if is_marked:
                if len(text) < _MARK_BYTES and not is_end:
                    tail = text
                    continue
                text, is_marked = cutter.without_mark(text), False
            tail = await asyncio.to_thread(cutter.take, text, is_csv=is_csv, last=is_end)
        while len(cutter.ready) >= CHUNKS_AT_ONCE:
            yield cutter.cut(CHUNKS_AT_ONCE)
        if last:
            break
    yield cutter.last()


@dataclass(slots=True)
class _Cutter:
    """The chunk being gathered begins at byte `start` with row `row` on line `line`; it ends, so far, at
    `end` with `rows` rows. What is complete lies in `ready`, each with the cursor behind it."""

    limits: ChunkLimits
    range_of: RangeOf
    start: int = 0
    row: int = 0
    line: int = 1
    end: int = 0
    rows: int = 0
    end_line: int = 1
    columns: list[str] = field(default_factory=list)
    ready: deque[tuple[Chunk, Cursor]] = field(default_factory=deque)

    def go_on(self, cursor: Cursor) -> None:
        self.start = self.end = cursor["at"]
        self.row = cursor["row"]
        self.line = self.end_line = cursor["line"]
        self.columns = cursor["columns"]

    def cursor(self) -> Cursor:
        return {"at": self.start, "row": self.row, "line": self.line, "columns": self.columns}

    def without_mark(self, text: bytes) -> bytes:
        """The beginning of the input without a byte order mark of UTF-8."""
        if text.startswith(_WIDE_BOMS):
            raise refused("The input is not UTF-8.")
        if text.startswith(codecs.BOM_UTF8):
            self.start = self.end = len(codecs.BOM_UTF8)
            return text[self.start :]
        return text

    def take(self, text: bytes, *, is_csv: bool, last: bool) -> bytes:
        """Cut `text`, which begins at byte `end`, and return what is not a whole line yet."""
        ends = csv_ends(text, self.end_line, last=last) if is_csv else json_ends(text, last=last)
        self._check_length(ends, text)
        begin = 0
        if is_csv and not self.columns and len(ends.at):
            begin = self._header(ends, text)
        self._gather(ends, text, begin)
        return text[int(ends.at[-1]) :] if len(ends.at) else text

    def cut(self, count: int) -> Cut:
        taken = [self.ready.popleft() for _ in range(count)]
        chunk, cursor = taken[-1]
        return Cut([one for one, _ in taken], cursor, chunk.first_row + chunk.rows, done=False)

    def last(self) -> Cut:
        if self.rows:
            self._finish()
        chunks = [chunk for chunk, _ in self.ready]
        return Cut(chunks, self.cursor(), self.row, done=True)

    def _check_length(self, ends: Ends, text: bytes) -> None:
        limit = self.limits.line_bytes
        starts = np.concatenate((np.zeros(1, dtype=np.int64), ends.at))
        lengths = np.diff(np.append(starts, len(text)))
        too_long = np.flatnonzero(lengths > limit)
        if len(too_long):
            before = text.count(b"\n", 0, int(starts[too_long[0]]))
            raise refused(f"Line {self.end_line + before} is longer than {limit} bytes.")

    def _header(self, ends: Ends, text: bytes) -> int:
        """Read the names of the columns; the index of the first line behind them, or of none."""
        index = int(np.searchsorted(ends.rows, 1))
        if index == len(ends.at):
            return index
        begin = int(ends.at[index - 1]) if index else 0
        self.columns = header_columns(text[begin : int(ends.at[index])])
        ends.rows[:] -= 1
        return index + 1

    def _gather(self, ends: Ends, text: bytes, index: int) -> None:
        base, before = self.end, int(ends.rows[index - 1]) if index else 0
        if index:  # a header, and blank lines before it
            self._skip(text, base, 0, int(ends.at[index - 1]))
        at, rows = ends.at, ends.rows
        done = int(ends.at[index - 1]) if index else 0
        while index < len(at):
            by_rows = int(np.searchsorted(rows, before + self.limits.rows - self.rows, side="right"))
            by_bytes = int(np.searchsorted(at, self.start + self.limits.bytes - base, side="right"))
            stop = min(by_rows, by_bytes)
            if stop <= index:
                if self.rows:
                    self._finish()
                    continue
                stop = index + 1  # one line that fills a chunk
            upto = int(at[stop - 1])
            self.rows += int(rows[stop - 1]) - before
            self.end_line += text.count(b"\n", done, upto)
            self.end, before, index, done = base + upto, int(rows[stop - 1]), stop, upto
            if not self.rows:  # blank lines belong to no chunk
                self.start, self.line = self.end, self.end_line

    def _skip(self, text: bytes, base: int, begin: int, upto: int) -> None:
        self.end_line += text.count(b"\n", begin, upto)
        self.start = self.end = base + upto
        self.line = self.end_line

    def _finish(self) -> None:
        chunk = Chunk(self.row, self.rows, self.range_of(self.start, self.end, self.columns))
        self.start, self.line, self.row, self.rows = self.end, self.end_line, self.row + self.rows, 0
        self.ready.append((chunk, self.cursor()))


def header_columns(line: bytes) -> list[str]:
    """The names in the first record of a CSV. Raises InvalidArgument where they are none."""
    try:
        names = next(csv.reader(io.StringIO(line.decode(), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error):
        raise refused("The first line of the CSV cannot be read as names of columns.") from None
    if len(names) > _MAX_COLUMNS or "" in names:
        raise refused("The first line of the CSV has a column without a name.")
    twice = (
        next((name for name in names if names.count(name) > 1), None)
        if len(set(names)) < len(names)
        else None
    )
    if twice is not None:
        raise refused(f"The CSV has two columns named {twice[:64]!r}.")
    if all(_is_number(name) for name in names):
        raise refused("The first line of a CSV names its columns; this one holds numbers only.")
    return names


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
