"""How far a spool has been published, in a file of two slots that are written in turn.

A slot: u64 sequence | u64 segment number | u64 offset | u32 CRC-32 of these; little-endian. Writing in place
costs a few microseconds and no disk: replacing the file by a rename, ten times a second, held up the event
loop for 10 ms each time on a journalling file system. The slot not being written stays whole whenever the
process dies.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path
from struct import Struct
from zlib import crc32

log = logging.getLogger(__name__)

_FIELDS = Struct("<QQQ")
_CHECKSUM = Struct("<I")
_SLOT = _FIELDS.size + _CHECKSUM.size


class Cursor:
    """Segment number and offset in one file. `open` reads what the last `write` left."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self._sequence = 0

    def open(self) -> tuple[int, int]:
        """The position, (0, 0) where there is none. Blocking. An unreadable file is logged: all that is there
        is published again then, which loses nothing. The file gets its full size here: once the disk is full
        of events, it must still be written, or none of them could be published to make room."""
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        data = os.pread(self._fd, 2 * _SLOT, 0)
        with suppress(OSError):  # the disk is full already
            os.pwrite(self._fd, bytes(2 * _SLOT - len(data)), len(data))
        slots = [_read(data[start : start + _SLOT]) for start in (0, _SLOT)]
        whole = [slot for slot in slots if slot is not None]
        if not whole:
            if any(data):
                log.error("the cursor %s is unreadable: publishing all that is there", self._path)
            return 0, 0
        self._sequence, number, offset = max(whole)
        return number, offset

    def write(self, number: int, offset: int) -> None:
        """Remember the position; one system call."""
        self._sequence += 1
        fields = _FIELDS.pack(self._sequence, number, offset)
        os.pwrite(self._fd, fields + _CHECKSUM.pack(crc32(fields)), self._sequence % 2 * _SLOT)

    def close(self) -> None:
        """Let the file go."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):  # it is closed all the same
                os.close(fd)


def _read(slot: bytes) -> tuple[int, int, int] | None:
    if len(slot) < _SLOT:
        return None
    fields = slot[: _FIELDS.size]
    if crc32(fields) != _CHECKSUM.unpack(slot[_FIELDS.size :])[0]:
        return None
    sequence, number, offset = _FIELDS.unpack(fields)
    # A slot never written is all zeros, and so is its checksum's input: sequence 0 is none of ours.
    return (sequence, number, offset) if sequence else None
