"""How many rows an input has, roughly."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from headrace.v1.batch_pb2 import InputFormat

from services.common.errors import InvalidArgument
from services.common.objects import ArtifactStore, InputSources
from services.gateway.jobs.splitting import Input, about_rows
from services.gateway.jobs.splitting.counting import rows_of_sample

JSON, CSV = InputFormat.INPUT_FORMAT_JSON_LINES, InputFormat.INPUT_FORMAT_CSV


def test_what_was_read_whole_is_counted() -> None:
    assert rows_of_sample(b"[1]\n\n[2]\n[3]", JSON, 12) == 3
    assert rows_of_sample(b'a,b\n1,2\n"3\n",4\n', CSV, 15) == 2
    assert rows_of_sample(b"", JSON, 0) == 0
    assert rows_of_sample(b"a,b\n", CSV, 4) == 0


def test_the_rest_has_rows_like_those_that_were_read() -> None:
    assert rows_of_sample(b"[1]\n[2]\n[3", JSON, 4000) == 1000
    assert rows_of_sample(b"name\n" + b"1\n" * 10, CSV, 2005) == 1000


def test_nothing_is_said_of_lines_that_do_not_end() -> None:
    assert rows_of_sample(b"[1, 2, ", JSON, 4000) is None
    assert rows_of_sample(b"a,b\n", CSV, 4000) is None


async def test_tables_say_it_and_folders_are_counted(tmp_path: Path) -> None:
    table = pa.table({"x": list(range(1000))})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=300)
    with pa.ipc.new_file(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    (tmp_path / "x.jsonl").write_bytes(b"[1.5]\n" * 100_000)
    (tmp_path / "broken.parquet").write_bytes(b"PAR1" * 10)
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(b"")
    store = ArtifactStore((tmp_path / "store").as_uri())
    sources = InputSources(store, (f"{tmp_path.as_uri()}/",))
    try:

        async def rows(name: str, kind: InputFormat) -> float | None:
            return await about_rows(sources, Input((tmp_path / name).as_uri(), kind, ""))

        assert await rows("x.parquet", InputFormat.INPUT_FORMAT_PARQUET) == 1000
        assert await rows("x.arrow", InputFormat.INPUT_FORMAT_ARROW) == 1000
        assert await rows("x.jsonl", JSON) == 100_000
        assert await rows("images/", InputFormat.INPUT_FORMAT_IMAGES) == 2
        with pytest.raises(InvalidArgument):
            await rows("broken.parquet", InputFormat.INPUT_FORMAT_PARQUET)
    finally:
        await sources.close()
        await store.close()
