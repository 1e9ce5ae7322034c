"""How one event lies in a segment file.

    u32 length of what follows the checksum | u32 CRC-32 of it | u64 Unix milliseconds | u32 key length |
    u16 number of headers | per header: u16 name length, u32 value length, name, value | key | value

All little-endian. A record cut short or altered anywhere fails its length or its checksum.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from struct import Struct
from typing import Final, NamedTuple
from zlib import crc32

_ENVELOPE = Struct("<II")
_META = Struct("<QIH")
_HEADER = Struct("<HI")
_pack_meta: Final = _META.pack
_pack_envelope: Final = _ENVELOPE.pack
_ENVELOPE_SIZE: Final = 8
_SMALL: Final = 16 << 10

Headers = Sequence[tuple[str, bytes]]


class Event(NamedTuple):
    """One event, `size` being its bytes on disk. A tuple, since one is made for every append."""

    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    timestamp_ms: int
    size: int


#: Work cut into steps of some tens of microseconds; what it returns is its result.
Steps = Generator[None, None, list[Event]]


def frame(key: bytes, value: bytes, headers: Headers, timestamp_ms: int) -> tuple[list[bytes], int]:
    """The buffers to write one after another, and their total size in bytes. Nothing large is copied."""
    begin = _pack_meta(timestamp_ms, len(key), len(headers))
    if headers:
        names = [(name.encode(), content) for name, content in headers]
        begin += b"".join([_HEADER.pack(len(n), len(c)) + n + c for n, c in names])
    begin += key
    length = len(begin) + len(value)
    begin = _pack_envelope(length, crc32(value, crc32(begin))) + begin
    # A buffer more costs the system call more than to copy a little.
    buffers = [begin + value] if len(value) <= _SMALL else [begin, value]
    return buffers, _ENVELOPE_SIZE + length


def framed(
    key: bytes, values: Sequence[bytes], headers: tuple[tuple[str, bytes], ...], timestamp_ms: int
) -> tuple[list[bytes], list[Event], int]:
    """The buffers of several events, these, and the bytes of all of them."""
    buffers: list[bytes] = []
    events: list[Event] = []
    total = 0
    for value in values:
        parts, size = frame(key, value, headers, timestamp_ms)
        buffers += parts
        events.append(Event(key, value, headers, timestamp_ms, size))
        total += size
    return buffers, events, total


def frames(data: bytes) -> Iterator[Event]:
    """The whole events at the start of `data`, ending before the first that is cut short or damaged."""
    at = 0
    while at + _ENVELOPE.size <= len(data):
        length, checksum = _ENVELOPE.unpack_from(data, at)
        body = data[at + _ENVELOPE.size : at + _ENVELOPE.size + length]
        if length < _META.size or len(body) < length or crc32(body) != checksum:
            return
        yield _event(body)
        at += _ENVELOPE.size + length


def size_of_first(data: bytes) -> int:
    """Bytes that the event starting at `data` says it has; 0 when not even its length is there."""
    if len(data) < _ENVELOPE.size:
        return 0
    length: int = _ENVELOPE.unpack_from(data)[0]
    return _ENVELOPE.size + length


def _event(body: bytes) -> Event:
    timestamp_ms, key_length, count = _META.unpack_from(body)
    at = _META.size
    headers: list[tuple[str, bytes]] = []
    for _ in range(count):
        name_length, content_length = _HEADER.unpack_from(body, at)
        at += _HEADER.size
        name = body[at : at + name_length].decode()
        at += name_length
        headers.append((name, body[at : at + content_length]))
        at += content_length
    key = body[at : at + key_length]
    return Event(key, body[at + key_length :], tuple(headers), timestamp_ms, _ENVELOPE.size + len(body))
