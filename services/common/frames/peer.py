"""A server's view of one client: which of its items are open, and the replies queued for it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Sequence
from typing import Final, Protocol

from headrace.v1.dataplane_pb2 import Hello, PredictReply, PredictRequest, RequestFrame
from headrace.v1.tensor_pb2 import Code

from services.common.frames.detached import Buffer, Detached
from services.common.frames.limits import Limits
from services.common.frames.messages import ID_BEGINS, id_end, item_header, item_payloads
from services.common.frames.turn import turn_of
from services.common.frames.wire import ErrorCode, Violation

log = logging.getLogger(__name__)

_BUSY: Final = "more requests in flight than this stream may have"


class Outlet(Protocol):
    """Where a peer's frames leave."""

    @property
    def can_send(self) -> bool:
        """Whether a message would not only be queued behind another."""
        ...

    def send_message(self, parts: Collection[Buffer], size: int) -> None:
        """Send the message made of `parts`, `size` bytes in all. Only while `can_send`."""
        ...

    def on_flushed(self, waiting: int) -> None:
        """The outbox was flushed; `waiting` bytes had to stay."""
        ...


class FrameHandler(Protocol):
    """What a server does with the frames of one connection."""

    def on_request_frame(self, frame: RequestFrame) -> None:
        """Take the frame's items and cancels. Must not block; answers go to `peer.reply`, now or later.

        Where the server detaches, data of large tensors is not in the items: `peer.contents` has it, and
        `peer.item_payloads` all of them as they came, behind what is `peer.apart`, for who passes them on.
        All are good for the time of this call; views that they give stay good.
        """
        ...

    def on_closed(self) -> None:
        """The connection is gone, or the peer waits no more. Called once."""
        ...


