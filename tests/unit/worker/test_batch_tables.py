"""Slices of Parquet and Arrow files in any order, kept decoded or stepped through."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.common.errors import FailedPrecondition, InvalidArgument
from services.worker.batch import tables
from services.worker.batch.tables import TableFile

ROWS = np.arange(1000)
TABLE = pa.table({"n": ROWS, "unused": ROWS.astype(str), "x": ROWS.astype(np.float32)})


def parquet(group_rows: int = 400) -> io.BytesIO:
    sink = io.BytesIO()
    pq.write_table(TABLE, sink, row_group_size=group_rows)
    return io.BytesIO(sink.getvalue())


def arrow(group_rows: int = 400) -> io.BytesIO:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, TABLE.schema) as writer:
        for batch in TABLE.to_batches(max_chunksize=group_rows):
            writer.write_batch(batch)
    return io.BytesIO(sink.getvalue())


def chosen(names: list[str]) -> list[str]:
    return [name for name in names if name != "unused"]


@pytest.fixture(params=["parquet", "parquet in steps", "arrow"])
def file(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TableFile:
    if request.param == "parquet in steps":
        monkeypatch.setattr(tables, "KEPT_BYTES", 0)
        monkeypatch.setattr(tables, "_STEP_ROWS", 64)
    if request.param == "arrow":
        return TableFile(arrow(), chosen, parquet=False)
    return TableFile(parquet(), chosen, parquet=True)


def test_slices_are_read_in_any_order(file: TableFile) -> None:
    for group, offset, rows in [
        (0, 0, 100),
        (0, 100, 300),
        (0, 50, 10),
        (1, 0, 400),
        (1, 399, 1),
        (2, 0, 200),
    ]:
        read = file.read(group, offset, rows)
        assert read.column_names == ["n", "x"]
        first = group * 400 + offset
        assert read["n"].to_pylist() == list(range(first, first + rows))


def test_rows_go_on_into_the_next_groups(file: TableFile) -> None:
    assert file.read(0, 390, 500)["n"].to_pylist() == list(range(390, 890))


def test_rows_beyond_the_end_are_an_error(file: TableFile) -> None:
    with pytest.raises(FailedPrecondition, match="fewer rows"):
        file.read(2, 100, 200)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_what_is_no_such_file_is_an_error_of_the_input(kind: str) -> None:
    for content in (b"", b"PAR1 nothing of the kind", parquet().getvalue()[:-20], arrow().getvalue()[:-20]):
        with pytest.raises(InvalidArgument) as caught:
            TableFile(io.BytesIO(content), chosen, parquet=kind == "parquet")
        assert caught.value.field == "input_uri"


def test_damaged_pages_are_an_error_of_the_input() -> None:
    content = bytearray(parquet().getvalue())
    content[4:400] = bytes(396)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        TableFile(io.BytesIO(bytes(content)), chosen, parquet=True).read(0, 0, 100)


def test_metadata_that_contradict_themselves_are_an_error_of_the_input() -> None:
    """pyarrow ends the process of whoever asks for them."""
    sink = io.BytesIO()
    pq.write_table(pa.table({"n": [1.0, 2.0]}), sink)
    content = sink.getvalue()
    damaged = content.replace(b"%\2\x18\1n", b"%\0\x18\1n")  # the column is not optional any more
    assert damaged != content
    with pytest.raises(InvalidArgument, match="cannot be read"):
        TableFile(io.BytesIO(damaged), list, parquet=True).read(0, 0, 2)


def test_a_group_that_holds_fewer_rows_than_it_says_is_an_error_of_the_input() -> None:
    """Also where it is read in steps."""
    table = pa.table({"n": [["a", "b"]] * 300})
    sink = io.BytesIO()
    pq.write_table(table, sink)
    # Of the footer, where the last number of rows is that of the group: 300, now 600.
    before, rows, behind = sink.getvalue().rpartition(b"\xd8\x04")
    assert rows
    file = TableFile(io.BytesIO(before + b"\xb0\x09" + behind), list, parquet=True)
    assert file.read(0, 0, 300).num_rows == 300
    with pytest.raises(InvalidArgument, match="fewer rows than it says"):
        file.read(0, 0, 600)


@settings(deadline=None, max_examples=30)
@given(
    group_rows=st.integers(1, 1000),
    step=st.integers(1, 300),
    slices=st.lists(st.tuples(st.integers(0, 999), st.integers(1, 300)), min_size=1, max_size=6),
)
def test_any_slice_of_any_grouping_is_the_right_rows(
    group_rows: int, step: int, slices: list[tuple[int, int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "KEPT_BYTES", 0)
        patch.setattr(tables, "_STEP_ROWS", step)
        opened = TableFile(parquet(group_rows), chosen, parquet=True)
        for first, most in slices:
            rows = min(most, 1000 - first)
            read = opened.read(first // group_rows, first % group_rows, rows)
            assert read["n"].to_pylist() == list(range(first, first + rows))


def encoded(table: pa.Table) -> io.BytesIO:
    """As Parquet, in one row group."""
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=len(table))
    return io.BytesIO(sink.getvalue())


def compressed(table: pa.Table) -> io.BytesIO:
    """As Arrow, in one record batch."""
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    return io.BytesIO(sink.getvalue())


def test_a_group_is_not_kept_for_being_small_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "KEPT_BYTES", 1 << 20)
    content = encoded(pa.table({"n": np.zeros(4_000_000, np.int64)}))
    assert len(content.getvalue()) < 1 << 18
    opened = TableFile(content, chosen, parquet=True)
    before = pa.total_allocated_bytes()
    assert opened.read(0, 1_000_000, 100)["n"].to_pylist() == [0] * 100
    assert pa.total_allocated_bytes() - before < 4 << 20
    opened.close()


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (encoded(pa.table({"n": np.zeros(500_000, np.int64)})), 500000),
        (encoded(pa.table({"n": ["x" * 10_000] * 500})), 500),
        (encoded(pa.table({"n": [["x" * 10_000]] * 500})), 500),
        (encoded(pa.table({"n": pa.array([["x" * 10_000]] * 500, pa.large_list(pa.large_string()))})), 500),
        (compressed(pa.table({"n": np.zeros(500_000, np.int64)})), 500000),
        (compressed(pa.table({"n": ["x" * 10_000] * 500})), 500),
        (compressed(pa.table({"n": pa.array(["x" * 10_000] * 500).dictionary_encode()})), 500),
        (compressed(pa.table({"n": pa.array(["x" * 3_000_000, "y"]).dictionary_encode()})), 2),
    ],
    ids=["numbers", "texts", "lists", "large lists", "arrow numbers", "arrow texts", "references", "entries"],
)
def test_rows_that_take_too_much_memory_are_refused(
    content: io.BytesIO, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "MAX_BYTES", 2 << 20)
    parquet = content.getvalue()[:4] == b"PAR1"
    assert len(content.getvalue()) < 1 << 18
    with pytest.raises(InvalidArgument, match="more than 2097152 bytes in memory") as caught:
        TableFile(content, chosen, parquet=parquet).read(0, 0, rows)
    assert caught.value.field == "input_uri"


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a", None, "ä", "a"]),
        pa.array(["a", None, "ä", "a"], pa.large_string()),
        pa.array([b"1", None, b"22", b""], pa.binary()),
        pa.array(["a", None, "ä", "a"]).dictionary_encode(),
        pa.array([["a"], None, [], ["b", "c"]]),
        pa.array([1.5, None, 2, 3], pa.float64()),
        pa.array([5, None, 5, 6]).dictionary_encode(),
    ],
)
def test_texts_and_lists_are_what_they_were(column: pa.Array, monkeypatch: pytest.MonkeyPatch) -> None:
    table = pa.table({"n": column})
    for kept in (tables.KEPT_BYTES, 0):
        monkeypatch.setattr(tables, "KEPT_BYTES", kept)
        for content, parquet in ((encoded(table), True), (compressed(table), False)):
            read = TableFile(content, chosen, parquet=parquet).read(0, 1, 3)
            assert read["n"].to_pylist() == column.to_pylist()[1:]
            assert not pa.types.is_dictionary(read["n"].type)


def test_offsets_that_lead_out_of_the_file_are_an_error_of_the_input() -> None:
    sink = io.BytesIO()
    table = pa.table({"n": ["ab", "cde", "f"]})
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    offsets = np.array([0, 2, 5, 6], np.int32).tobytes()
    assert sink.getvalue().count(offsets) == 1
    wrong = np.array([0, 2, 0x7FFFFF00, 0x7FFFFFFF], np.int32).tobytes()
    opened = TableFile(io.BytesIO(sink.getvalue().replace(offsets, wrong)), chosen, parquet=False)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        opened.read(0, 0, 3)


@settings(deadline=None, max_examples=300)
@example(changes=[(10624, 0)])
@example(changes=[(3882, 0)])
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_of_an_arrow_file_gives_rows_or_an_error_of_the_input(
    changes: list[tuple[int, int]],
) -> None:
    table = pa.table({"n": ["ab", None, "f"], "x": [[1], [2, 3], []], "d": pa.array([1, 2, 1])})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    content = bytearray(sink.getvalue())
    for at, value in changes:
        content[at % len(content)] = value
    with suppress(InvalidArgument, FailedPrecondition):
        read = TableFile(io.BytesIO(bytes(content)), chosen, parquet=False).read(0, 0, 3)
        assert read.num_rows == 3 or not read.column_names  # damaged names: nothing was chosen


def test_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(parquet().getvalue())
    opened = path.open("rb")
    TableFile(opened, chosen, parquet=True).close()
    assert opened.closed
