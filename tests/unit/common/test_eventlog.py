"""The event log against a bus in memory: what is on disk, what arrives, in which order."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from services.common.bus import MemoryBus, Record
from services.common.clock import SystemClock
from services.common.errors import FailedPrecondition, InvalidArgument, ResourceExhausted, Unavailable
from services.common.eventlog import EventLog, spool
from services.common.eventlog import log as eventlog
from services.common.eventlog.framing import Event, Steps, frame
from services.common.topics import Topic
from tests.fixtures.waiting import PATIENCE_S

TOPIC = Topic("test.events.v1", partitions=1)
CLOCK = SystemClock()


@pytest.fixture
def bus() -> MemoryBus:
    return MemoryBus([TOPIC])


def new_log(directory: Path, bus: MemoryBus, **options: int | float) -> EventLog:
    return EventLog(directory, bus, TOPIC.name, clock=CLOCK, linger=0.001, **options)  # type: ignore[arg-type]  # sizes


@asynccontextmanager
async def opened(directory: Path, bus: MemoryBus, **options: int | float) -> AsyncIterator[EventLog]:
    log = new_log(directory, bus, **options)
    await log.start()
    try:
        yield log
    finally:
        await log.close(CLOCK.monotonic() + 2.0)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - many conditions, none of which could set an event
            await asyncio.sleep(0.002)


def arrived(bus: MemoryBus) -> list[bytes | None]:
    return [record.value for record in bus.records(TOPIC.name)]


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.log"))


async def test_events_arrive_in_order_with_key_headers_and_the_time_of_their_append(
    tmp_path: Path, bus: MemoryBus
) -> None:
    before = time.time_ns() // 1_000_000
    async with opened(tmp_path, bus) as log:
        for i in range(100):
            log.append(b"model:1", b"%d" % i, [("traceparent", b"00-%d" % i), ("raw", b"\xff\x00")])
        assert log.pending_records == 100
        assert arrived(bus) == []  # nothing was awaited yet
        await eventually(lambda: log.pending_records == 0)
    records = bus.records(TOPIC.name)
    assert [record.value for record in records] == [b"%d" % i for i in range(100)]
    assert records[7].key == b"model:1"
    assert records[7].headers == (("traceparent", b"00-7"), ("raw", b"\xff\x00"))
    assert before <= records[7].timestamp_ms <= time.time_ns() // 1_000_000
    assert (log.appended, log.published, log.pending_bytes) == (100, 100, 0)


async def test_an_append_is_on_disk_when_it_returns(tmp_path: Path, bus: MemoryBus) -> None:
    bus.away = True
    async with opened(tmp_path, bus) as log:
        log.append(b"k", b"a very particular value")
        assert any(b"a very particular value" in path.read_bytes() for path in segments(tmp_path))
        bus.away = False


async def test_with_fsync_every_append_reaches_the_disk_itself(
    tmp_path: Path, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    async with opened(tmp_path / "with", bus, fsync=True) as log:
        log.append(b"k", b"1")
        log.append(b"k", b"2")
        assert len(flushed) == 2
    async with opened(tmp_path / "without", bus) as log:
        log.append(b"k", b"3")
    assert len(flushed) == 2
    assert arrived(bus) == [b"1", b"2", b"3"]


async def test_many_events_travel_in_one_publish(tmp_path: Path, bus: MemoryBus) -> None:
    batches: list[int] = []
    publish = bus.publish

    async def counting(records: Sequence[Record]) -> None:
        batches.append(len(records))
        await publish(records)

    bus.publish = counting  # type: ignore[method-assign]  # a spy
    async with opened(tmp_path, bus) as log:
        for i in range(500):
            log.append(b"k", b"%d" % i)
    assert batches == [500]


async def test_what_was_appended_lately_is_published_without_reading_it_from_disk(
    tmp_path: Path, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool.Extent, "read", None)  # whoever calls it fails
    async with opened(tmp_path, bus, segment_bytes=300) as log:
        for i in range(100):
            log.append(b"k", b"%d" % i)
            if i % 7 == 0:
                await asyncio.sleep(0.001)
        await eventually(lambda: log.pending_records == 0)
        assert log.publish_failures == 0
    assert arrived(bus) == [b"%d" % i for i in range(100)]


async def test_what_is_too_much_for_memory_comes_from_disk_in_order(
    tmp_path: Path, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory, then disk, then memory again, while events keep coming."""
    monkeypatch.setattr(spool, "KEPT_BYTES", 500)
    monkeypatch.setattr(eventlog, "PUBLISH_BYTES", 400)
    expected = [b"%d" % i for i in range(300)]
    async with opened(tmp_path, bus, segment_bytes=1000) as log:
        for number, value in enumerate(expected):
            bus.away = 50 <= number < 150
            log.append(b"k", value)
            if number % 3 == 0:
                await asyncio.sleep(0)
        await eventually(lambda: log.pending_records == 0)
        log.append(b"k", b"last")
        await eventually(lambda: log.pending_records == 0)
    assert arrived(bus) == [*expected, b"last"]


