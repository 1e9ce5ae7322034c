"""The broker is killed and comes back, with its data or without: nothing is lost silently or read blindly."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from deploy.embedded.apache_kafka import ApacheKafkaServer
from deploy.embedded.server import Server
from deploy.embedded.tansu import TansuServer
from services.common.bus import KafkaBus, Record
from services.common.bus.admin import ensure_topics
from services.common.clock import SystemClock
from services.common.errors import Unavailable
from services.common.eventlog import EventLog
from services.common.topics import Topic
from tests.fixtures.waiting import PATIENCE_S, eventually, patience

EVENTS = Topic("test.events.v1", partitions=4)
STATE = Topic("test.state.v1", partitions=1, compacted=True)
CLOCK = SystemClock()


def numbered(first: int, last: int) -> list[Record]:
    return [Record(EVENTS.name, b"key-%d" % (i % 9), b"%d" % i) for i in range(first, last)]


class Reader:
    """A handler that remembers; `numbers` in order of first arrival."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    async def __call__(self, records: Sequence[Record]) -> None:
        self.records.extend(records)

    @property
    def numbers(self) -> set[int]:
        return {int(record.value or b"") for record in self.records}


async def accepted(bus: KafkaBus, records: Sequence[Record]) -> None:
    """Publish until the broker takes them; some may arrive twice. The deadlines here are shorter than what a
    busy machine may need."""

    async def taken() -> bool:
        try:
            await bus.publish(records)
        except Unavailable:
            return False
        return True

    await eventually(taken)


async def restarted(server: Server) -> None:
    """Start the killed server as a supervisor does: on the main thread, then wait off the loop."""
    server.prepare()
    server.launch()
    await asyncio.to_thread(server.wait_ready, PATIENCE_S)


async def test_publishing_without_a_broker_fails_at_its_deadline(
    new_tansu: Callable[[], TansuServer],
) -> None:
    server = new_tansu()
    await ensure_topics(server.url, [EVENTS])
    async with KafkaBus(server.url, "test", publish_deadline=1.0) as bus:
        await accepted(bus, numbered(0, 5))
        server.kill()
        async with patience("a publish to end by itself"):
            with pytest.raises(Unavailable):
                await bus.publish(numbered(5, 500))
        await restarted(server)
        await ensure_topics(server.url, [EVENTS])
        await accepted(bus, numbered(500, 505))
        assert await bus.lag(EVENTS, "nobody") >= 5


@pytest.mark.parametrize("factory", ["new_tansu", pytest.param("new_apache_kafka", marks=pytest.mark.kafka)])
async def test_a_bus_may_be_opened_before_its_broker_and_its_topics(
    factory: str, request: pytest.FixtureRequest
) -> None:
    server: Server = request.getfixturevalue(factory)()
    server.kill()
    reader, known = Reader(), dict[bytes, bytes | None]()
    async with (
        KafkaBus(server.url, "test", publish_deadline=0.5, session_timeout=2.0) as bus,
        bus.consume(EVENTS, "g", reader),
        bus.table(STATE, known.__setitem__) as table,
    ):
        with pytest.raises(Unavailable):
            await bus.publish(numbered(0, 1))
        with pytest.raises(Unavailable):
            await table.ready(0.1)
        with pytest.raises(Unavailable):
            await bus.lag(EVENTS, "g")
        await restarted(server)
        await ensure_topics(server.url, [EVENTS, STATE])
        await table.ready(PATIENCE_S)
        await accepted(bus, [*numbered(0, 10), Record(STATE.name, b"a", b"1")])
        await eventually(lambda: reader.numbers == set(range(10)) and known == {b"a": b"1"})


