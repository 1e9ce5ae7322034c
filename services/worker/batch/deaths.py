"""Chunks that were in work when this worker died. A chunk that kills its workers is delivered again and again
by the broker, which does not know; the files here do."""

from __future__ import annotations

import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from headrace.v1.batch_pb2 import BatchChunk

# A file this old is of a chunk that another worker has finished long since.
_FORGOTTEN_S = 24 * 3600


class Deaths:
    """One small file per chunk in work. Blocks for tens of microseconds."""

    def __init__(self, directory: Path) -> None:
        """Creates the directory, and forgets what is old."""
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.iterdir():
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _FORGOTTEN_S:
                    path.unlink()

    def begin(self, chunk: BatchChunk) -> int:
        """Write down that `chunk` is in work, and return in how many lives of this worker it was before,
        without an end."""
        path = self._path(chunk)
        before = 0
        with suppress(OSError, ValueError):
            before = int(path.read_bytes())
        path.write_bytes(b"%d" % (before + 1))
        return before

    def end(self, chunk: BatchChunk) -> None:
        """It is out of work, whatever became of it."""
        self._path(chunk).unlink(missing_ok=True)

    def _path(self, chunk: BatchChunk) -> Path:
        named = f"{chunk.job_id}/{chunk.index}/{chunk.attempt}".encode()
        return self._directory / blake2b(named, digest_size=16).hexdigest()
