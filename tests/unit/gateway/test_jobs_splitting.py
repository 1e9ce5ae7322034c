"""Inputs cut into chunks: each row in exactly one, whatever the file looks like."""

from __future__ import annotations

import csv
import io
import json
import struct
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from headrace.v1.batch_pb2 import InputFormat, InputRange
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.objects import SourceInfo
from services.gateway.jobs.sizing import MAX_ROWS, ChunkLimits, chunk_limits, run_rows, seconds_for
from services.gateway.jobs.splitting.arrow_file import arrow_batches
from services.gateway.jobs.splitting.groups import Group, cut_groups
from services.gateway.jobs.splitting.images import cut_images
from services.gateway.jobs.splitting.parquet import parquet_groups
from services.gateway.jobs.splitting.port import Chunk, Cursor
from services.gateway.jobs.splitting.text import cut_text

JSONL, CSV = InputFormat.INPUT_FORMAT_JSON_LINES, InputFormat.INPUT_FORMAT_CSV


class Text:
    """Bytes that are read in pieces of at most `piece`; counts what was read."""

    def __init__(self, text: bytes, piece: int = 1 << 30) -> None:
        self.text = text
        self.size = len(text)
        self.piece = piece
        self.reached = 0

    async def read(self, start: int, end: int) -> bytes:
        found = self.text[start : min(end, start + self.piece)]
        self.reached = max(self.reached, start + len(found))
        return found

    def range(self, start: int, end: int, columns: list[str]) -> InputRange:
        return InputRange(first_byte=start, end_byte=end, columns=columns)


async def chunks_of(
    source: Text, kind: InputFormat, limits: ChunkLimits, cursor: Cursor | None = None
) -> tuple[list[Chunk], int]:
    """All chunks, and the number of rows. Checks that they follow each other, also after a restart."""
    found: list[Chunk] = []
    rows, done = -1, False
    async for cut in cut_text(source, kind, limits, cursor, source.range):
        assert not done
        found += cut.chunks
        rows, done = cut.rows, cut.done
    assert done
    return found, rows


async def json_rows(text: bytes, rows: int = 3, piece: int = 1 << 30, **limits: int) -> list[Any]:
    source = Text(text, piece)
    chunks, total = await chunks_of(source, JSONL, ChunkLimits(rows=rows, **limits))
    found: list[Any] = []
    for chunk in chunks:
        lines = text[chunk.input.first_byte : chunk.input.end_byte].split(b"\n")
        values = [json.loads(line) for line in lines if line.strip()]
        assert chunk.first_row == len(found)
        assert len(values) == chunk.rows <= rows
        found += values
    assert total == len(found)
    return found


async def csv_rows(text: bytes, rows: int = 3, piece: int = 1 << 30) -> tuple[list[str], list[list[str]]]:
    """Columns and records, each chunk read by pyarrow as a worker reads it."""
    source = Text(text, piece)
    chunks, total = await chunks_of(source, CSV, ChunkLimits(rows=rows))
    found: list[list[str]] = []
    columns: list[str] = []
    for chunk in chunks:
        columns = list(chunk.input.columns)
        part = text[chunk.input.first_byte : chunk.input.end_byte]
        table = pa_csv.read_csv(
            io.BytesIO(part),
            read_options=pa_csv.ReadOptions(column_names=columns),
            parse_options=pa_csv.ParseOptions(newlines_in_values=True),
            convert_options=pa_csv.ConvertOptions(column_types=dict.fromkeys(columns, pa.string())),
        )
        assert chunk.first_row == len(found)
        assert table.num_rows == chunk.rows <= rows
        found += [list(row.values()) for row in table.to_pylist()]
    assert total == len(found)
    return columns, found


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (b"", []),
        (b"\n\n  \n\t\r\n", []),
        (b"1", [1]),
        (b"1\n2\n", [1, 2]),
        (b"1\r\n2\r\n3", [1, 2, 3]),
        (b"\xef\xbb\xbf1\n2\n", [1, 2]),
        (b"\n1\n\n \n2\n\n", [1, 2]),
        (b' {"a": "\\n"}\n[1,\t2]\n', [{"a": "\n"}, [1, 2]]),
        (b"1\n2\n3\n4\n5\n6\n7", [1, 2, 3, 4, 5, 6, 7]),
    ],
)
@pytest.mark.parametrize("piece", [1 << 30, 5, 1])
async def test_json_lines(text: bytes, wanted: list[Any], piece: int) -> None:
    assert await json_rows(text, piece=piece) == wanted


