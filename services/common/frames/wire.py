"""HTTP/2 frames as bytes (RFC 9113): constants, writers, and the checks that need no connection state."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_BYTES: Final = 9
#: What a DATA frame that holds one whole gRPC message begins with: the frame's length in two parts, kind,
#: flags, stream; then whether the message is compressed, and its length.
MESSAGE_HEAD: Final = struct.Struct(">HBBBIBI")
MAX_WINDOW: Final = (1 << 31) - 1
DEFAULT_WINDOW: Final = 65_535
DEFAULT_MAX_FRAME: Final = 16_384

DATA: Final = 0
HEADERS: Final = 1
PRIORITY: Final = 2
RST_STREAM: Final = 3
SETTINGS: Final = 4
PUSH_PROMISE: Final = 5
PING: Final = 6
GOAWAY: Final = 7
WINDOW_UPDATE: Final = 8
CONTINUATION: Final = 9

END_STREAM: Final = 0x1
ACK: Final = 0x1
END_HEADERS: Final = 0x4
PADDED: Final = 0x8
PRIORITY_FLAG: Final = 0x20

HEADER_TABLE_SIZE: Final = 1
ENABLE_PUSH: Final = 2
MAX_CONCURRENT_STREAMS: Final = 3
INITIAL_WINDOW_SIZE: Final = 4
MAX_FRAME_SIZE: Final = 5
MAX_HEADER_LIST_SIZE: Final = 6


class ErrorCode(IntEnum):
    """Reasons in RST_STREAM and GOAWAY (RFC 9113, section 7)."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    CONNECT_ERROR = 10
    ENHANCE_YOUR_CALM = 11


class Violation(Exception):
    """The peer broke the protocol; the connection ends with GOAWAY carrying `code`."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def frame(kind: int, flags: int, stream_id: int, payload: bytes = b"") -> bytes:
    """One whole frame."""
    return frame_header(len(payload), kind, flags, stream_id) + payload


def frame_header(length: int, kind: int, flags: int, stream_id: int) -> bytes:
    """The nine bytes before a payload of `length` bytes."""
    return length.to_bytes(3, "big") + bytes((kind, flags)) + stream_id.to_bytes(4, "big")


def settings(values: dict[int, int]) -> bytes:
    """A SETTINGS frame."""
    body = b"".join(key.to_bytes(2, "big") + value.to_bytes(4, "big") for key, value in values.items())
    return frame(SETTINGS, 0, 0, body)


def goaway(last_stream_id: int, code: int, reason: str) -> bytes:
    """A GOAWAY frame with `reason` as its debug data."""
    body = last_stream_id.to_bytes(4, "big") + int(code).to_bytes(4, "big") + reason.encode()[:256]
    return frame(GOAWAY, 0, 0, body)


def reset(stream_id: int, code: int) -> bytes:
    """An RST_STREAM frame."""
    return frame(RST_STREAM, 0, stream_id, int(code).to_bytes(4, "big"))


def window_update(stream_id: int, increment: int) -> bytes:
    """A WINDOW_UPDATE frame; stream 0 is the connection."""
    return frame(WINDOW_UPDATE, 0, stream_id, increment.to_bytes(4, "big"))


def header_block(stream_id: int, block: bytes, max_frame: int, *, end_stream: bool) -> bytes:
    """HEADERS and as many CONTINUATION frames as `max_frame` makes necessary."""
    flags = END_STREAM if end_stream else 0
    first, rest = block[:max_frame], block[max_frame:]
    parts = [frame(HEADERS, flags | (0 if rest else END_HEADERS), stream_id, first)]
    while rest:
        piece, rest = rest[:max_frame], rest[max_frame:]
        parts.append(frame(CONTINUATION, 0 if rest else END_HEADERS, stream_id, piece))
    return b"".join(parts)


def parse_settings(payload: bytes) -> list[tuple[int, int]]:
    """The pairs of a SETTINGS payload, each checked against its range."""
    if len(payload) % 6:
        raise Violation(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS length is no multiple of 6")
    pairs = []
    for at in range(0, len(payload), 6):
        key = int.from_bytes(payload[at : at + 2], "big")
        value = int.from_bytes(payload[at + 2 : at + 6], "big")
        if key == INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            raise Violation(ErrorCode.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE above 2^31-1")
        if key == MAX_FRAME_SIZE and not DEFAULT_MAX_FRAME <= value < 1 << 24:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "MAX_FRAME_SIZE out of range")
        if key == ENABLE_PUSH and value > 1:
            raise Violation(ErrorCode.PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")
        pairs.append((key, value))
    return pairs


def without_padding(data: bytes | bytearray, start: int, end: int) -> tuple[int, int]:
    """Where the content of a padded frame's payload `data[start:end]` starts and ends."""
    if start == end:
        raise Violation(ErrorCode.FRAME_SIZE_ERROR, "padded frame without pad length")
    pad = data[start]
    if pad > end - start - 1:
        raise Violation(ErrorCode.PROTOCOL_ERROR, "padding longer than the frame")
    return start + 1, end - pad


def header_fragment(payload: bytes, flags: int) -> bytes:
    """The header block fragment in the payload of a HEADERS frame."""
    start, end = 0, len(payload)
    if flags & PADDED:
        start, end = without_padding(payload, start, end)
    if flags & PRIORITY_FLAG:
        start += 5
        if start > end:
            raise Violation(ErrorCode.FRAME_SIZE_ERROR, "frame shorter than its priority fields")
    return payload[start:end]


def check_priority(stream_id: int, payload: bytes) -> None:
    """PRIORITY says nothing that is used, but must be well formed."""
    if not stream_id:
        raise Violation(ErrorCode.PROTOCOL_ERROR, "PRIORITY without a stream")
    if len(payload) != 5:
        raise Violation(ErrorCode.FRAME_SIZE_ERROR, "PRIORITY is not 5 bytes")
