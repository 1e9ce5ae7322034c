"""One HTTP/2 connection carrying one gRPC stream, read: the data path that client and server share.

Bytes come in through `data_received`, are cut into frames and checked; gRPC messages go to `_on_message`.
Whatever the peer does wrong ends here as GOAWAY with the right code on this connection. No exception leaves
a callback of the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from services.common.frames import wire
from services.common.frames.control import Controlled
from services.common.frames.detached import LARGE_BYTES
from services.common.frames.in_place import IN_PLACE_BYTES, InPlace
from services.common.frames.limits import Limits
from services.common.frames.messages import PREFIX_BYTES, CompressedMessage, MessageReader, Oversize
from services.common.frames.wire import ErrorCode, Violation

log = logging.getLogger(__name__)

_WHOLE: Final = wire.MESSAGE_HEAD


class Http2Connection(Controlled):
    """The state of one connection. Subclasses say what headers, messages and ends mean."""

    def __init__(self, limits: Limits, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(limits, loop)
        self._unparsed = bytearray()
        self._data_left = 0  # of a DATA frame that is read as it comes,
        self._data_flags = 0  # and its flags
        self._reader = MessageReader(limits.max_message_bytes)
        self._received = 0  # not yet granted again
        self._stream_received = 0
        self._grants_held = False  # no new windows: what the peer asked for is more than it takes
        self._in_place: InPlace | None = None
        self._whole_max = _WHOLE.size + min(limits.max_message_bytes, limits.max_http2_frame_bytes - 5)

    # What subclasses fill in; what raises here has no meaning without them.

    def _on_message(self, payload: bytes) -> None:
        """A whole gRPC message arrived."""
        raise NotImplementedError

    def _on_bad_message(self, error: Exception) -> None:
        """A gRPC message was announced that is too large or compressed."""
        raise NotImplementedError

    def _on_end_stream(self) -> None:
        """The peer sends nothing more on the stream."""
        raise NotImplementedError

    # asyncio.Protocol

    def data_received(self, data: bytes) -> None:
        if self._ending:
            return
        self._heard_at = self._loop.time()
        self._ping_sent_at = None
        turn = self._turn
        turn.reading = True
        try:
            if self._data_left:
                data = self._take_rest(data)
            if not data:
                pass
            elif self._unparsed:
                self._unparsed += data
                used = self._parse(self._unparsed)
                del self._unparsed[:used]
            elif not self._take_whole(data):
                used = self._parse(data)
                if used < len(data) and not self._ending:
                    self._unparsed += memoryview(data)[used:]
            if self._received * 4 >= self._limits.window_bytes:
                self._grant()
            if self._data_left >= IN_PLACE_BYTES:
                self._read_in_place()
        except Violation as violation:
            self._fail(violation.code, violation.reason)
        except Exception:
            log.exception("frame connection failed")
            self._fail(ErrorCode.INTERNAL_ERROR, "internal error")
        finally:
            turn.reading = False
        turn.end()

    # Long messages

    def _read_in_place(self) -> None:
        transport = self._transport
        if self._ending or transport is None or self.room() is None or not InPlace.fits(transport):
            return
        if self._in_place is None:
            self._in_place = InPlace(self, transport)
        self._in_place.begin()

    def room(self) -> memoryview | None:
        """Where the next bytes of a long message belong; None where none is being read."""
        return self._reader.room(self._data_left) if self._data_left else None

    def filled(self, size: int) -> None:
        """`size` bytes of it came."""
        if self._ending:
            return
        self._heard_at = self._loop.time()
        self._ping_sent_at = None
        turn = self._turn
        turn.reading = True
        try:
            self._data_left -= size
            if self._remote_open:  # else its stream ended while it came
                self._filled(size)
        except Violation as violation:
            self._fail(violation.code, violation.reason)
        except Exception:
            log.exception("frame connection failed")
            self._fail(ErrorCode.INTERNAL_ERROR, "internal error")
        finally:
            turn.reading = False
        turn.end()

    def _filled(self, size: int) -> None:
        message = self._reader.filled(size)
        if message is not None:
            self._control_frames = 0
            self._on_message(message)
        if not self._data_left and self._data_flags & wire.END_STREAM and not self._ending:
            self._end_remote()

    # Reading

    def _take_whole(self, data: bytes) -> bool:
        """Whether `data` was what it mostly is: one DATA frame that holds one message, and nothing else."""
        total = len(data)
        if not _WHOLE.size < total <= self._whole_max or not self._settings_seen:
            return False
        high, low, kind, flags, stream_id, compressed, size = _WHOLE.unpack_from(data)
        if (
            size != total - _WHOLE.size
            or high << 8 | low != size + PREFIX_BYTES
            or kind
            or flags
            or compressed
            or stream_id != self._stream_id
            or not self._remote_open
            or self._headers_stream
            or self._reader.mid_message
        ):
            return False
        self._received += size + PREFIX_BYTES
        self._stream_received += size + PREFIX_BYTES
        if self._received > self._limits.window_bytes:
            raise Violation(ErrorCode.FLOW_CONTROL_ERROR, "more data than the window granted")
        self._control_frames = 0
        self._on_message(data[_WHOLE.size :])
        return True

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
                if length >= LARGE_BYTES and self._begin_data(data, start, length):
                    at = size
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

    def _begin_data(self, data: bytes | bytearray, start: int, length: int) -> bool:
        """Whether the frame whose payload begins at `start`, and of which all of `data` behind that is part,
        is large and ordinary, and is now read as it comes instead of being kept until it is complete."""
        kind, flags = data[start - 6], data[start - 5]
        stream_id = int.from_bytes(data[start - 4 : start], "big") & wire.MAX_WINDOW
        if (
            kind != wire.DATA
            or flags & wire.PADDED
            or stream_id != self._stream_id
            or not self._remote_open
            or not self._settings_seen
            or self._headers_stream
        ):
            return False
        self._received += length
        self._stream_received += length
        if self._received > self._limits.window_bytes:
            raise Violation(ErrorCode.FLOW_CONTROL_ERROR, "more data than the window granted")
        size = len(data)
        self._data_left = length - (size - start)
        self._data_flags = flags
        if start < size:
            self._content(0, data, start, size)
        return True

    def _take_rest(self, data: bytes) -> bytes:
        """More of such a frame; returns what follows it."""
        size = len(data)
        taken = min(size, self._data_left)
        self._data_left -= taken
        if self._remote_open:  # else its stream ended while it came
            self._content(self._data_flags if not self._data_left else 0, data, 0, taken)
        return data[taken:] if taken < size else b""

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

    def _grant(self) -> None:
        """Give windows back in few, large steps."""
        if self._received * 4 < self._limits.window_bytes or self._grants_held or self._ending:
            return
        grants = wire.window_update(0, self._received)
        if self._remote_open and self._stream_received:
            grants += wire.window_update(self._stream_id, self._stream_received)
        self._received = self._stream_received = 0
        self._write(grants)
