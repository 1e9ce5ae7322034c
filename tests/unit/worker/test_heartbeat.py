"""What routers hear of a worker."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from headrace.v1.control_pb2 import WorkerStatus

from services.common.bus import MemoryBus, Record
from services.common.tasks import running
from services.common.topics import WORKERS
from services.worker.heartbeat import Heartbeat
from tests.fixtures.waiting import eventually


def status() -> WorkerStatus:
    return WorkerStatus(worker_id="w", state=WorkerStatus.STATE_READY)


def heard(bus: MemoryBus) -> list[WorkerStatus]:
    return [WorkerStatus.FromString(record.value or b"") for record in bus.records(WORKERS.name)]


async def test_a_change_is_told_at_once_and_the_broker_may_be_away() -> None:
    bus = MemoryBus()
    heartbeat = Heartbeat(bus, interval=30.0)
    task = asyncio.create_task(heartbeat.run(status))
    await eventually(lambda: len(heard(bus)) == 1)
    heartbeat.changed()
    await eventually(lambda: len(heard(bus)) == 2)
    bus.away = True
    heartbeat.changed()
    await asyncio.sleep(0.01)
    bus.away = False
    heartbeat.changed()
    await eventually(lambda: len(heard(bus)) == 3)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    numbers = [one.sequence for one in heard(bus)]
    assert numbers == sorted(set(numbers))
    assert {one.interval_ms for one in heard(bus)} == {30_000}
    assert {record.key for record in bus.records(WORKERS.name)} == {b"w"}


class Breaking(MemoryBus):
    """Its second publish fails of what no bus should raise."""

    tries = 0

    async def publish(self, records: Sequence[Record]) -> None:
        self.tries += 1
        if self.tries == 2:
            raise RuntimeError("unable to perform operation on <TCPTransport>")
        await super().publish(records)


async def test_a_beat_that_breaks_is_not_the_last() -> None:
    bus = Breaking()
    async with running(Heartbeat(bus, interval=0.001).run(status), "heartbeat"):
        await eventually(lambda: len(heard(bus)) > 2)


async def test_the_last_word_does_not_need_a_broker() -> None:
    bus = MemoryBus()
    bus.away = True
    await Heartbeat(bus).last(status())
    assert heard(bus) == []
    bus.away = False
    await Heartbeat(bus).last(status())
    assert len(heard(bus)) == 1
