"""How large the record batches of an Arrow IPC file are once they are decoded, without decoding them: a
compressed one may be a thousand times its bytes in the file.

Layout: https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format; tables are FlatBuffers
(https://flatbuffers.dev/internals). A compressed buffer begins with its decoded length, or -1 where it is
stored as it is.
"""

from __future__ import annotations

import struct
from typing import IO

from services.common.errors import InvalidArgument

_MAGIC = b"ARROW1"
_MAX_FOOTER = 64 << 20
_MAX_HEADER = 16 << 20
#: Fields of the tables: Footer.dictionaries, recordBatches; Message.header_type, header;
#: DictionaryBatch.data; RecordBatch.buffers, compression.
_DICTIONARIES, _RECORD_BATCHES, _HEADER_TYPE, _HEADER, _DATA, _BUFFERS, _COMPRESSION = 2, 3, 1, 2, 1, 2, 3
_IS_DICTIONARY, _IS_RECORD_BATCH = 2, 3
#: struct Block: offset, length of the metadata, padding, length of the body. struct Buffer: offset, length.
_BLOCK = struct.Struct("<qi4xq")
_BUFFER = struct.Struct("<qq")


class DecodedSizes:
    """Of one open file, whose position it moves. Blocks. All raise InvalidArgument where the file is
    damaged."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        size = file.seek(0, 2)
        trailer = self._at(max(0, size - len(_MAGIC) - 4), len(_MAGIC) + 4)
        length = int.from_bytes(trailer[:4], "little", signed=True)
        if trailer[4:] != _MAGIC or not 0 < length <= min(_MAX_FOOTER, size - len(trailer)):
            raise _damaged()
        footer = self._at(size - len(trailer) - length, length)
        try:
            self._dictionaries = _blocks(footer, _DICTIONARIES)
            self._batches = _blocks(footer, _RECORD_BATCHES)
        except struct.error:
            raise _damaged() from None

    def dictionaries(self) -> int:
        """Bytes of all dictionaries, which stay in memory with the file."""
        return sum(self._decoded(block) for block in self._dictionaries)

    def batch(self, index: int) -> int:
        """Bytes of record batch `index` with all its columns."""
        return self._decoded(self._batches[index])

    def _decoded(self, block: tuple[int, int, int]) -> int:
        offset, header, body = block
        if not 8 < header <= _MAX_HEADER or body < 0:
            raise _damaged()
        prefixed = self._at(offset, header)
        message = prefixed[8:] if prefixed[:4] == b"\xff\xff\xff\xff" else prefixed[4:]
        try:
            return self._of_message(message, offset + header, body)
        except (struct.error, IndexError):
            raise _damaged() from None

    def _of_message(self, message: bytes, start: int, body: int) -> int:
        root = _uint(message, 0)
        kind, batch = _field(message, root, _HEADER_TYPE), _table(message, root, _HEADER)
        if kind is not None and message[kind] == _IS_DICTIONARY and batch is not None:
            batch = _table(message, batch, _DATA)
        elif kind is None or message[kind] != _IS_RECORD_BATCH:
            raise _damaged()
        if batch is None:
            raise _damaged()
        if _field(message, batch, _COMPRESSION) is None:
            return body
        total = 0
        for offset, length in _structs(message, batch, _BUFFERS, _BUFFER):
            if length:
                decoded = int.from_bytes(self._at(start + offset, 8), "little", signed=True)
                total += length if decoded == -1 else decoded
                if decoded < -1:
                    raise _damaged()
        return total

    def _at(self, start: int, length: int) -> bytes:
        if start < 0:
            raise _damaged()
        self._file.seek(start)
        data = self._file.read(length)
        if len(data) != length:
            raise _damaged()
        return data


def _damaged() -> InvalidArgument:
    return InvalidArgument("The Arrow file is damaged or cut short.", field="input_uri")


def _blocks(footer: bytes, number: int) -> list[tuple[int, int, int]]:
    return [(block[0], block[1], block[2]) for block in _structs(footer, _uint(footer, 0), number, _BLOCK)]


def _structs(buffer: bytes, table: int, number: int, kind: struct.Struct) -> list[tuple[int, ...]]:
    """The vector of structures in field `number` of the table."""
    at = _field(buffer, table, number)
    if at is None:
        return []
    vector = at + _uint(buffer, at)
    count = _uint(buffer, vector)
    if count * kind.size > len(buffer):
        raise _damaged()
    return [kind.unpack_from(buffer, vector + 4 + index * kind.size) for index in range(count)]


def _table(buffer: bytes, table: int, number: int) -> int | None:
    at = _field(buffer, table, number)
    return None if at is None else at + _uint(buffer, at)


def _field(buffer: bytes, table: int, number: int) -> int | None:
    """Where field `number` of the table at `table` lies; None where it is absent."""
    vtable = table - int(struct.unpack_from("<i", buffer, table)[0])
    if not 0 <= vtable <= len(buffer) - 4:
        raise _damaged()
    entry = 4 + 2 * number
    if entry + 2 > struct.unpack_from("<H", buffer, vtable)[0]:
        return None
    offset = int(struct.unpack_from("<H", buffer, vtable + entry)[0])
    return table + offset if offset else None


def _uint(buffer: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", buffer, at)[0])
