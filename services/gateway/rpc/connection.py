"""One client's connection: bytes are cut into HTTP/2 frames, checked, and handed to their streams.

Whatever the client does wrong ends here as a reset of the stream or GOAWAY with the right code on this
connection. No exception leaves a callback of the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Mapping
from typing import Final, Protocol

from services.common.frames import wire
from services.common.frames.header_blocks import BlockReader
from services.common.frames.wire import ErrorCode, Violation
from services.gateway.predict import PredictService
from services.gateway.rpc.control import Controlled
from services.gateway.rpc.exchange import InferExchange
from services.gateway.rpc.heads import CallHead, read_head
from services.gateway.rpc.infer_stream import InferStream, InferStreams
from services.gateway.rpc.methods import Method
from services.gateway.rpc.sending import Around
from services.gateway.rpc.statuses import HEAD
from services.gateway.rpc.streams import Stream
from services.gateway.rpc.tasks import TaskCall, Tasks

log = logging.getLogger(__name__)

_FRAME: Final = struct.Struct(">HBBBI")
_STREAM_BITS: Final = wire.MAX_WINDOW
#: Heads that a connection remembers, and the longest block it remembers one by.
_REMEMBERED: Final = 16
_MAX_REMEMBERED_BYTES: Final = 1024
#: A DATA frame of this length is not waited for: what came of it is taken.
_LONG_FRAME: Final = 4096


class Acceptor(Around, Protocol):
    """The server a connection belongs to."""

    service: PredictService
    hot_path: bytes
    stream_path: bytes
    methods: Mapping[bytes, Method]
    tasks: Tasks
    streams: InferStreams

    def admit(self, connection: RpcConnection) -> bool:
        """Count a new connection; False where there are too many already."""
        ...

    def forget(self, connection: RpcConnection) -> None:
        """A connection is gone."""
        ...


class RpcConnection(Controlled):
    """One accepted connection."""

    def __init__(self, server: Acceptor, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(server, loop)
        self._server = server
        self._preface = wire.PREFACE
        self._rest = b""
        self._reader = BlockReader(self._limits.max_header_bytes)
        self._known: dict[bytes, CallHead] = {}
        self._known_for = 0
        self._block_stream = 0  # stream whose header block is incomplete
        self._block_ends_stream = False
        self._block = bytearray()
        # Of a DATA frame that has begun: what is still to come, and where it belongs.
        self._data_left = 0
        self._data_stream = self._data_flags = 0
        self._received = 0  # not yet granted again
        self._opened: list[Stream] = []  # in this turn, and not complete with it
        # Counted by the sweep.
        self._ticks = 0
        self._silent_ticks = 0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        limits = self._limits
        ours = {
            wire.MAX_CONCURRENT_STREAMS: limits.max_streams,
            wire.INITIAL_WINDOW_SIZE: limits.stream_window_bytes,
            wire.MAX_FRAME_SIZE: limits.max_frame_bytes,
            wire.MAX_HEADER_LIST_SIZE: limits.max_header_bytes,
        }
        more = limits.window_bytes - wire.DEFAULT_WINDOW
        self._out.append(wire.settings(ours) + (wire.window_update(0, more) if more > 0 else b""))
        self._out_now()
        if not self._server.admit(self):
            self._fail(ErrorCode.ENHANCE_YOUR_CALM, "too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._ending:
            return
        self._silent_ticks = 0
        if self._rest:
            data = self._rest + data
        try:
            if self._preface:
                data = self._take_preface(data)
            used = self._parse(data)
            self._rest = data[used:] if used < len(data) else b""
            if self._opened:
                self._look_at_opened()
            if self._received * 4 >= self._limits.window_bytes:
                self._queue(wire.window_update(0, self._received))
                self._received = 0
        except Violation as violation:
            self._fail(violation.code, violation.reason)
        except Exception:
            log.exception("gRPC connection failed")
            self._fail(ErrorCode.INTERNAL_ERROR, "internal error")

    def _take_preface(self, data: bytes) -> bytes:
        count = min(len(self._preface), len(data))
        if data[:count] != self._preface[:count]:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "not an HTTP/2 preface")
        self._preface = self._preface[count:]
        return data[count:]

    def _look_at_opened(self) -> None:
        """Calls whose message did not come with their head: some are refused before it does."""
        opened, self._opened = self._opened, []
        for stream in opened:
            if not stream.complete and not stream.over and not stream.gone:
                stream.on_opened()

    # Reading

    def _parse(self, data: bytes) -> int:
        """Handle what `data` has of whole frames, and of a long one; returns how many bytes that were."""
        at, size = 0, len(data)
        largest = self._limits.max_frame_bytes
        if self._data_left:
            at = self._data_goes_on(data)
        while size - at >= wire.HEADER_BYTES and not self._ending:
            high, low, kind, flags, stream_id = _FRAME.unpack_from(data, at)
            length = high << 8 | low
            if length > largest:
                raise Violation(ErrorCode.FRAME_SIZE_ERROR, "frame larger than MAX_FRAME_SIZE")
            start = at + wire.HEADER_BYTES
            end = start + length
            stream_id &= _STREAM_BITS
            if not self._settings_seen and (kind != wire.SETTINGS or flags & wire.ACK):
                raise Violation(ErrorCode.PROTOCOL_ERROR, "the first frame is not SETTINGS")
            if self._block_stream and (kind != wire.CONTINUATION or stream_id != self._block_stream):
                raise Violation(ErrorCode.PROTOCOL_ERROR, "a header block was interrupted")
            if end > size:
                if kind == wire.DATA and length >= _LONG_FRAME and size > start and not flags & wire.PADDED:
                    self._data_stream, self._data_flags, self._data_left = stream_id, flags, end - size
                    self._data(stream_id, flags & ~wire.END_STREAM, data, start, size)
                    return size
                break
            at = end
            if kind == wire.DATA:
                self._data(stream_id, flags, data, start, end)
            elif kind == wire.HEADERS:
                self._headers(stream_id, flags, data[start:end])
            elif kind == wire.CONTINUATION:
                self._continue(flags, data[start:end])
            else:
                self._control(kind, flags, stream_id, data[start:end])
        return at

    def _data_goes_on(self, data: bytes) -> int:
        """More of the long DATA frame that has begun; returns how many bytes of `data` are its own."""
        count = min(self._data_left, len(data))
        self._data_left -= count
        flags = self._data_flags & ~wire.END_STREAM if self._data_left else self._data_flags
        self._data(self._data_stream, flags, data, 0, count)
        return count

    def _data(self, stream_id: int, flags: int, data: bytes, start: int, end: int) -> None:
        length = end - start
        self._received += length
        if self._received > self._limits.window_bytes:
            raise Violation(ErrorCode.FLOW_CONTROL_ERROR, "more data than the window granted")
        if flags & wire.PADDED:
            start, end = wire.without_padding(data, start, end)
        stream = self._streams.get(stream_id)
        if stream is None or stream.over:
            if not stream_id or stream_id > self._last_stream_id:
                raise Violation(ErrorCode.PROTOCOL_ERROR, "DATA on a stream that is not open")
            self._count_control()  # still under way when its stream ended
            return
        if stream.complete:
            raise Violation(ErrorCode.STREAM_CLOSED, "DATA after the end of the stream")
        stream.received += length
        if stream.received > self._limits.stream_window_bytes:
            raise Violation(ErrorCode.FLOW_CONTROL_ERROR, "more data than the stream's window granted")
        if start < end:
            stream.take(data, start, end)
        if flags & wire.END_STREAM:
            stream.complete = True
            if not stream.over:
                stream.end()
        elif start == end:
            self._count_control()
        elif stream.received * 4 >= self._limits.stream_window_bytes and not stream.over:
            self._grant(stream)

    def _grant(self, stream: Stream) -> None:
        if isinstance(stream, InferStream) and stream.full:
            return  # what it has comes first
        self._queue(wire.window_update(stream.stream_id, stream.received))
        stream.received = 0

    def read_on(self, stream: Stream) -> None:
        """It was full and is not any more."""
        if stream.received and not stream.complete and not stream.over:
            self._grant(stream)

    def _headers(self, stream_id: int, flags: int, payload: bytes) -> None:
        if not stream_id:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "HEADERS without a stream")
        if flags & (wire.PADDED | wire.PRIORITY_FLAG):
            payload = wire.header_fragment(payload, flags)
        if flags & wire.END_HEADERS:
            self._on_block(stream_id, payload, end_stream=bool(flags & wire.END_STREAM))
            return
        self._block_stream = stream_id
        self._block_ends_stream = bool(flags & wire.END_STREAM)
        self._continue(flags, payload)

    def _continue(self, flags: int, payload: bytes) -> None:
        if not self._block_stream:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        self._count_control()
        self._block += payload
        if len(self._block) > self._limits.max_header_bytes:
            raise Violation(ErrorCode.ENHANCE_YOUR_CALM, "header block too large")
        if flags & wire.END_HEADERS:
            stream_id, block = self._block_stream, bytes(self._block)
            self._block_stream = 0
            self._block.clear()
            self._on_block(stream_id, block, end_stream=self._block_ends_stream)

    def _on_block(self, stream_id: int, block: bytes, *, end_stream: bool) -> None:
        head = self._known.get(block)
        if head is None:
            head = self._read(block, is_request=stream_id > self._last_stream_id)
        if stream_id <= self._last_stream_id:
            self._on_client_trailers(stream_id, end_stream=end_stream)
            return
        if not stream_id & 1:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "stream id out of order")
        self._last_stream_id = stream_id
        if stream_id > self._last_taken:
            return  # its client has heard that it may send it elsewhere
        if len(self._streams) >= self._limits.max_streams:
            self._count_control()
            self._queue(wire.reset(stream_id, ErrorCode.REFUSED_STREAM))
            return
        hot = head.hot
        if hot is not None:
            stream: Stream = InferExchange(self._server.service, self, head, hot, stream_id)
        elif head.streamed is not None:
            server = self._server
            stream = InferStream(server.service, server.streams, self, head, head.streamed, stream_id)
        elif head.method is not None:
            stream = TaskCall(self._server.tasks, self, head, head.method, stream_id)
        else:
            self._refuse_head(stream_id, head, end_stream=end_stream)
            return
        stream.window = self._peer_initial_window
        self._streams[stream_id] = stream
        if end_stream:
            stream.complete = True
            stream.end()
        else:
            self._opened.append(stream)

    def _read(self, block: bytes, *, is_request: bool) -> CallHead:
        """What a block says that is not known. It is remembered for as long as it says the same."""
        reader = self._reader
        if len(block) > self._limits.max_header_bytes:
            raise Violation(ErrorCode.ENHANCE_YOUR_CALM, "header block too large")
        fields = reader.read(block)
        changed = reader.changes != self._known_for
        if changed:
            self._known.clear()
            self._known_for = reader.changes
        if not is_request:
            return CallHead()
        server = self._server
        head = read_head(fields, server.hot_path, server.stream_path, server.methods)
        if not changed and head.hot is not None and len(block) <= _MAX_REMEMBERED_BYTES:
            if len(self._known) >= _REMEMBERED:
                self._known.clear()
            self._known[block] = head
        return head

    def _refuse_head(self, stream_id: int, head: CallHead, *, end_stream: bool) -> None:
        self._count_control()
        if head.refused_http:
            self._refuse_http(stream_id, head.refusal)
        elif head.refusal:
            self._refuse_trailers(stream_id, head.refusal)
        else:
            self._queue(wire.reset(stream_id, ErrorCode.PROTOCOL_ERROR))
            return
        if not end_stream:
            self._queue(wire.reset(stream_id, ErrorCode.NO_ERROR))

    def _on_client_trailers(self, stream_id: int, *, end_stream: bool) -> None:
        stream = self._streams.get(stream_id)
        if stream is None or stream.over:
            self._count_control()
        elif stream.complete or not end_stream:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "headers in the middle of a stream")
        else:
            stream.complete = True
            stream.end()

    # Time

    def tick(self) -> None:
        """A second has passed."""
        if self._ending:
            return
        limits = self._limits
        self._control_frames = self._resets = self._answered = 0
        self._ticks += 1
        if not self._settings_seen and self._ticks > limits.handshake_s:
            self._fail(ErrorCode.SETTINGS_TIMEOUT, "no SETTINGS in time")
            return
        if self._paused or self._sending or self._blocked:
            self._unread_ticks += 1
            if self._unread_ticks > limits.unread_s:
                self._fail(ErrorCode.ENHANCE_YOUR_CALM, "answers are not read")
                self.abort()
                return
        for stream in list(self._streams.values()):
            if not stream.complete and not stream.over:
                self._tick_incomplete(stream)
        self._tick_silent()

    def _tick_incomplete(self, stream: Stream) -> None:
        if isinstance(stream, InferStream):
            stream.on_tick(self._limits.body_s)
            return
        stream.ticks += 1
        said = stream.call_head.timeout_s
        patience = self._limits.body_s
        if isinstance(stream, TaskCall) and stream.method.streams:
            return  # it has a deadline of its own, or goes on for as long as its client lives
        if stream.ticks > (min(said, patience) if said else patience):
            stream.late()

    def _tick_silent(self) -> None:
        limits = self._limits
        if not self._streams or self._paused:  # while it is not read, it may well speak
            self._silent_ticks = 0
            return
        self._silent_ticks += 1
        if self._silent_ticks == limits.ping_after_s:
            self._queue(wire.frame(wire.PING, 0, 0, b"headrace"))
        elif self._silent_ticks > limits.ping_after_s + limits.ping_timeout_s:
            self._end()
            self.abort()

    def _on_sent(self, stream: Stream) -> None:
        if isinstance(stream, (TaskCall, InferStream)):
            stream.on_sent()

    def _refuse_trailers(self, stream_id: int, trailers: bytes) -> None:
        self._queue(wire.header_block(stream_id, HEAD + trailers, self._peer_max_frame, end_stream=True))
