"""The serving side: accepts frame connections, checks who calls, and answers item by item."""

from __future__ import annotations

import asyncio
import hmac
import logging
import ssl as tls
from collections.abc import Callable
from typing import Final, Protocol
from urllib.parse import quote

from google.protobuf.message import DecodeError
from headrace.v1.dataplane_pb2 import Hello, PredictReply, ReplyFrame, RequestFrame
from headrace.v1.tensor_pb2 import Code

from services.common.frames import wire
from services.common.frames.connection import Headers, Http2Connection
from services.common.frames.limits import Limits
from services.common.frames.messages import CompressedMessage, item_header
from services.common.frames.wire import ErrorCode, Violation

log = logging.getLogger(__name__)

PATH: Final = "/headrace.v1.DataPlane/Frames"
PROTOCOL: Final = 1

_BUSY: Final = "more requests in flight than this stream may have"


class FrameHandler(Protocol):
    """What a server does with the frames of one connection."""

    def on_request_frame(self, frame: RequestFrame) -> None:
        """Take the frame's items and cancels. Must not block; answers go to `peer.reply`, now or later."""
        ...

    def on_closed(self) -> None:
        """The connection is gone, or the peer waits no more. Called once."""
        ...


class Peer:
    """The client at the other end of one connection, as its handler sees it."""

    __slots__ = (
        "_closed",
        "_connection",
        "_limits",
        "_loop",
        "_open",
        "_outbox",
        "_outbox_bytes",
        "_scheduled",
        "instance",
        "remote",
        "role",
    )

    def __init__(self, connection: _ServerConnection, limits: Limits, hello: Hello, remote: str) -> None:
        self.role: str = hello.role
        self.instance: str = hello.instance
        self.remote = remote
        self._connection = connection
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._open: set[int] = set()
        self._outbox: list[bytes] = []  # item header, item, item header, item, …
        self._outbox_bytes = 0
        self._scheduled = False
        self._closed = False

    @property
    def in_flight(self) -> int:
        """Items neither answered nor cancelled."""
        return len(self._open)

    @property
    def closed(self) -> bool:
        """Whether replies lead nowhere any more."""
        return self._closed

    @property
    def idle(self) -> bool:
        """Whether every item was answered and every answer handed to the socket."""
        return not self._open and not self._outbox

    def reply(self, reply: PredictReply) -> None:
        """Answer the item `reply.id`. Everything queued when the loop turns leaves in one frame.

        Serializes at once. A reply to an item that is not open is dropped.
        """
        item_id = reply.id
        if item_id not in self._open:
            return
        self._open.remove(item_id)
        payload = reply.SerializeToString()
        size = len(payload)
        if size > self._limits.max_message_bytes - 16:
            payload = _refusal(item_id, Code.CODE_INTERNAL, "the answer is larger than a message may be")
            size = len(payload)
        head = item_header(size)
        self._outbox.append(head)
        self._outbox.append(payload)
        self._outbox_bytes += size + len(head)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    # The connection's part.

    def take(self, frame: RequestFrame) -> None:
        """Open the frame's items, close its cancels, and refuse what is too much."""
        opened = self._open
        if frame.cancels:
            opened.difference_update(frame.cancels)
        items = frame.items
        room = self._limits.max_in_flight - len(opened)
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
        before = len(opened)
        opened.update([item.id for item in items])
        if len(opened) - before != len(items):
            raise Violation(ErrorCode.PROTOCOL_ERROR, "an item id was used twice")

    def abandon(self, ids: list[int], message: str) -> None:
        """Answer those of `ids` that are still open with INTERNAL."""
        for item_id in ids:
            self.reply(PredictReply(id=item_id, code=Code.CODE_INTERNAL, message=message))

    def close(self) -> None:
        """Forget everything; replies are dropped from now on."""
        self._closed = True
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
            if self._outbox_bytes <= target:
                connection.send_message(outbox, self._outbox_bytes)
                self._outbox = outbox = []
                self._outbox_bytes = 0
                break
            count = size = 0
            while count < len(outbox) and size < target:
                size += len(outbox[count]) + len(outbox[count + 1])
                count += 2
            connection.send_message(outbox[:count], size)
            del outbox[:count]
            self._outbox_bytes -= size
        connection.on_flushed(self._outbox_bytes)


