"""The event log over a disk that fails now and then, or is full: nothing is lost, nothing stands still."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from services.common.bus import MemoryBus
from services.common.clock import SystemClock
from services.common.errors import ResourceExhausted
from services.common.eventlog import EventLog
from services.common.topics import Topic
from tests.fixtures.waiting import eventually

TOPIC = Topic("test.events.v1", partitions=1)
CLOCK = SystemClock()


@pytest.fixture
def bus() -> MemoryBus:
    return MemoryBus([TOPIC])


async def opened(directory: Path, bus: MemoryBus, segment_bytes: int = 200) -> EventLog:
    log = EventLog(directory, bus, TOPIC.name, clock=CLOCK, linger=0.0, segment_bytes=segment_bytes)
    await log.start()
    return log


def arrived(bus: MemoryBus) -> list[bytes | None]:
    """What came, in the order in which it first did."""
    return list(dict.fromkeys(record.value for record in bus.records(TOPIC.name)))


class Failing:
    """Takes the place of a system call, which fails when it is called for the `nth` time."""

    def __init__(self, call: Callable[..., Any], nth: int) -> None:
        self._call = call
        self._left = nth

    def __call__(self, *args: Any, **options: Any) -> Any:
        self._left -= 1
        if not self._left:
            raise OSError(errno.EIO, "Input/output error")
        return self._call(*args, **options)


@pytest.mark.parametrize("nth", range(1, 8))
@pytest.mark.parametrize("name", ["pwrite", "unlink", "open", "close"])
async def test_nothing_is_lost_where_a_system_call_fails_once(
    tmp_path: Path, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch, name: str, nth: int
) -> None:
    """Neither by this process nor for the next one: what was published once must not be counted twice."""
    taken: list[bytes] = []
    log = await opened(tmp_path, bus)
    monkeypatch.setattr(os, name, Failing(getattr(os, name), nth))
    for number in range(40):
        value = b"%d" % number
        try:
            log.append(b"k", value)
        except ResourceExhausted:  # its caller is told so
            continue
        taken.append(value)
        if number % 5 == 0:
            await eventually(lambda: log.pending_records == 0)
    await eventually(lambda: log.pending_records == 0)
    assert log.pending_bytes == 0
    log.append(b"k", b"last")
    await log.close(CLOCK.monotonic() + 2.0)
    assert arrived(bus) == [*taken, b"last"]
    assert len(taken) >= 39

    monkeypatch.undo()
    following = await opened(tmp_path, bus)
    following.append(b"k", b"of the next process")
    await following.close(CLOCK.monotonic() + 2.0)
    assert arrived(bus) == [*taken, b"last", b"of the next process"]


@pytest.mark.parametrize("raises", [False, True])
async def test_what_a_failed_write_left_hides_nothing_where_it_cannot_be_taken_back(
    tmp_path: Path, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch, raises: bool
) -> None:
    def torn(fd: int, buffers: Sequence[bytes]) -> int:
        written = os.write(fd, b"".join(buffers)[:-3])
        if raises:
            raise OSError(errno.EIO, "Input/output error")
        return written

    bus.away = True
    log = await opened(tmp_path, bus, segment_bytes=1 << 20)
    log.append(b"k", b"first")
    with monkeypatch.context() as patch:
        patch.setattr(os, "writev", torn)
        patch.setattr(os, "ftruncate", Failing(os.ftruncate, 1))
        with pytest.raises(ResourceExhausted):
            log.append(b"k", b"refused")
    log.append(b"k", b"second")
    await log.close(CLOCK.monotonic())
    bus.away = False
    following = await opened(tmp_path, bus)
    await following.close(CLOCK.monotonic() + 2.0)
    assert arrived(bus) == [b"first", b"second"]


async def test_what_cannot_be_deleted_is_not_published_again_nor_in_the_way(
    tmp_path: Path, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kept(*_args: object, **_options: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "unlink", kept)
    values = [b"%d" % number for number in range(30)]
    for part in (values[:15], values[15:]):
        log = await opened(tmp_path, bus)
        for value in part:
            log.append(b"k", value)
        await log.close(CLOCK.monotonic() + 2.0)
    assert [record.value for record in bus.records(TOPIC.name)] == values
    assert len(list(tmp_path.glob("*.log"))) > 2


async def test_a_disk_filled_while_the_broker_was_away_is_published_once_it_is_back(
    tmp_path: Path, bus: MemoryBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk takes what stands in a file already in another's place, and nothing beyond: where a file
    for the positions had yet to become longer, nothing could be published, and so nothing deleted."""
    longest = 2000

    def has_room(more: int) -> bool:
        return sum(path.stat().st_size for path in tmp_path.iterdir()) + more <= longest

    writev, pwrite = os.writev, os.pwrite

    def limited_writev(fd: int, buffers: Sequence[bytes]) -> int:
        if not has_room(sum(map(len, buffers))):
            raise OSError(errno.ENOSPC, "No space left on device")
        return writev(fd, buffers)

    def limited_pwrite(fd: int, data: bytes, offset: int) -> int:
        more = offset + len(data) - os.fstat(fd).st_size
        if more > 0 and not has_room(more):
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "writev", limited_writev)
    monkeypatch.setattr(os, "pwrite", limited_pwrite)
    bus.away = True
    log = await opened(tmp_path, bus, segment_bytes=1 << 20)
    values = []
    with suppress(ResourceExhausted):
        for number in range(1000):
            log.append(b"k", b"%d" % number)
            values.append(b"%d" % number)
    assert 20 < len(values) < 1000
    await asyncio.sleep(0)
    bus.away = False
    await eventually(lambda: log.pending_records == 0)
    log.append(b"k", b"there is room again")
    await log.close(CLOCK.monotonic() + 2.0)
    assert arrived(bus) == [*values, b"there is room again"]
