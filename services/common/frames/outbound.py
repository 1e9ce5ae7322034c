"""The lower half of a connection: its socket, what is sent and how much may be, its end, and whether the peer
still lives.

Messages go out through `_send_message` while `can_send`; what the windows or the socket do not take at once
waits in `_unsent`, which holds one message at most, and `_on_writable` says when more may follow.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Collection
from typing import Final, cast

from hpack import Encoder

from services.common.frames import wire
from services.common.frames.detached import LARGE_BYTES, Buffer
from services.common.frames.limits import Limits
from services.common.frames.messages import PREFIX_BYTES
from services.common.frames.turn import turn_of
from services.common.frames.wire import ErrorCode

log = logging.getLogger(__name__)

Headers = list[tuple[str, str]]
#: More parts than these are small ones, and cost less when they are joined.
_MOST_PARTS: Final = 16
#: What a local socket takes at once, so that an image does not go over in many steps.
_SOCKET_BYTES: Final = 1 << 20
#: A timer that comes later than this was held up by our own loop, seconds.
_STALLED_S: Final = 0.5


class Outbound(asyncio.Protocol):
    """The socket of one connection and its one stream, as far as sending and ending go."""

    def __init__(self, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        self._limits = limits
        self._loop = loop
        self._turn = turn_of(loop)
        self._transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[str] = loop.create_future()  # done with the reason when the socket is gone
        self.end_reason = ""  # why it ends, where that is known before the socket is gone
        self._encoder = Encoder()

        self._stream_id = 0  # the one stream; 0 before it opens
        self._last_stream_id = 0
        self._local_open = False  # we may still send on it
        self._remote_open = False  # the peer may still send on it
        self._stream_over = False  # we ended it; what the peer still sends on it is dropped

        self._peer_initial_window = wire.DEFAULT_WINDOW
        self._peer_max_frame = wire.DEFAULT_MAX_FRAME
        self._connection_window = wire.DEFAULT_WINDOW  # what we may still send
        self._stream_window = wire.DEFAULT_WINDOW
        self._unsent = bytearray()
        self._paused_at: float | None = None  # since when the socket takes nothing more
        self._owed_answers = 0  # acknowledgements written meanwhile
        self._reading_held = False

        self._ending = False  # nothing is read or sent any more
        self._heard_at = loop.time()
        self._ping_sent_at: float | None = None
        self._ping_after_s = limits.ping_after_s
        self._keepalive: asyncio.TimerHandle | None = None
        self._look_at = 0.0  # when that timer is due
        self._left_unread = 0  # bytes that the socket had not taken when it was looked at last
        self._linger: asyncio.TimerHandle | None = None

    # What subclasses fill in; what raises here has no meaning without them.

    def _on_open(self) -> None:
        """The socket (and TLS) is up."""

    def _on_writable(self) -> None:
        """`can_send` became true."""

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
        take_large_writes(transport.get_extra_info("socket"))
        keep_alive(transport.get_extra_info("socket"), self._limits.idle_s, self._limits.idle_s)
        self._on_open()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._keepalive, self._linger):
            if timer is not None:
                timer.cancel()
        self._keepalive = self._linger = None
        self._ending = True
        self._local_open = self._remote_open = False
        self._unsent.clear()
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
    def can_send(self) -> bool:
        """Whether a message would not only be queued behind another."""
        return (
            self._local_open
            and not self._unsent
            and self._paused_at is None
            and not self._ending
            and self._connection_window > 0
            and self._stream_window > 0
        )

    @property
    def silent(self) -> bool:
        """Whether the peer was asked if it lives, and has said nothing since."""
        return self._ping_sent_at is not None

    def _send_message(self, parts: Collection[Buffer], size: int) -> None:
        """Send the message made of `parts`, `size` bytes in all. Only while `can_send`."""
        total = size + PREFIX_BYTES
        if total > self._connection_window or total > self._stream_window:
            self._unsent += b"\0" + size.to_bytes(4, "big")
            for part in parts:
                self._unsent += part
            self._pump()
            return
        self._connection_window -= total
        self._stream_window -= total
        if self._transport is None:
            return
        if total > self._peer_max_frame or (total >= LARGE_BYTES and len(parts) <= _MOST_PARTS):
            self._transport.writelines(self._in_frames((b"\0" + size.to_bytes(4, "big"), *parts), total))
        else:
            head = wire.MESSAGE_HEAD.pack(total >> 8, total & 255, wire.DATA, 0, self._stream_id, 0, size)
            self._transport.write(b"".join((head, *parts)))

    def _in_frames(self, parts: tuple[Buffer, ...], left: int) -> list[Buffer]:
        """DATA frames that hold `parts`, `left` bytes in all, which are not copied."""
        pieces: list[Buffer] = []
        room = 0
        for part in parts:
            at, end = 0, len(part)
            while at < end:
                if not room:
                    room = min(left, self._peer_max_frame)
                    left -= room
                    pieces.append(wire.frame_header(room, wire.DATA, 0, self._stream_id))
                taken = min(end - at, room)
                pieces.append(part if taken == end else memoryview(part)[at : at + taken])
                at += taken
                room -= taken
        return pieces

    def _drain(self) -> None:
        self._pump()
        if self.can_send:
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
            self._look_again(self._loop.time() + self._ping_after_s)

    def _look_again(self, when: float) -> None:
        self._look_at = when
        self._keepalive = self._loop.call_at(when, self._check_alive)

    def _check_alive(self) -> None:
        self._keepalive = None
        if self._ending or not (self._busy() or self._paused_at is not None):
            return
        now = self._loop.time()
        self._forgive(now)
        if self._paused_at is not None and now >= self._paused_at + self._limits.unread_s:
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
        self._look_again(silent_until)

    def _forgive(self, now: float) -> None:
        """Take no silence for the peer's that is ours, or the way's."""
        if now > self._look_at + _STALLED_S:
            # Our own loop stood still, and timers may come before what has arrived meanwhile.
            self._heard_at = now
            self._ping_sent_at = None
            if self._paused_at is not None:
                self._paused_at = now
        if self._paused_at is None or self._transport is None:
            self._left_unread = 0
            return
        left = self._transport.get_write_buffer_size()
        if left < self._left_unread:  # it reads; our question waits behind what it has not come to yet
            self._heard_at = now
            self._ping_sent_at = None
        self._left_unread = left


def take_large_writes(sock: socket.socket | None) -> None:
    """Give a socket of this machine a longer queue; those of networks find theirs by themselves."""
    if sock is not None and sock.family == socket.AF_UNIX:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)


def keep_alive(sock: socket.socket | None, after_s: float, timeout_s: float) -> None:
    """Let the kernel find dead peers of idle connections: it asks after `after_s` of silence, and gives up
    `timeout_s` later."""
    if sock is None or sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (
            ("TCP_KEEPIDLE", after_s),
            ("TCP_KEEPINTVL", max(timeout_s / 3, 1)),
            ("TCP_KEEPCNT", 3),
        ):
            if hasattr(socket, name):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(int(value), 1))
