"""The client's end of one connection: greets, opens the stream, checks what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final, Protocol
from urllib.parse import unquote

from google.protobuf.message import DecodeError
from headrace.v1.dataplane_pb2 import Hello, ReplyFrame, RequestFrame, SealedReplyFrame
from headrace.v1.tensor_pb2 import Code

from services.common.frames import wire
from services.common.frames.connection import Http2Connection
from services.common.frames.detached import Buffer
from services.common.frames.limits import Limits
from services.common.frames.messages import PATH, PROTOCOL, CompressedMessage
from services.common.frames.outbound import Headers
from services.common.frames.wire import ErrorCode, Violation


class Opening:
    """What a client says when it opens a connection, and what it learnt from those before."""

    def __init__(
        self, authority: str, scheme: str, credential: str, hello: Hello, ping_after_s: float
    ) -> None:
        """`authority` and `scheme` are what HTTP/2 wants to know of the address."""
        self.authority = authority
        self.scheme = scheme
        self.credential = credential
        self.hello = hello
        #: Silence after which to ask whether the peer lives, seconds.
        self.ping_after_s = ping_after_s


class Connection(Protocol):
    """What its Caller, and who opened it, know of a connection."""

    #: Done, with the reason, when nothing of it is left.
    lost: asyncio.Future[str]
    #: Whether the hellos agreed.
    greeted: bool

    @property
    def can_send(self) -> bool:
        """Whether a message would not only be queued behind another."""
        ...

    @property
    def silent(self) -> bool:
        """Whether the peer was asked if it lives, and has said nothing since."""
        ...

    def send_message(self, parts: Collection[Buffer], size: int) -> None:
        """Send the message made of `parts`, `size` bytes in all. Only while `can_send`."""
        ...

    def shut(self) -> None:
        """End it."""
        ...

    def abort(self) -> None:
        """End it now."""
        ...


class Caller(Protocol):
    """Whose connection it is."""

    limits: Limits
    #: What its messages are read as.
    reply_frame: type[ReplyFrame] | type[SealedReplyFrame]

    @property
    def in_flight(self) -> int:
        """How many calls wait for the peer."""
        ...

    def established(self, connection: Connection, hello: Hello) -> None:
        """The hellos agree: calls may flow."""
        ...

    def take(self, frame: ReplyFrame | SealedReplyFrame, payload: bytes) -> None:
        """Deliver the replies of the frame, which `payload` is serialized."""
        ...

    def drained(self) -> None:
        """The peer wants nothing new; what is in flight is still answered."""
        ...

    def disconnected(self, connection: Connection, reason: str) -> None:
        """The connection is of no use any more. May be said more than once."""
        ...

    def flush(self) -> None:
        """Send what is queued, as far as the peer takes it."""
        ...


class ClientConnection(Http2Connection):
    """One connection of a FrameCalls."""

    def __init__(self, calls: Caller, opening: Opening, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(calls.limits, loop)
        self._calls = calls
        self._opening = opening
        self._answered = False  # response headers are in
        self.greeted = False
        self._handshake: asyncio.TimerHandle | None = None
        self._ping_after_s = opening.ping_after_s

    def send_message(self, parts: Collection[Buffer], size: int) -> None:
        """Send one message; only while `can_send`."""
        self._send_message(parts, size)
        self._watch()

    def shut(self) -> None:
        """End the stream and the connection."""
        if self._local_open:
            self._write(wire.reset(self._stream_id, ErrorCode.CANCEL))
        self._fail(ErrorCode.NO_ERROR, "the client is going away")

    def _on_open(self) -> None:
        self._handshake = self._loop.call_later(
            self._limits.handshake_s, self._fail, ErrorCode.SETTINGS_TIMEOUT, "no hello in time"
        )
        self._greet(wire.PREFACE, {wire.ENABLE_PUSH: 0})
        self._open_stream(1)
        self._send_headers(
            [
                (":method", "POST"),
                (":scheme", self._opening.scheme),
                (":path", PATH),
                (":authority", self._opening.authority),
                ("te", "trailers"),
                ("content-type", "application/grpc"),
                ("grpc-accept-encoding", "identity"),
                ("user-agent", "headrace-frames/1"),
                ("authorization", f"Bearer {self._opening.credential}"),
            ]
        )
        payload = RequestFrame(hello=self._opening.hello).SerializeToString()
        self._send_message([payload], len(payload))

    def _on_headers(self, stream_id: int, headers: Headers, *, end_stream: bool) -> None:
        if stream_id != self._stream_id or not self._remote_open:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "HEADERS on a stream that is not open")
        fields = dict(headers)
        if not self._answered:
            status = fields.get(":status", "")
            if status.startswith("1") and len(status) == 3 and not end_stream:
                return
            self._answered = True
            if status != "200":
                self._over(f"HTTP status {status or 'missing'}")
                return
            if not fields.get("content-type", "").startswith("application/grpc"):
                self._over("the server does not speak gRPC")
                return
            if not end_stream:
                if fields.get("grpc-encoding", "identity") != "identity":
                    self._over("the server compresses its messages")
                return
        elif not end_stream:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "headers in the middle of the stream")
        self._over(_status(fields))

    def _over(self, reason: str) -> None:
        self._remote_open = False
        self.end_reason = f"connection ended by the peer: {reason}"
        if self._local_open:
            self._write(wire.reset(self._stream_id, ErrorCode.CANCEL))
        self._fail(ErrorCode.NO_ERROR, "the stream is over")

    def _on_message(self, payload: bytes) -> None:
        if not self._answered:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "a message before the headers")
        try:
            frame = self._calls.reply_frame.FromString(payload)
        except DecodeError:
            self._over("it sent something that is no ReplyFrame")
            return
        if not self.greeted:
            if frame.hello.protocol != PROTOCOL:
                self._over(f"it speaks protocol {frame.hello.protocol}, not {PROTOCOL}")
                return
            self.greeted = True
            if self._handshake is not None:
                self._handshake.cancel()
                self._handshake = None
            self._calls.established(self, frame.hello)
        self._calls.take(frame, payload)

    def _on_bad_message(self, error: Exception) -> None:
        compressed = isinstance(error, CompressedMessage)
        self._over("it sent a compressed message" if compressed else "it sent a message that is too large")

    def _on_end_stream(self) -> None:
        self._over("the stream ended without a status")

    def _on_reset(self, code: int) -> None:
        self._over(f"the stream was reset ({code})")

    def _on_goaway(self, last_stream_id: int, code: int, reason: str) -> None:
        if code == ErrorCode.ENHANCE_YOUR_CALM and "ping" in reason:
            self._opening.ping_after_s *= 2  # it finds our PINGs too many
        if last_stream_id < self._stream_id or code != ErrorCode.NO_ERROR:
            self._over(f"it goes away ({code} {reason})".rstrip())
        elif self.greeted:
            self._calls.drained()

    def _on_writable(self) -> None:
        if self.greeted:
            self._calls.flush()

    def _on_lost(self, reason: str) -> None:
        if self._handshake is not None:
            self._handshake.cancel()
            self._handshake = None
        self._calls.disconnected(self, reason)

    def _end(self, reason: str) -> None:
        super()._end(reason)
        self._calls.disconnected(self, self.end_reason)

    def _busy(self) -> bool:
        return bool(self._unsent) or self._calls.in_flight > 0


def _status(fields: dict[str, str]) -> str:
    """A sentence from gRPC's trailers."""
    code = fields.get("grpc-status", "")
    name = Code.Name(Code.ValueType(int(code))).removeprefix("CODE_") if code in _CODES else f"status {code}"
    return f"{name} {unquote(fields.get('grpc-message', ''))}".rstrip()


_CODES: Final = frozenset(str(number) for number in Code.values())
