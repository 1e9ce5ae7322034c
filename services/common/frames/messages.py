"""gRPC messages on the stream, and the coalescing of serialized items into one protobuf frame.

Both frame messages keep their items in field 2, so a frame is the concatenation of `field 2, length, item`
for every item: joining bytes that were serialized once costs half of what building the frame message does.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from headrace.v1.dataplane_pb2 import UnopenedFrame

from services.common.frames.in_place import IN_PLACE_BYTES, MOST_IN_PLACE, unwritten
from services.common.frames.wire import ErrorCode, Violation

#: The stream, and the version of what is said on it.
PATH: Final = "/headrace.v1.DataPlane/Frames"
PROTOCOL: Final = 1

PREFIX_BYTES: Final = 5

#: Tag of `items` in RequestFrame and ReplyFrame (field 2, length-delimited).
_ITEMS_TAG: Final = b"\x12"
#: Tag of `timeout_us` in PredictRequest (field 7, varint).
_TIMEOUT_TAG: Final = 0x38
_TIMEOUT_MAX: Final = (1 << 35) - 1
#: Of a message that comes in pieces.
_LONG_PIECE: Final = 4096


class Oversize(Exception):
    """A message longer than the limit was announced."""


class CompressedMessage(Exception):
    """A message says that it is compressed; no compression was agreed."""


def varint(number: int) -> bytes:
    """`number`, not negative."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


@lru_cache(maxsize=4096)
def item_header(length: int) -> bytes:
    """What precedes a serialized item of `length` bytes in a frame."""
    return _ITEMS_TAG + varint(length)


def item_payloads(frame: bytes) -> list[bytes]:
    """The serialized items of a RequestFrame or ReplyFrame, in order."""
    return UnopenedFrame.FromString(frame).items[:]  # a slice is five times as fast as going through


#: The tag of `id` in PredictRequest and PredictReply (field 1, varint), and the lowest seven bits of an id.
ID_BEGINS: Final = tuple(bytes((0x08, bits | 128)) for bits in range(128))
#: What, appended to a serialized PredictRequest, takes its `timeout_us` away.
NO_TIMEOUT: Final = bytes((_TIMEOUT_TAG, 0))


@lru_cache(maxsize=1024)
def id_end(high: int) -> bytes:
    """What follows `ID_BEGINS[id & 127]`, for `high` = id >> 7: the same for 128 ids in a row."""
    return varint(high)


@lru_cache(maxsize=4096)
def timeout_override(timeout_us: int) -> bytes:
    """Bytes that, appended to a serialized PredictRequest, replace its `timeout_us`.

    In protobuf the last value of a scalar field counts. Fixed five-byte varint, up to nine hours.
    """
    us = min(max(timeout_us, 1), _TIMEOUT_MAX)
    return bytes(
        (
            _TIMEOUT_TAG,
            us & 127 | 128,
            us >> 7 & 127 | 128,
            us >> 14 & 127 | 128,
            us >> 21 & 127 | 128,
            us >> 28,
        )
    )


class MessageReader:
    """Cuts the DATA payloads of one stream into gRPC messages, however they are split or packed."""

    __slots__ = ("_max_bytes", "_missing", "_partial", "_pieces", "_room", "_whole")

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._partial = bytearray()  # of a prefix
        self._pieces: list[bytearray | memoryview] = []  # of a message whose prefix is complete,
        self._missing = 0  # and how much of it is still to come
        self._whole = b""  # a long one, in place of its pieces,
        self._room: memoryview | None = None  # and what fills it

    @property
    def mid_message(self) -> bool:
        """Whether a message was begun and is not complete."""
        return bool(self._partial or self._missing)

    def room(self, most: int) -> memoryview | None:
        """Where the next bytes of a long message belong, `most` at most; None where none is being read."""
        room = self._room
        if room is None:
            return None
        at = len(self._whole) - self._missing
        return room[at : at + min(self._missing, most)]

    def filled(self, size: int) -> bytes | None:
        """`size` bytes of that room came: the message, where it is complete now."""
        self._missing -= size
        return self._complete() if not self._missing else None

    def feed(self, data: bytes | bytearray, start: int, end: int) -> list[bytes]:
        """The messages completed by `data[start:end]`. Raises Oversize or CompressedMessage."""
        messages: list[bytes] = []
        if self._missing:
            if end - start < self._missing:
                self._keep(data, start, end)
                return messages
            stop = start + self._missing
            self._keep(data, start, stop)
            messages.append(self._complete())
            start = stop
        partial = self._partial
        if partial:
            partial += memoryview(data)[start:end]
            data, start, end = bytes(partial), 0, len(partial)
            partial.clear()
        while end - start >= PREFIX_BYTES:
            size = int.from_bytes(data[start + 1 : start + 5], "big")
            if data[start] > 1:
                raise Violation(ErrorCode.PROTOCOL_ERROR, "message prefix is not gRPC's")
            if data[start]:
                raise CompressedMessage
            if size > self._max_bytes:
                raise Oversize
            start += PREFIX_BYTES
            stop = start + size
            if stop > end:
                self._missing = size
                if stop - end >= IN_PLACE_BYTES and size <= MOST_IN_PLACE:
                    self._whole, self._room = unwritten(size)
                self._keep(data, start, end)
                return messages
            messages.append(bytes(memoryview(data)[start:stop]))
            start = stop
        if start < end:
            partial += memoryview(data)[start:end]
        return messages

    def _keep(self, data: bytes | bytearray, start: int, end: int) -> None:
        """Part of a message that is not complete. Long pieces are copied once, when all are joined; short
        ones now, since a peer that sends bytes one by one must not make an object of each."""
        if start == end:
            return
        piece = memoryview(data)[start:end]
        if self._room is not None:
            at = len(self._whole) - self._missing
            self._room[at : at + end - start] = piece
            self._missing -= end - start
            return
        self._missing -= end - start
        if isinstance(data, bytes) and end - start >= _LONG_PIECE:
            self._pieces.append(piece)
            return
        last = self._pieces[-1] if self._pieces else None
        if isinstance(last, bytearray):
            last += piece
        else:
            self._pieces.append(bytearray(piece))

    def _complete(self) -> bytes:
        if self._room is not None:
            message = self._whole
            self._whole, self._room = b"", None
        else:
            message = b"".join(self._pieces)
            self._pieces = []
        return message