@pytest.mark.parametrize(
    ("text", "columns", "wanted"),
    [
        (b"a,b\n1,2\n", ["a", "b"], [["1", "2"]]),
        (b"\xef\xbb\xbfa,b\r\n1,2\r\n3,4", ["a", "b"], [["1", "2"], ["3", "4"]]),
        (b"a,b\n", [], []),
        (b"a,b\n\n\n1,2\n\n\n", ["a", "b"], [["1", "2"]]),
        (b'a,b\n"x\ny",2\n"x\r\n\r\ny","3"\n', ["a", "b"], [["x\ny", "2"], ["x\r\n\r\ny", "3"]]),
        (b'a,b\n"say ""hi""\n",1\n"",2\n', ["a", "b"], [['say "hi"\n', "1"], ["", "2"]]),
        (b'"a\nb","c,d"\n1,2\n', ["a\nb", "c,d"], [["1", "2"]]),
        (b'a,b\n""""," , "\n', ["a", "b"], [['"', " , "]]),
        (b'a\n"1"\r\n"2"', ["a"], [["1"], ["2"]]),
        (b"\n\na\n1\n", ["a"], [["1"]]),
    ],
)
@pytest.mark.parametrize("piece", [1 << 30, 7, 1])
async def test_csv(text: bytes, columns: list[str], wanted: list[list[str]], piece: int) -> None:
    found, rows = await csv_rows(text, piece=piece)
    assert rows == wanted
    assert not columns or found == columns


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'a,b\n1,"2\n3,4\n', "Line 2: a quoted value is not closed."),
        (b'a,b\n1,2\n5" pipe,2\n', "Line 3: a quote stands inside a value"),
        (b'a,b\n"x"y,2\n', "Line 2: a quote stands inside a value"),
        (b"a,b\n1,2\r3,4\n", "Line 2: a carriage return without a line feed"),
        (b"a,,b\n1,2,3\n", "a column without a name"),
        (b"a,b,a\n1,2,3\n", "two columns named 'a'"),
        (b"1,2\n3,4\n", "names its columns"),
        (b"\xff\xfea\x00\n\x00", "not UTF-8"),
        (b"\x80,b\n1,2\n", "cannot be read as names"),
    ],
)
async def test_a_csv_that_could_be_read_in_two_ways_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason) as caught:
        await csv_rows(text)
    assert caught.value.field == "input_uri"


@pytest.mark.parametrize("kind", [JSONL, CSV])
async def test_an_endless_line_is_refused_by_its_number_without_reading_on(kind: InputFormat) -> None:
    class Endless(Text):
        size = 2 << 30

        async def read(self, start: int, end: int) -> bytes:
            self.reached = max(self.reached, end)
            head = b"a\n1\n2\n"
            return (head + b"x" * (end - len(head)))[start:end] if start < len(head) else b"x" * (end - start)

    source = Endless(b"")
    source.size = 2 << 30
    with pytest.raises(InvalidArgument, match="Line 4 is longer than 8388608 bytes"):
        await chunks_of(source, kind, ChunkLimits())
    assert source.reached <= 16 << 20


async def test_a_chunk_keeps_within_its_bytes() -> None:
    text = b"".join(b'"%s"\n' % (b"x" * 90) for _ in range(100))
    chunks, _ = await chunks_of(Text(text), JSONL, ChunkLimits(rows=1000, bytes=1000))
    assert all(chunk.input.end_byte - chunk.input.first_byte <= 1000 for chunk in chunks)
    assert sum(chunk.rows for chunk in chunks) == 100


async def test_an_input_that_is_cut_short_meanwhile_is_refused() -> None:
    source = Text(b"1\n2\n")
    source.size = 100
    with pytest.raises(InvalidArgument, match="ends before its size"):
        await chunks_of(source, JSONL, ChunkLimits())


VALUE = st.text(st.sampled_from('ab",\n\r é'), max_size=6)


