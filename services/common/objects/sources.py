"""Inputs that callers name by address: `store://path` (the platform's own store), `file:///path`,
`s3://bucket/key`. Only what the operator allowed is read, and nothing is read whole.

An address of an own store or of S3 is a name, compared as text; a path of this machine is resolved first, so
that neither `..` nor a link leads out (local_files.py)."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

from services.common.errors import (
    Aborted,
    DeadlineExceeded,
    FailedPrecondition,
    Fatal,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from services.common.objects.local_files import FIELD, etag_of, files_below, open_file, resolved
from services.common.objects.store import ArtifactStore

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

MAX_FILES = 200_000
_MAX_URI = 4096
_TIMEOUT_S = 120.0
_THREADS = 4
_SCHEMES = ("store", "file", "s3")
_CHANGED = "The input was replaced or changed after the job was accepted."

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SourceInfo:
    """One input: `size` in bytes, `etag` another one when its bytes are others. `name` is its path below the
    folder that was listed, empty otherwise."""

    size: int
    etag: str
    name: str = ""


@dataclass(frozen=True, slots=True)
class _Address:
    """A checked address: `path` as text, and the allowed prefix it lies under."""

    scheme: str
    bucket: str
    path: str
    allowed: str


class InputSources:
    """Reads inputs. Errors carry the field `input_uri`: InvalidArgument (no address, no file),
    PermissionDenied (not allowed), NotFound, FailedPrecondition (another etag than asked for), and
    Unavailable where trying again can help.

    `allow` are prefixes at whole names: `store://files/`, `file:///srv/data/`, `s3://bucket/inputs/`. Every
    S3 bucket is reached with `s3_options` (ArtifactStore's), so at the configured endpoint only.
    """

    def __init__(
        self, store: ArtifactStore, allow: Sequence[str], s3_options: Mapping[str, str] | None = None
    ) -> None:
        """Raises Fatal where a prefix is none."""
        self._store = store
        self._allow = [_allowed(prefix) for prefix in allow]
        self._s3_options = dict(s3_options or {})
        self._buckets: dict[str, ArtifactStore] = {}
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="input")

    async def close(self) -> None:
        """Let running reads end. The store given stays open."""
        for bucket in self._buckets.values():
            await bucket.close()
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)

    def check(self, uri: str) -> None:
        """Raise unless `uri` is an address and allowed. Looks at nothing but the text."""
        self._address(uri)

    def store_path(self, uri: str) -> str | None:
        """Checks as `check` does; the path in the platform's own store, None for what lies elsewhere."""
        at = self._address(uri)
        return at.path if at.scheme == "store" else None

    async def stat(self, uri: str) -> SourceInfo:
        """Size and etag of one file."""
        at = self._address(uri)
        if at.scheme == "file":

            def look() -> SourceInfo:
                with os.fdopen(open_file(Path(at.path), Path(at.allowed)), "rb", buffering=0) as file:
                    status = os.fstat(file.fileno())
                    return SourceInfo(status.st_size, etag_of(status))

            return await self._in_thread(look)
        with _source_errors():
            info = await _within(self._objects(at).stat(at.path))
        return SourceInfo(info.size, info.etag or f"{info.size}")

    async def read(self, uri: str, start: int, end: int, *, etag: str | None = None) -> bytes:
        """The bytes `start` to before `end`, fewer where the file ends before. With `etag`, of that file."""
        at = self._address(uri)
        if at.scheme == "file":

            def look() -> bytes:
                with os.fdopen(open_file(Path(at.path), Path(at.allowed)), "rb", buffering=0) as file:
                    _same(file.fileno(), etag)
                    return os.pread(file.fileno(), max(0, end - start), start)

            return await self._in_thread(look)
        with _source_errors():
            known = etag if etag is not None else (await _within(self._objects(at).stat(at.path))).etag
            return await _within(self._objects(at).get(at.path, start, end, etag=known))

    async def open(self, uri: str, *, etag: str | None = None) -> IO[bytes]:
        """A seekable file for readers that want one (Parquet, Arrow): a real one for `file:`, otherwise one
        that fetches each range as it is read. Its reads block: use it in a thread, and close it."""
        at = self._address(uri)
        if at.scheme == "file":

            def look() -> IO[bytes]:
                file = os.fdopen(open_file(Path(at.path), Path(at.allowed)), "rb", buffering=0)
                try:
                    _same(file.fileno(), etag)
                except FailedPrecondition:
                    file.close()
                    raise
                return file

            return await self._in_thread(look)
        info = await self.stat(uri)
        if etag is not None and info.etag != etag:
            raise FailedPrecondition(_CHANGED, field=FIELD)
        return RangeFile(self._objects(at), at.path, info.size, info.etag)  # type: ignore[return-value]  # RawIOBase has every method of IO[bytes]

    async def list(self, uri: str, most: int = MAX_FILES) -> Sequence[SourceInfo]:
        """The files below a folder, at any depth, by name. Raises InvalidArgument beyond `most`."""
        at = self._address(uri)
        if at.scheme == "file":

            def look() -> Sequence[SourceInfo]:
                found = files_below(Path(at.path), Path(at.allowed), most)
                return [SourceInfo(status.st_size, etag_of(status), name) for name, status in found]

            return await self._in_thread(look)
        folder = at.path.rstrip("/")
        with _source_errors():
            infos = await _within(self._objects(at).list(folder, most + 1))
        if len(infos) > most:
            raise InvalidArgument(f"The folder has more than {most} files.", field=FIELD)
        if not infos:
            raise NotFound("There is no such input folder, or nothing in it.", field=FIELD)
        below = len(folder) + 1
        return [SourceInfo(one.size, one.etag or f"{one.size}", one.path[below:]) for one in infos]

    def local_path(self, uri: str) -> Path | None:
        """Where the input lies as a file of this machine, None where it does not. For readers that insist on
        a path; `open` is safer, since between this check and the reader's open a link may change."""
        at = self._address(uri)
        if at.scheme == "file":
            return resolved(Path(at.path), Path(at.allowed))
        return self._store.local_path(at.path) if at.scheme == "store" else None

    def _address(self, uri: str) -> _Address:
        scheme, bucket, path = _split(uri)
        for kind, name, prefix in self._allow:
            inside = not prefix or path == prefix or path.startswith(f"{prefix.rstrip('/')}/")
            if kind == scheme and name == bucket and inside:
                return _Address(scheme, bucket, path, prefix)
        raise PermissionDenied(
            "Inputs from there are not allowed here (BATCH_INPUT_ALLOW): upload the file (POST /v1/files).",
            field=FIELD,
        )

    def _objects(self, at: _Address) -> ArtifactStore:
        if at.scheme == "store":
            return self._store
        if at.bucket not in self._buckets:
            self._buckets[at.bucket] = ArtifactStore(f"s3://{at.bucket}", self._s3_options)
        return self._buckets[at.bucket]

    async def _in_thread(self, work: Callable[[], T]) -> T:
        running = asyncio.get_running_loop().run_in_executor(self._threads, work)
        try:
            return await _within(running)
        except OSError as error:
            raise Unavailable(f"The input cannot be read: {error.strerror}.", field=FIELD) from error


class RangeFile(io.RawIOBase):
    """An object of a store as a seekable file that holds nothing: each read fetches its range, of the object
    with that etag. Blocks."""

    def __init__(self, store: ArtifactStore, path: str, size: int, etag: str) -> None:
        self._store = store
        self._path = path
        self._size = size
        self._etag = etag
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def read(self, size: int = -1, /) -> bytes:
        end = self._size if size < 0 else min(self._size, self._at + size)
        with _source_errors():
            data = self._store.read_blocking(self._path, self._at, end, self._etag)
        self._at += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]  # any writable buffer
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def check_prefixes(allow: Sequence[str]) -> None:
    """Raise Fatal where one of the prefixes that InputSources is given is none."""
    for prefix in allow:
        _allowed(prefix)


