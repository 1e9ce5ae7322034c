"""Arrow IPC files by their metadata: the footer says where each record batch lies, the batch's own header how
many rows it has. pyarrow would read a batch to count its rows.

Layout: https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format; tables are FlatBuffers
(https://flatbuffers.dev/internals): a table's first word leads back to its vtable, which holds, after two
lengths, the offset of each field in the table, 0 where it is absent.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import IO

from services.gateway.jobs.splitting.groups import Group
from services.gateway.jobs.splitting.port import refused

_MAGIC = b"ARROW1"
_MAX_FOOTER = 64 << 20
_MAX_HEADER = 16 << 20
#: Fields of the tables: Footer.recordBatches; Message.header_type, header; RecordBatch.length.
_RECORD_BATCHES, _HEADER_TYPE, _HEADER, _LENGTH = 3, 1, 2, 0
_IS_RECORD_BATCH = 3
#: struct Block: offset, length of the metadata, padding, length of the body.
_BLOCK = struct.Struct("<qi4xq")
_DAMAGED = "The Arrow file is damaged or cut short."


def arrow_batches(file: IO[bytes]) -> Sequence[Group]:
    """The record batches of an open IPC file. Blocks. Raises InvalidArgument where it is none."""
    size = file.seek(0, 2)
    file.seek(0)
    if file.read(len(_MAGIC)) != _MAGIC:
        raise refused("The input is no Arrow IPC file: it does not begin with ARROW1.")
    if size < len(_MAGIC) * 2 + 4:
        raise refused(_DAMAGED)
    trailer = _at(file, size - len(_MAGIC) - 4, len(_MAGIC) + 4, size)
    length = int.from_bytes(trailer[:4], "little", signed=True)
    if trailer[4:] != _MAGIC or not 0 < length <= min(_MAX_FOOTER, size - len(trailer)):
        raise refused(_DAMAGED)
    footer = _at(file, size - len(trailer) - length, length, size)
    try:
        blocks = _blocks(footer)
        return [_batch(file, offset, header, body, size) for offset, header, body in blocks]
    except (struct.error, IndexError):
        raise refused(_DAMAGED) from None


def _blocks(footer: bytes) -> list[tuple[int, int, int]]:
    at = _field(footer, _root(footer), _RECORD_BATCHES)
    if at is None:
        return []
    vector = at + _uint(footer, at)
    count = _uint(footer, vector)
    if count * _BLOCK.size > len(footer):
        raise refused(_DAMAGED)
    return [_BLOCK.unpack_from(footer, vector + 4 + index * _BLOCK.size) for index in range(count)]


def _batch(file: IO[bytes], offset: int, header: int, body: int, size: int) -> Group:
    if not 8 < header <= _MAX_HEADER or body < 0 or offset < 0 or offset + header + body > size:
        raise refused(_DAMAGED)
    prefixed = _at(file, offset, header, size)
    # Before format version 5 there was no continuation marker in front of the length.
    message = prefixed[8:] if prefixed[:4] == b"\xff\xff\xff\xff" else prefixed[4:]
    root = _root(message)
    kind = _field(message, root, _HEADER_TYPE)
    inner = _field(message, root, _HEADER)
    if kind is None or inner is None or message[kind] != _IS_RECORD_BATCH:
        raise refused(_DAMAGED)
    length = _field(message, inner + _uint(message, inner), _LENGTH)
    rows = 0 if length is None else struct.unpack_from("<q", message, length)[0]
    if rows < 0:
        raise refused(_DAMAGED)
    return Group(rows, body)


def _root(table: bytes) -> int:
    return _uint(table, 0)


def _field(buffer: bytes, table: int, number: int) -> int | None:
    """Where field `number` of the table at `table` lies; None where it is absent."""
    vtable = table - struct.unpack_from("<i", buffer, table)[0]
    if not 0 <= vtable <= len(buffer) - 4:
        raise refused(_DAMAGED)
    entry = 4 + 2 * number
    if entry + 2 > struct.unpack_from("<H", buffer, vtable)[0]:
        return None
    offset = struct.unpack_from("<H", buffer, vtable + entry)[0]
    return table + offset if offset else None


def _uint(buffer: bytes, at: int) -> int:
    found: int = struct.unpack_from("<I", buffer, at)[0]
    return found


def _at(file: IO[bytes], start: int, length: int, size: int) -> bytes:
    if start < 0 or start + length > size:
        raise refused(_DAMAGED)
    file.seek(start)
    data = file.read(length)
    if len(data) != length:
        raise refused(_DAMAGED)
    return data