def _refusal(item_id: int, code: Code, message: str) -> bytes:
    return PredictReply(id=item_id, code=code, message=message).SerializeToString()


class _ServerConnection(Http2Connection):
    """One accepted connection: headers → hello → items, until either side ends it."""

    def __init__(self, server: FrameServer, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(server.limits, loop)
        self._server = server
        self._preface = wire.PREFACE
        self._peer: Peer | None = None
        self._handler: FrameHandler | None = None
        self._handshake: asyncio.TimerHandle | None = None
        self._draining = False

    # Reading

    def _on_open(self) -> None:
        if not self._server.admit(self):
            self._greet()
            self._fail(ErrorCode.ENHANCE_YOUR_CALM, "too many connections")
            return
        self._handshake = self._loop.call_later(
            self._limits.handshake_s, self._fail, ErrorCode.SETTINGS_TIMEOUT, "no hello in time"
        )
        self._greet(settings={wire.MAX_CONCURRENT_STREAMS: 1})

    def data_received(self, data: bytes) -> None:
        if self._preface and not self._ending:
            count = min(len(self._preface), len(data))
            if data[:count] != self._preface[:count]:
                self._fail(ErrorCode.PROTOCOL_ERROR, "not an HTTP/2 preface")
                return
            self._preface, data = self._preface[count:], data[count:]
        if data:
            super().data_received(data)

    def _on_headers(self, stream_id: int, headers: Headers, *, end_stream: bool) -> None:
        if stream_id == self._stream_id and self._remote_open:
            if not end_stream:
                raise Violation(ErrorCode.PROTOCOL_ERROR, "headers in the middle of the stream")
            self._end_remote()
            return
        if stream_id % 2 == 0 or stream_id <= self._last_stream_id:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "stream id out of order")
        if self._stream_id:
            self._last_stream_id = stream_id
            self._write(wire.reset(stream_id, ErrorCode.REFUSED_STREAM))
            return
        self._open_stream(stream_id)
        fields = _fields(headers)
        if fields is None:
            self._write(wire.reset(stream_id, ErrorCode.PROTOCOL_ERROR))
            self._fail(ErrorCode.PROTOCOL_ERROR, "malformed request headers")
        elif fields[":method"] != "POST":
            self._refuse_http("405")
        elif not fields.get("content-type", "").startswith("application/grpc"):
            self._refuse_http("415")
        elif fields[":path"] != PATH:
            self._finish(Code.CODE_UNIMPLEMENTED, "this port serves the frame stream only")
        elif not self._server.authentic(fields.get("authorization", "")):
            log.warning("frame connection from %s refused: wrong credential", self._remote_address())
            self._finish(Code.CODE_UNAUTHENTICATED, "the credential is missing or wrong")
        elif fields.get("grpc-encoding", "identity") != "identity":
            self._finish(Code.CODE_UNIMPLEMENTED, "messages must not be compressed")
        else:
            self._remote_open = True
            if end_stream:
                self._end_remote()

    def _on_message(self, payload: bytes) -> None:
        try:
            frame = RequestFrame.FromString(payload)
        except DecodeError:
            self._finish(Code.CODE_INVALID_ARGUMENT, "the message is no RequestFrame")
            return
        if self._peer is None and not self._greeted(frame):
            return
        peer, handler = self._peer, self._handler
        if peer is None or handler is None:
            return
        peer.take(frame)
        if not frame.items and not frame.cancels:
            return
        self._watch()
        try:
            handler.on_request_frame(frame)
        except Exception:
            log.exception("a frame handler failed")
            peer.abandon([item.id for item in frame.items], "internal error")

    def _greeted(self, frame: RequestFrame) -> bool:
        """Check the client's hello and answer it."""
        hello = frame.hello
        if hello.protocol != PROTOCOL:
            spoken = f"protocol {hello.protocol}" if frame.HasField("hello") else "no hello"
            self._finish(
                Code.CODE_FAILED_PRECONDITION, f"this server speaks protocol {PROTOCOL}, the client {spoken}"
            )
            return False
        if self._handshake is not None:
            self._handshake.cancel()
            self._handshake = None
        self._peer = Peer(self, self._limits, hello, self._remote_address())
        self._handler = self._server.handler_factory(self._peer)
        self._send_response_headers()
        answer = ReplyFrame(hello=self._server.hello, draining=self._server.draining)
        self._send_control(answer)
        return True

    def _on_bad_message(self, error: Exception) -> None:
        if isinstance(error, CompressedMessage):
            self._finish(Code.CODE_INTERNAL, "a message is compressed without an agreed encoding")
        else:
            self._finish(Code.CODE_RESOURCE_EXHAUSTED, "a message is larger than this server takes")

    def _on_end_stream(self) -> None:
        if self._peer is None:
            self._finish(Code.CODE_FAILED_PRECONDITION, "the stream ended before its hello")
        else:
            self._finish_if_done()

    def _on_reset(self, code: int) -> None:
        self._fail(ErrorCode.NO_ERROR, f"the client reset the stream ({code})")

    def _on_lost(self, reason: str) -> None:
        if self._handshake is not None:
            self._handshake.cancel()
            self._handshake = None
        self._server.forget(self)
        self._close_peer()

    def _busy(self) -> bool:
        return bool(self._unsent) or (self._peer is not None and not self._peer.idle)

    # Writing

    @property
    def can_send(self) -> bool:
        """Whether a message would not only be queued behind another."""
        return self._can_send

    def send_message(self, parts: list[bytes], size: int) -> None:
        """Send one message; only while `can_send`."""
        self._send_message(parts, size)

    def on_flushed(self, waiting: int) -> None:
        """The peer's outbox was flushed; `waiting` bytes had to stay."""
        if self._ending:
            return
        if waiting > self._limits.max_buffer_bytes:
            self._fail(ErrorCode.ENHANCE_YOUR_CALM, "the client does not read its replies")
            return
        self._hold_reading(waiting > self._limits.pause_buffer_bytes or self._paused)
        if not waiting:
            self._finish_if_done()

    def pause_writing(self) -> None:
        super().pause_writing()
        # Acknowledgements are not windowed: a peer that sends and never reads would grow them without end.
        self._hold_reading(True)

    def resume_writing(self) -> None:
        self._hold_reading(False)
        super().resume_writing()

    def _on_writable(self) -> None:
        if self._peer is not None:
            self._peer.flush()

    def _send_response_headers(self) -> None:
        self._send_headers(
            [
                (":status", "200"),
                ("content-type", "application/grpc"),
                ("grpc-accept-encoding", "identity"),
            ]
        )

    def _send_control(self, frame: ReplyFrame) -> None:
        """A frame without items. Small: may join what waits already."""
        payload = frame.SerializeToString()
        if self._can_send:
            self._send_message([payload], len(payload))
        else:
            self._unsent += b"\0" + len(payload).to_bytes(4, "big") + payload
            self._drain()

    # Ending

    def say_draining(self) -> None:
        """Ask the client for nothing new; ends by itself when all is answered."""
        self._draining = True
        if self._peer is None:
            self._finish(Code.CODE_UNAVAILABLE, "the server is going away")
        elif self._local_open:
            self._send_control(ReplyFrame(draining=True))
            self._finish_if_done()

    def shut(self) -> None:
        """End now, whatever is open."""
        self._finish(Code.CODE_UNAVAILABLE, "the server is going away")

    def _finish_if_done(self) -> None:
        over = self._draining or not self._remote_open
        if over and self._local_open and not self._unsent and self._peer is not None and self._peer.idle:
            self._finish(Code.CODE_OK, "")

    def _refuse_http(self, status: str) -> None:
        self._send_headers([(":status", status)], end_stream=True)
        self._fail(ErrorCode.NO_ERROR, f"the client was refused with HTTP status {status}")

    def _finish(self, code: Code, message: str) -> None:
        """End the stream with a gRPC status, and the connection with it."""
        if self._ending:
            return
        if self._local_open and not self._unsent:
            trailers = [("grpc-status", str(int(code)))]
            if message:
                trailers.append(("grpc-message", quote(message, safe=" !\"#$&'()*+,-./:;<=>?@[]^_`{|}~")))
            if self._peer is None:
                trailers = [(":status", "200"), ("content-type", "application/grpc"), *trailers]
            self._send_headers(trailers, end_stream=True)
        elif self._stream_id:
            self._write(wire.reset(self._stream_id, ErrorCode.CANCEL))
        self._fail(ErrorCode.NO_ERROR, message or "the stream is complete")

    def _end(self, reason: str) -> None:
        super()._end(reason)
        self._close_peer()

    def _close_peer(self) -> None:
        peer, handler = self._peer, self._handler
        self._handler = None
        if peer is not None:
            peer.close()
        if handler is not None:
            try:
                handler.on_closed()
            except Exception:
                log.exception("a frame handler failed to close")

    def _remote_address(self) -> str:
        name = self._transport.get_extra_info("peername") if self._transport is not None else None
        return f"{name[0]}:{name[1]}" if isinstance(name, tuple) and len(name) > 1 else str(name or "local")