def _allowed(prefix: str) -> tuple[str, str, str]:
    if prefix.rstrip("/") in ("store:", "file:"):
        return (prefix.partition(":")[0], "", "/" if prefix.startswith("file") else "")
    try:
        return _split(prefix.rstrip("/"))
    except InvalidArgument as error:
        raise Fatal(f"BATCH_INPUT_ALLOW holds {prefix!r}: {error.message}") from None


def _split(uri: str) -> tuple[str, str, str]:
    """Scheme, bucket and path. Raises InvalidArgument for everything that could be read in two ways."""
    try:
        parts = urlsplit(uri) if len(uri) <= _MAX_URI else None
    except ValueError:  # brackets of no IPv6 address, or a host that Unicode writes in two ways
        parts = None
    if parts is None or parts.scheme not in _SCHEMES or any(ord(letter) < 32 for letter in uri):
        raise InvalidArgument("An input is store://…, file:///… or s3://bucket/….", field=FIELD)
    # What urlsplit forgives (capitals, blanks in front) would be another text for whoever compares texts.
    if not uri.startswith(f"{parts.scheme}:"):
        raise InvalidArgument("The scheme is written in small letters, at the very start.", field=FIELD)
    if parts.scheme == "file":
        path = unquote(parts.path)
        if parts.netloc or not path.startswith("/") or "\0" in path or parts.query or parts.fragment:
            raise InvalidArgument("A file is written file:///folder/name.", field=FIELD)
        return "file", "", path
    # Names in a store are taken as they are written: no escapes, and nothing that a store could normalise.
    if not uri.startswith(f"{parts.scheme}://"):
        raise InvalidArgument("An input is store://…, file:///… or s3://bucket/….", field=FIELD)
    body = uri.partition("://")[2]
    bucket, path = ("", body) if parts.scheme == "store" else body.partition("/")[::2]
    names = path.rstrip("/").split("/") if path.rstrip("/") else []
    if any(name in {"", ".", ".."} for name in names) or (parts.scheme == "s3" and not bucket):
        raise InvalidArgument("The address holds an empty name, `.` or `..`.", field=FIELD)
    return parts.scheme, bucket, path.rstrip("/")


def _same(descriptor: int, etag: str | None) -> None:
    if etag is not None and etag_of(os.fstat(descriptor)) != etag:
        raise FailedPrecondition(_CHANGED, field=FIELD)


async def _within(work: Awaitable[T]) -> T:
    async with asyncio.timeout(_TIMEOUT_S):
        return await work


@contextmanager
def _source_errors() -> Iterator[None]:
    try:
        yield
    except NotFound:
        raise NotFound("There is no such input.", field=FIELD) from None
    except Aborted:
        raise FailedPrecondition(_CHANGED, field=FIELD) from None
    except InvalidArgument as error:
        raise InvalidArgument(error.message, field=FIELD) from None
    except Unavailable as error:
        raise Unavailable(error.message, field=FIELD, retry_after_ms=error.retry_after_ms) from error
    except (TimeoutError, DeadlineExceeded):
        raise Unavailable("The input store does not answer.", field=FIELD, retry_after_ms=1000) from None
