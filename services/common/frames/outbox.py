"""What a client has to send: serialized requests and cancels, made RequestFrames as the peer takes them."""

from __future__ import annotations

from typing import Final

from headrace.v1.dataplane_pb2 import RequestFrame

from services.common.frames.limits import Limits
from services.common.frames.messages import item_header, timeout_override

#: At most what a frame adds to an item: its header, and a timeout written anew.
ITEM_OVERHEAD: Final = 16
#: Cancels beyond this are dropped: the peer then works for nothing, and its replies are ignored.
_MAX_CANCELS: Final = 65_536


class Outbox:
    """Requests in the order they were added, bounded by `limits.max_buffer_bytes`."""

    __slots__ = ("_bytes", "_cancels", "_held", "_items", "_limits")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._items: dict[int, tuple[bytes, float | None]] = {}
        self._bytes = 0
        self._cancels: list[int] = []
        self._held = False  # some waited longer than a loop turn: their timeouts are stale

    def __bool__(self) -> bool:
        return bool(self._items or self._cancels)

    @property
    def nbytes(self) -> int:
        """Bytes waiting."""
        return self._bytes

    def unsent(self) -> list[int]:
        """Ids of the requests that wait."""
        return list(self._items)

    def add(self, local_id: int, payload: bytes, deadline: float | None) -> bool:
        """Queue a serialized request; False where there is no room."""
        size = len(payload) + ITEM_OVERHEAD
        if self._bytes + size > self._limits.max_buffer_bytes:
            return False
        self._items[local_id] = (payload, deadline)
        self._bytes += size
        return True

    def withdraw(self, local_id: int) -> bool:
        """Take a request back; False where it has left already."""
        item = self._items.pop(local_id, None)
        if item is None:
            return False
        self._bytes -= len(item[0]) + ITEM_OVERHEAD
        return True

    def cancel(self, local_id: int) -> None:
        """Queue the news that nobody waits for a request that has left."""
        if len(self._cancels) < _MAX_CANCELS:
            self._cancels.append(local_id)

    def hold(self) -> None:
        """The peer takes nothing more now."""
        self._held = bool(self._items)

    def clear(self) -> None:
        """Forget everything: the connection is gone."""
        self._items.clear()
        self._bytes = 0
        self._cancels = []
        self._held = False

    def next_frame(self, now: float) -> tuple[list[bytes], int]:
        """One RequestFrame's bytes in parts, and their total size: about `limits.frame_target_bytes`, and
        never more than a message may have. `now` is on the deadlines' scale."""
        parts: list[bytes] = []
        size = 0
        if self._cancels:
            cancels = RequestFrame(cancels=self._cancels).SerializeToString()
            self._cancels = []
            parts.append(cancels)
            size = len(cancels)
        if self._bytes <= self._limits.frame_target_bytes and not self._held:
            for payload, _ in self._items.values():
                head = item_header(len(payload))
                parts.append(head)
                parts.append(payload)
                size += len(head) + len(payload)
            self._items.clear()
            self._bytes = 0
            return parts, size
        return self._fill(parts, size, now)

    def _fill(self, parts: list[bytes], size: int, now: float) -> tuple[list[bytes], int]:
        """Add requests one by one, with what is left of their time."""
        for local_id, (payload, deadline) in list(self._items.items()):
            longer = size + len(payload) + ITEM_OVERHEAD
            if parts and (size >= self._limits.frame_target_bytes or longer > self._limits.max_message_bytes):
                break
            self.withdraw(local_id)
            if deadline is not None:
                payload += timeout_override(int((deadline - now) * 1e6))  # noqa: PLW2901 - completed here
            head = item_header(len(payload))
            parts.append(head)
            parts.append(payload)
            size += len(head) + len(payload)
        return parts, size
