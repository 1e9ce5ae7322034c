"""What is said about a connection and its streams beside their content: windows, resets, settings, pings; and
its end in good order."""

from __future__ import annotations

import asyncio
from typing import Final

from services.common.frames import wire
from services.common.frames.wire import ErrorCode, Violation
from services.gateway.rpc.sending import Around, Sending
from services.gateway.rpc.statuses import GOING_AWAY

_ALL_STREAMS: Final = wire.MAX_WINDOW
_DRAIN_PING: Final = b"draining"
#: Control frames that a good client may send for every answer.
_PER_ANSWER: Final = 8
#: To change the windows of so many streams counts as one more of them.
_STREAMS_PER_FRAME: Final = 4


class Controlled(Sending):
    """Takes control frames. Those that bring nothing forward are counted from one round of the sweep to the
    next, and may be the more the more calls are answered meanwhile."""

    def __init__(self, around: Around, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(around, loop)
        self._settings_seen = False
        self._last_taken = _ALL_STREAMS  # streams beyond are not taken any more
        self._drain_timer: asyncio.TimerHandle | None = None
        self._control_frames = 0
        self._resets = 0

    def connection_lost(self, exc: Exception | None) -> None:
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        super().connection_lost(exc)

    def _count_control(self) -> None:
        self._control_frames += 1
        if self._control_frames > self._limits.max_control_frames + _PER_ANSWER * self._answered:
            raise Violation(ErrorCode.ENHANCE_YOUR_CALM, "too many control frames")

    def _control(self, kind: int, flags: int, stream_id: int, payload: bytes) -> None:
        """A frame that neither opens a stream nor carries its content."""
        self._count_control()
        if kind == wire.WINDOW_UPDATE:
            self._take_window(stream_id, payload)
        elif kind == wire.RST_STREAM:
            self._take_reset(stream_id, payload)
        elif kind == wire.SETTINGS:
            self._take_settings(flags, stream_id, payload)
        elif kind == wire.PING:
            self._take_ping(flags, stream_id, payload)
        elif kind == wire.GOAWAY:
            if stream_id:
                raise Violation(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
            if len(payload) < 8:
                raise Violation(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY shorter than 8 bytes")
        elif kind == wire.PUSH_PROMISE:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE is for servers")
        elif kind == wire.PRIORITY:
            wire.check_priority(stream_id, payload)

    def _take_window(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Violation(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE is not 4 bytes")
        increment = int.from_bytes(payload, "big") & wire.MAX_WINDOW
        if stream_id:
            if stream_id > self._last_stream_id:
                raise Violation(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE on a stream that is not open")
            stream = self._streams.get(stream_id)
            if stream is None:
                return
            stream.window += increment
            if not increment or stream.window > wire.MAX_WINDOW:
                code = ErrorCode.FLOW_CONTROL_ERROR if increment else ErrorCode.PROTOCOL_ERROR
                self._queue(wire.reset(stream_id, code))
                self._lose(stream)
                return
            if stream not in self._blocked or stream.window <= 0:
                return
            del self._blocked[stream]
            self._sending[stream] = None
        else:
            self._window += increment
            if not increment:
                raise Violation(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
            if self._window > wire.MAX_WINDOW:
                raise Violation(ErrorCode.FLOW_CONTROL_ERROR, "the window grew beyond 2^31-1")
        if self._sending:
            self._pump()

    def _take_reset(self, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Violation(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM is not 4 bytes")
        if not stream_id or stream_id > self._last_stream_id:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "RST_STREAM on a stream that is not open")
        self._resets += 1
        if self._resets > self._limits.max_resets + self._answered:
            raise Violation(ErrorCode.ENHANCE_YOUR_CALM, "too many resets")
        stream = self._streams.get(stream_id)
        if stream is not None:
            self._lose(stream)

    def _take_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & wire.ACK:
            if payload:
                raise Violation(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS acknowledgement with a payload")
            return
        self._settings_seen = True
        window = self._peer_initial_window
        for key, value in wire.parse_settings(payload):
            if key == wire.INITIAL_WINDOW_SIZE:
                window = value
            elif key == wire.MAX_FRAME_SIZE:
                self._peer_max_frame = value
        if window != self._peer_initial_window:
            self._change_windows(window)
        self._queue(wire.frame(wire.SETTINGS, wire.ACK, 0))
        if self._sending:
            self._pump()

    def _change_windows(self, initial: int) -> None:
        """Once for a frame, however often it says so; and counted by the streams that are to be changed."""
        self._control_frames += len(self._streams) // _STREAMS_PER_FRAME
        change, self._peer_initial_window = initial - self._peer_initial_window, initial
        for stream in self._streams.values():
            stream.window += change
            if stream.window > wire.MAX_WINDOW:
                raise Violation(ErrorCode.FLOW_CONTROL_ERROR, "a window grew beyond 2^31-1")
        self._sending.update(self._blocked)
        self._blocked.clear()

    def _take_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise Violation(ErrorCode.FRAME_SIZE_ERROR, "PING is not 8 bytes")
        if not flags & wire.ACK:
            self._queue(wire.frame(wire.PING, wire.ACK, 0, payload))
        elif payload == _DRAIN_PING:
            self._stop_taking()

    # Ending

    def drain(self) -> None:
        """Ask the client to go elsewhere with new calls; what is open is answered."""
        if self._ending or self._draining:
            return
        self._draining = True
        self._queue(
            wire.goaway(_ALL_STREAMS, ErrorCode.NO_ERROR, "draining"),
            wire.frame(wire.PING, 0, 0, _DRAIN_PING),
        )
        # Calls that crossed the news are taken: until it was read, which the PING's answer tells.
        self._drain_timer = self._loop.call_later(self._limits.drain_notice_s, self._stop_taking)

    def shut(self) -> None:
        """End now, whatever is open."""
        for stream in list(self._streams.values()):
            self.refuse(stream, GOING_AWAY)
            stream.gone = True
            stream.on_gone()
        self._fail(ErrorCode.NO_ERROR, "the server is going away")

    def _stop_taking(self) -> None:
        if self._ending or self._last_taken != _ALL_STREAMS:
            return
        self._last_taken = self._last_stream_id
        if self._drain_timer is not None:
            self._drain_timer.cancel()
        self._queue(wire.goaway(self._last_stream_id, ErrorCode.NO_ERROR, "draining"))
        for stream in list(self._streams.values()):
            stream.drain()
        if not self._streams:
            self._on_idle()

    def _on_idle(self) -> None:
        if self._last_taken != _ALL_STREAMS:
            self._out_now()
            self._end()
