"""Segment files in one directory: appended at the end, read at the cursor, deleted once behind it. What was
appended lately is kept in memory as well, so that files are read only for a backlog."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from services.common.bus.port import Record
from services.common.errors import FailedPrecondition, ResourceExhausted
from services.common.eventlog.cursor import Cursor
from services.common.eventlog.framing import Event, frame, frames, size_of_first

log = logging.getLogger(__name__)

#: What one system call takes at least, everywhere.
_MAX_BUFFERS = 1000

#: Events waiting for the broker are kept in memory as long as they are not more bytes than this.
KEPT_BYTES = 8 << 20

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(slots=True)
class Segment:
    """One file. `size` counts the bytes that hold whole events."""

    number: int
    path: Path
    size: int


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a segment file to be read next; at most so many `events` of them, None: all."""

    path: Path
    offset: int
    size: int
    most_bytes: int
    events: int | None

    def read(self) -> bytes:
        """What is there, beginning with a whole event. Blocking; touches nothing but the file."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(min(self.most_bytes, self.size))
            needed = size_of_first(data)
            if needed > len(data):
                data += file.read(needed - len(data))
        return data


class Spool:
    """One writer, one reader, both in this process: the directory is locked against any other.

    A new segment is begun at every opening, so nothing is ever appended behind a torn event.

    Who reads asks `recent` first, which costs no disk, and `extent` where that has nothing. All but `open`,
    `close`, `set_aside` and `Extent.read` is for the event loop.
    """

    def __init__(self, directory: Path, *, segment_bytes: int, fsync: bool) -> None:
        self._directory = directory
        self._segment_bytes = segment_bytes
        self._fsync = fsync
        self._segments: deque[Segment] = deque()
        self._offset = 0  # of the cursor, in the first segment
        self._cursor = Cursor(directory / "cursor")
        self._remembers = True
        # Up to where events are being published, to be repeated as they were after a crash.
        self._publishing = Cursor(directory / "publishing")
        self._marked = (0, 0)
        # The last events that are pending, all that were appended since `_keeping` was set: those before them
        # are only on disk.
        self._kept: deque[Event] = deque()
        self._kept_bytes = 0
        self._keeping = False
        self._lock = -1
        self._fd = -1
        # Whether the last segment may end with a part of an event.
        self._is_torn = False
        self.pending_bytes = 0
        self.pending_events = 0
        self.dropped_bytes = 0

    def open(self) -> None:
        """Lock the directory, find what an earlier process left, begin a segment. Blocking.

        Raises FailedPrecondition when another process has the directory.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            self._lock = -1
            raise FailedPrecondition(f"another process writes the event log in {self._directory}") from None
        try:
            self._take_over()
        except BaseException:
            self.close()  # who held the lock on would keep everybody out, himself included
            raise

    def _take_over(self) -> None:
        first, offset = self._cursor.open()
        self._marked = self._publishing.open()
        last = first
        for path in sorted(self._directory.glob("*.log")):
            number = int(path.stem)
            last = max(last, number)
            if number < first:
                _delete(path)  # published, the deletion was cut off
                continue
            self._recover(Segment(number, path, 0), offset if number == first else 0)
        if self._segments and self._segments[0].number == first:
            self._offset = min(offset, self._segments[0].size)
        self._begin(last + 1)
        # Who was killed left its last segment, however much of it was published: a full disk needs its room.
        self._skip_read_segments()
        self._remember()
        self._keeping = not self.pending_bytes

    def append(self, buffers: Sequence[bytes], size: int, events: Sequence[Event]) -> None:
        """Write `events`, which are `buffers` of `size` bytes together: all, or, where it raises, none.

        Afterwards they survive the death of the process; a loss of power only with fsync. Raises
        ResourceExhausted when the disk is full or does not take them.
        """
        if len(buffers) > _MAX_BUFFERS:
            buffers = [b"".join(buffers)]
        try:
            segment = self._write(buffers, size)
        except ResourceExhausted:
            if not self._make_room():
                raise
            segment = self._write(buffers, size)
        segment.size += size
        self.pending_bytes += size
        self.pending_events += len(events)
        if self._keeping:
            self._kept.extend(events)
            self._kept_bytes += size
            if self._kept_bytes > KEPT_BYTES:
                self._kept.clear()
                self._kept_bytes = 0
                self._keeping = False

    def _write(self, buffers: Sequence[bytes], size: int) -> Segment:
        """The segment at whose end `buffers` are now. Raises as `append`."""
        segment = self._segments[-1]
        try:
            if segment.size >= self._segment_bytes or self._is_torn:
                self._begin(segment.number + 1)
                segment = self._segments[-1]
            written = os.writev(self._fd, buffers)
            if self._fsync:
                os.fdatasync(self._fd)
        except OSError as error:
            self._cut(segment)
            full = error.errno in _NO_SPACE
            reason = "is full" if full else f"does not take anything: {error.strerror}"
            raise ResourceExhausted(f"the disk of the event log {reason}", retry_after_ms=1000) from error
        if written != size:
            self._cut(segment)
            raise ResourceExhausted("the disk of the event log is full", retry_after_ms=1000)
        return segment

    def _make_room(self) -> bool:
        """Whether there may be room now, in an empty segment behind one that holds something: files may
        be allowed to become no longer (RLIMIT_FSIZE), or all of it was published and it makes way."""
        last = self._segments[-1]
        if not last.size:
            return False
        try:
            self._begin(last.number + 1)
        except OSError:
            return False
        if not self.pending_events:
            self._skip_read_segments()
            self._remember()
        return True

    def set_aside(self, record: Record) -> None:
        """Keep `record` in the file `refused`, framed as an event, for a person to look at. Blocking."""
        buffers, _ = frame(record.key or b"", record.value or b"", record.headers, record.timestamp_ms)
        with (self._directory / "refused").open("ab") as file:
            file.write(b"".join(buffers))

    def recent(self, most_bytes: int, most_events: int) -> list[Event]:
        """The next events at the cursor, if they are in memory: at least one, all of one segment. The cursor
        stays."""
        if self._kept_bytes < self.pending_bytes:
            return []
        self._skip_read_segments()
        room = min(self._segments[0].size - self._offset, most_bytes)
        events: list[Event] = []
        for event in islice(self._kept, most_events):
            room -= event.size
            if room < 0 and events:
                break
            events.append(event)
        return events

    def extent(self, most_bytes: int, most_events: int) -> Extent | None:
        """Where the next events at the cursor are, of those that are only on disk; those that `mark` was last
        told of as long as the cursor is before them. The cursor stays."""
        on_disk = self.pending_bytes - self._kept_bytes
        if on_disk <= 0:
            return None
        self._skip_read_segments()
        segment, offset = self._segments[0], self._offset
        size = min(segment.size - offset, on_disk)
        # All that is appended from here on comes after what this reading can reach.
        self._keeping = self._keeping or size == on_disk
        number, end = self._marked
        if number == segment.number and offset < end <= segment.size:
            return Extent(segment.path, offset, end - offset, end - offset, None)
        return Extent(segment.path, offset, size, most_bytes, most_events)

    def mark(self, events: Sequence[Event]) -> None:
        """Remember that `events`, the next at the cursor, are about to be published together: after a crash
        they are read together again, whatever was appended behind them."""
        self._skip_read_segments()
        end = self._offset + sum([event.size for event in events])
        self._marked = self._segments[0].number, end
        self._publishing.write(*self._marked)

    def advance(self, events: Sequence[Event]) -> None:
        """Move the cursor behind `events`, the next at it, and delete the segments it left. Raises nothing
        where the disk fails: what was published must not be counted twice."""
        size = sum([event.size for event in events])
        if self._kept and self._kept[0] is events[0]:
            for _ in events:
                self._kept.popleft()
            self._kept_bytes -= size
        self._skip_read_segments()
        self._offset += size
        self.pending_bytes -= size
        self.pending_events -= len(events)
        self._skip_read_segments()
        self._remember()

    def close(self) -> None:
        """Release the directory, leaving no segment where everything was published."""
        if self._fd >= 0:
            self._close_segment()
            if self.pending_events == 0:
                number = self._segments[-1].number
                self._segments.append(Segment(number + 1, self._directory / f"{number + 1:020d}.log", 0))
                while len(self._segments) > 1:
                    self._retire()
                self._remember()
        self._cursor.close()
        self._publishing.close()
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def _begin(self, number: int) -> None:
        path = self._directory / f"{number:020d}.log"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._close_segment()
        self._fd = fd
        self._is_torn = False
        self._segments.append(Segment(number, path, 0))

    def _close_segment(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):  # it is closed all the same
                os.close(fd)

    def _cut(self, segment: Segment) -> None:
        """Take back what a failed write left, or the events behind it could not be read. Where that fails,
        too, they go to another file."""
        try:
            os.ftruncate(self._fd, segment.size)
        except OSError:
            self._is_torn = True

    def _skip_read_segments(self) -> None:
        while self._offset == self._segments[0].size and len(self._segments) > 1:
            self._retire()

    def _retire(self) -> None:
        path = self._segments.popleft().path
        self._offset = 0
        _delete(path)

    def _remember(self) -> None:
        """Write where the cursor is. Where the disk does not take that, the next time does; after a crash
        before it, what was published is published again."""
        try:
            self._cursor.write(self._segments[0].number, self._offset)
        except OSError as error:
            if self._remembers:
                log.warning("the cursor in %s cannot be written: %r", self._directory, error)
            self._remembers = False
        else:
            self._remembers = True

    def _recover(self, segment: Segment, offset: int) -> None:
        """Take over a segment of an earlier process from `offset` on, without what is torn at its end."""
        data = segment.path.read_bytes()
        events = list(frames(data[offset:]))
        segment.size = offset + sum(event.size for event in events)
        torn = len(data) - segment.size
        if torn > 0:
            self.dropped_bytes += torn
            log.warning("%s ends with %d bytes that are no whole event: dropped", segment.path.name, torn)
        if offset > len(data):
            segment.size = len(data)
        self.pending_bytes += max(0, segment.size - offset)
        self.pending_events += len(events)
        self._segments.append(segment)


def _delete(path: Path) -> None:
    """Remove a segment that was published. Where that fails, whoever opens the directory next tries again."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s was published and is not deleted: %r", path.name, error)
