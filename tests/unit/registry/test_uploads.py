"""Receiving multipart bodies piece by piece."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from headrace.v1 import registry_pb2 as pb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.common.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    HeadraceError,
    InvalidArgument,
    MalformedBody,
    ResourceExhausted,
)
from services.registry.artifacts import ReceivedFile, arranged, manifest
from services.registry.servicer import _receive
from services.registry.uploads import Uploads, receive_multipart, steady

TYPE = "multipart/form-data; boundary=----b"


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename is not None else "")
    return b"------b\r\nContent-Disposition: " + disposition.encode() + b"\r\n\r\n" + content + b"\r\n"


END = b"------b--\r\n"


async def pieces(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


def uploads(directory: Path, *, at_once: int = 2, max_bytes: int = 1 << 20, within_s: float = 5.0) -> Uploads:
    made = Uploads(directory / "uploads", at_once=at_once, max_bytes=max_bytes, within_s=within_s)
    made.clear()
    return made


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=500), size=st.integers(1, 200))
def test_any_content_in_any_pieces_arrives_unchanged(tmp_path: Path, content: bytes, size: int) -> None:
    async def receive() -> None:
        body = (
            part("files", content, "a/b.bin") + part("metadata", b'{"x": 1}') + part("files", b"", "c") + END
        )
        async with uploads(tmp_path).receive() as upload:
            assert await receive_multipart(TYPE, pieces(body, size), upload) == b'{"x": 1}'
            first, second = upload.files
            assert first.at.read_bytes() == content
            assert (first.path, first.size) == ("a/b.bin", len(content))
            assert first.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
            assert (second.path, second.size) == ("c", 0)

    if b"\r\n------b" not in b"\r\n" + content:
        asyncio.run(receive())


@pytest.mark.parametrize(
    ("kind", "body", "error", "field"),
    [
        ("application/json", b"{}", MalformedBody, None),
        ("multipart/form-data", END, MalformedBody, None),
        (TYPE, b"no boundary here", MalformedBody, None),
        (f"multipart/form-data; boundary={'b' * 1000}", END, MalformedBody, None),
        (TYPE, part("files", b"abc", "a"), MalformedBody, None),
        (TYPE, part("files", b"abc", "a")[:-5], MalformedBody, None),
        (TYPE, part("other", b"1") + END, InvalidArgument, "other"),
        (TYPE, part("metadata", b"{}") * 2 + END, InvalidArgument, "metadata"),
        (TYPE, part("files", b"x", "../up") + END, InvalidArgument, "files"),
        (TYPE, part("files", b"x", "/etc/passwd") + END, InvalidArgument, "files"),
        (TYPE, part("files", b"x", "") + END, InvalidArgument, "files"),
        (TYPE, part("files", b"x" * 2000, "big") + END, BodyTooLarge, "files"),
    ],
)
async def test_bad_bodies_are_refused_and_leave_nothing(
    tmp_path: Path, kind: str, body: bytes, error: type[HeadraceError], field: str | None
) -> None:
    receiving = uploads(tmp_path, max_bytes=1000)

    async def receive() -> None:
        async with receiving.receive() as upload:
            await receive_multipart(kind, pieces(body, 64), upload)

    with pytest.raises(error) as caught:
        await receive()
    assert type(caught.value) is error
    assert caught.value.field == field
    assert list((tmp_path / "uploads").iterdir()) == []


async def test_no_more_uploads_than_allowed(tmp_path: Path) -> None:
    receiving = uploads(tmp_path, at_once=1)

    async def another() -> None:
        async with receiving.receive():
            pass

    async with receiving.receive():
        with pytest.raises(ResourceExhausted):
            await another()
    await another()


async def test_one_key_leaves_places_to_others(tmp_path: Path) -> None:
    receiving = uploads(tmp_path, at_once=4)
    async with AsyncExitStack() as running:
        for _ in range(2):
            await running.enter_async_context(receiving.receive("greedy"))
        with pytest.raises(ResourceExhausted):
            await running.enter_async_context(receiving.receive("greedy"))
        await running.enter_async_context(receiving.receive("other"))
        await running.enter_async_context(receiving.receive())
    async with AsyncExitStack() as running:
        for _ in range(2):
            await running.enter_async_context(receiving.receive("greedy"))


async def test_an_upload_that_trickles_is_ended() -> None:
    sent = 0

    async def trickle() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            await asyncio.sleep(0.005)
            sent += 1
            yield b"x"

    with pytest.raises(DeadlineExceeded, match="slower than 16 kB/s"):
        async for _ in steady(trickle(), patience_s=0.1):
            pass
    assert sent > 0


async def test_an_upload_whose_pieces_are_worth_the_wait_goes_on() -> None:
    async def sender() -> AsyncIterator[bytes]:
        for _ in range(11):
            await asyncio.sleep(0.1)
            yield bytes(1 << 20)

    assert [len(piece) async for piece in steady(sender(), patience_s=1.0)] == [1 << 20] * 11


async def test_an_upload_that_never_ends_is_ended(tmp_path: Path) -> None:
    async def stalled() -> AsyncIterator[bytes]:
        yield part("files", b"abc", "a")
        await asyncio.Event().wait()

    async def receive() -> None:
        async with uploads(tmp_path, within_s=0.05).receive() as upload:
            await receive_multipart(TYPE, stalled(), upload)

    with pytest.raises(DeadlineExceeded):
        await receive()


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    left = tmp_path / "uploads" / "tmp123"
    left.mkdir(parents=True)
    (left / "0000").write_bytes(b"half a model")
    uploads(tmp_path)
    assert list((tmp_path / "uploads").iterdir()) == []


def received(path: str, content: str = "0") -> ReceivedFile:
    return ReceivedFile(path, f"sha256:{content * 64}", 1, Path(path))


def test_the_manifest_does_not_depend_on_the_order_of_files() -> None:
    one, two = received("a.json"), received("model.onnx", "1")
    assert manifest(arranged([one, two])) == manifest(arranged([two, one]))
    assert manifest(arranged([one])).startswith(b'{"files":[{"digest":"sha256:000')


def test_a_single_onnx_file_is_the_model_whatever_its_name() -> None:
    files = arranged([received("cancer-v2.onnx"), received("notes.txt")])
    assert [file.path for file in files] == ["model.onnx", "notes.txt"]


def test_a_path_stands_once() -> None:
    with pytest.raises(InvalidArgument, match="twice"):
        arranged([received("notes.txt"), received("notes.txt", "1")])


async def test_of_more_than_was_announced_nothing_is_kept(tmp_path: Path) -> None:
    """A stream that goes on for ever would fill the memory otherwise."""
    came = 0

    async def messages() -> AsyncIterator[pb.CreateVersionRequest]:
        nonlocal came
        for chunk in (b"abc", b"", *[b"more"] * 100):
            came += 1
            yield pb.CreateVersionRequest(chunk=chunk)

    header = pb.CreateVersionHeader(files=[pb.ArtifactFile(path="model.onnx", size=3)])
    async with uploads(tmp_path).receive() as upload:
        with pytest.raises(InvalidArgument, match="more bytes came") as refused:
            await _receive(header, messages(), upload)
        assert refused.value.field == "files"
    assert came == 3
