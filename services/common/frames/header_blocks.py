"""Header blocks (HPACK, RFC 7541), for connections of many streams.

`hpack` decodes a block at 2 to 4 µs a field and does not say whether the block changed its table. Here a
field costs a sixth of that, and `BlockReader.changes` tells when what a block says may be remembered: as long
as the table is the same, the same bytes say the same. Huffman's code itself is `hpack`'s.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final
from urllib.parse import quote

from hpack.exceptions import HPACKError
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from services.common.frames.wire import ErrorCode, Violation

Field = tuple[bytes, bytes]

_STATIC: Final[tuple[Field, ...]] = tuple(HeaderTable.STATIC_TABLE)
_STATIC_COUNT: Final = len(_STATIC)
#: What an entry costs beyond its bytes (RFC 7541, section 4.1).
_ENTRY_BYTES: Final = 32
_MAX_INTEGER: Final = 1 << 24
_REMEMBERED_STRING_BYTES: Final = 256
#: What gRPC leaves as it is in grpc-message: printable ASCII but the percent sign.
_PLAIN: Final = " !\"#$&'()*+,-./:;<=>?@[]^_`{|}~\\"


class BlockReader:
    """Decodes the header blocks of one connection, in their order. Strings are bytes."""

    __slots__ = ("_entries", "_max_list_bytes", "_max_table_bytes", "_size", "_table_bytes", "changes")

    def __init__(self, max_list_bytes: int, table_bytes: int = 4096) -> None:
        """`table_bytes`: the SETTINGS_HEADER_TABLE_SIZE that was told to the peer."""
        self._max_list_bytes = max_list_bytes
        self._max_table_bytes = self._table_bytes = table_bytes
        self._entries: list[Field] = []  # the oldest first
        self._size = 0
        #: Grows with every change of the table.
        self.changes = 0

    def read(self, block: bytes) -> list[Field] | None:
        """The fields of `block`; None where they are more than `max_list_bytes`, which leaves the connection
        as it should be. Raises Violation with COMPRESSION_ERROR."""
        try:
            return self._read(block)
        except (IndexError, HPACKError) as error:
            raise _undecodable() from error

    def _read(self, block: bytes) -> list[Field] | None:
        fields: list[Field] = []
        at, end, room = 0, len(block), self._max_list_bytes
        while at < end:
            first = block[at]
            if first & 0x80:
                index = first & 0x7F
                if index == 0x7F:
                    index, at = _integer(block, at, 0x7F)
                else:
                    at += 1
                field = self._at(index)
            elif first & 0x40:
                field, at = self._literal(block, at, 0x3F)
                self._add(field)
            elif first & 0x20:
                if fields:
                    raise _undecodable()  # sizes are said before all fields
                size, at = _integer(block, at, 0x1F)
                self._resize(size)
                continue
            else:
                field, at = self._literal(block, at, 0x0F)
            room -= len(field[0]) + len(field[1]) + _ENTRY_BYTES
            if room >= 0:
                fields.append(field)
        return fields if room >= 0 else None

    def _at(self, index: int) -> Field:
        if 0 < index <= _STATIC_COUNT:
            return _STATIC[index - 1]
        back = index - _STATIC_COUNT
        if not 0 < back <= len(self._entries):
            raise _undecodable()
        return self._entries[-back]

    def _literal(self, block: bytes, at: int, mask: int) -> tuple[Field, int]:
        index = block[at] & mask
        if index == mask:
            index, at = _integer(block, at, mask)
        else:
            at += 1
        if index:
            name = self._at(index)[0]
        else:
            name, at = _string(block, at)
        value, at = _string(block, at)
        return (name, value), at

    def _add(self, field: Field) -> None:
        self.changes += 1
        self._entries.append(field)
        self._size += len(field[0]) + len(field[1]) + _ENTRY_BYTES
        self._evict()

    def _resize(self, size: int) -> None:
        if size > self._max_table_bytes:
            raise _undecodable()
        self.changes += 1
        self._table_bytes = size
        self._evict()

    def _evict(self) -> None:
        gone = 0
        while self._size > self._table_bytes:
            name, value = self._entries[gone]
            self._size -= len(name) + len(value) + _ENTRY_BYTES
            gone += 1
        if gone:
            del self._entries[:gone]


def _undecodable() -> Violation:
    return Violation(ErrorCode.COMPRESSION_ERROR, "header block cannot be decoded")


def _integer(block: bytes, at: int, mask: int) -> tuple[int, int]:
    """An integer whose prefix has the bits of `mask` (section 5.1), and where it ends."""
    value = block[at] & mask
    at += 1
    if value < mask:
        return value, at
    shift = 0
    while True:
        byte = block[at]
        at += 1
        value += (byte & 0x7F) << shift
        shift += 7
        if value > _MAX_INTEGER or shift > 35:
            raise _undecodable()
        if byte < 0x80:
            return value, at


def _string(block: bytes, at: int) -> tuple[bytes, int]:
    first = block[at]
    size = first & 0x7F
    if size == 0x7F:
        size, start = _integer(block, at, 0x7F)
    else:
        start = at + 1
    end = start + size
    text = block[start:end]
    if len(text) != size:
        raise _undecodable()
    if first & 0x80:
        text = _short(text) if size <= _REMEMBERED_STRING_BYTES else bytes(decode_huffman(text))
    return text, end


@lru_cache(maxsize=2048)
def _short(coded: bytes) -> bytes:
    return bytes(decode_huffman(coded))


def literal(name: bytes, value: bytes) -> bytes:
    """A field that leaves the peer's table alone, so that it reads the same wherever it stands."""
    return b"\0" + _said(name) + _said(value)


def grpc_message(text: str) -> str:
    """`text` as the value of grpc-message."""
    return quote(text, safe=_PLAIN)


def _said(text: bytes) -> bytes:
    size = len(text)
    if size < 0x7F:
        return bytes((size,)) + text
    size -= 0x7F
    out = bytearray((0x7F,))
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    out.append(size)
    return bytes(out) + text
