"""Answers that are sent piece by piece, for as long as their readers take."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator

from services.gateway.jobs.shares import Places


class Downloads:
    """A bound on how many run at once: each holds a piece or two, which for results may be a group of rows of
    16 MB, until its reader has taken them, and one that reads slowly enough keeps them for hours."""

    def __init__(self, at_once: int = 32) -> None:
        self._places = Places(at_once, "downloads")

    async def bounded(self, pieces: AsyncIterator[bytes], key_id: str) -> AsyncGenerator[bytes, None]:
        """`pieces`; the first raises ResourceExhausted where too many run already, of all keys or of this
        one. Its place is free again behind the last one, and when this is closed or forgotten."""
        with self._places.taken(key_id):
            async for piece in pieces:
                yield piece
