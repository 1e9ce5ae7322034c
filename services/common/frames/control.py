"""What is said about a connection and its stream beside the messages: settings, windows, pings, headers, and
ends that came early."""

from __future__ import annotations

import asyncio
from typing import Final, cast

from hpack import Decoder
from hpack.exceptions import HPACKError

from services.common.frames import wire
from services.common.frames.limits import Limits
from services.common.frames.outbound import Headers, Outbound
from services.common.frames.wire import ErrorCode, Violation

_OUR_TABLE_SIZE: Final = 4096


class Controlled(Outbound):
    """Takes control frames; so many of them in a row, without a message in between, end the connection."""

    def __init__(self, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limits, loop)
        self._settings_seen = False
        self._headers_stream = 0  # stream whose header block is incomplete
        self._headers_end_stream = False
        self._header_block = bytearray()
        self._decoder = Decoder(max_header_list_size=limits.max_header_bytes)
        self._control_frames = 0

    # What subclasses fill in; what raises here has no meaning without them.

    def _on_headers(self, stream_id: int, headers: Headers, *, end_stream: bool) -> None:
        """A whole header block arrived."""
        raise NotImplementedError

    def _on_reset(self, code: int) -> None:
        """The peer ended the stream at once."""
        raise NotImplementedError

    def _on_goaway(self, last_stream_id: int, code: int, reason: str) -> None:
        """The peer takes no new streams, and none above `last_stream_id`."""

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
