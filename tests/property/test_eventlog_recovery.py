"""Wherever a crash cut the spool, every whole event comes back in order, and once after a clean close."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.bus import MemoryBus
from services.common.clock import SystemClock
from services.common.eventlog import EventLog
from services.common.eventlog.framing import Event, frame, frames
from services.common.eventlog.spool import Spool
from services.common.topics import Topic

TOPIC = Topic("test.events.v1", partitions=1)
CLOCK = SystemClock()

events = st.tuples(
    st.binary(max_size=12),
    st.binary(max_size=200),
    st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=9)), max_size=2),
)


def write_spool(
    directory: Path, batch: list[tuple[bytes, bytes, list[tuple[str, bytes]]]], size: int
) -> list[int]:
    """Leave `batch` in `directory` as a killed process would; the bytes of each event."""
    spool = Spool(directory, segment_bytes=size, fsync=False)
    spool.open()
    sizes = []
    for key, value, headers in batch:
        buffers, length = frame(key, value, headers, 1)
        spool.append(buffers, length, [Event(key, value, tuple(headers), 1, length)])
        sizes.append(length)
    spool.close()
    return sizes


def read(spool: Spool, most: int) -> list[Event]:
    """The next events, at most so many, of a spool that was just opened: they are only on disk."""
    extent = spool.extent(1 << 20, most)
    return list(frames(extent.read()))[: extent.events] if extent is not None else []


async def replay(directory: Path, bus: MemoryBus) -> EventLog:
    log = EventLog(directory, bus, TOPIC.name, clock=CLOCK, linger=0.0)
    await log.start()
    await log.close(CLOCK.monotonic() + 5)
    return log


@settings(max_examples=60, deadline=None)
@given(st.lists(events, min_size=1, max_size=12), st.data())
def test_a_spool_cut_at_any_byte_gives_back_every_whole_event_once(
    batch: list[tuple[bytes, bytes, list[tuple[str, bytes]]]], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        sizes = write_spool(directory, batch, 1 << 20)
        (segment,) = directory.glob("*.log")
        cut = data.draw(st.integers(0, sum(sizes)), label="cut")
        segment.write_bytes(segment.read_bytes()[:cut])
        whole = sum(1 for i in range(len(sizes)) if sum(sizes[: i + 1]) <= cut)

        async def crash_and_return() -> None:
            bus = MemoryBus([TOPIC])
            log = await replay(directory, bus)
            got = [(r.key, r.value, list(r.headers)) for r in bus.records(TOPIC.name)]
            assert got == [tuple(event) for event in batch[:whole]]
            assert log.dropped_bytes == cut - sum(sizes[:whole])
            await replay(directory, bus)
            assert len(bus.records(TOPIC.name)) == whole

        asyncio.run(crash_and_return())


@settings(max_examples=40, deadline=None)
@given(st.lists(events, min_size=1, max_size=30), st.integers(1, 400), st.integers(1, 5))
def test_segments_of_any_size_keep_the_order_over_restarts(
    batch: list[tuple[bytes, bytes, list[tuple[str, bytes]]]], segment_bytes: int, lives: int
) -> None:
    async def live() -> None:
        with tempfile.TemporaryDirectory() as name:
            bus = MemoryBus([TOPIC])
            for life in range(lives):
                write_spool(Path(name), batch[life::lives], segment_bytes)
            log = await replay(Path(name), bus)
            expected = [event[1] for life in range(lives) for event in batch[life::lives]]
            assert [record.value for record in bus.records(TOPIC.name)] == expected
            assert log.replayed == len(batch)
            assert list(Path(name).glob("*.log")) == []

    asyncio.run(live())


@settings(max_examples=60, deadline=None)
@given(st.lists(events, min_size=2, max_size=8), st.integers(1, 3), st.integers(1, 400))
def test_a_crash_between_publishing_and_the_cursor_repeats_and_never_skips(
    batch: list[tuple[bytes, bytes, list[tuple[str, bytes]]]], published: int, segment_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_spool(directory, batch, segment_bytes)
        spool = Spool(directory, segment_bytes=segment_bytes, fsync=False)
        spool.open()
        done = read(spool, published)
        spool.advance(done)
        repeated = read(spool, published)  # published, and the process dies before it says so
        spool.close()
        bus = MemoryBus([TOPIC])

        asyncio.run(replay(directory, bus))

        rest = [event[1] for event in batch[len(done) :]]
        assert [record.value for record in bus.records(TOPIC.name)] == rest
        assert [event.value for event in repeated] == rest[: len(repeated)]


@given(st.lists(events, min_size=1, max_size=5), st.data())
def test_a_flipped_bit_ends_the_reading_before_it(
    batch: list[tuple[bytes, bytes, list[tuple[str, bytes]]]], data: st.DataObject
) -> None:
    framed = [frame(key, value, headers, 7) for key, value, headers in batch]
    image = bytearray(b"".join(b"".join(buffers) for buffers, _ in framed))
    at = data.draw(st.integers(0, len(image) - 1), label="byte")
    image[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    sizes = [size for _, size in framed]
    undamaged = sum(1 for i in range(len(sizes)) if sum(sizes[: i + 1]) <= at)
    assert [event.value for event in frames(bytes(image))] == [event[1] for event in batch[:undamaged]]
