"""Slices of Parquet and Arrow files in any order, kept decoded or stepped through."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
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


def test_the_file_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    path.write_bytes(parquet().getvalue())
    opened = path.open("rb")
    TableFile(opened, chosen, parquet=True).close()
    assert opened.closed
