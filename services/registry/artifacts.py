"""From received files to an artifact in the store: checked, content-addressed, listed in a manifest."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headrace.v1.tensor_pb2 import Signature

from services.common.errors import InvalidArgument
from services.common.objects import ArtifactStore
from services.registry.onnx_file import MODEL_FILE
from services.registry.schemas import SignatureOverrides
from services.registry.signatures import describe

_PATH = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]*(/[A-Za-z0-9_][A-Za-z0-9._-]*)*$")
_MAX_PATH = 200


@dataclass(frozen=True, slots=True)
class ReceivedFile:
    """A file of an upload: its path inside the version, its "sha256:<hex>", and where its bytes lie."""

    path: str
    digest: str
    size: int
    at: Path


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """What of a version is in the artifact store. `artifact_digest` is that of the manifest."""

    artifact_digest: str
    backend: str
    signature: Signature
    files: tuple[ReceivedFile, ...]
    #: Equal inputs have unequal answers.
    random: bool = False


class Artifacts:
    """Reads what an upload is and puts it into the store. One is read at a time."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._parsing = asyncio.Semaphore(1)

    async def store(
        self, received: Sequence[ReceivedFile], backend: str, overrides: SignatureOverrides
    ) -> StoredVersion:
        """Check the files, then store them and their manifest. The same files give the same digest.

        Raises InvalidArgument naming `files`, `backend` or `signature.…`, before anything is stored.
        """
        files = arranged(received)
        async with self._parsing:
            by_path = {file.path: file.at for file in files}
            described = await asyncio.to_thread(describe, by_path, backend, overrides)
        for file in files:
            stored = await self._store.put_blob(file.at)
            if stored != file.digest:
                raise RuntimeError(f"{file.at} changed while it was stored")
        digest = await self._store.put_blob(manifest(files))
        return StoredVersion(digest, described.backend, described.signature, files, described.random)


def arranged(received: Sequence[ReceivedFile]) -> tuple[ReceivedFile, ...]:
    """The files sorted by path; a single .onnx file of any name becomes `model.onnx`.

    Raises InvalidArgument, field `files`: none, a path that is unsafe or stands twice.
    """
    models = [file for file in received if file.path.endswith(".onnx")]
    if len(models) == 1 and "/" not in models[0].path:
        single = ReceivedFile(MODEL_FILE, models[0].digest, models[0].size, models[0].at)
        received = [single if file is models[0] else file for file in received]
    if not received:
        raise InvalidArgument("a version needs at least one file", field="files")
    files = tuple(sorted(received, key=lambda file: file.path))
    for before, file in zip((None, *files), files, strict=False):
        if before is not None and before.path == file.path:
            raise InvalidArgument(f"{file.path} stands twice", field="files")
    return files


def check_path(path: str) -> str:
    """`path` where it is a safe relative path inside a version. Raises InvalidArgument, field `files`."""
    if len(path) > _MAX_PATH or not _PATH.fullmatch(path):
        raise InvalidArgument(
            f"{path[:_MAX_PATH]!r} is no path: names of letters, digits, '.', '_' and '-', joined by '/'",
            field="files",
        )
    return path


def manifest(files: Sequence[ReceivedFile]) -> bytes:
    """Canonical JSON of the files: what a version's artifact digest is the digest of."""
    listed = [{"path": f.path, "digest": f.digest, "size": f.size} for f in files]
    return json.dumps({"files": listed}, sort_keys=True, separators=(",", ":")).encode()
