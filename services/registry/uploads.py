"""Receiving files without holding them: bytes go to a temporary file and through SHA-256 as they come."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import BinaryIO

from services.common.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
)
from services.common.multipart import read_parts
from services.registry.artifacts import ReceivedFile, check_path

MAX_FILES = 1000
MAX_METADATA_BYTES = 8 << 20
_BUFFER = 1 << 20
#: So many bytes of an upload are worth a second of waiting for more, of which it has at most so many.
_SLOWEST = 16 << 10
_PATIENCE_S = 60.0
_RETRY_MS = 2000


class Uploads:
    """Where uploads are received: `at_once` of them, each of at most `max_bytes` within `within_s`. No key
    has more places than are left to others: one alone gets half."""

    def __init__(self, directory: Path, *, at_once: int, max_bytes: int, within_s: float) -> None:
        self._directory = directory
        self._free = at_once
        self._held: Counter[str] = Counter()
        self._max_bytes = max_bytes
        self._within_s = within_s

    def clear(self) -> None:
        """Remove what a killed process left behind. Blocking; before the first upload."""
        shutil.rmtree(self._directory, ignore_errors=True)
        self._directory.mkdir(parents=True)

    @asynccontextmanager
    async def receive(self, key_id: str = "") -> AsyncIterator[Upload]:
        """One upload by that key; its files are gone after the block. Raises ResourceExhausted where too many
        are running, DeadlineExceeded where the block takes too long."""
        if not self._free:
            raise ResourceExhausted("too many uploads are running", retry_after_ms=_RETRY_MS)
        if self._held[key_id] >= self._free:
            raise ResourceExhausted("too many uploads of this key are running", retry_after_ms=_RETRY_MS)
        self._free -= 1
        self._held[key_id] += 1
        upload = None
        try:
            directory = Path(await asyncio.to_thread(tempfile.mkdtemp, dir=self._directory))
            upload = Upload(directory, self._max_bytes)
            async with asyncio.timeout(self._within_s):
                yield upload
        except TimeoutError:
            raise DeadlineExceeded(f"the upload took longer than {self._within_s:g} s") from None
        finally:
            self._free += 1
            self._held[key_id] -= 1
            if not self._held[key_id]:
                del self._held[key_id]
            if upload is not None:
                await asyncio.to_thread(upload.discard)


class Upload:
    """Files received so far, one after another: `begin`, `write` as often as needed, `end`."""

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.files: list[ReceivedFile] = []
        self._directory = directory
        self._left = max_bytes
        self._path = ""
        self._buffer = bytearray()
        self._file: BinaryIO | None = None
        self._hash = hashlib.sha256()
        self._size = 0

    async def begin(self, path: str) -> None:
        """A file whose path inside the version is `path`. Raises InvalidArgument, field `files`."""
        if len(self.files) >= MAX_FILES:
            raise InvalidArgument(f"a version has at most {MAX_FILES} files", field="files")
        self._path = check_path(path)
        self._hash, self._size = hashlib.sha256(), 0
        self._file = await asyncio.to_thread(open, self._at, "wb")

    async def write(self, data: bytes) -> None:
        """More of the file that was begun. Raises BodyTooLarge."""
        self._left -= len(data)
        if self._left < 0:
            raise BodyTooLarge("the upload is larger than this registry accepts", field="files")
        self._buffer += data
        if len(self._buffer) >= _BUFFER:
            await self._flush()

    async def end(self) -> ReceivedFile:
        """The file that was begun is complete."""
        await self._flush()
        if self._file is not None:
            await asyncio.to_thread(self._file.close)
            self._file = None
        received = ReceivedFile(self._path, f"sha256:{self._hash.hexdigest()}", self._size, self._at)
        self.files.append(received)
        return received

    def discard(self) -> None:
        """Remove every file, the one that was begun included. Blocking."""
        if self._file is not None:
            self._file.close()
            self._file = None
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def _at(self) -> Path:
        return self._directory / f"{len(self.files):04d}"

    async def _flush(self) -> None:
        data, self._buffer = self._buffer, bytearray()
        await asyncio.to_thread(self._store, data)

    def _store(self, data: bytearray) -> None:
        if self._file is None:
            raise RuntimeError("write before begin")
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)


async def steady(body: AsyncIterator[bytes], patience_s: float = _PATIENCE_S) -> AsyncIterator[bytes]:
    """`body`, as long as it is sent faster than a trickle. Raises DeadlineExceeded. Only what is waited for
    counts, not what is done with it."""
    clock, left_s = asyncio.get_running_loop().time, patience_s
    while True:
        began = clock()
        try:
            async with asyncio.timeout(left_s):
                piece = await anext(body, None)
        except TimeoutError:
            raise DeadlineExceeded(f"the upload is slower than {_SLOWEST >> 10} kB/s") from None
        if piece is None:
            return
        left_s = min(patience_s, left_s - (clock() - began) + len(piece) / _SLOWEST)
        yield piece


async def receive_multipart(content_type: str, body: AsyncIterator[bytes], upload: Upload) -> bytes:
    """Receive a multipart/form-data body: its `files` into `upload`; the text of `metadata` is the result.

    Raises MalformedBody where it is no such body or ends early, InvalidArgument for other fields.
    """
    form = _Form(upload)
    await read_parts(content_type, body, form, "`metadata` and `files`")
    return bytes(form.metadata)


class _Form:
    """One `metadata`, any number of `files`."""

    def __init__(self, upload: Upload) -> None:
        self.metadata = bytearray()
        self._upload = upload
        self._in_file = False
        self._seen_metadata = False

    async def begin(self, name: str, filename: str) -> None:
        self._in_file = name == "files"
        if self._in_file:
            await self._upload.begin(filename)
        elif name != "metadata" or self._seen_metadata:
            raise InvalidArgument(
                "the parts are one `metadata` and any number of `files`", field=name or None
            )
        else:
            self._seen_metadata = True

    async def write(self, data: bytes) -> None:
        if self._in_file:
            await self._upload.write(data)
            return
        self.metadata += data
        if len(self.metadata) > MAX_METADATA_BYTES:
            raise BodyTooLarge("metadata is too large", field="metadata")

    async def end(self) -> None:
        if self._in_file:
            await self._upload.end()
