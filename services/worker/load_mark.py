"""A mark on disk while a version is being loaded, for a process that must not end because of it twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from services.worker.backends.port import LeftToOthers


class LoadMark:
    """Written before native code first sees an artifact, removed after its first runs. One that is found when
    a process starts is of an artifact that ended the process before it: this process does not load it."""

    def __init__(self, path: Path) -> None:
        """Reads what was left at `path`, and removes it. Blocks for a moment."""
        self._path = path
        self._suspect = ""
        with suppress(OSError):
            self._suspect = path.read_text()
            path.unlink()

    def check(self, digest: str) -> None:
        """Raises LeftToOthers for the artifact that a process ended with."""
        if digest == self._suspect:
            raise LeftToOthers("a process ended while it was loaded")

    @contextmanager
    def on(self, digest: str) -> Iterator[None]:
        """While the block runs, this is what is being loaded. A disk that takes no mark is no reason not to
        load."""
        with suppress(OSError):
            self._path.write_text(digest)
        try:
            yield
        finally:
            with suppress(OSError):
                self._path.unlink()