@pytest.mark.parametrize("after", [3, 200], ids=["fewer records than before", "more records than before"])
async def test_a_broker_that_comes_back_empty_is_read_from_its_beginning(
    new_tansu: Callable[[], TansuServer], after: int
) -> None:
    server = new_tansu()
    await ensure_topics(server.url, [EVENTS, STATE])
    reader, known = Reader(), dict[bytes, bytes | None]()
    async with (
        KafkaBus(server.url, "test", session_timeout=2.0) as bus,
        bus.consume(EVENTS, "g", reader),
        bus.table(STATE, known.__setitem__) as table,
    ):
        await table.ready(PATIENCE_S)
        await bus.publish(numbered(0, 60))
        await bus.publish([Record(STATE.name, b"k%d" % i, b"before") for i in range(20)])
        await eventually(lambda: len(reader.numbers) == 60 and len(known) == 20)
        server.kill()
        await restarted(server)
        await ensure_topics(server.url, [EVENTS, STATE])
        await bus.publish(numbered(1000, 1000 + after))
        await bus.publish([Record(STATE.name, b"k%d" % i, b"after") for i in range(after)])
        await eventually(lambda: reader.numbers >= set(range(1000, 1000 + after)))
        await eventually(lambda: all(known.get(b"k%d" % i) == b"after" for i in range(after)))
        assert known.keys() == {b"k%d" % i for i in range(max(20, after))}  # what was known is kept
        await bus.publish([*numbered(5000, 5010), Record(STATE.name, b"late", b"1")])
        await eventually(lambda: reader.numbers >= set(range(5000, 5010)) and b"late" in known)


@pytest.mark.parametrize("noticed", [False, True], ids=["ends at once", "ends after its group joined anew"])
@pytest.mark.parametrize("fails", [False, True], ids=["returns", "raises"])
async def test_a_handler_that_outlives_a_memory_only_broker_hides_nothing_of_the_next(
    new_tansu: Callable[[], TansuServer], *, noticed: bool, fails: bool
) -> None:
    """Its offsets are those of a log that is gone: committed or returned to, they would skip new records."""
    server = new_tansu()
    await ensure_topics(server.url, [EVENTS])
    old, new, again, late = asyncio.Event(), asyncio.Event(), asyncio.Event(), Reader()

    async def slow(records: Sequence[Record]) -> None:
        if old.is_set():
            again.set()
            raise ConnectionError("the process ends before it has handled any of the new records")
        old.set()
        await new.wait()
        if fails:
            raise ConnectionError("the database is away")

    async with KafkaBus(server.url, "test", session_timeout=2.0) as bus:
        await bus.publish(numbered(0, 60))
        async with bus.consume(EVENTS, "g", slow):
            await asyncio.wait_for(old.wait(), PATIENCE_S)
            server.kill()
            await restarted(server)
            await ensure_topics(server.url, [EVENTS])
            await bus.publish(numbered(1000, 1200))
            if noticed:
                await asyncio.sleep(4.0)  # two sessions
            new.set()
            await asyncio.wait_for(again.wait(), PATIENCE_S)
        async with bus.consume(EVENTS, "g", late):
            await eventually(lambda: late.numbers >= set(range(1000, 1200)), on=late.records)
        assert await bus.lag(EVENTS, "g") == 0


@pytest.mark.kafka
async def test_a_durable_broker_killed_under_load_loses_no_logged_event(
    new_apache_kafka: Callable[[], ApacheKafkaServer], tmp_path: Path
) -> None:
    server = new_apache_kafka()
    await ensure_topics(server.url, [EVENTS, STATE])
    reader, known = Reader(), dict[bytes, bytes | None]()
    async with (
        KafkaBus(server.url, "test", publish_deadline=3.0, session_timeout=2.0) as bus,
        bus.consume(EVENTS, "g", reader),
        bus.table(STATE, known.__setitem__) as table,
    ):
        await table.ready(PATIENCE_S)
        log = EventLog(tmp_path, bus, EVENTS.name, clock=CLOCK)
        await log.start()
        for i in range(3000):
            log.append(b"key-%d" % (i % 9), b"%d" % i)
            if i == 1000:
                await eventually(lambda: len(reader.numbers) > 0)
                server.kill()
            if i == 2000:
                await eventually(lambda: log.publish_failures >= 1)
                await restarted(server)
            if i % 10 == 0:
                await asyncio.sleep(0.001)
        await eventually(lambda: log.pending_records == 0)
        await log.close(CLOCK.monotonic() + 5)
        await accepted(bus, [Record(STATE.name, b"a", b"1")])
        await eventually(lambda: reader.numbers == set(range(3000)) and known == {b"a": b"1"})
    async with KafkaBus(server.url, "test", session_timeout=2.0) as bus:
        again = Reader()
        async with bus.consume(EVENTS, "fresh", again):
            await eventually(lambda: again.numbers == set(range(3000)))
        for key in range(9):  # the first arrival of each event is in the order of the appends
            first: dict[int, None] = {}
            for record in again.records:
                if record.key == b"key-%d" % key:
                    first.setdefault(int(record.value or b""))
            assert list(first) == sorted(first)