async def test_the_loop_goes_on_while_events_are_joined(tmp_path: Path, bus: MemoryBus) -> None:
    turns: list[int] = []

    class Slow:
        def steps(self, events: Sequence[Event]) -> Steps:
            for _ in range(3):
                until = time.perf_counter() + 0.001
                while time.perf_counter() < until:
                    pass
                turns.append(beside)
                yield
            return list(events)

    beside = 0
    log = EventLog(tmp_path, bus, TOPIC.name, clock=CLOCK, linger=0.001, join=Slow())
    await log.start()
    log.append(b"k", b"v")
    async with asyncio.timeout(PATIENCE_S):
        while log.pending_records:
            beside += 1
            await asyncio.sleep(0)
    await log.close(CLOCK.monotonic() + 2.0)
    assert len(set(turns)) == 3  # something else ran between any two of the steps


async def test_an_outage_delays_and_never_reorders(tmp_path: Path, bus: MemoryBus) -> None:
    async with opened(tmp_path, bus) as log:
        log.append(b"k", b"0")
        await eventually(lambda: len(arrived(bus)) == 1)
        bus.away = True
        for i in range(1, 50):
            log.append(b"k", b"%d" % i)
        await eventually(lambda: log.publish_failures >= 1)
        for i in range(50, 80):
            log.append(b"k", b"%d" % i)
        assert log.pending_records == 79
        bus.away = False
        await eventually(lambda: log.pending_records == 0)
    assert arrived(bus) == [b"%d" % i for i in range(80)]


async def test_what_a_process_left_is_published_before_what_the_next_one_appends(
    tmp_path: Path, bus: MemoryBus
) -> None:
    bus.away = True
    first = new_log(tmp_path, bus)
    await first.start()
    for i in range(10):
        first.append(b"k", b"%d" % i)
    await first.close(CLOCK.monotonic())
    bus.away = False
    async with opened(tmp_path, bus) as second:
        assert second.replayed == 10
        second.append(b"k", b"10")
    assert arrived(bus) == [b"%d" % i for i in range(11)]


async def test_a_clean_close_leaves_nothing_to_repeat(tmp_path: Path, bus: MemoryBus) -> None:
    for round_ in range(3):
        async with opened(tmp_path, bus, segment_bytes=200) as log:
            assert log.replayed == 0
            for i in range(20):
                log.append(b"k", b"%d-%d" % (round_, i))
        assert segments(tmp_path) == []
    assert arrived(bus) == [b"%d-%d" % (r, i) for r in range(3) for i in range(20)]


async def test_segments_are_deleted_once_published(tmp_path: Path, bus: MemoryBus) -> None:
    bus.away = True
    async with opened(tmp_path, bus, segment_bytes=1000) as log:
        for i in range(100):
            log.append(b"k", b"%100d" % i)
        assert len(segments(tmp_path)) > 5
        bus.away = False
        await eventually(lambda: log.pending_records == 0)
        assert len(segments(tmp_path)) == 1  # the one being appended to
    assert arrived(bus) == [b"%100d" % i for i in range(100)]


async def test_a_full_log_refuses_and_recovers(tmp_path: Path, bus: MemoryBus) -> None:
    bus.away = True
    async with opened(tmp_path, bus, max_bytes=1000) as log:
        written = 1000 // 123  # 22 bytes and the key stand before each value
        for _ in range(written):
            log.append(b"k", bytes(100))
        with pytest.raises(ResourceExhausted) as refusal:
            log.append(b"k", bytes(100))
        assert refusal.value.retry_after_ms
        assert 0 < log.pending_bytes <= 1000
        assert (log.pending_records, log.refused) == (written, 1)
        bus.away = False
        await eventually(lambda: log.pending_records == 0)
        assert log.usable
        log.append(b"k", b"again")
    assert len(arrived(bus)) == written + 1


async def test_usable_says_whether_it_is_open_and_not_full(tmp_path: Path, bus: MemoryBus) -> None:
    bus.away = True
    log = new_log(tmp_path, bus, max_bytes=40)
    assert not log.usable
    await log.start()
    assert log.usable
    log.append(b"", bytes(18))  # 22 bytes around it make 40
    assert not log.usable
    await log.close(CLOCK.monotonic())
    assert not log.usable


