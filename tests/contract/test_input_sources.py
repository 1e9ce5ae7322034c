"""One suite for every place that inputs may lie in: files, the platform's own store, S3 as moto's server
speaks it."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from headrace.v1.batch_pb2 import InputFormat

from services.common.errors import FailedPrecondition, NotFound, PermissionDenied
from services.common.objects import ArtifactStore, InputSources
from services.gateway.jobs.sizing import ChunkLimits
from services.gateway.jobs.splitting import Input, cuts
from tests.contract.test_objects import _KEYS, _new_bucket, s3_endpoint
from tests.fixtures.jobs import arrow_of, parquet_of

__all__ = ["s3_endpoint"]


@dataclass
class Place:
    """`base` is allowed and ends in a slash; `put` writes a file below it."""

    sources: InputSources
    base: str
    put: Callable[[str, bytes], Awaitable[None]]


class SourcesContract:
    """What holds wherever inputs lie."""

    async def test_a_file_is_read_in_pieces_of_one_version(self, place: Place) -> None:
        await place.put("a/x.bin", b"abcdef")
        uri = f"{place.base}a/x.bin"
        info = await place.sources.stat(uri)
        assert info.size == 6
        assert await place.sources.read(uri, 2, 4, etag=info.etag) == b"cd"
        assert await place.sources.read(uri, 4, 4, etag=info.etag) == b""
        file = await place.sources.open(uri, etag=info.etag)
        file.seek(3)
        assert file.read(2) == b"de"
        assert file.read() == b"f"
        file.close()
        await place.put("a/x.bin", b"ABCDEFG")
        with pytest.raises(FailedPrecondition) as caught:
            await place.sources.read(uri, 2, 4, etag=info.etag)
        assert caught.value.field == "input_uri"
        with pytest.raises(FailedPrecondition):
            await place.sources.open(uri, etag=info.etag)
        assert (await place.sources.stat(uri)).etag != info.etag

    async def test_what_is_not_there(self, place: Place) -> None:
        for look in (
            place.sources.stat(f"{place.base}none"),
            place.sources.read(f"{place.base}none", 0, 1),
            place.sources.open(f"{place.base}none"),
            place.sources.list(f"{place.base}none"),
        ):
            with pytest.raises(NotFound) as caught:
                await look
            assert caught.value.field == "input_uri"

    async def test_beside_the_prefix(self, place: Place) -> None:
        with pytest.raises(PermissionDenied):
            await place.sources.stat(f"{place.base.rstrip('/')}2/x")

    async def test_a_folder_is_listed_in_order(self, place: Place) -> None:
        for name in ("b.png", "a.png", "sub/c.png"):
            await place.put(f"folder/{name}", name.encode())
        found = await place.sources.list(f"{place.base}folder/")
        assert [(one.name, one.size) for one in found] == [("a.png", 5), ("b.png", 5), ("sub/c.png", 9)]
        whole = await place.sources.read(f"{place.base}folder/sub/c.png", 0, 9, etag=found[2].etag)
        assert whole == b"sub/c.png"

    async def test_columnar_files_are_cut_and_read_by_ranges(self, place: Place) -> None:
        values = [float(number) for number in range(2500)]
        await place.put("x.parquet", parquet_of(values, group_rows=1000))
        await place.put("x.arrow", arrow_of(values, batch_rows=1000))
        for name, kind in (
            ("x.parquet", InputFormat.INPUT_FORMAT_PARQUET),
            ("x.arrow", InputFormat.INPUT_FORMAT_ARROW),
        ):
            uri = f"{place.base}{name}"
            etag = (await place.sources.stat(uri)).etag
            found = cuts(place.sources, Input(uri, kind, etag), ChunkLimits(rows=700), None)
            chunks = [chunk async for cut in found for chunk in cut.chunks]
            assert [chunk.rows for chunk in chunks] == [700, 300, 700, 300, 500]
            file = await place.sources.open(uri, etag=etag)
            table = pq.read_table(file) if name == "x.parquet" else pa.ipc.open_file(file).read_all()
            assert table.column("x").to_pylist() == values

    async def test_lines_are_cut(self, place: Place) -> None:
        text = b"".join(b"%d\n" % number for number in range(1000))
        await place.put("x.jsonl", text)
        uri = f"{place.base}x.jsonl"
        given = Input(uri, InputFormat.INPUT_FORMAT_JSON_LINES, (await place.sources.stat(uri)).etag)
        read = io.BytesIO()
        async for cut in cuts(place.sources, given, ChunkLimits(rows=300), None):
            for chunk in cut.chunks:
                lines = chunk.input
                read.write(await place.sources.read(uri, lines.first_byte, lines.end_byte, etag=lines.etag))
        assert read.getvalue() == text


class TestFiles(SourcesContract):
    @pytest.fixture
    async def place(self, tmp_path: Path) -> AsyncIterator[Place]:
        async def put(name: str, data: bytes) -> None:
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)

        (tmp_path / "data").mkdir()
        (tmp_path / "data2").mkdir()
        store = ArtifactStore(f"file://{tmp_path}/store")
        sources = InputSources(store, [f"file://{tmp_path}/data/"])
        yield Place(sources, f"file://{tmp_path}/data/", put)
        await sources.close()
        await store.close()


class TestOwnStore(SourcesContract):
    @pytest.fixture
    async def place(self, tmp_path: Path) -> AsyncIterator[Place]:
        store = ArtifactStore(f"file://{tmp_path}/store")

        async def put(name: str, data: bytes) -> None:
            await store.put(f"files/{name}", data)

        sources = InputSources(store, ["store://files/"])
        yield Place(sources, "store://files/", put)
        await sources.close()
        await store.close()


class TestS3(SourcesContract):
    @pytest.fixture
    async def place(self, tmp_path: Path, s3_endpoint: str) -> AsyncIterator[Place]:
        bucket = _new_bucket(s3_endpoint)
        options = {"endpoint": s3_endpoint} | _KEYS
        direct = ArtifactStore(f"s3://{bucket}/inputs", options)
        own = ArtifactStore(f"file://{tmp_path}/store")
        sources = InputSources(own, [f"s3://{bucket}/inputs/"], options)
        yield Place(sources, f"s3://{bucket}/inputs/", direct.put)
        await sources.close()
        await direct.close()
        await own.close()
