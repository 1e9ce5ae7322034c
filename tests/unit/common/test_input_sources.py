"""Inputs that callers name: what is allowed is read, and nothing else."""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from services.common.errors import (
    FailedPrecondition,
    Fatal,
    HeadraceError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
)
from services.common.objects import ArtifactStore, InputSources
from services.common.objects.local_files import open_file
from services.common.objects.sources import RangeFile, check_prefixes


@dataclass
class Place:
    """An allowed folder `data` with `a` (hello) and `in/x.png`, a secret beside it, and a store."""

    root: Path
    store: ArtifactStore
    sources: InputSources

    def uri(self, name: str) -> str:
        return f"file://{self.root}/data/{name}"


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    data = tmp_path / "data"
    (data / "in").mkdir(parents=True)
    (tmp_path / "data2").mkdir()
    (data / "a").write_bytes(b"hello")
    (data / "in" / "x.png").write_bytes(b"1")
    (data / "a b%").write_bytes(b"odd")
    (tmp_path / "data2" / "a").write_bytes(b"secret")
    (tmp_path / "secret").write_bytes(b"secret")
    (data / "out").symlink_to(tmp_path / "secret")
    (data / "outside").symlink_to(tmp_path / "data2")
    (data / "circle").symlink_to(data / "circle")
    (data / "link").symlink_to(data / "a")
    os.mkfifo(data / "fifo")
    store = ArtifactStore(f"file://{tmp_path}/store")
    await store.put("files/1/x", b"abcdef")
    await store.put("predictions/1", b"secret")
    sources = InputSources(store, ["store://files/", f"file://{data}/", "s3://bucket/inputs"])
    yield Place(tmp_path, store, sources)
    await sources.close()
    await store.close()


@pytest.mark.parametrize("name", ["a", "link", "in/../a", "./a", "a%20b%25"])
async def test_files_that_are_allowed_are_read_in_pieces(place: Place, name: str) -> None:
    info = await place.sources.stat(place.uri(name))
    whole = await place.sources.read(place.uri(name), 0, info.size, etag=info.etag)
    assert whole in (b"hello", b"odd")
    assert await place.sources.read(place.uri(name), 1, 3, etag=info.etag) == whole[1:3]
    assert await place.sources.read(place.uri(name), 1, 99) == whole[1:]
    with await place.sources.open(place.uri(name), etag=info.etag) as file:
        assert file.seek(-2, 2) == len(whole) - 2
        assert file.read() == whole[-2:]


@pytest.mark.parametrize(
    ("uri", "kind"),
    [
        ("file://{root}/secret", PermissionDenied),
        ("file://{root}/data2/a", PermissionDenied),
        ("file://{root}/data/../secret", PermissionDenied),
        ("file://{root}/data/%2e%2e/secret", PermissionDenied),
        ("file://{root}/data/out", PermissionDenied),
        ("file://{root}/data/outside/a", PermissionDenied),
        ("file://{root}/data/circle", PermissionDenied),
        ("file:///etc/passwd", PermissionDenied),
        ("file://{root}/data/none", NotFound),
        ("file://{root}/data/a/none", NotFound),
        ("file://{root}/data", InvalidArgument),
        ("file://{root}/data/fifo", InvalidArgument),
        ("file://localhost{root}/data/a", InvalidArgument),
        ("file://{root}/data/a?x", InvalidArgument),
        ("file://{root}/data/a%00", InvalidArgument),
        ("file:{root}", PermissionDenied),
        ("file:a", InvalidArgument),
        ("store://predictions/1", PermissionDenied),
        ("store://files/../predictions/1", InvalidArgument),
        ("store://files/..%2fpredictions/1", NotFound),
        ("store://files//1/x", InvalidArgument),
        ("store:///files/1/x", InvalidArgument),
        ("store://[files]/1/x", InvalidArgument),
        ("s3://[bucket/inputs/x", InvalidArgument),
        ("s3://buc\u2100ket/inputs/x", InvalidArgument),
        ("store://files2/x", PermissionDenied),
        ("store://files/2/none", NotFound),
        ("store://", PermissionDenied),
        ("s3://bucket/other/x", PermissionDenied),
        ("s3://bucket/inputs2/x", PermissionDenied),
        ("s3://bucket/inputs/../other", InvalidArgument),
        ("s3://other/inputs/x", PermissionDenied),
        ("s3:///inputs/x", InvalidArgument),
        ("STORE://files/1/x", InvalidArgument),
        (" store://files/1/x", InvalidArgument),
        ("store:files/1/x", InvalidArgument),
        ("FILE://{root}/data/a", InvalidArgument),
        ("S3://bucket/inputs/x", InvalidArgument),
        ("http://127.0.0.1/", InvalidArgument),
        ("gopher://x", InvalidArgument),
        ("file://{root}/data/\na", InvalidArgument),
        ("x" * 5000, InvalidArgument),
        ("", InvalidArgument),
    ],
)
async def test_everything_else_is_refused(place: Place, uri: str, kind: type[HeadraceError]) -> None:
    uri = uri.replace("{root}", str(place.root))
    for look in (place.sources.stat(uri), place.sources.read(uri, 0, 5), place.sources.open(uri)):
        with pytest.raises(kind) as caught:
            await look
        assert caught.value.field == "input_uri"
        assert "secret" not in caught.value.message


