"""Chunks that were read or run when this worker died. A chunk that kills its workers is delivered again and
again by the broker, which does not know; the files here do. They are this worker's own, so the bound is one
for each worker: a chunk that goes from one to the next kills each of them as often before one of them says
so, and the gateway, which sees publications and results and no deliveries, cannot count for all. The folder
must outlive the process (in Kubernetes an emptyDir does), or nothing is counted."""

from __future__ import annotations

import time
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

from headrace.v1.batch_pb2 import BatchChunk

# A file this old is of a chunk that another worker has finished long since.
_FORGOTTEN_S = 24 * 3600


class Deaths:
    """One small file per chunk that is read or runs, or that did when this worker died. Blocks for tens of
    microseconds."""

    def __init__(self, directory: Path) -> None:
        """Creates the directory, and forgets what is old."""
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.iterdir():
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _FORGOTTEN_S:
                    path.unlink()

    def before(self, chunk: BatchChunk) -> int:
        """At how many deaths of this worker `chunk` was in work."""
        with suppress(OSError, ValueError):
            return int(self._path(chunk).read_bytes())
        return 0

    def begin(self, chunk: BatchChunk) -> None:
        """Write down that `chunk` is in work: a death from now on is counted."""
        self._path(chunk).write_bytes(b"%d" % (self.before(chunk) + 1))

    def rest(self, chunk: BatchChunk) -> None:
        """It waits: a death from now on is not its doing."""
        before = self.before(chunk) - 1
        if before > 0:
            self._path(chunk).write_bytes(b"%d" % before)
        else:
            self.end(chunk)

    def end(self, chunk: BatchChunk) -> None:
        """It is over, whatever became of it."""
        self._path(chunk).unlink(missing_ok=True)

    def _path(self, chunk: BatchChunk) -> Path:
        named = f"{chunk.job_id}/{chunk.index}/{chunk.attempt}".encode()
        return self._directory / blake2b(named, digest_size=16).hexdigest()