async def test_a_closed_log_refuses(tmp_path: Path, bus: MemoryBus) -> None:
    log = new_log(tmp_path, bus)
    with pytest.raises(Unavailable):
        log.append(b"k", b"v")
    await log.start()
    await log.close(CLOCK.monotonic() + 1)
    with pytest.raises(Unavailable):
        log.append(b"k", b"v")
    assert arrived(bus) == []


async def test_an_event_too_large_for_any_broker_is_refused(tmp_path: Path, bus: MemoryBus) -> None:
    async with opened(tmp_path, bus) as log:
        with pytest.raises(InvalidArgument):
            log.append(b"k", bytes(17 << 20))
        log.append(b"k", b"small")
    assert arrived(bus) == [b"small"]


async def test_an_event_larger_than_one_publish_and_one_segment_arrives(
    tmp_path: Path, bus: MemoryBus
) -> None:
    large = os.urandom(3 << 20)
    async with opened(tmp_path, bus, segment_bytes=1 << 20) as log:
        for value in (b"before", large, b"after"):
            log.append(b"k", value)
    assert arrived(bus) == [b"before", large, b"after"]


async def test_two_logs_never_share_a_directory(tmp_path: Path, bus: MemoryBus) -> None:
    async with opened(tmp_path, bus):
        with pytest.raises(FailedPrecondition):
            await new_log(tmp_path, bus).start()
    async with opened(tmp_path, bus) as third:
        third.append(b"k", b"free again")
    assert arrived(bus) == [b"free again"]


