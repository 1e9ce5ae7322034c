"""One HTTP/2 connection carrying one gRPC stream: the data path that client and server share.

Bytes come in through `data_received`, are cut into frames and checked; gRPC messages go to `_on_message`.
Messages go out through `_send_message` while `_can_send`; what the windows or the socket do not take at once
waits in `_unsent`, which holds one message at most, and `_on_writable` says when more may follow.

Whatever the peer does wrong ends here as GOAWAY with the right code on this connection. No exception leaves
a callback of the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from typing import Final, cast

from hpack import Decoder, Encoder
from hpack.exceptions import HPACKError

from services.common.frames import wire
from services.common.frames.limits import Limits
from services.common.frames.messages import PREFIX_BYTES, CompressedMessage, MessageReader, Oversize
from services.common.frames.wire import ErrorCode, Violation

log = logging.getLogger(__name__)

Headers = list[tuple[str, str]]

_OUR_TABLE_SIZE: Final = 4096


class Http2Connection(asyncio.Protocol):
    """The state of one connection. Subclasses say what headers, messages and ends mean."""

    def __init__(self, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        self._limits = limits
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[str] = loop.create_future()  # done with the reason when the socket is gone
        self.end_reason = ""  # why it ends, where that is known before the socket is gone

        self._unparsed = bytearray()
        self._settings_seen = False
        self._headers_stream = 0  # stream whose header block is incomplete
        self._headers_end_stream = False
        self._header_block = bytearray()
        self._decoder = Decoder(max_header_list_size=limits.max_header_bytes)
        self._encoder = Encoder()

        self._stream_id = 0  # the one stream; 0 before it opens
        self._last_stream_id = 0
        self._local_open = False  # we may still send on it
        self._remote_open = False  # the peer may still send on it
        self._stream_over = False  # we ended it; what the peer still sends on it is dropped
        self._reader = MessageReader(limits.max_message_bytes)

        self._peer_initial_window = wire.DEFAULT_WINDOW
        self._peer_max_frame = wire.DEFAULT_MAX_FRAME
        self._connection_window = wire.DEFAULT_WINDOW  # what we may still send
        self._stream_window = wire.DEFAULT_WINDOW
        self._received = 0  # not yet granted again
        self._stream_received = 0
        self._unsent = bytearray()
        self._paused_at: float | None = None  # since when the socket takes nothing more
        self._owed_answers = 0  # written meanwhile
        self._reading_held = False
        self._grants_held = False  # no new windows: what the peer asked for is more than it takes

        self._ending = False  # nothing is read or sent any more
        self._control_frames = 0
        self._heard_at = loop.time()
        self._ping_sent_at: float | None = None
        self._ping_after_s = limits.ping_after_s
        self._keepalive: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None

    # What subclasses fill in.

    def _on_open(self) -> None:
        """The socket (and TLS) is up."""

    def _on_headers(self, stream_id: int, headers: Headers, *, end_stream: bool) -> None:
        """A whole header block arrived."""
        raise NotImplementedError

    def _on_message(self, payload: bytes) -> None:
        """A whole gRPC message arrived."""
        raise NotImplementedError

    def _on_bad_message(self, error: Exception) -> None:
        """A gRPC message was announced that is too large or compressed."""
        raise NotImplementedError

    def _on_end_stream(self) -> None:
        """The peer sends nothing more on the stream."""
        raise NotImplementedError

    def _on_reset(self, code: int) -> None:
        """The peer ended the stream at once."""
        raise NotImplementedError

    def _on_goaway(self, last_stream_id: int, code: int, reason: str) -> None:
        """The peer takes no new streams, and none above `last_stream_id`."""

    def _on_writable(self) -> None:
        """`_can_send` became true."""

    def _on_lost(self, reason: str) -> None:
        """The connection is gone. Called once."""

    def _busy(self) -> bool:
        """Whether anything is owed, so that silence is suspicious."""
        raise NotImplementedError

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self._end("connection refused: TLS did not settle on h2")
            return
        _keep_alive(transport.get_extra_info("socket"), self._limits)
        self._on_open()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._keepalive, self._linger):
            if timer is not None:
                timer.cancel()
        self._keepalive = self._linger = None
        self._ending = True
        self._local_open = self._remote_open = False
        self._unsent.clear()
        self._unparsed.clear()
        reason = self.end_reason or ("connection lost" if exc is None else f"connection lost: {exc}")
        try:
            self._on_lost(reason)
        except Exception:
            log.exception("closing a frame connection failed")
        if not self.lost.done():
            self.lost.set_result(reason)

    def pause_writing(self) -> None:
        self._paused_at = self._loop.time()
        self._watch()

    def resume_writing(self) -> None:
        self._paused_at = None
        self._owed_answers = 0
        self._drain()

    def eof_received(self) -> bool:
        return False

    def data_received(self, data: bytes) -> None:
        if self._ending:
            return
        self._heard_at = self._loop.time()
        self._ping_sent_at = None
        try:
            if self._unparsed:
                self._unparsed += data
                used = self._parse(self._unparsed)
                del self._unparsed[:used]
            else:
                used = self._parse(data)
                if used < len(data):
                    self._unparsed += memoryview(data)[used:]
            self._grant()
        except Violation as violation:
            self._fail(violation.code, violation.reason)
        except Exception:
            log.exception("frame connection failed")
            self._fail(ErrorCode.INTERNAL_ERROR, "internal error")

    # Reading

    def _parse(self, data: bytes | bytearray) -> int:
        """Handle every whole frame in `data`; returns how many bytes that were."""
        at, size = 0, len(data)
        while size - at >= wire.HEADER_BYTES and not self._ending:
            length = data[at] << 16 | data[at + 1] << 8 | data[at + 2]
            if length > self._limits.max_http2_frame_bytes:
                raise Violation(ErrorCode.FRAME_SIZE_ERROR, "frame larger than MAX_FRAME_SIZE")
            start = at + wire.HEADER_BYTES
            end = start + length
            if end > size:
                break
            kind, flags = data[at + 3], data[at + 4]
            stream_id = int.from_bytes(data[at + 5 : start], "big") & wire.MAX_WINDOW
            at = end
            if not self._settings_seen and (kind != wire.SETTINGS or flags & wire.ACK):
                raise Violation(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            if self._headers_stream and (kind != wire.CONTINUATION or stream_id != self._headers_stream):
                raise Violation(ErrorCode.PROTOCOL_ERROR, "a header block was interrupted")
            if kind == wire.DATA:
                self._data(stream_id, flags, data, start, end)
            else:
                self._control(kind, flags, stream_id, bytes(data[start:end]))
        return at

    def _data(self, stream_id: int, flags: int, data: bytes | bytearray, start: int, end: int) -> None:
        length = end - start
        self._received += length
        if self._received > self._limits.window_bytes:
            raise Violation(ErrorCode.FLOW_CONTROL_ERROR, "more data than the window granted")
        if flags & wire.PADDED:
            start, end = wire.without_padding(data, start, end)
        if stream_id != self._stream_id or not stream_id:
            if not stream_id or stream_id > self._last_stream_id:
                raise Violation(ErrorCode.PROTOCOL_ERROR, "DATA on a stream that is not open")
            self._count_control()  # still under way when its stream was refused
            return
        if self._stream_over:
            self._count_control()
        elif not self._remote_open:
            raise Violation(ErrorCode.STREAM_CLOSED, "DATA after the end of the stream")
        else:
            self._stream_received += length
            self._content(flags, data, start, end)

    def _content(self, flags: int, data: bytes | bytearray, start: int, end: int) -> None:
        """Part of the stream, without padding."""
        try:
            messages = self._reader.feed(data, start, end)
        except (Oversize, CompressedMessage) as error:
            self._on_bad_message(error)
            return
        if messages:
            self._control_frames = 0
            for message in messages:
                self._on_message(message)
                if self._ending:
                    return
        elif start == end:
            self._count_control()
        if flags & wire.END_STREAM:
            self._end_remote()

    def _end_remote(self) -> None:
        if self._reader.mid_message:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "the stream ended inside a message")
        self._remote_open = False
        self._on_end_stream()

    def _count_control(self) -> None:
        self._control_frames += 1
        if self._control_frames > self._limits.max_control_frames:
            raise Violation(ErrorCode.ENHANCE_YOUR_CALM, "too many control frames")

    def _control(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        self._count_control()
        if kind == wire.WINDOW_UPDATE:
            self._take_window(stream_id, payload)
        elif kind == wire.SETTINGS:
            self._take_settings(flags, stream_id, payload)
        elif kind == wire.PING:
            self._take_ping(flags, stream_id, payload)
        elif kind == wire.HEADERS:
            self._take_headers(flags, stream_id, payload)
        elif kind == wire.CONTINUATION:
            self._take_continuation(flags, payload)
        elif kind == wire.RST_STREAM:
            self._take_reset(stream_id, payload)
        elif kind == wire.GOAWAY:
            self._take_goaway(stream_id, payload)
        elif kind == wire.PUSH_PROMISE:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE was never allowed")
        elif kind == wire.PRIORITY:
            wire.check_priority(stream_id, payload)

    def _take_goaway(self, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < 8:
            raise Violation(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY shorter than 8 bytes")
        last = int.from_bytes(payload[:4], "big") & wire.MAX_WINDOW
        self._on_goaway(last, int.from_bytes(payload[4:8], "big"), payload[8:264].decode(errors="replace"))

    def _take_window(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Violation(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE is not 4 bytes")
        increment = int.from_bytes(payload, "big") & wire.MAX_WINDOW
        if not increment:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
        if not stream_id:
            self._connection_window += increment
        elif stream_id == self._stream_id:
            self._stream_window += increment
        elif stream_id > self._last_stream_id:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE on a stream that is not open")
        if self._connection_window > wire.MAX_WINDOW or self._stream_window > wire.MAX_WINDOW:
            raise Violation(ErrorCode.FLOW_CONTROL_ERROR, "the window grew beyond 2^31-1")
        self._drain()

    def _take_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & wire.ACK:
            if payload:
                raise Violation(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS acknowledgement with a payload")
            return
        self._settings_seen = True
        for key, value in wire.parse_settings(payload):
            if key == wire.INITIAL_WINDOW_SIZE:
                self._stream_window += value - self._peer_initial_window
                self._peer_initial_window = value
                if self._stream_window > wire.MAX_WINDOW:
                    raise Violation(ErrorCode.FLOW_CONTROL_ERROR, "the window grew beyond 2^31-1")
            elif key == wire.MAX_FRAME_SIZE:
                self._peer_max_frame = value
            elif key == wire.HEADER_TABLE_SIZE:
                self._encoder.header_table_size = min(value, _OUR_TABLE_SIZE)
        self._acknowledge(wire.frame(wire.SETTINGS, wire.ACK, 0))
        self._drain()

    def _take_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise Violation(ErrorCode.FRAME_SIZE_ERROR, "PING is not 8 bytes")
        if not flags & wire.ACK:
            self._acknowledge(wire.frame(wire.PING, wire.ACK, 0, payload))

    def _acknowledge(self, answer: bytes) -> None:
        """Acknowledgements have no window: a peer that asks and never reads must not pile them up."""
        if self._paused_at is not None:
            self._owed_answers += 1
            if self._owed_answers > self._limits.max_control_frames:
                raise Violation(ErrorCode.ENHANCE_YOUR_CALM, "answers are not read")
        self._write(answer)

    def _take_reset(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Violation(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM is not 4 bytes")
        if not stream_id or stream_id > self._last_stream_id:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "RST_STREAM on a stream that is not open")
        if stream_id == self._stream_id:
            self._local_open = self._remote_open = False
            self._unsent.clear()
            self._on_reset(int.from_bytes(payload, "big"))

    def _take_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if not stream_id:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "HEADERS without a stream")
        self._headers_stream = stream_id
        self._headers_end_stream = bool(flags & wire.END_STREAM)
        self._take_continuation(flags, wire.header_fragment(payload, flags))

    def _take_continuation(self, flags: int, payload: bytes) -> None:
        if not self._headers_stream:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        self._header_block += payload
        if len(self._header_block) > self._limits.max_header_bytes:
            raise Violation(ErrorCode.ENHANCE_YOUR_CALM, "header block too large")
        if not flags & wire.END_HEADERS:
            return
        stream_id, block = self._headers_stream, bytes(self._header_block)
        self._headers_stream = 0
        self._header_block.clear()
        try:
            decoded = cast("Headers", self._decoder.decode(block))
        except (HPACKError, UnicodeDecodeError, IndexError, ValueError) as error:
            raise Violation(ErrorCode.COMPRESSION_ERROR, "header block cannot be decoded") from error
        self._on_headers(stream_id, decoded, end_stream=self._headers_end_stream)

    def _grant(self) -> None:
        """Give windows back in few, large steps."""
        if self._received * 4 < self._limits.window_bytes or self._grants_held or self._ending:
            return
        grants = wire.window_update(0, self._received)
        if self._remote_open and self._stream_received:
            grants += wire.window_update(self._stream_id, self._stream_received)
        self._received = self._stream_received = 0
        self._write(grants)

    def _hold_reading(self, hold: bool) -> None:
        """Leave the peer's bytes in the socket while it does not read ours.

        Only one side of a pair may do this, the server: were both to wait for the other, both would for ever.
        """
        if hold != self._reading_held and self._transport is not None and not self._transport.is_closing():
            self._reading_held = hold
            (self._transport.pause_reading if hold else self._transport.resume_reading)()

    # Writing

    def _greet(self, extra: bytes = b"", settings: dict[int, int] | None = None) -> None:
        """SETTINGS and the connection's window, before anything else of ours."""
        ours = {
            wire.INITIAL_WINDOW_SIZE: self._limits.window_bytes,
            wire.MAX_FRAME_SIZE: self._limits.max_http2_frame_bytes,
            wire.MAX_HEADER_LIST_SIZE: self._limits.max_header_bytes,
            **(settings or {}),
        }
        more = self._limits.window_bytes - wire.DEFAULT_WINDOW
        self._write(extra + wire.settings(ours) + (wire.window_update(0, more) if more else b""))

    def _open_stream(self, stream_id: int) -> None:
        self._stream_id = self._last_stream_id = stream_id
        self._stream_window = self._peer_initial_window
        self._local_open = self._remote_open = True

    def _write(self, data: bytes) -> None:
        if not self._ending and self._transport is not None:
            self._transport.write(data)

    def _send_headers(self, headers: Headers, *, stream_id: int = 0, end_stream: bool = False) -> None:
        block = self._encoder.encode(headers, huffman=False)
        self._write(
            wire.header_block(
                stream_id or self._stream_id, block, self._peer_max_frame, end_stream=end_stream
            )
        )

    @property
    def _can_send(self) -> bool:
        """Whether a message would not only be queued behind another."""
        return (
            self._local_open
            and not self._unsent
            and self._paused_at is None
            and not self._ending
            and self._connection_window > 0
            and self._stream_window > 0
        )

    def _send_message(self, parts: list[bytes], size: int) -> None:
        """Send the message made of `parts`, `size` bytes in all. Only while `_can_send`."""
        total = size + PREFIX_BYTES
        prefix = b"\0" + size.to_bytes(4, "big")
        if (
            total <= self._peer_max_frame
            and total <= self._connection_window
            and total <= self._stream_window
        ):
            self._connection_window -= total
            self._stream_window -= total
            head = wire.frame_header(total, wire.DATA, 0, self._stream_id) + prefix
            self._write(b"".join((head, *parts)))
        else:
            self._unsent += prefix
            for part in parts:
                self._unsent += part
            self._pump()

    def _drain(self) -> None:
        self._pump()
        if self._can_send:
            self._on_writable()

    def _pump(self) -> None:
        unsent = self._unsent
        while unsent and self._paused_at is None and self._local_open and not self._ending:
            size = min(len(unsent), self._peer_max_frame, self._connection_window, self._stream_window)
            if size <= 0:
                return
            self._connection_window -= size
            self._stream_window -= size
            self._write(wire.frame(wire.DATA, 0, self._stream_id, bytes(memoryview(unsent)[:size])))
            del unsent[:size]

    # Ending

    def _fail(self, code: ErrorCode, reason: str) -> None:
        """Say what went wrong and close."""
        if self._ending:
            return
        if code is not ErrorCode.NO_ERROR:
            log.warning("frame connection ended with %s: %s", code.name, reason)
        self._write(wire.goaway(self._last_stream_id, code, reason))
        self._end(self.end_reason or f"connection closed: {reason}")

    def _end(self, reason: str) -> None:
        """Send nothing more; the socket follows when the peer has read, at the latest after `linger_s`.

        Closing at once would reset the connection where bytes of the peer are still unread, and the peer
        would lose the reason with it.
        """
        if self._ending:
            return
        self._ending = True
        self.end_reason = self.end_reason or reason
        self._local_open = self._remote_open = False
        self._unsent.clear()
        self._unparsed.clear()
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        self._linger = self._loop.call_later(self._limits.linger_s, transport.abort)
        self._hold_reading(False)
        if transport.can_write_eof():
            with contextlib.suppress(OSError, RuntimeError):
                transport.write_eof()
        else:
            transport.close()

    def abort(self) -> None:
        """Drop the socket now."""
        if self._transport is not None:
            self._transport.abort()

    # Dead peers

    def _watch(self) -> None:
        """Start asking whether the peer lives; called when something becomes owed."""
        if self._keepalive is None and not self._ending:
            self._heard_at = max(self._heard_at, self._loop.time())
            self._keepalive = self._loop.call_later(self._ping_after_s, self._check_alive)

    def _check_alive(self) -> None:
        self._keepalive = None
        if self._ending or not (self._busy() or self._paused_at is not None):
            return
        now = self._loop.time()
        patience = self._limits.ping_after_s + self._limits.ping_timeout_s
        if self._paused_at is not None and now >= self._paused_at + patience:
            self._end("connection lost: the peer does not read")
            self.abort()
            return
        if self._reading_held:  # it may well speak; nobody listens
            self._ping_sent_at = None
            silent_until = now + self._limits.ping_after_s
        elif self._ping_sent_at is not None:
            silent_until = self._ping_sent_at + self._limits.ping_timeout_s
            if now >= silent_until:
                self._end("connection lost: the peer is silent")
                self.abort()
                return
        else:
            silent_until = self._heard_at + self._ping_after_s
            if now >= silent_until:
                self._ping_sent_at = now
                self._write(wire.frame(wire.PING, 0, 0, b"headrace"))
                silent_until = now + self._limits.ping_timeout_s
        self._keepalive = self._loop.call_at(silent_until, self._check_alive)


def _keep_alive(sock: socket.socket | None, limits: Limits) -> None:
    """Let the kernel find dead peers of idle connections."""
    if sock is None or sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", limits.ping_after_s),
            ("TCP_KEEPINTVL", max(limits.ping_timeout_s / 3, 1)),
            ("TCP_KEEPCNT", 3),
        ):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(int(value), 1))
