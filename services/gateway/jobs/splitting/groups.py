"""Row groups and record batches cut into chunks. Pure.

A chunk is whole groups, or a slice of one that is larger than a chunk: never parts of two, so that a worker
reads no group for a few of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from headrace.v1.batch_pb2 import InputRange

from services.gateway.jobs.sizing import ChunkLimits
from services.gateway.jobs.splitting.port import CHUNKS_AT_ONCE, Chunk, Cursor, Cut


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that lie together, and the bytes that they take."""

    rows: int
    bytes: int


#: The range of a group and an offset in it.
RangeOf = Callable[[int, int], InputRange]


def cut_groups(
    groups: Sequence[Group], limits: ChunkLimits, cursor: Cursor | None, range_of: RangeOf
) -> Iterator[Cut]:
    """The cuts of all `groups`, from `cursor` on."""
    at = cursor or {"group": 0, "offset": 0, "row": 0}
    number, offset, row = at["group"], at["offset"], at["row"]
    chunks: list[Chunk] = []
    while number < len(groups):
        first, start = number, offset
        group = groups[number]
        most = _most_rows(group, limits)
        if offset or group.rows > most:
            rows = min(most, group.rows - offset)
            offset += rows
            if offset >= group.rows:
                number, offset = number + 1, 0
        else:
            rows, size = 0, 0
            while number < len(groups) and _fits(groups[number], rows, size, limits):
                rows += groups[number].rows
                size += groups[number].bytes
                number += 1
        if rows:
            chunks.append(Chunk(row, rows, range_of(first, start)))
            row += rows
        if len(chunks) == CHUNKS_AT_ONCE:
            yield Cut(chunks, {"group": number, "offset": offset, "row": row}, row, done=False)
            chunks = []
    yield Cut(chunks, {"group": number, "offset": offset, "row": row}, row, done=True)


def _most_rows(group: Group, limits: ChunkLimits) -> int:
    """Rows of a slice of `group`."""
    by_bytes = limits.bytes * group.rows // group.bytes if group.bytes > limits.bytes else limits.rows
    return max(1, min(limits.rows, by_bytes))


def _fits(group: Group, rows: int, size: int, limits: ChunkLimits) -> bool:
    if not rows:
        return group.rows <= _most_rows(group, limits)
    return rows + group.rows <= limits.rows and size + group.bytes <= limits.bytes
