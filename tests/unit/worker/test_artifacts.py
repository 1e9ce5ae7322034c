"""Artifacts on the local disk."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.common.errors import Unavailable
from services.common.objects import ArtifactStore
from services.worker.artifacts import ArtifactCache
from services.worker.backends.port import LoadFailed
from tests.fixtures.deployments import blob_file, put_artifact, put_blob


class CountingStore(ArtifactStore):
    """The real store on a folder; counts what runs at once, and can be away."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"file://{folder}", concurrency=16)
        self.fetched = 0
        self.running = 0
        self.most = 0
        self.away = False

    async def get_blob(self, digest: str) -> bytes:
        if self.away:
            raise Unavailable("the artifact store is away")
        return await super().get_blob(digest)

    async def download_blob(self, digest: str, to: Path) -> int:
        self.fetched += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.002)
            return await super().download_blob(digest, to)
        finally:
            self.running -= 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def cache_of(tmp_path: Path, folder: Path) -> tuple[ArtifactCache, CountingStore]:
    store = CountingStore(folder)
    return ArtifactCache(store, tmp_path / "cache"), store


async def test_files_arrive_once_and_few_at_a_time(tmp_path: Path, folder: Path) -> None:
    files = {f"deep/er/{i}.bin": bytes([i]) * 1000 for i in range(20)}
    digest, _ = put_artifact(folder, files)
    cache, store = cache_of(tmp_path, folder)
    directory = await cache.fetch(digest)
    assert {path: (directory / path).read_bytes() for path in files} == files
    assert store.most <= 4
    assert await cache.fetch(digest) == directory
    assert store.fetched == len(files)


async def test_versions_of_one_artifact_that_load_at_once_share_it(tmp_path: Path, folder: Path) -> None:
    files = {f"{i}.bin": bytes([i]) * 1000 for i in range(3)}
    digest, _ = put_artifact(folder, files)
    cache, _ = cache_of(tmp_path, folder)
    directories = await asyncio.gather(*(cache.fetch(digest) for _ in range(8)))
    assert len(set(directories)) == 1
    assert {path: (directories[0] / path).read_bytes() for path in files} == files
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [directories[0].name]


async def test_what_lost_bytes_on_disk_is_fetched_again(tmp_path: Path, folder: Path) -> None:
    digest, _ = put_artifact(folder, {"model.onnx": b"abcdef"})
    cache, _ = cache_of(tmp_path, folder)
    directory = await cache.fetch(digest)
    (directory / "model.onnx").write_bytes(b"abc")
    assert (await cache.fetch(digest) / "model.onnx").read_bytes() == b"abcdef"


async def test_a_failed_download_leaves_nothing_behind(tmp_path: Path, folder: Path) -> None:
    digest, files = put_artifact(folder, {"a": b"good", "b": b"bad"})
    blob_file(folder, files["b"]).write_bytes(b"changed")
    cache, _ = cache_of(tmp_path, folder)
    with pytest.raises(LoadFailed, match="corrupt: b"):
        await cache.fetch(digest)
    assert list((tmp_path / "cache").iterdir()) == []


async def test_a_store_that_is_away_is_not_a_broken_artifact(tmp_path: Path, folder: Path) -> None:
    digest, _ = put_artifact(folder, {"a": b"good"})
    cache, store = cache_of(tmp_path, folder)
    store.away = True
    with pytest.raises(Unavailable):
        await cache.fetch(digest)


@pytest.mark.parametrize(
    "manifest",
    [
        b"not json",
        b"{}",
        b'{"files": []}',
        b'{"files": [{"path": "a"}]}',
        b'{"files": [{"path": "/etc/passwd", "digest": "sha256:0", "size": 1}]}',
        b'{"files": [{"path": "a/../../b", "digest": "sha256:0", "size": 1}]}',
        b'{"files": [{"path": "", "digest": "sha256:0", "size": 1}]}',
        b'{"files": [{"path": "a", "digest": "sha256:0", "size": 1}]}',
    ],
)
async def test_a_manifest_that_cannot_be_trusted(tmp_path: Path, folder: Path, manifest: bytes) -> None:
    digest = put_blob(folder, manifest)
    cache, _ = cache_of(tmp_path, folder)
    with pytest.raises(LoadFailed, match=r"manifest|corrupt"):
        await cache.fetch(digest)


async def test_the_cache_keeps_only_what_is_served(tmp_path: Path, folder: Path) -> None:
    one, _ = put_artifact(folder, {"a": b"1"})
    two, _ = put_artifact(folder, {"a": b"2"})
    cache, _ = cache_of(tmp_path, folder)
    kept, removed = await cache.fetch(one), await cache.fetch(two)
    (tmp_path / "cache" / ".partial-left").mkdir()
    await cache.keep_only([one])
    await cache.clear_partial()
    assert kept.exists()
    assert not removed.exists()
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [kept.name]
