"""Objects under paths, in a local folder (`file:///directory`) or in S3 (`s3://bucket/prefix`).

obstore does the work through its blocking API in a few threads of our own (its asyncio API can abort the
interpreter at exit); their number bounds concurrency. Files travel in pieces, so memory does not grow with
their size."""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import AlreadyExistsError
from obstore.store import LocalStore, S3Store

from services.common.errors import AlreadyExists, DataLoss, Fatal
from services.common.objects.digest import blob_path, digest_of_bytes, digest_of_file
from services.common.objects.failures import checked_path, store_errors

if TYPE_CHECKING:
    from obstore.store import ObjectStore

_PIECE = 4 * 1024 * 1024
_UPLOAD_PIECE = 5 * 1024 * 1024  # the smallest part that S3 takes
_UPLOADS_AT_ONCE = 2

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object. `size` in bytes; another `etag` means other bytes, None where the store tells none."""

    path: str
    size: int
    modified: datetime
    etag: str | None = None


class ArtifactStore:
    """Every method raises NotFound, InvalidArgument (bad path), ResourceExhausted (disk full) or Unavailable
    (store away, access refused). Writes are atomic: readers see the old object, the new one, or none."""

    def __init__(self, url: str, options: Mapping[str, str] | None = None, *, concurrency: int = 4) -> None:
        """`options` are S3's: endpoint, region, access_key_id, secret_access_key; by default the AWS_*
        variables. A local folder is created. Raises Fatal where `url` cannot be a store."""
        self.url = url
        self._root: Path | None = None
        self._store: ObjectStore
        parts = urlsplit(url)
        if parts.scheme == "file" and not parts.netloc and len(parts.path) > 1:
            self._root = Path(unquote(parts.path))
            self._store = _local(self._root)
        elif parts.scheme == "s3" and parts.netloc:
            self._store = _s3(parts.netloc, parts.path.strip("/"), options or {})
        else:
            raise Fatal(f"The artifact store is file:///directory or s3://bucket/prefix, not {url}.")
        self._threads = ThreadPoolExecutor(concurrency, thread_name_prefix="artifact-store")

    async def close(self) -> None:
        """Let running transfers end, start no others."""
        await asyncio.to_thread(self._threads.shutdown, wait=True, cancel_futures=True)

    async def check(self) -> None:
        """Raise unless the store answers."""

        def ask() -> None:
            next(iter(obstore.list(self._store, "health", chunk_size=1)), None)

        await self._in_thread("health", ask)

    def local_path(self, path: str) -> Path | None:
        """Where the object lies as a file, None where the store is not a local folder. For readers that
        want files."""
        return None if self._root is None else self._root / checked_path(path)

    async def put(self, path: str, data: bytes | Path) -> None:
        """Write an object from memory or from a file, replacing one that is there."""
        await self._in_thread(path, lambda: self._put(path, data))

    async def put_if_absent(self, path: str, data: bytes) -> None:
        """Write an object that must not be there yet. Raises AlreadyExists; of two writers at once one
        succeeds."""

        def write() -> None:
            try:
                obstore.put(self._store, path, data, mode="create", use_multipart=False)
            except AlreadyExistsError:
                raise AlreadyExists(f"There is an object at {path} already.") from None

        await self._in_thread(path, write)

    async def stat(self, path: str) -> ObjectInfo:
        """What the store knows of one object."""

        def ask() -> ObjectInfo:
            return _info(obstore.head(self._store, path))

        return await self._in_thread(path, ask)

    async def get(
        self, path: str, start: int = 0, end: int | None = None, *, etag: str | None = None
    ) -> bytes:
        """The bytes `start` to before `end` of an object, by default all of them. For small objects. Raises
        Aborted where the object is no longer the one of `etag`."""

        def read() -> bytes:
            if etag is not None and end is not None:
                return self._range(path, start, end, etag)
            if start == 0 and end is None:
                return bytes(obstore.get(self._store, path).bytes())
            stop = obstore.head(self._store, path)["size"] if end is None else end
            return bytes(obstore.get_range(self._store, path, start=start, end=stop)) if start < stop else b""

        return await self._in_thread(path, read)

    def read_blocking(self, path: str, start: int, end: int, etag: str) -> bytes:
        """`get` in the thread of the caller, for readers that take a file: see RangeFile."""
        with store_errors(checked_path(path)):
            return self._range(path, start, end, etag)

    async def stream(self, path: str, piece_bytes: int = _PIECE) -> AsyncIterator[bytes]:
        """The object in pieces of at most `piece_bytes`. Raises Aborted where it is replaced meanwhile."""
        pieces = self._pieces(path, piece_bytes)
        while (piece := await self._in_thread(path, lambda: next(pieces, None))) is not None:
            yield piece

    async def download(self, path: str, to: Path, *, digest: str | None = None) -> int:
        """Write an object to a local file, which appears whole or not at all, and return its size. With
        `digest` given, raises DataLoss where the bytes are others. Parent folders are created."""
        return await self._in_thread(path, lambda: self._download(path, to, digest))

    async def exists(self, path: str) -> bool:
        """Whether there is an object at `path`."""
        return await self._in_thread(path, lambda: self._exists(path))

    async def list(self, prefix: str = "", limit: int | None = None) -> Sequence[ObjectInfo]:
        """The objects below the folder `prefix`, at any depth, by path; the first `limit` found where
        given."""

        def read() -> Sequence[ObjectInfo]:
            found: list[ObjectInfo] = []
            for page in obstore.list(self._store, prefix or None, chunk_size=1000):
                found += [_info(meta) for meta in page]
                if limit is not None and len(found) >= limit:
                    break
            return sorted(found[:limit], key=lambda info: info.path)

        return await self._in_thread(prefix or "-", read)

    async def delete(self, path: str) -> None:
        """Remove an object; that it is gone already is fine."""

        def remove() -> None:
            with suppress(FileNotFoundError):
                obstore.delete(self._store, path)

        await self._in_thread(path, remove)

    async def put_blob(self, content: bytes | Path) -> str:
        """Store content under its own digest and return `sha256:<hex>`. Content that is there already is
        not sent again. Raises DataLoss where the file changes while it is read."""

        def write() -> str:
            digest = digest_of_bytes(content) if isinstance(content, bytes) else digest_of_file(content)
            path = blob_path(digest)
            if not self._exists(path):
                self._put(path, content, digest)
            return digest

        return await self._in_thread("blobs", write)

    async def get_blob(self, digest: str) -> bytes:
        """The content of that digest. Raises DataLoss where the bytes are others. For small content."""
        data = await self.get(blob_path(digest))
        if digest_of_bytes(data) != digest:
            raise DataLoss(f"The stored content of {digest} is damaged.")
        return data

    async def download_blob(self, digest: str, to: Path) -> int:
        """`download` of the content of that digest, checked."""
        return await self.download(blob_path(digest), to, digest=digest)

    async def _in_thread(self, path: str, work: Callable[[], T]) -> T:
        checked_path(path)

        def guarded() -> T:
            with store_errors(path):
                return work()

        return await asyncio.get_running_loop().run_in_executor(self._threads, guarded)

    def _range(self, path: str, start: int, end: int, etag: str) -> bytes:
        if start >= end:
            return b""
        options: obstore.GetOptions = {"range": (start, end), "if_match": etag}
        return bytes(obstore.get(self._store, path, options=options).bytes())

    def _exists(self, path: str) -> bool:
        try:
            obstore.head(self._store, path)
        except FileNotFoundError:
            return False
        return True

    def _put(self, path: str, data: bytes | Path, digest: str | None = None) -> None:
        small = isinstance(data, bytes) or data.stat().st_size <= _UPLOAD_PIECE
        whole = data.read_bytes() if small and isinstance(data, Path) else data
        if isinstance(whole, bytes):
            if digest is not None and digest_of_bytes(whole) != digest:
                raise DataLoss(f"The file for {path} changed while it was read.")
            obstore.put(self._store, path, whole)
        else:
            obstore.put(
                self._store,
                path,
                _read_pieces(whole, digest),
                chunk_size=_UPLOAD_PIECE,
                max_concurrency=_UPLOADS_AT_ONCE,
            )
        if self._root is not None:
            _sync(self._root / path)

    def _pieces(self, path: str, size: int = _PIECE) -> Iterator[bytes]:
        meta = obstore.head(self._store, path)
        tag = meta["e_tag"]
        for start in range(0, meta["size"], size):
            stop = min(start + size, meta["size"])
            # Every piece is of the object that was asked for first, also when it is replaced meanwhile.
            options: obstore.GetOptions = {"range": (start, stop)}
            if tag is not None:
                options["if_match"] = tag
            yield bytes(obstore.get(self._store, path, options=options).bytes())

    def _download(self, path: str, to: Path, digest: str | None) -> int:
        to.parent.mkdir(parents=True, exist_ok=True)
        part = to.with_name(f".{to.name}.{secrets.token_hex(6)}.part")
        hashed, size = hashlib.sha256(), 0
        try:
            with part.open("wb") as file:
                for piece in self._pieces(path):
                    hashed.update(piece)
                    size += file.write(piece)
            if digest is not None and f"sha256:{hashed.hexdigest()}" != digest:
                raise DataLoss(f"The stored content of {digest} is damaged.")
            part.replace(to)
        finally:
            part.unlink(missing_ok=True)
        return size


def _info(meta: obstore.ObjectMeta) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["last_modified"], meta["e_tag"])


def _local(root: Path) -> LocalStore:
    try:
        root.mkdir(parents=True, exist_ok=True)
        return LocalStore(root)
    except (OSError, ValueError) as error:
        raise Fatal(f"The artifact store cannot use the folder {root}: {error}.") from error


def _s3(bucket: str, prefix: str, options: Mapping[str, str]) -> S3Store:
    return S3Store(
        bucket,
        prefix=prefix or None,
        config=dict(options),  # type: ignore[arg-type]  # names are checked by obstore
        client_options={
            "allow_http": options.get("endpoint", "").startswith("http://"),
            "connect_timeout": timedelta(seconds=5),
            "timeout": timedelta(seconds=60),
        },
        retry_config={"max_retries": 4, "retry_timeout": timedelta(seconds=30)},
    )


def _read_pieces(file: Path, digest: str | None) -> Iterator[bytes]:
    """The file in pieces. What is raised here ends the upload before anything becomes visible."""
    hashed = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(_UPLOAD_PIECE):
            hashed.update(piece)
            yield piece
    if digest is not None and f"sha256:{hashed.hexdigest()}" != digest:
        raise DataLoss(f"{file} changed while it was read.")


def _sync(file: Path) -> None:
    """A database row that names the object may be durable a moment later; so must the object be."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