async def test_a_write_cut_short_by_a_full_disk_is_taken_back(
    tmp_path: Path, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.writev

    def cut_short(fd: int, buffers: Sequence[bytes]) -> int:
        return os.write(fd, b"".join(buffers)[:-3])

    async with opened(tmp_path, bus) as log:
        log.append(b"k", b"first")
        with monkeypatch.context() as patch:
            patch.setattr(os, "writev", cut_short)
            with pytest.raises(ResourceExhausted):
                log.append(b"k", b"does not fit")
        assert os.writev is whole
        log.append(b"k", b"second")
    assert arrived(bus) == [b"first", b"second"]


async def test_what_was_published_makes_room_on_a_full_disk(
    tmp_path: Path, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.writev

    def within_3000_bytes(fd: int, buffers: Sequence[bytes]) -> int:
        if sum(path.stat().st_size for path in segments(tmp_path)) + sum(map(len, buffers)) > 3000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole(fd, buffers)

    monkeypatch.setattr(os, "writev", within_3000_bytes)
    values = [b"%d" % n * 2000 for n in range(5)]
    async with opened(tmp_path, bus) as log:
        log.append(b"k", values[0])
        with pytest.raises(ResourceExhausted):
            log.append(b"k", values[1])  # nothing was published yet
        for count, value in enumerate(values[1:], 1):
            await eventually(lambda: log.pending_records == 0)
            log.append(b"k", value)
            assert len(segments(tmp_path)) == 1, count
    assert arrived(bus) == values
    # What a crash leaves in such a moment is read on as ever.
    bus.away = True
    last = new_log(tmp_path, bus)
    await last.start()
    last.append(b"k", b"kept")
    await last.close(CLOCK.monotonic())
    bus.away = False
    async with opened(tmp_path, bus):
        pass
    assert arrived(bus) == [*values, b"kept"]


async def test_files_that_may_not_become_as_long_as_a_segment_refuse_nothing(
    tmp_path: Path, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As RLIMIT_FSIZE has it: what fits is written, and where nothing does, nothing."""
    whole, longest = os.writev, 1000

    def limited(fd: int, buffers: Sequence[bytes]) -> int:
        room = longest - os.fstat(fd).st_size
        if room <= 0:
            raise OSError(errno.EFBIG, "File too large")
        return whole(fd, [b"".join(buffers)[:room]])

    monkeypatch.setattr(os, "writev", limited)
    values = [b"%d" % n * 100 for n in range(100, 150)]
    bus.away = True
    first = new_log(tmp_path, bus)
    await first.start()
    for value in values[:25]:
        first.append(b"k", value)
    with pytest.raises(ResourceExhausted):
        first.append(b"k", b"longer than any file" * 100)
    assert len(segments(tmp_path)) > 5
    assert max(path.stat().st_size for path in segments(tmp_path)) <= longest
    await first.close(CLOCK.monotonic())
    bus.away = False
    async with opened(tmp_path, bus) as log:
        for value in values[25:]:
            log.append(b"k", value)
        await eventually(lambda: log.pending_records == 0)
        assert len(segments(tmp_path)) == 1
    assert arrived(bus) == values


async def test_an_unreadable_cursor_repeats_rather_than_loses(tmp_path: Path, bus: MemoryBus) -> None:
    bus.away = True
    first = new_log(tmp_path, bus)
    await first.start()
    first.append(b"k", b"kept")
    await first.close(CLOCK.monotonic())
    bus.away = False
    (tmp_path / "cursor").write_text("garbage")
    async with opened(tmp_path, bus):
        pass
    assert arrived(bus) == [b"kept"]


async def test_a_killed_process_loses_no_event(tmp_path: Path, bus: MemoryBus) -> None:
    script = textwrap.dedent("""
        import asyncio, os, signal, sys
        from pathlib import Path
        from services.common.bus import MemoryBus
        from services.common.clock import SystemClock
        from services.common.eventlog import EventLog

        async def main():
            bus = MemoryBus()
            bus.away = True
            log = EventLog(Path(sys.argv[1]), bus, "test.events.v1", clock=SystemClock())
            await log.start()
            for i in range(250):
                log.append(b"k", b"%d" % i)
            os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(main())
    """)
    killed = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=60,
        check=False,
    )
    assert killed.returncode == -9
    async with opened(tmp_path, bus) as log:
        assert log.replayed == 250
    assert arrived(bus) == [b"%d" % i for i in range(250)]


def test_what_was_published_by_who_was_killed_takes_no_room_of_the_disk(tmp_path: Path) -> None:
    killed = spool.Spool(tmp_path, segment_bytes=1 << 20, fsync=False)
    killed.open()
    buffers, size = frame(b"k", b"v" * 100, (), 0)
    killed.append(buffers, size, [Event(b"k", b"v" * 100, (), 0, size)])
    killed.advance(killed.recent(1 << 20, 10))
    os.close(killed._lock)  # what a kill leaves: nothing is tidied up
    again = spool.Spool(tmp_path, segment_bytes=1 << 20, fsync=False)
    again.open()
    try:
        assert [path for path in tmp_path.glob("*.log") if path.stat().st_size] == []
    finally:
        again.close()


async def test_many_events_are_written_together_or_not_at_all(tmp_path: Path, bus: MemoryBus) -> None:
    async with opened(tmp_path, bus, max_bytes=10_000) as log:
        bus.away = True
        log.append_many(b"k", [b"a" * 3000, b"b" * 3000])
        with pytest.raises(ResourceExhausted):
            log.append_many(b"k", [b"c" * 3000, b"d" * 3000])
        log.append_many(b"k", [b"e"])
        assert (log.pending_records, log.appended, log.refused) == (3, 3, 2)
        bus.away = False
        await eventually(lambda: len(arrived(bus)) == 3)
    assert arrived(bus) == [b"a" * 3000, b"b" * 3000, b"e"]


async def test_more_events_than_one_system_call_has_room_for(tmp_path: Path, bus: MemoryBus) -> None:
    async with opened(tmp_path, bus) as log:
        log.append_many(b"k", [str(n).encode() for n in range(1500)])
        await eventually(lambda: len(arrived(bus)) == 1500)
    assert arrived(bus) == [str(n).encode() for n in range(1500)]


class ParticularBus(MemoryBus):
    """A broker whose limit is lower than ours."""

    async def publish(self, records: Sequence[Record]) -> None:
        if any(len(record.value or b"") > 1000 for record in records):
            raise InvalidArgument("a record is too large")
        await super().publish(records)


async def test_what_the_broker_never_takes_holds_up_nothing(tmp_path: Path) -> None:
    bus = ParticularBus([TOPIC])
    async with opened(tmp_path, bus) as log:
        log.append_many(b"k", [b"first", b"x" * 2000, b"last"])
        await eventually(lambda: arrived(bus) == [b"first", b"last"])
        await eventually(lambda: log.pending_records == 0)
        assert log.set_aside == 1
    assert b"x" * 2000 in (tmp_path / "refused").read_bytes()


async def test_a_disk_that_fails_is_a_refusal(
    tmp_path: Path, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(tmp_path, bus) as log:

        def broken(_fd: int, _buffers: Sequence[bytes]) -> int:
            raise OSError(5, "Input/output error")

        with monkeypatch.context() as patched:
            patched.setattr(os, "writev", broken)
            with pytest.raises(ResourceExhausted, match="Input/output"):
                log.append(b"k", b"v")
        log.append(b"k", b"w")
        await eventually(lambda: arrived(bus) == [b"w"])
