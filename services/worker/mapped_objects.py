"""Objects of shared memory that requests read again and again: mapped once, for as long as they are used."""

from __future__ import annotations

import asyncio
import os
import stat
from collections import OrderedDict
from typing import Final

from services.common.clock import Clock
from services.common.shared_memory import DIRECTORY, identity_of
from services.worker.bus_errors import Mapped, map_guarded

_DIRECTORY: Final = str(DIRECTORY)
_MOST: Final = 64
#: A larger object is copied from. What it takes of the addresses is all of it, however little is read.
_MOST_BYTES: Final = 1 << 32
_UNUSED_S: Final = 2.0


class _Known:
    __slots__ = ("identity", "mapped", "used_at")

    def __init__(self, mapped: Mapped, identity: int) -> None:
        self.mapped = mapped
        self.identity = identity
        self.used_at = 0.0


class MappedObjects:
    """At most `_MOST` of them; one that is forgotten stays mapped while a request has a view of it. An object
    that its owner removes gives its memory back `unused_s` seconds after its last request, or twice as
    long."""

    def __init__(self, clock: Clock, unused_s: float = _UNUSED_S) -> None:
        self._clock = clock
        self._unused_s = unused_s
        # By device and inode, which are not given anew while the object is mapped; that used last at the end.
        self._known: OrderedDict[tuple[int, int], _Known] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def view(self, name: str, offset: int, nbytes: int, identity: int) -> memoryview | None:
        """What the object has there, as its owner changes it; `identity` 0: whatever has the name. None where
        `read` is to copy it, or to say why not: it is gone, another one, or ends before; or it cannot be
        mapped."""
        path = f"{_DIRECTORY}/{name}"
        try:
            status = os.stat(path, follow_symlinks=False)
            end = offset + nbytes
            if not stat.S_ISREG(status.st_mode) or not end <= status.st_size <= _MOST_BYTES:
                return None
            key = status.st_dev, status.st_ino
            known = self._known.get(key)
            if known is None or known.mapped.shortened or len(known.mapped) < end:
                known = self._map(path, key)
        except (OSError, ValueError):
            return None
        if known is None or identity not in {0, known.identity} or len(known.mapped) < end:
            return None
        known.used_at = self._clock.monotonic()
        self._known.move_to_end(key)
        return memoryview(known.mapped)[offset:end]

    async def forget_unused(self) -> None:
        """Unmap what no request has used lately, for ever."""
        while True:
            await asyncio.sleep(self._unused_s)
            since = self._clock.monotonic() - self._unused_s
            for key in [key for key, known in self._known.items() if known.used_at <= since]:
                del self._known[key]

    def _map(self, path: str, key: tuple[int, int]) -> _Known | None:
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            status = os.fstat(file)
            if (status.st_dev, status.st_ino) != key or not stat.S_ISREG(status.st_mode):
                return None
            known = _Known(map_guarded(file, min(status.st_size, _MOST_BYTES)), identity_of(status))
        finally:
            os.close(file)
        self._known[key] = known
        while len(self._known) > _MOST:
            self._known.popitem(last=False)
        return known
