"""Artifacts of model versions on the local disk: fetched once, every byte checked against its digest."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from uuid import uuid4

from services.common.errors import HeadraceError, NotFound, Unavailable
from services.common.objects import blob_path
from services.worker.backends.port import LoadFailed

_MANIFEST_BYTES = 1 << 20


class Blobs(Protocol):
    """The part of the artifact store that a worker reads."""

    async def get(self, path: str) -> bytes: ...

    async def download(self, path: str, to: Path) -> None: ...


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
            async with asyncio.TaskGroup() as tasks:
                for file in _parse(manifest, digest):
                    tasks.create_task(self._file(file, partial / file.path))
            await asyncio.to_thread(_publish, partial, final, manifest)
        except* HeadraceError as group:
            raise _first(group) from group
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
                manifest = await self._blobs.get(blob_path(digest))
            except NotFound:
                raise LoadFailed(f"the artifact store has no manifest {digest}") from None
        found = _sha256(manifest)
        if found != digest:
            raise LoadFailed(f"the artifact is corrupt: its manifest {digest} has the digest {found}")
        return manifest

    async def _file(self, file: ManifestFile, to: Path) -> None:
        async with self._downloads:
            await asyncio.to_thread(to.parent.mkdir, parents=True, exist_ok=True)
            try:
                await self._blobs.download(blob_path(file.digest), to)
            except NotFound:
                raise LoadFailed(f"the artifact store has no {file.path} ({file.digest})") from None
            except OSError as error:
                raise Unavailable(f"{file.path} cannot be written: {error.strerror}") from error
            found = await asyncio.to_thread(_sha256_of_file, to)
        if found != file.digest:
            raise LoadFailed(f"the artifact is corrupt: {file.path} should have {file.digest}, has {found}")


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
    # A rename onto a full directory fails; whoever was first fetched the same bytes.
    if not final.exists():
        os.replace(partial, final)


def _clear_partial(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(".partial-*"):
        shutil.rmtree(left, ignore_errors=True)


def _remove_others(root: Path, wanted: set[str]) -> None:
    for directory in root.glob("sha256-*"):
        if directory.name not in wanted:
            shutil.rmtree(directory, ignore_errors=True)


def _sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _first(group: BaseExceptionGroup[HeadraceError]) -> HeadraceError:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
