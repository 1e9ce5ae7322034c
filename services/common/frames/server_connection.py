"""The server's end of one connection: headers, hello, items, until either side ends it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from typing import Final, Protocol

from google.protobuf.message import DecodeError
from headrace.v1.dataplane_pb2 import Hello, ReplyFrame, RequestFrame
from headrace.v1.tensor_pb2 import Code

from services.common.frames import wire
from services.common.frames.connection import Http2Connection
from services.common.frames.detached import LARGE_BYTES, Buffer, detach
from services.common.frames.header_blocks import grpc_message
from services.common.frames.limits import Limits
from services.common.frames.messages import PATH, PROTOCOL, CompressedMessage
from services.common.frames.outbound import Headers
from services.common.frames.peer import FrameHandler, Peer
from services.common.frames.wire import ErrorCode, Violation

log = logging.getLogger(__name__)

#: Between a stream's trailers and the connection's GOAWAY, seconds.
_PARTING_S: Final = 0.1


class Accepted(Protocol):
    """What its server knows of a connection."""

    #: Done, with the reason, when nothing of it is left.
    lost: asyncio.Future[str]

    def say_draining(self) -> None:
        """Ask the client for nothing new; ends by itself when all is answered."""
        ...

    def shut(self) -> None:
        """End now, whatever is open."""
        ...

    def abort(self) -> None:
        """Wait for nobody."""
        ...


class Acceptor(Protocol):
    """The server a connection belongs to."""

    limits: Limits
    hello: Hello
    draining: bool
    #: Whether handlers expect the data of large tensors beside the frame.
    detaches: bool
    handler_factory: Callable[[Peer], FrameHandler]

    def admit(self, connection: Accepted) -> bool:
        """Count a new connection; False where there are too many already."""
        ...

    def forget(self, connection: Accepted) -> None:
        """A connection is gone."""
        ...

    def authentic(self, authorization: str) -> bool:
        """Whether the header carries the credential."""
        ...


class ServerConnection(Http2Connection):
    """One accepted connection: headers → hello → items, until either side ends it."""

    def __init__(self, server: Acceptor, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(server.limits, loop)
        self._server = server
        self._detaches = server.detaches
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
        if stream_id == self._stream_id and self._stream_over:
            return
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
        self._admit_stream(stream_id, headers, end_stream=end_stream)

    def _admit_stream(self, stream_id: int, headers: Headers, *, end_stream: bool) -> None:
        """Look at the request headers; the stream goes on only if all is as it must be."""
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
        detached = detach(payload) if self._detaches and len(payload) >= LARGE_BYTES else None
        try:
            frame = RequestFrame.FromString(payload if detached is None else detached.frame)
        except DecodeError:
            self._finish(Code.CODE_INVALID_ARGUMENT, "the message is no RequestFrame")
            return
        if self._peer is None and not self._greeted(frame):
            return
        peer, handler = self._peer, self._handler
        if peer is None or handler is None:
            return
        if peer.serve(handler, frame, payload, detached):
            self._watch()

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

    def send_message(self, parts: Collection[Buffer], size: int) -> None:
        """Send one message; only while `can_send`."""
        self._send_message(parts, size)

    def on_flushed(self, waiting: int) -> None:
        """The peer's outbox was flushed; `waiting` bytes had to stay."""
        if self._ending:
            return
        if waiting > self._limits.max_buffer_bytes:
            self._fail(ErrorCode.ENHANCE_YOUR_CALM, "the client does not read its replies")
            return
        self._grants_held = waiting > self._limits.pause_buffer_bytes
        self._grant()
        if not waiting:
            self._finish_if_done()

    def pause_writing(self) -> None:
        super().pause_writing()
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
        if self.can_send:
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
        self._leave(f"the client was refused with HTTP status {status}")

    def _finish(self, code: Code, message: str) -> None:
        """End the stream with a gRPC status, and the connection with it."""
        if self._ending or self._stream_over:
            return
        if not self._local_open or self._unsent:
            if self._stream_id:
                self._write(wire.reset(self._stream_id, ErrorCode.CANCEL))
            self._fail(ErrorCode.NO_ERROR, message or "the stream is complete")
            return
        trailers = [("grpc-status", str(int(code)))]
        if message:
            trailers.append(("grpc-message", grpc_message(message)))
        if self._peer is None:
            trailers = [(":status", "200"), ("content-type", "application/grpc"), *trailers]
        self._send_headers(trailers, end_stream=True)
        self._leave(message or "the stream is complete")

    def _leave(self, reason: str) -> None:
        """The stream is over; give the client a moment to read why before GOAWAY.

        Some clients drop what they have not yet handled of a stream when they see a GOAWAY.
        """
        self._stream_over = True
        self._local_open = self._remote_open = False
        self._close_peer()
        if self._handshake is not None:
            self._handshake.cancel()
        self._handshake = self._loop.call_later(_PARTING_S, self._fail, ErrorCode.NO_ERROR, reason)

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