class Peer:
    """The client at the other end of one connection, as its handler sees it."""

    __slots__ = (
        "_connection",
        "_limits",
        "_max_in_flight",
        "_max_item_bytes",
        "_open",
        "_outbox",
        "_outbox_bytes",
        "_scheduled",
        "_turn",
        "detached",
        "instance",
        "payload",
        "remote",
        "role",
    )

    def __init__(self, connection: Outlet, limits: Limits, hello: Hello, remote: str) -> None:
        self.role: str = hello.role
        self.instance: str = hello.instance
        self.remote = remote
        self._connection = connection
        self._limits = limits
        self._max_in_flight = limits.max_in_flight
        self._max_item_bytes = limits.max_message_bytes - 16
        self._turn = turn_of(asyncio.get_running_loop())
        #: The frame that is being handled, as it came.
        self.payload = b""
        #: The same in parts, where it has large tensors: the frame is without their data then.
        self.detached: Detached | None = None
        self._open: set[int] = set()
        self._outbox: list[bytes] = []  # item header, item, item header, item, …
        self._outbox_bytes = 0
        self._scheduled = False

    @property
    def in_flight(self) -> int:
        """Items neither answered nor cancelled."""
        return len(self._open)

    @property
    def contents(self) -> dict[int, list[memoryview | None]]:
        """Of the frame that is handled, by an item's position: the data of its inputs, None where the input
        has it. Items that are not there have all of theirs."""
        return self.detached.contents if self.detached is not None else {}

    @property
    def apart(self) -> tuple[Buffer, ...]:
        """What stands before the payload of the only item of the frame that is handled; mostly nothing."""
        return self.detached.apart if self.detached is not None else ()

    def item_payloads(self) -> Sequence[Buffer]:
        """The serialized items of the frame that is handled, in order, but for what is `apart`."""
        return self.detached.items if self.detached is not None else item_payloads(self.payload)

    @property
    def idle(self) -> bool:
        """Whether every item was answered and every answer handed to the socket."""
        return not self._open and not self._outbox

    def reply(self, reply: PredictReply) -> None:
        """Answer the item `reply.id`. Everything queued when the loop turns leaves in one frame.

        Serializes at once. A reply to an item that is not open is dropped.
        """
        self.reply_raw(reply.id, reply.SerializeToString())

    def reply_raw(self, item_id: int, payload: bytes) -> None:
        """The same for a PredictReply that is serialized already and says `item_id` itself."""
        if item_id not in self._open:
            return
        self._open.remove(item_id)
        size = len(payload)
        if size > self._max_item_bytes:
            payload = _too_large(item_id)
            size = len(payload)
        head = item_header(size)
        self._outbox.append(head)
        self._outbox.append(payload)
        self._outbox_bytes += size + len(head)
        if not self._scheduled:
            self._scheduled = True
            self._turn.at_end(self._flush)

    def forward(self, item_id: int, payload: bytes) -> None:
        """The same for a serialized PredictReply of another stream, whose id does not count."""
        id_rest = id_end(item_id >> 7)
        if item_id not in self._open:
            return
        size = len(payload) + len(id_rest) + 2
        if size > self._max_item_bytes:
            self.reply_raw(item_id, _too_large(item_id))
            return
        self._open.remove(item_id)
        head = item_header(size)
        self._outbox += (head, b"".join((payload, ID_BEGINS[item_id & 127], id_rest)))
        self._outbox_bytes += size + len(head)
        if not self._scheduled:
            self._scheduled = True
            self._turn.at_end(self._flush)

    # The connection's part.

    def take(self, frame: RequestFrame) -> list[PredictRequest]:
        """Open the frame's items, close its cancels, and refuse what is too much. Returns the items left:
        while somebody holds them, the frame need not make them again."""
        opened = self._open
        if frame.cancels:
            opened.difference_update(frame.cancels)
        items = frame.items
        room = self._max_in_flight - len(opened)
        if len(items) > room:
            for item in items[room:]:
                if item.id in opened:
                    raise Violation(ErrorCode.PROTOCOL_ERROR, "an item id was used twice")
                opened.add(item.id)
                self.reply(
                    PredictReply(
                        id=item.id, code=Code.CODE_RESOURCE_EXHAUSTED, message=_BUSY, retry_after_ms=100
                    )
                )
            del items[room:]
        kept = items[:]
        before = len(opened)
        opened.update([item.id for item in kept])
        if len(opened) - before != len(kept):
            raise Violation(ErrorCode.PROTOCOL_ERROR, "an item id was used twice")
        return kept

    def serve(
        self, handler: FrameHandler, frame: RequestFrame, payload: bytes, detached: Detached | None
    ) -> bool:
        """Give the handler what of the frame it is to see; False where that is nothing. `payload` is the
        frame as it came, `detached` the same in parts. Raises Violation."""
        items = self.take(frame)
        if not items and not frame.cancels:
            return False
        self.payload = payload
        self.detached = detached
        try:
            handler.on_request_frame(frame)
        except Exception:
            log.exception("the handler of %s %s (%s) failed", self.role, self.instance, self.remote)
            self.abandon([item.id for item in items], "internal error")
        finally:
            self.payload = b""
            self.detached = None
        return True

    def abandon(self, ids: list[int], message: str) -> None:
        """Answer those of `ids` that are still open with INTERNAL."""
        for item_id in ids:
            self.reply(PredictReply(id=item_id, code=Code.CODE_INTERNAL, message=message))

    def close(self) -> None:
        """Forget everything; replies are dropped from now on."""
        self._open.clear()
        self._outbox.clear()
        self._outbox_bytes = 0

    def _flush(self) -> None:
        self._scheduled = False
        self.flush()

    def flush(self) -> None:
        """Send what is queued, as far as the peer takes it."""
        connection = self._connection
        outbox = self._outbox
        target = self._limits.frame_target_bytes
        while outbox and connection.can_send:
            # Taken out first: where the client is in this process, what it makes of a reply may bring others.
            if self._outbox_bytes <= target:
                size, self._outbox, self._outbox_bytes = self._outbox_bytes, [], 0
                connection.send_message(outbox, size)
                break
            count = size = 0
            while count < len(outbox) and size < target:
                size += len(outbox[count]) + len(outbox[count + 1])
                count += 2
            message = outbox[:count]
            del outbox[:count]
            self._outbox_bytes -= size
            connection.send_message(message, size)
        connection.on_flushed(self._outbox_bytes)


def _too_large(item_id: int) -> bytes:
    message = "the answer is larger than a message may be"
    return PredictReply(id=item_id, code=Code.CODE_INTERNAL, message=message).SerializeToString()
