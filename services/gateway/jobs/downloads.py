"""Answers that are sent piece by piece, for as long as their readers take."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from services.common.errors import ResourceExhausted

_RETRY_MS = 2000


class Downloads:
    """A bound on how many run at once: each holds a piece or two, which for results may be a group of rows of
    16 MB, until its reader has taken them, and one that reads slowly enough keeps them for hours."""

    def __init__(self, at_once: int = 32) -> None:
        self._free = at_once

    async def bounded(self, pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
        """`pieces`; the first raises ResourceExhausted where too many run already. Its place is free again
        behind the last one, and when this is closed or forgotten."""
        if not self._free:
            raise ResourceExhausted("Too many downloads are running.", retry_after_ms=_RETRY_MS)
        self._free -= 1
        try:
            async for piece in pieces:
                yield piece
        finally:
            self._free += 1
