"""The calling side: one `FrameCalls` per remote address. `reconnecting` keeps its connection."""

from __future__ import annotations

import asyncio
import logging
import math
import ssl as tls
import sys
from collections.abc import Callable, Iterable
from typing import Final

from headrace.v1.dataplane_pb2 import (
    Hello,
    PredictReply,
    PredictRequest,
    ReplyFrame,
    SealedReply,
    SealedReplyFrame,
)
from headrace.v1.tensor_pb2 import Code

from services.common.errors import Unavailable
from services.common.frames.client_connection import Connection
from services.common.frames.deadlines import Deadlines
from services.common.frames.detached import LARGE_BYTES, Buffer
from services.common.frames.limits import Limits
from services.common.frames.messages import (
    ID_BEGINS,
    NO_TIMEOUT,
    PROTOCOL,
    id_end,
    item_header,
    item_payloads,
    timeout_override,
)
from services.common.frames.outbox import ITEM_OVERHEAD, Outbox
from services.common.frames.reconnecting import Reconnecting
from services.common.frames.turn import turn_of

log = logging.getLogger(__name__)

#: Takes a PredictReply, or what else the channel was asked for.
OnReply = Callable[..., None]

#: Replies made here because the connection was not there or went away start with this word.
_LOST: Final = "connection"


def lost(reply: PredictReply | SealedReply) -> bool:
    """Whether the reply says that the connection was not there or went away before the answer."""
    return reply.code == Code.CODE_UNAVAILABLE and reply.message.startswith(_LOST)