async def test_a_link_put_there_after_the_check_is_not_followed(place: Place, tmp_path: Path) -> None:
    data = place.root / "data"
    folder, kept = data / "in", data / "kept"
    real = folder.resolve()
    assert real.is_dir()
    folder.rename(kept)
    folder.symlink_to(place.root / "data2")
    with pytest.raises(HeadraceError):
        os.close(open_file(folder / "a", data))
    # As if the check had seen the folder itself: the walk to the file finds the link.
    (kept / "a").write_bytes(b"inside")
    inner = kept / "deep"
    inner.mkdir()
    (inner / "a").write_bytes(b"inside")
    descriptor = open_file(inner / "a", data)
    os.close(descriptor)
    shutil.rmtree(inner)
    inner.symlink_to(place.root / "data2")
    with pytest.raises(HeadraceError):
        open_file(inner / "a", data)


async def test_what_was_replaced_is_another_input(place: Place) -> None:
    for uri in (place.uri("a"), "store://files/1/x"):
        info = await place.sources.stat(uri)
        if uri.startswith("file"):
            (place.root / "data" / "a").write_bytes(b"changed")
        else:
            await place.store.put("files/1/x", b"changed!")
        for look in (place.sources.read(uri, 0, 3, etag=info.etag), place.sources.open(uri, etag=info.etag)):
            with pytest.raises(FailedPrecondition):
                await look


async def test_the_store_as_a_file(place: Place) -> None:
    info = await place.sources.stat("store://files/1/x")
    file = await place.sources.open("store://files/1/x", etag=info.etag)
    assert isinstance(file, RangeFile)
    assert file.read(2) == b"ab"
    assert file.seek(1, 1) == 3
    assert file.read() == b"def"
    assert file.read(5) == b""
    await place.store.put("files/1/x", b"ABCDEFG")
    file.seek(0)
    with pytest.raises(FailedPrecondition):
        file.read(1)


async def test_folders_are_listed_by_name_without_links(place: Place) -> None:
    found = await place.sources.list(place.uri(""))
    assert [one.name for one in found] == ["a", "a b%", "in/x.png"]
    assert [one.name for one in await place.sources.list("store://files/1")] == ["x"]
    with pytest.raises(InvalidArgument, match="more than 2"):
        await place.sources.list(place.uri(""), most=2)
    with pytest.raises(InvalidArgument):
        await place.sources.list(place.uri("a"))
    with pytest.raises(NotFound):
        await place.sources.list("store://files/none")


def test_a_prefix_that_is_none_is_found_at_start(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}/store")
    for prefix in ("http://x/", "data/", "s3://", "file://host/x"):
        with pytest.raises(Fatal):
            InputSources(store, [prefix])


async def test_nothing_is_allowed_by_default(tmp_path: Path) -> None:
    store = ArtifactStore(f"file://{tmp_path}/store")
    with pytest.raises(PermissionDenied):
        await InputSources(store, []).stat("store://files/x")


def test_prefixes_are_checked_without_a_store() -> None:
    check_prefixes(("store://", "file:///srv/data/", "s3://bucket/inputs"))
    for prefix in ("http://x/", "STORE://files", "store://a/../b", "file://host/x"):
        with pytest.raises(Fatal, match="BATCH_INPUT_ALLOW"):
            check_prefixes(("store://files/", prefix))