@given(
    st.lists(st.tuples(VALUE, VALUE), max_size=12),
    st.integers(1, 5),
    st.integers(1, 40),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
async def test_whatever_a_csv_writer_writes_is_cut_at_its_records(
    values: list[tuple[str, str]], rows: int, piece: int, end: str, closed: bool
) -> None:
    out = io.StringIO(newline="")
    writer = csv.writer(out, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerow(["first", "second"])
    writer.writerows(values)
    text = out.getvalue().encode()
    _, found = await csv_rows(text if closed else text.removesuffix(end.encode()), rows, piece)
    assert found == [list(pair) for pair in values]


@given(
    st.lists(st.one_of(st.integers(-5, 10**6), st.just(None), st.text(max_size=5))),
    st.integers(1, 5),
    st.integers(1, 40),
    st.lists(st.sampled_from(["", " ", "\t"]), min_size=1),
)
@settings(max_examples=150, deadline=None)
async def test_blank_lines_are_no_rows(values: list[Any], rows: int, piece: int, blanks: list[str]) -> None:
    lines: list[str] = []
    for number, value in enumerate(values):
        lines += [json.dumps(value), blanks[number % len(blanks)]]
    assert await json_rows("\n".join(lines).encode(), rows, piece) == values


@given(st.integers(0, 300), st.integers(1, 7))
@settings(max_examples=40, deadline=None)
async def test_cutting_goes_on_behind_any_cursor(count: int, rows: int) -> None:
    text = "".join(f"{number}\n\n" for number in range(count)).encode()
    limits = ChunkLimits(rows=rows)
    source = Text(text)
    whole, _ = await chunks_of(source, JSONL, limits)
    before: list[Chunk] = []
    async for cut in cut_text(source, JSONL, limits, None, source.range):
        before += cut.chunks
        if not cut.done:
            after, total = await chunks_of(source, JSONL, limits, json.loads(json.dumps(cut.cursor)))
            assert before + after == whole
            assert total == count


def group_range(group: int, offset: int) -> InputRange:
    return InputRange(group=group, group_offset=offset)


@given(
    st.lists(st.builds(Group, st.integers(0, 50), st.integers(0, 500)), max_size=12),
    st.integers(1, 20),
    st.integers(1, 200),
)
@settings(deadline=None)
def test_groups_are_cut_whole_or_alone(groups: list[Group], rows: int, size: int) -> None:
    limits = ChunkLimits(rows=rows, bytes=size)
    starts = [sum(group.rows for group in groups[:number]) for number in range(len(groups) + 1)]
    found: list[Chunk] = []
    for cut in cut_groups(groups, limits, None, group_range):
        found += cut.chunks
        rest = [chunk for one in cut_groups(groups, limits, cut.cursor, group_range) for chunk in one.chunks]
        if not cut.done:
            assert found + rest == [
                chunk for one in cut_groups(groups, limits, None, group_range) for chunk in one.chunks
            ]
    at = 0
    for chunk in found:
        first, last = chunk.first_row, chunk.first_row + chunk.rows
        assert first == at == starts[chunk.input.group] + chunk.input.group_offset
        assert 0 < chunk.rows <= rows
        # Whole groups, or within one.
        assert (first in starts and last in starts) or last <= starts[chunk.input.group + 1]
        at = last
    assert at == starts[-1]


def parquet(rows: int, **options: Any) -> bytes:
    sink = io.BytesIO()
    table = pa.table({"x": list(range(rows)), "nested": [{"a": [number]} for number in range(rows)]})
    pq.write_table(table, sink, **options)
    return sink.getvalue()


def arrow(batches: Sequence[int], **options: Any) -> bytes:
    sink = io.BytesIO()
    schema = pa.schema([("x", pa.int64()), ("t", pa.dictionary(pa.int8(), pa.string()))])
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for rows in batches:
            texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int8()), pa.array(["a"]))
            writer.write_batch(pa.record_batch([pa.array(range(rows), pa.int64()), texts], schema=schema))
    return sink.getvalue()


@pytest.mark.parametrize(("rows", "wanted"), [(0, []), (1, [1]), (10, [4, 4, 2])])
def test_groups_of_parquet(rows: int, wanted: list[int]) -> None:
    found = parquet_groups(io.BytesIO(parquet(rows, row_group_size=4)))
    assert [group.rows for group in found if group.rows] == wanted


