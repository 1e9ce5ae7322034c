"""Heads of requests that were parsed before.

A client on a connection that is kept sends the same head again and again, but for the length of the body.
What a parser finds in a head depends on its bytes alone, so a head that is byte for byte the same, at a place
where a request begins, needs no parser. A head is known once it came twice: those that name something of one
request alone would drive out the others. Only heads get here whose request the parser took as one whole
message of a known length, over a connection that goes on, and whose key opened; so nobody without a key fills
the memory, and whatever is unusual about the framing of a message is always for the parser to find.
"""

from __future__ import annotations

from services.gateway.call import Head

_END = b"\r\n\r\n"
_REMEMBERED = 8192
_MAX_BYTES = 1024


class KnownHeads:
    """What known heads say, by their bytes; bounded in number and length."""

    def __init__(self) -> None:
        self._heads: dict[bytes, Head] = {}
        #: Hashes of heads that came once.
        self._seen: set[int] = set()

    def find(self, data: bytes) -> tuple[Head, int] | None:
        """The head that `data`, the beginning of a request, begins with, and where the body starts; only
        where `data` is that request, whole and nothing else."""
        start = data.find(_END, 0, _MAX_BYTES) + 4
        head = self._heads.get(data[:start])
        return (head, start) if head is not None and head.length == len(data) - start else None

    def learn(self, data: bytes, head: Head) -> None:
        """`data` is one whole request, and `head` what the parser found in it."""
        start = data.find(_END, 0, _MAX_BYTES) + 4
        if start < 4 or head.length != len(data) - start:
            return
        if head.caller_id is not None or head.traceparent is not None:
            return  # every request has another
        bare = data[:start]
        seen = hash(bare)
        if seen not in self._seen:
            if len(self._seen) >= _REMEMBERED:
                self._seen.clear()
            self._seen.add(seen)
            return
        self._seen.discard(seen)
        if len(self._heads) >= _REMEMBERED:
            self._heads.clear()
        self._heads[bare] = head
