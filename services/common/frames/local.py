"""A connection within one process, whose client and server share an event loop: no socket, no HTTP/2, and the
same contract otherwise.

What one end sends is handled by the other at the end of the turn (`Turn`), so that nothing is ever delivered
inside `submit`, `cancel` or `reply`, and all that one turn brings shares a frame as it does on sockets. There
is nothing to wait for between the two: what may be queued is bounded by what may be in flight.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import Final
from weakref import WeakKeyDictionary

from google.protobuf.message import DecodeError
from headrace.v1.dataplane_pb2 import RequestFrame
from headrace.v1.tensor_pb2 import Code

from services.common.frames.client_connection import Caller, Opening
from services.common.frames.detached import LARGE_BYTES, Buffer, detach, detach_parts
from services.common.frames.peer import FrameHandler, Peer
from services.common.frames.server_connection import Acceptor
from services.common.frames.turn import turn_of
from services.common.frames.wire import Violation

log = logging.getLogger(__name__)

_REMOTE: Final = "this process"
_servers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, Acceptor]] = WeakKeyDictionary()


def offer(loop: asyncio.AbstractEventLoop, name: str, server: Acceptor) -> None:
    """Let clients on `loop` find `server` by `name`. Raises OSError where another has it."""
    named = _servers.setdefault(loop, {})
    if named.setdefault(name, server) is not server:
        raise FileExistsError(f"local:{name} is in use")


def withdraw(loop: asyncio.AbstractEventLoop, name: str, server: Acceptor) -> None:
    """Nobody finds it any more."""
    named = _servers.get(loop, {})
    if named.get(name) is server:
        del named[name]


def connect(
    loop: asyncio.AbstractEventLoop, name: str, calls: Caller, opening: Opening
) -> LocalConnection | None:
    """A connection to the server of that name, which may have refused already; None where there is none."""
    server = _servers.get(loop, {}).get(name)
    return LocalConnection(loop, server, calls, opening) if server is not None else None


class LocalConnection:
    """The client's end."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, server: Acceptor, calls: Caller, opening: Opening
    ) -> None:
        self.lost: asyncio.Future[str] = loop.create_future()
        self.greeted = False
        self._turn = turn_of(loop)
        self._calls = calls
        self._end_reason = ""
        self._stream = LocalStream(loop, server, self)
        if not self._stream.admitted(opening):
            return
        self.greeted = True
        calls.established(self, server.hello)

    @property
    def can_send(self) -> bool:
        """Whether the server is still there."""
        return not self._stream.closed

    @property
    def silent(self) -> bool:
        """Where it stands still, so do we."""
        return False

    def send_message(self, parts: Collection[Buffer], size: int) -> None:
        """Hand one message over; only while `can_send`, and at the end of a turn."""
        self._stream.take(parts, size)

    def shut(self) -> None:
        """End the connection."""
        self._turn.at_end(self.abort)

    def abort(self) -> None:
        """End it now."""
        self._stream.close("connection closed: the client is going away")

    # The server's part.

    def take(self, parts: Collection[Buffer], size: int) -> None:
        """Deliver what the server sent."""
        if size > self._calls.limits.max_message_bytes:
            self._stream.close(_by_peer("it sent a message that is too large"))
            return
        payload = b"".join(parts)
        try:
            frame = self._calls.reply_frame.FromString(payload)
        except DecodeError:
            self._stream.close(_by_peer("it sent something that is no ReplyFrame"))
            return
        self._calls.take(frame, payload)

    def drained(self) -> None:
        """The server wants nothing new."""
        if not self._stream.closed:
            self._calls.drained()

    def ended(self, reason: str) -> None:
        """The server's end is closed; it is said when the turn ends."""
        self._end_reason = reason
        self._turn.at_end(self._ended)

    def _ended(self) -> None:
        self._calls.disconnected(self, self._end_reason)
        if not self.lost.done():
            self.lost.set_result(self._end_reason)


class LocalStream:
    """The server's end: what its FrameServer and its Peer know of the connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, server: Acceptor, client: LocalConnection) -> None:
        self.lost: asyncio.Future[str] = loop.create_future()
        self.closed = False
        self._turn = turn_of(loop)
        self._server = server
        self._client = client
        self._peer: Peer | None = None
        self._handler: FrameHandler | None = None
        self._draining = False

    def admitted(self, opening: Opening) -> bool:
        """Whether the server takes the client; it has closed otherwise."""
        server = self._server
        if not server.admit(self):
            self.close("connection closed: too many connections")
        elif not server.authentic(f"Bearer {opening.credential}"):
            log.warning("frame connection from %s refused: wrong credential", _REMOTE)
            self._finish(Code.CODE_UNAUTHENTICATED, "the credential is missing or wrong")
        else:
            self._peer = Peer(self, server.limits, opening.hello, _REMOTE)
            try:
                self._handler = server.handler_factory(self._peer)
            except Exception:
                log.exception("a frame connection has no handler")
                self.close("connection closed: internal error")
        return not self.closed

    def take(self, parts: Collection[Buffer], size: int) -> None:
        """Handle what the client sent."""
        server, peer, handler = self._server, self._peer, self._handler
        if peer is None or handler is None:
            return
        if size > server.limits.max_message_bytes:
            self._finish(Code.CODE_RESOURCE_EXHAUSTED, "a message is larger than this server takes")
            return
        large = server.detaches and size >= LARGE_BYTES
        detached = detach_parts(parts) if large else None
        payload = b""
        if detached is None:
            payload = b"".join(parts)
            detached = detach(payload) if large else None
        try:
            frame = RequestFrame.FromString(payload if detached is None else detached.frame)
        except DecodeError:
            self._finish(Code.CODE_INVALID_ARGUMENT, "the message is no RequestFrame")
            return
        try:
            peer.serve(handler, frame, payload, detached)
        except Violation as violation:
            self.close(f"connection closed: {violation.reason}")
            return
        self._finish_if_done()

    # The peer's part.

    @property
    def can_send(self) -> bool:
        """Whether the client is still there."""
        return not self.closed

    def send_message(self, parts: Collection[Buffer], size: int) -> None:
        """Hand one message over."""
        self._client.take(parts, size)

    def on_flushed(self, waiting: int) -> None:
        """The peer's outbox was flushed."""
        self._finish_if_done()

    # The server's part.

    def say_draining(self) -> None:
        """Ask the client for nothing new; ends by itself when all is answered."""
        self._draining = True
        self._turn.at_end(self._say_draining)

    def shut(self) -> None:
        """End now, whatever is open."""
        self._finish(Code.CODE_UNAVAILABLE, "the server is going away")

    def abort(self) -> None:
        """The same, whatever the client makes of it."""
        self.shut()

    def close(self, reason: str) -> None:
        """Both ends are of no use any more; the client hears `reason` when the turn ends."""
        if self.closed:
            return
        self.closed = True
        self._server.forget(self)
        handler, self._handler = self._handler, None
        if self._peer is not None:
            self._peer.close()
        if handler is not None:
            try:
                handler.on_closed()
            except Exception:
                log.exception("a frame handler failed to close")
        self.lost.set_result(reason)
        self._client.ended(reason)

    def _say_draining(self) -> None:
        self._client.drained()
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        if self._draining and self._peer is not None and self._peer.idle:
            self._finish(Code.CODE_OK, "")

    def _finish(self, code: Code, message: str) -> None:
        name = Code.Name(code).removeprefix("CODE_")
        self.close(_by_peer(f"{name} {message}".rstrip()))


def _by_peer(reason: str) -> str:
    return f"connection ended by the peer: {reason}"