@pytest.mark.parametrize("batches", [[], [0], [1], [3, 0, 70_000, 1]])
@pytest.mark.parametrize("options", [{}, {"compression": "lz4"}, {"use_legacy_format": True}])
def test_batches_of_arrow(batches: list[int], options: dict[str, Any]) -> None:
    data = arrow(batches, **options)
    assert [group.rows for group in arrow_batches(io.BytesIO(data))] == batches
    assert pa.ipc.open_file(io.BytesIO(data)).num_record_batches == len(batches)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damaged_files_are_refused_whatever_is_damaged(kind: str) -> None:
    read = parquet_groups if kind == "parquet" else arrow_batches
    data = parquet(50, row_group_size=10) if kind == "parquet" else arrow([10, 20])
    for end in range(0, len(data), 7):
        with pytest.raises(InvalidArgument) as caught:
            read(io.BytesIO(data[:end]))
        assert caught.value.field == "input_uri"
    for at in range(max(0, len(data) - 600), len(data)):
        damaged = bytearray(data)
        damaged[at] ^= 0xFF
        try:
            groups = read(io.BytesIO(bytes(damaged)))
        except InvalidArgument:
            continue
        assert all(group.rows >= 0 and group.bytes >= 0 for group in groups)


def test_a_footer_that_claims_gigabytes_is_refused() -> None:
    data = parquet(5)[:-8] + struct.pack("<I", 0x7FFFFFFF) + b"PAR1"
    with pytest.raises(InvalidArgument, match="damaged"):
        parquet_groups(io.BytesIO(data))
    claim = arrow([5])[:-10] + struct.pack("<i", 0x7FFFFFFF) + b"ARROW1"
    with pytest.raises(InvalidArgument, match="damaged"):
        arrow_batches(io.BytesIO(claim))


def test_images_are_cut_by_name_and_a_changed_folder_is_another_input() -> None:
    files = [SourceInfo(10, "e", name) for name in ("a.png", "b.JPG", "notes.txt", "sub/c.jpeg", "z.png")]
    limits = ChunkLimits(rows=2)
    (cut,) = cut_images("file:///f", files, limits, None)
    assert [list(chunk.input.names) for chunk in cut.chunks] == [["a.png", "b.JPG"], ["sub/c.jpeg", "z.png"]]
    assert cut.rows == 4
    with pytest.raises(FailedPrecondition):
        list(cut_images("file:///f", files[1:], limits, cut.cursor))
    with pytest.raises(InvalidArgument, match="no PNG"):
        list(cut_images("file:///f", [SourceInfo(1, "e", "notes.txt")], limits, None))


def test_image_chunks_keep_within_bytes_and_names() -> None:
    large = [SourceInfo(6, "e", f"{number}.png") for number in range(5)]
    (cut,) = cut_images("file:///f", large, ChunkLimits(rows=100, bytes=12), None)
    assert [chunk.rows for chunk in cut.chunks] == [2, 2, 1]
    (cut,) = cut_images("file:///f", large, ChunkLimits(rows=100, bytes=1), None)
    assert [chunk.rows for chunk in cut.chunks] == [1] * 5
    long = [SourceInfo(1, "e", f"{'x' * 200}{number:06d}.png") for number in range(20_000)]
    (cut,) = cut_images("file:///f", long, ChunkLimits(rows=65_536), None)
    assert sum(chunk.rows for chunk in cut.chunks) == 20_000
    assert all(chunk.input.ByteSize() < 2 << 20 for chunk in cut.chunks)


def test_an_estimate_counts_the_model_and_what_is_around_it() -> None:
    assert seconds_for(0, 2, 1e6) == 0.2
    assert seconds_for(1_000_000, 1, 1e6) == 2.2
    assert seconds_for(1_000_000, 4, 100) == 2500.45


def test_chunks_are_whole_batches_of_about_a_second() -> None:
    assert chunk_limits(0, 0.0).rows == 4096
    assert chunk_limits(256, 10_000).rows == 39 * 256
    assert chunk_limits(512, 5e6).rows == MAX_ROWS
    assert chunk_limits(1, 0.2).rows == 1
    assert chunk_limits(100_000, 1.0).rows == MAX_ROWS
    assert [run_rows(best, rate) for best, rate in ((0, 9), (64, 0), (1, 5), (1000, 1e6), (8192, 1e6))] == [
        0,
        0,
        1,
        512,
        2048,
    ]
    for best in (1, 7, 64, 1000):
        assert chunk_limits(best, 12_345.6).rows % best == 0
