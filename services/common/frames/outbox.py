"""What a client has to send: serialized requests and cancels, made RequestFrames as the peer takes them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from headrace.v1.dataplane_pb2 import RequestFrame

from services.common.frames.detached import Buffer
from services.common.frames.limits import Limits
from services.common.frames.messages import item_header, timeout_override

#: At most what a frame adds to an item: its header, and a timeout written anew.
ITEM_OVERHEAD: Final = 16
#: Cancels beyond this are dropped: the peer then works for nothing, and its replies are ignored.
_MAX_CANCELS: Final = 65_536


class Outbox:
    """Requests in the order they were added, bounded by `limits.max_buffer_bytes`.

    Each is kept as it stands in a frame, behind its header: nearly always all of them leave in the turn that
    brought them, and then joining them is all there is to do.
    """

    __slots__ = (
        "_bytes",
        "_cancels",
        "_deadline_of",
        "_held",
        "_items",
        "_large",
        "_large_bytes",
        "_large_next",
        "_limits",
    )

    def __init__(self, limits: Limits, deadline_of: Callable[[int], float | None]) -> None:
        """`deadline_of` an id that waits here: on the loop's scale, None for none."""
        self._limits = limits
        self._deadline_of = deadline_of
        self._items: dict[int, bytes] = {}
        self._bytes = 0
        self._large: dict[int, tuple[tuple[Buffer, ...], int]] = {}
        self._large_bytes = 0
        self._large_next = False  # the last frame had small ones: neither kind keeps the other waiting
        self._cancels: list[int] = []
        self._held = False  # some waited longer than a loop turn: their timeouts are stale

    def __bool__(self) -> bool:
        return bool(self._items or self._large or self._cancels)

    @property
    def nbytes(self) -> int:
        """Bytes waiting."""
        return self._bytes + self._large_bytes

    def unsent(self) -> list[int]:
        """Ids of the requests that wait."""
        return [*self._large, *self._items]

    def add(self, local_id: int, item: bytes) -> bool:
        """Queue a serialized request behind its `item_header`; False where there is no room."""
        size = self._bytes + len(item)
        if size + self._large_bytes + ITEM_OVERHEAD > self._limits.max_buffer_bytes:
            return False
        self._items[local_id] = item
        self._bytes = size
        return True

    def add_large(self, local_id: int, parts: tuple[Buffer, ...], size: int) -> bool:
        """The same for a request of `size` bytes in `parts`, without its header; it gets a frame of its own,
        and is never copied here."""
        total = self._large_bytes + size
        if total + self._bytes + ITEM_OVERHEAD > self._limits.max_buffer_bytes:
            return False
        self._large[local_id] = parts, size
        self._large_bytes = total
        return True

    def withdraw(self, local_id: int) -> bool:
        """Take a request back; False where it has left already."""
        item = self._items.pop(local_id, None)
        if item is not None:
            self._bytes -= len(item)
            return True
        large = self._large.pop(local_id, None)
        if large is not None:
            self._large_bytes -= large[1]
            return True
        return False

    def cancel(self, local_id: int) -> None:
        """Queue the news that nobody waits for a request that has left."""
        if len(self._cancels) < _MAX_CANCELS:
            self._cancels.append(local_id)

    def hold(self) -> None:
        """The peer takes nothing more now."""
        self._held = bool(self._items or self._large)

    def clear(self) -> None:
        """Forget everything: the connection is gone."""
        self._items.clear()
        self._bytes = 0
        self._large.clear()
        self._large_bytes = 0
        self._cancels = []
        self._held = False

    def next_frame(self, now: float) -> tuple[Collection[Buffer], int]:
        """One RequestFrame's bytes in parts, and their total size: about `limits.frame_target_bytes`, and
        never more than a message may have. `now` is on the deadlines' scale."""
        if self._large and not self._cancels and (self._large_next or not self._items):
            self._large_next = False
            return self._next_large(now)
        self._large_next = True
        if not self._cancels and not self._held and self._bytes <= self._limits.frame_target_bytes:
            items, size = self._items, self._bytes
            self._items, self._bytes = {}, 0
            return items.values(), size
        return self._fill(now)

    def _next_large(self, now: float) -> tuple[tuple[Buffer, ...], int]:
        """The request in parts that waits longest, in a frame of its own."""
        local_id, (parts, size) = next(iter(self._large.items()))
        del self._large[local_id]
        self._large_bytes -= size
        deadline = self._deadline_of(local_id) if self._held else None
        if deadline is not None:
            timeout = timeout_override(int((deadline - now) * 1e6))
            parts = (*parts, timeout)
            size += len(timeout)
        head = item_header(size)
        return (head, *parts), size + len(head)

    def _fill(self, now: float) -> tuple[list[bytes], int]:
        """Cancels, then requests one by one, with what is left of their time."""
        parts: list[bytes] = []
        size = 0
        if self._cancels:
            cancels = RequestFrame(cancels=self._cancels).SerializeToString()
            self._cancels = []
            parts.append(cancels)
            size = len(cancels)
        for local_id, item in list(self._items.items()):
            longer = size + len(item) + ITEM_OVERHEAD
            if parts and (size >= self._limits.frame_target_bytes or longer > self._limits.max_message_bytes):
                break
            deadline = self._deadline_of(local_id)
            self.withdraw(local_id)
            if self._held and deadline is not None:
                payload = _payload(item) + timeout_override(int((deadline - now) * 1e6))
                head = item_header(len(payload))
                parts += (head, payload)
                size += len(head) + len(payload)
            else:
                parts.append(item)
                size += len(item)
        return parts, size


def _payload(item: bytes) -> bytes:
    """The request behind its header: a tag, then its length, each byte of it but the last above 127."""
    at = 1
    while item[at] > 127:
        at += 1
    return item[at + 1 :]
