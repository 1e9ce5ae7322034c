"""One suite for both stores: a local folder, and S3 as moto's server speaks it."""

from __future__ import annotations

import asyncio
import os
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from moto.server import ThreadedMotoServer

from services.common.errors import (
    AlreadyExists,
    DataLoss,
    Fatal,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from services.common.objects import ArtifactStore, blob_path, digest_of_bytes
from tests.fixtures.waiting import PATIENCE_S

_BIG = 11 * 1024 * 1024 + 7
_KEYS = {"access_key_id": "test", "secret_access_key": "test", "region": "us-east-1"}


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    serving = server._server
    assert serving is not None
    answer, one_at_a_time = serving.app, threading.Lock()

    def whole(environ: Any, start_response: Any) -> Any:
        # It looks whether a key is there and creates it in two steps, and S3 in one.
        with one_at_a_time:
            return answer(environ, start_response)

    serving.app = whole
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def _new_bucket(endpoint: str) -> str:
    bucket = f"bucket-{uuid.uuid4().hex[:12]}"
    httpx.put(f"{endpoint}/{bucket}", timeout=PATIENCE_S).raise_for_status()
    return bucket


class StoreContract:
    async def test_what_was_put_is_read_back(self, store: ArtifactStore) -> None:
        await store.put("a/b.bin", b"\x00first")
        await store.put("a/b.bin", b"\x00second")
        assert await store.get("a/b.bin") == b"\x00second"
        assert await store.exists("a/b.bin")
        assert not await store.exists("a")

    async def test_parts_of_an_object(self, store: ArtifactStore) -> None:
        await store.put("x", b"0123456789")
        assert await store.get("x", 2, 5) == b"234"
        assert await store.get("x", 7) == b"789"
        assert await store.get("x", 10) == b""

    async def test_an_absent_object_is_not_found(self, store: ArtifactStore, tmp_path: Path) -> None:
        with pytest.raises(NotFound, match="no/such"):
            await store.get("no/such")
        with pytest.raises(NotFound):
            await store.download("no/such", tmp_path / "file")
        with pytest.raises(NotFound):
            [piece async for piece in store.stream("no/such")]
        assert list(tmp_path.glob("**/*.part")) == []

    async def test_put_if_absent_never_replaces(self, store: ArtifactStore) -> None:
        await store.put_if_absent("once", b"first")
        with pytest.raises(AlreadyExists, match="once"):
            await store.put_if_absent("once", b"second")
        assert await store.get("once") == b"first"

    async def test_of_many_writers_at_once_exactly_one_creates(self, store: ArtifactStore) -> None:
        tries = (store.put_if_absent("race", b"%d" % number) for number in range(6))
        results = await asyncio.gather(*tries, return_exceptions=True)
        assert sorted(type(result).__name__ for result in results) == ["AlreadyExists"] * 5 + ["NoneType"]
        winner = next(number for number, result in enumerate(results) if result is None)
        assert await store.get("race") == b"%d" % winner

    async def test_a_big_file_goes_up_and_down_in_pieces(self, store: ArtifactStore, tmp_path: Path) -> None:
        big = tmp_path / "big"
        big.write_bytes(os.urandom(_BIG))
        await store.put("big", big)
        pieces = [piece async for piece in store.stream("big")]
        assert max(map(len, pieces)) <= 8 * 1024 * 1024
        assert b"".join(pieces) == big.read_bytes()
        assert await store.download("big", tmp_path / "deep" / "copy") == _BIG
        assert (tmp_path / "deep" / "copy").read_bytes() == big.read_bytes()

    async def test_an_empty_object(self, store: ArtifactStore, tmp_path: Path) -> None:
        await store.put("empty", b"")
        assert await store.get("empty") == b""
        assert [piece async for piece in store.stream("empty")] == []
        assert await store.download("empty", tmp_path / "empty") == 0
        assert (tmp_path / "empty").read_bytes() == b""

    async def test_list_knows_folders_not_prefixes_of_names(self, store: ArtifactStore) -> None:
        for path in ("m/2/x", "m/1/y", "m2/z"):
            await store.put(path, path.encode())
        found = await store.list("m")
        assert [(info.path, info.size) for info in found] == [("m/1/y", 5), ("m/2/x", 5)]
        assert len(await store.list()) == 3
        assert len(await store.list("m", limit=1)) == 1
        assert await store.list("nothing") == []

    async def test_delete_is_repeatable(self, store: ArtifactStore) -> None:
        await store.put("gone", b"x")
        await store.delete("gone")
        await store.delete("gone")
        assert not await store.exists("gone")

    async def test_blobs_are_named_by_their_content(self, store: ArtifactStore, tmp_path: Path) -> None:
        file = tmp_path / "model.onnx"
        file.write_bytes(os.urandom(_BIG))
        digest = await store.put_blob(file)
        assert digest == digest_of_bytes(file.read_bytes())
        assert await store.put_blob(file.read_bytes()) == digest
        assert [info.path for info in await store.list("blobs")] == [blob_path(digest)]
        await store.download_blob(digest, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == file.read_bytes()
        small = await store.put_blob(b"{}")
        assert await store.get_blob(small) == b"{}"

    async def test_a_damaged_blob_is_noticed_and_never_lands(
        self, store: ArtifactStore, tmp_path: Path
    ) -> None:
        digest = await store.put_blob(b"as it was")
        await store.put(blob_path(digest), b"as it is now")
        with pytest.raises(DataLoss, match="damaged"):
            await store.get_blob(digest)
        with pytest.raises(DataLoss, match="damaged"):
            await store.download_blob(digest, tmp_path / "copy")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("path", ["", "/abs", "a//b", "../up", "a/../b", "a/", ".", "nul\0"])
    async def test_paths_stay_inside(self, store: ArtifactStore, path: str) -> None:
        with pytest.raises(InvalidArgument) as caught:
            await store.put(path, b"x")
        assert caught.value.field == "path"

    @pytest.mark.parametrize("digest", ["", "sha256:", "sha256:" + "g" * 64, "md5:" + "0" * 64, "0" * 64])
    async def test_only_digests_name_blobs(self, store: ArtifactStore, digest: str) -> None:
        with pytest.raises(InvalidArgument) as caught:
            await store.get_blob(digest)
        assert caught.value.field == "digest"

    async def test_a_store_that_answers_passes_its_check(self, store: ArtifactStore) -> None:
        await store.check()


class TestLocalStore(StoreContract):
    @pytest.fixture
    async def store(self, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ArtifactStore]:
        store = ArtifactStore(f"file://{tmp_path_factory.mktemp('store')}/made/when needed")
        yield store
        await store.close()

    async def test_objects_are_files(self, store: ArtifactStore) -> None:
        await store.put("data/part-1.parquet", b"PAR1")
        path = store.local_path("data/part-1.parquet")
        assert path is not None
        assert path.read_bytes() == b"PAR1"


class TestS3Store(StoreContract):
    @pytest.fixture
    async def store(self, s3_endpoint: str) -> AsyncIterator[ArtifactStore]:
        url = f"s3://{_new_bucket(s3_endpoint)}/some/prefix"
        store = ArtifactStore(url, {"endpoint": s3_endpoint} | _KEYS)
        yield store
        await store.close()

    async def test_objects_are_not_files(self, store: ArtifactStore) -> None:
        assert store.local_path("x") is None


async def test_a_bucket_that_does_not_exist_fails_its_check(s3_endpoint: str) -> None:
    store = ArtifactStore("s3://no-such-bucket", {"endpoint": s3_endpoint} | _KEYS)
    with pytest.raises((NotFound, Unavailable)):
        await store.check()
    await store.close()


@pytest.mark.parametrize("url", ["", "/tmp/x", "file://host/x", "file:///", "s3://", "gs://bucket"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(Fatal, match="artifact store is"):
        ArtifactStore(url)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Fatal, match="cannot use the folder"):
        ArtifactStore(f"file://{tmp_path}/file/below")
