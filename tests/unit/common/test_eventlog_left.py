"""What one process left in its event log is published by another."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest

from services.common.bus import MemoryBus
from services.common.clock import SystemClock
from services.common.eventlog import EventLog, publish_left
from services.common.eventlog import left as left_module
from services.common.topics import Topic
from tests.fixtures.waiting import eventually

TOPIC = Topic("test.events.v1", partitions=1)
CLOCK = SystemClock()


def arrived(bus: MemoryBus) -> list[bytes | None]:
    return [record.value for record in bus.records(TOPIC.name)]


async def leave(directory: Path, *values: bytes) -> EventLog:
    """A log whose broker is away and stays so."""
    away = MemoryBus([TOPIC])
    away.away = True
    made = EventLog(directory, away, TOPIC.name, clock=CLOCK, linger=0.001)
    await made.start()
    for value in values:
        made.append(b"k", value)
    return made


async def test_it_waits_for_the_end_of_whose_it_is(tmp_path: Path) -> None:
    bus = MemoryBus([TOPIC])
    owner = await leave(tmp_path, b"first", b"second")
    task = asyncio.create_task(publish_left(tmp_path, bus, TOPIC.name, clock=CLOCK, every_s=0.01))
    for _ in range(20):
        await asyncio.sleep(0.01)
    assert arrived(bus) == []
    await owner.close(CLOCK.monotonic())
    await eventually(lambda: arrived(bus) == [b"first", b"second"])
    # It can be had again, and nothing of it is left.
    await eventually(lambda: not any(path.stat().st_size for path in tmp_path.glob("*.log")))
    task.cancel()
    await asyncio.wait({task})
    back = EventLog(tmp_path, bus, TOPIC.name, clock=CLOCK)
    await back.start()
    assert back.pending_records == 0
    await back.close(CLOCK.monotonic() + 2)
    assert arrived(bus) == [b"first", b"second"]


async def test_without_a_broker_it_is_let_go_and_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(left_module, "_WITHIN_S", 0.05)
    bus = MemoryBus([TOPIC])
    bus.away = True
    await (await leave(tmp_path, b"kept")).close(CLOCK.monotonic())
    task = asyncio.create_task(publish_left(tmp_path, bus, TOPIC.name, clock=CLOCK, every_s=0.01))
    await asyncio.sleep(0.3)
    bus.away = False
    await eventually(lambda: arrived(bus) == [b"kept"])
    task.cancel()
    await asyncio.wait({task})


async def test_where_nobody_was_nothing_is_made(tmp_path: Path) -> None:
    task = asyncio.create_task(
        publish_left(tmp_path / "never", MemoryBus([TOPIC]), TOPIC.name, clock=CLOCK, every_s=0.001)
    )
    await asyncio.sleep(0.05)
    assert not task.done()
    assert not (tmp_path / "never").exists()
    task.cancel()
    await asyncio.wait({task})


async def test_a_directory_that_could_not_be_opened_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where there are too many open files, or no room for another one: it passes, and the log is published
    by whoever comes first."""
    bus = MemoryBus([TOPIC])
    owner = await leave(tmp_path, b"first")
    await owner.close(CLOCK.monotonic())
    failing, opened = [True], os.open

    def full(path: Path, flags: int, *mode: int) -> int:
        if failing and flags & os.O_EXCL:  # a new segment
            failing.pop()
            raise OSError(errno.EMFILE, "Too many open files")
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", full)
    before = len(os.listdir("/proc/self/fd"))
    task = asyncio.create_task(publish_left(tmp_path, bus, TOPIC.name, clock=CLOCK, every_s=0.01))
    await eventually(lambda: not failing)
    await eventually(lambda: arrived(bus) == [b"first"])
    task.cancel()
    await asyncio.wait({task})
    assert len(os.listdir("/proc/self/fd")) <= before
