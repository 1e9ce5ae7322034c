"""Artifacts of model versions on the local disk: fetched once, every byte checked against its digest."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from uuid import uuid4

from services.common.errors import DataLoss, InvalidArgument, NotFound
from services.worker.backends.port import LoadFailed

_MANIFEST_BYTES = 1 << 20


class Blobs(Protocol):
    """The part of the artifact store that a worker reads."""

    async def get_blob(self, digest: str) -> bytes:
        """The content of that digest. Raises NotFound, DataLoss where the bytes are others, Unavailable."""
        ...

    async def download_blob(self, digest: str, to: Path) -> int:
        """The same into a file; folders are created. Also raises ResourceExhausted for a full disk."""
        ...


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of an artifact. `path` is relative and stays inside; `size` is bytes."""

    path: str
    digest: str
    size: int


class ArtifactCache:
    """A directory per artifact, named by its digest. Owned by one process.

    A directory appears under its name only when complete and checked, so what is there can be used."""

    def __init__(self, blobs: Blobs, root: Path, *, downloads: int = 4) -> None:
        self._blobs = blobs
        self._root = root
        self._downloads = asyncio.Semaphore(downloads)

    async def fetch(self, digest: str) -> Path:
        """The directory of the artifact whose manifest has `digest`, downloaded unless it is there.

        Raises LoadFailed for an artifact that is missing or corrupt, Unavailable when the store is away."""
        final = self._root / digest.replace(":", "-")
        manifest_path = final / ".manifest.json"
        if await asyncio.to_thread(manifest_path.exists):
            manifest = await asyncio.to_thread(manifest_path.read_bytes)
            if await asyncio.to_thread(_complete, final, _parse(manifest, digest)):
                return final
            await asyncio.to_thread(shutil.rmtree, final)
        manifest = await self._manifest(digest)
        partial = self._root / f".partial-{uuid4().hex}"
        try:
            await _together([self._file(file, partial / file.path) for file in _parse(manifest, digest)])
            await asyncio.to_thread(_publish, partial, final, manifest)
        finally:
            await asyncio.to_thread(shutil.rmtree, partial, ignore_errors=True)
        return final

    async def clear_partial(self) -> None:
        """Remove what an earlier process left half downloaded."""
        await asyncio.to_thread(_clear_partial, self._root)

    async def keep_only(self, digests: Collection[str]) -> None:
        """Remove the artifacts of versions that are served no more."""
        wanted = {digest.replace(":", "-") for digest in digests}
        await asyncio.to_thread(_remove_others, self._root, wanted)

    async def _manifest(self, digest: str) -> bytes:
        async with self._downloads:
            try:
                return await self._blobs.get_blob(digest)
            except NotFound:
                raise LoadFailed(f"the artifact store has no manifest {digest}") from None
            except (DataLoss, InvalidArgument) as error:
                raise LoadFailed(f"the artifact is corrupt: manifest: {error.message}") from error

    async def _file(self, file: ManifestFile, to: Path) -> None:
        async with self._downloads:
            try:
                size = await self._blobs.download_blob(file.digest, to)
            except NotFound:
                raise LoadFailed(f"the artifact store has no {file.path} ({file.digest})") from None
            except (DataLoss, InvalidArgument) as error:
                raise LoadFailed(f"the artifact is corrupt: {file.path}: {error.message}") from error
        if size != file.size:
            raise LoadFailed(f"the artifact is corrupt: {file.path} has {size} bytes, not {file.size}")


def _parse(manifest: bytes, digest: str) -> list[ManifestFile]:
    try:
        listed: list[dict[str, Any]] = json.loads(manifest[:_MANIFEST_BYTES])["files"]
        files = [ManifestFile(str(file["path"]), str(file["digest"]), int(file["size"])) for file in listed]
    except (ValueError, KeyError, TypeError) as error:
        raise LoadFailed(f"the artifact's manifest {digest} cannot be read: {error!r}") from error
    for file in files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in file.path:
            raise LoadFailed(f"the artifact's manifest {digest} names a file outside of it: {file.path!r}")
    if not files:
        raise LoadFailed(f"the artifact's manifest {digest} names no files")
    return files


def _complete(directory: Path, files: list[ManifestFile]) -> bool:
    """Whether the files have their sizes: a machine that lost power may have lost bytes after the check."""
    paths = [(directory / file.path, file.size) for file in files]
    return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def _publish(partial: Path, final: Path, manifest: bytes) -> None:
    (partial / ".manifest.json").write_bytes(manifest)
    try:
        os.replace(partial, final)
    except OSError as error:
        # A rename onto a full directory fails: another load of the artifact was first, with the same bytes.
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:
            raise


def _clear_partial(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(".partial-*"):
        shutil.rmtree(left, ignore_errors=True)


def _remove_others(root: Path, wanted: set[str]) -> None:
    for directory in root.glob("sha256-*"):
        if directory.name not in wanted:
            shutil.rmtree(directory, ignore_errors=True)


async def _together(downloads: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Run all; the first that fails ends the others, and is raised.

    No TaskGroup: where a task of one fails, Python before 3.11.3 leaves its caller a cancellation, and every
    later `asyncio.timeout` of that task then ends it instead of raising TimeoutError.
    """
    tasks = [asyncio.create_task(download) for download in downloads]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