def _fields(headers: Headers) -> dict[str, str] | None:
    """The headers by name, None where they are malformed (RFC 9113, section 8.3)."""
    fields: dict[str, str] = {}
    regular = False
    for name, value in headers:
        if name.startswith(":"):
            if regular or name in fields or name not in {":method", ":scheme", ":path", ":authority"}:
                return None
        else:
            regular = True
        if name != name.lower() or name in {"connection", "transfer-encoding", "upgrade", "keep-alive"}:
            return None
        fields[name] = value
    return fields if fields.keys() >= {":method", ":scheme", ":path"} else None


class FrameServer:
    """Accepts frame connections on one address."""

    def __init__(
        self,
        handler_factory: Callable[[Peer], FrameHandler],
        *,
        credential: str,
        instance: str,
        role: str,
        limits: Limits | None = None,
        ssl: tls.SSLContext | None = None,
    ) -> None:
        if not credential:
            raise ValueError("a frame server needs a credential")
        self.handler_factory = handler_factory
        self.limits = limits or Limits()
        self.hello = Hello(
            protocol=PROTOCOL, role=role, instance=instance, max_in_flight=self.limits.max_in_flight
        )
        self.draining = False
        self._expected = f"Bearer {credential}".encode()
        self._ssl = ssl
        self._server: asyncio.Server | None = None
        self._connections: set[_ServerConnection] = set()

    @property
    def connections(self) -> int:
        """Open connections, those in their handshake included."""
        return len(self._connections)

    async def start(self, host: str, port: int, *, reuse_port: bool = False) -> int:
        """Listen; returns the port, which the system picks where `port` is 0."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: _ServerConnection(self, loop),
            host,
            port,
            ssl=self._ssl,
            ssl_handshake_timeout=self.limits.handshake_s if self._ssl else None,
            reuse_port=reuse_port or None,
            backlog=512,
        )
        return int(self._server.sockets[0].getsockname()[1])

    async def drain(self, grace_s: float) -> None:
        """Take nothing new, answer what is open for at most `grace_s`, then close."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.say_draining()
        await self._wait_lost(grace_s)
        await self.close()

    async def close(self) -> None:
        """End every connection and wait until the sockets are gone."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.shut()
        await self._wait_lost(self.limits.linger_s * 2)
        for connection in list(self._connections):
            connection.abort()
        await self._wait_lost(1.0)

    async def _wait_lost(self, timeout_s: float) -> None:
        waits = [connection.lost for connection in self._connections]
        if waits:
            await asyncio.wait(waits, timeout=timeout_s)

    # The connections' part.

    def admit(self, connection: _ServerConnection) -> bool:
        """Count a new connection; False where there are too many already."""
        self._connections.add(connection)
        return len(self._connections) <= self.limits.max_connections

    def forget(self, connection: _ServerConnection) -> None:
        """A connection is gone."""
        self._connections.discard(connection)

    def authentic(self, authorization: str) -> bool:
        """Whether the header carries the credential; takes the same time however wrong it is."""
        return hmac.compare_digest(authorization.encode(), self._expected)