class FrameCalls:
    """Calls to one peer. Every accepted or refused submit gets exactly one reply, unless it is cancelled."""

    def __init__(  # noqa: PLR0913 - what a connection is made of, all named
        self,
        address: str,
        *,
        credential: str,
        role: str,
        instance: str,
        limits: Limits | None = None,
        ssl: tls.SSLContext | None = None,
        on_state: Callable[[bool], None] | None = None,
        seed: int | None = None,
        sealed: bool = False,
        forwards: bool = False,
    ) -> None:
        """`sealed` gives replies as SealedReply, whose outputs are serialized Tensors. `forwards` gives
        `on_reply` the reply's own bytes as well; None where the reply was made here."""
        self.address = address
        self.forwards = forwards
        self.reply_frame: type[ReplyFrame] | type[SealedReplyFrame] = (
            SealedReplyFrame if sealed else ReplyFrame
        )
        self.limits = limits or Limits()
        self.peer: Hello | None = None
        self._on_state = on_state
        hello = Hello(protocol=PROTOCOL, role=role, instance=instance)
        self._keeper = Reconnecting(address, self, credential=credential, hello=hello, ssl=ssl, seed=seed)

        self._loop = asyncio.get_running_loop()
        self._connection: Connection | None = None  # only while the hellos agree
        self._draining = False
        self._closed = False
        self._usable = False
        self._changed = asyncio.Event()

        self._last_id = 0
        self._pending: dict[int, tuple[OnReply, float]] = {}
        self._deadlines = Deadlines(self._loop, self._pending, self._late)
        self._outbox = Outbox(self.limits, self._deadlines.of)
        self._scheduled = False
        self._in_turn = 0  # submitted since the last flush
        self._turn_items = self.limits.turn_items or sys.maxsize
        self._max_in_flight = self.limits.max_in_flight
        self._max_message_bytes = self.limits.max_message_bytes
        self._turn = turn_of(self._loop)

    # State

    @property
    def connected(self) -> bool:
        """Whether a connection stands and both hellos were exchanged."""
        return self._connection is not None

    @property
    def draining(self) -> bool:
        """Whether the peer wants nothing new on this connection."""
        return self._draining

    @property
    def usable(self) -> bool:
        """Connected and not draining."""
        return self._usable

    @property
    def last_error(self) -> str:
        """Why the last attempt to connect, or the last connection, ended."""
        return self._keeper.last_error

    @property
    def silent(self) -> bool:
        """Whether the peer was asked if it lives, and has said nothing since: better ask another."""
        connection = self._connection
        return connection is not None and connection.silent

    @property
    def in_flight(self) -> int:
        """Submitted and not yet answered, refused or cancelled."""
        return len(self._pending)

    def start(self) -> None:
        """Connect, and stay connected until `close`."""
        if not self._closed:
            self._keeper.start()

    async def wait_connected(self, timeout_s: float) -> None:
        """Wait until usable. Raises Unavailable with the reason of the last failure after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._usable:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            reason = self.last_error or "no connection yet"
            raise Unavailable(f"{self.address} cannot be reached: {reason}") from None

    async def close(self) -> None:
        """End the connection; what is pending is answered UNAVAILABLE."""
        self._closed = True
        try:
            await self._keeper.close()
        finally:
            self._note_state()
            self._fail_pending("connection closed")
            self._deadlines.stop()

    # Calls

    def submit(self, request: PredictRequest, deadline: float | None, on_reply: OnReply) -> int:
        """Send `request` with what else this loop turn brings; returns its local id.

        What it says of `id` and `timeout_us` does not count, and it is serialized before this returns.
        `deadline` is on the scale of `loop.time()`. `on_reply` is called once, later, on the loop.
        """
        return self.submit_raw(request.SerializeToString(), deadline, on_reply)

    def submit_raw(
        self,
        request: bytes,
        deadline: float | None,
        on_reply: OnReply,
        tensors: tuple[Buffer, ...] | None = None,
    ) -> int:
        """The same for a PredictRequest that is serialized already, as `tensors`, which are long and are sent
        from where they are, and `request`. Nobody may change them before the reply."""
        if deadline is None:
            return self.forward(request, NO_TIMEOUT, math.inf, on_reply, tensors or ())
        left = deadline - self._loop.time()
        if left <= 0:
            return self._refuse(on_reply, Code.CODE_DEADLINE_EXCEEDED, "the deadline has passed")
        # Beyond a tenth of a second whole milliseconds do, and most of them are known already.
        timeout = timeout_override(int(left * 1e3) * 1000 if left > 0.1 else int(left * 1e6))
        return self.forward(request, timeout, deadline, on_reply, tensors or ())

    def forward(
        self,
        request: Buffer,
        more: bytes,
        deadline: float,
        on_reply: OnReply,
        tensors: tuple[Buffer, ...] = (),
    ) -> int:
        """The same for a serialized request that is passed on with `more` fields, of which the last value
        counts. What the two say of `timeout_us` must be right now. `deadline` may be infinite."""
        if self._in_turn >= self._turn_items and not self._turn.reading:
            self._turn.end()
        if not self._usable:
            message = "connection is draining" if self._draining else "connection is not established"
            return self._refuse(on_reply, Code.CODE_UNAVAILABLE, message)
        pending = self._pending
        if len(pending) >= self._max_in_flight:
            return self._refuse(on_reply, Code.CODE_RESOURCE_EXHAUSTED, "too many requests in flight")
        self._last_id = local_id = self._last_id + 1
        id_rest = id_end(local_id >> 7)
        size = len(request) + len(more) + len(id_rest) + 2
        if tensors:
            size += sum([len(part) for part in tensors])
        if size + ITEM_OVERHEAD > self._max_message_bytes:
            return self._refuse(on_reply, Code.CODE_INVALID_ARGUMENT, "the request is too large")
        if size < LARGE_BYTES and not tensors:
            item = b"".join((item_header(size), request, more, ID_BEGINS[local_id & 127], id_rest))
            taken = self._outbox.add(local_id, item)
        else:
            end = b"".join((more, ID_BEGINS[local_id & 127], id_rest))
            taken = self._outbox.add_large(local_id, (*tensors, request, end), size)
        if not taken:
            return self._refuse(on_reply, Code.CODE_RESOURCE_EXHAUSTED, "too many bytes wait to be sent")
        self._in_turn += 1
        pending[local_id] = (on_reply, deadline)
        if deadline < self._deadlines.next_look:
            self._deadlines.look_at(deadline)
        if not self._scheduled:
            self._scheduled = True
            self._turn.at_end(self._flush)
        return local_id

    def cancel(self, local_id: int) -> None:
        """Deliver no reply for `local_id`, and tell the peer that nobody waits."""
        if self._pending.pop(local_id, None) is None:
            return
        self._withdraw(local_id)

    async def predict(self, request: PredictRequest, deadline: float | None) -> PredictReply:
        """Submit and wait. Cancelling the wait cancels the call."""
        answer: asyncio.Future[PredictReply] = self._loop.create_future()

        def settle(reply: PredictReply) -> None:
            if not answer.done():
                answer.set_result(reply)

        local_id = self.submit(request, deadline, settle)
        try:
            return await answer
        except asyncio.CancelledError:
            self.cancel(local_id)
            raise

    def _refuse(self, on_reply: OnReply, code: Code, message: str) -> int:
        self._last_id = local_id = self._last_id + 1
        self._pending[local_id] = (on_reply, math.inf)
        reply = PredictReply(id=local_id, code=code, message=message)
        self._loop.call_soon(self._answer, local_id, reply)
        return local_id

    def _answer(self, local_id: int, reply: PredictReply) -> None:
        entry = self._pending.pop(local_id, None)
        if entry is None:
            return
        try:
            entry[0](reply, None) if self.forwards else entry[0](reply)
        except Exception:
            log.exception("taking a reply failed")

    def _withdraw(self, local_id: int) -> None:
        """Take an item back from the outbox, or from the peer where it has left already."""
        if self._outbox.withdraw(local_id) or self._connection is None:
            return
        self._outbox.cancel(local_id)
        if not self._scheduled:
            self._scheduled = True
            self._turn.at_end(self._flush)

    def _late(self, local_id: int) -> None:
        self._withdraw(local_id)
        message = "no answer before the deadline"
        self._answer(local_id, PredictReply(id=local_id, code=Code.CODE_DEADLINE_EXCEEDED, message=message))

    # Sending

    def _flush(self) -> None:
        self._scheduled = False
        self._in_turn = 0
        self.flush()

    def flush(self) -> None:
        """Send what is queued, as far as the peer takes it."""
        connection = self._connection
        if connection is None:
            return
        outbox = self._outbox
        while outbox and connection.can_send:
            parts, size = outbox.next_frame(self._loop.time())
            connection.send_message(parts, size)
        outbox.hold()

    # The connection's part.

    def established(self, connection: Connection, hello: Hello) -> None:
        """The hellos agree: calls may flow."""
        self._connection = connection
        self.peer = hello
        ours = self.limits.max_in_flight
        self._max_in_flight = min(hello.max_in_flight or ours, ours)
        self._draining = False
        self._note_state()

    def take(self, frame: ReplyFrame | SealedReplyFrame, payload: bytes) -> None:
        """Deliver the replies of the frame, which `payload` is serialized."""
        if frame.draining:
            self.drained()
        pending, outbox = self._pending, self._outbox
        payloads = item_payloads(payload) if self.forwards else None
        replies: Iterable[PredictReply | SealedReply] = frame.items[:]
        for at, reply in enumerate(replies):
            local_id = reply.id
            entry = pending.pop(local_id, None)
            if entry is None:
                continue
            if outbox:
                outbox.withdraw(local_id)  # where it is answered before it was asked
            try:
                if payloads is None:
                    entry[0](reply)
                else:
                    entry[0](reply, payloads[at])
            except Exception:
                log.exception("taking a reply failed")

    def drained(self) -> None:
        """The peer wants nothing new; what is in flight is still answered."""
        self._draining = True
        self._note_state()
        for local_id in self._outbox.unsent():
            self._outbox.withdraw(local_id)
            reply = PredictReply(id=local_id, code=Code.CODE_UNAVAILABLE, message="connection is draining")
            self._answer(local_id, reply)

    def disconnected(self, connection: Connection, reason: str) -> None:
        """The connection is gone, with everything in flight."""
        self._keeper.last_error = reason
        if self._connection is not connection:
            return
        self._connection = None
        self._draining = False
        self._note_state()
        self._fail_pending(reason if reason.startswith(_LOST) else f"connection lost: {reason}")

    def _note_state(self) -> None:
        usable = self._connection is not None and not self._draining and not self._closed
        if usable == self._usable:
            return
        self._usable = usable
        self._changed.set()
        if self._on_state is not None:
            try:
                self._on_state(usable)
            except Exception:
                log.exception("noting the state of a frame connection failed")

    def _fail_pending(self, message: str) -> None:
        self._outbox.clear()
        for local_id in list(self._pending):
            self._answer(local_id, PredictReply(id=local_id, code=Code.CODE_UNAVAILABLE, message=message))
