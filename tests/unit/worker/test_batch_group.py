"""What the pool's consumer group commits, and what its client says while the broker is away."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from confluent_kafka import TopicPartition

from services.common.bus import Record
from services.common.topics import Topic
from services.worker.batch.group import KafkaChunks
from services.worker.batch.outages import OncePerOutage
from services.worker.batch.port import Delivery

TOPIC = Topic("batch.chunks.test.v1", 2)


class Broker:
    """Stands for the client: takes assignments, and keeps what is committed, and what was paused."""

    def __init__(self) -> None:
        self.committed: list[tuple[int, int]] = []
        self.joins = 0
        self.assigned: list[TopicPartition] = []
        self.paused: set[int] = set()

    def unsubscribe(self) -> None: ...

    def subscribe(self, topics: list[str], **_callbacks: Any) -> None:
        self.joins += 1

    def assign(self, partitions: list[TopicPartition]) -> None:
        self.assigned = partitions

    def unassign(self) -> None:
        self.assigned = []

    def assignment(self) -> list[TopicPartition]:
        return self.assigned

    def resume(self, partitions: list[TopicPartition]) -> None:
        self.paused -= {part.partition for part in partitions}

    def commit(self, *, offsets: list[TopicPartition], asynchronous: bool) -> None:
        self.committed += [(part.partition, part.offset) for part in offsets]


async def turned() -> None:
    """Let the loop take what its thread has told it."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def delivered(chunks: KafkaChunks, partition: int, offset: int) -> Delivery:
    chunks._sent += 1
    chunks._on_record(Record(TOPIC.name, b"k", b"%d" % offset, partition=partition, offset=offset))
    return await chunks.next()


def assigned(chunks: KafkaChunks, broker: Any, *numbers: int) -> None:
    chunks._on_assign(broker, [TopicPartition(TOPIC.name, number) for number in numbers])


async def test_what_is_done_is_committed_before_the_partitions_go() -> None:
    chunks = KafkaChunks("127.0.0.1:1", "test", TOPIC, "test", assignment="range")
    broker: Any = Broker()
    assigned(chunks, broker, 0, 1)
    await turned()
    chunks.settle(await delivered(chunks, 0, 6))
    chunks._on_revoke(broker, [TopicPartition(TOPIC.name, 0)])
    assert broker.committed == [(0, 7)]


async def test_what_was_done_before_the_partitions_were_lost_is_not_committed() -> None:
    chunks = KafkaChunks("127.0.0.1:1", "test", TOPIC, "test", assignment="range")
    broker: Any = Broker()
    assigned(chunks, broker, 0, 1)
    await turned()
    chunks.settle(await delivered(chunks, 0, 6))
    late = await delivered(chunks, 1, 8)
    chunks._on_lost(broker, [TopicPartition(TOPIC.name, number) for number in (0, 1)])
    assigned(chunks, broker, 0, 1)
    chunks.settle(late)  # the loop has not heard of the change yet
    chunks._commit(broker)
    assert broker.committed == []
    await turned()
    chunks.settle(await delivered(chunks, 1, 0))
    chunks._commit(broker)
    assert broker.committed == [(1, 1)]


async def test_what_was_paused_before_a_rebalance_is_read_after_it() -> None:
    chunks = KafkaChunks("127.0.0.1:1", "test", TOPIC, "test", assignment="range")
    broker: Any = Broker()
    assigned(chunks, broker, 0, 1)
    broker.paused, chunks._paused = {0, 1}, True
    chunks._on_revoke(broker, [TopicPartition(TOPIC.name, number) for number in (0, 1)])
    assigned(chunks, broker, 0)
    assert not chunks._paused
    assert broker.paused == {1}


async def test_a_member_that_lost_all_and_was_given_nothing_joins_again() -> None:
    chunks = KafkaChunks("127.0.0.1:1", "test", TOPIC, "test", assignment="range")
    broker: Any = Broker()

    def looks() -> int:
        chunks._rejoin_at = 0.0
        chunks._join_again(broker)
        return int(broker.joins)

    assigned(chunks, broker)
    assert looks() == 0  # there may be more members than partitions
    assigned(chunks, broker, 0, 1)
    chunks._on_lost(broker, [TopicPartition(TOPIC.name, number) for number in (0, 1)])
    assert looks() == 0  # it is being formed anew
    assigned(chunks, broker)
    assert looks() == looks() == 1
    assigned(chunks, broker)
    assert looks() == 2
    assigned(chunks, broker, 0, 1)
    chunks._on_revoke(broker, [TopicPartition(TOPIC.name, number) for number in (0, 1)])
    assigned(chunks, broker)
    assert looks() == 2  # others have them


def test_an_outage_is_said_once_and_as_a_warning() -> None:
    now = 100.0
    said: list[tuple[str, str]] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append((record.levelname, record.getMessage()))

    log = logging.Logger("rdkafka")
    log.addFilter(OncePerOutage(lambda: now))
    log.addHandler(Ear())

    def fails(name: str) -> None:
        log.log(logging.ERROR, "%s [%s] %s", "FAIL", name, "Connection refused")

    for _ in range(40):
        fails("one")
        now += 1.0
    log.warning("SESSTMOUT [one] rejoining")
    log.error("CRTERR [one] no memory")
    now += 60.0
    fails("two")
    assert said == [
        ("WARNING", "FAIL [one] Connection refused"),
        ("WARNING", "SESSTMOUT [one] rejoining"),
        ("ERROR", "CRTERR [one] no memory"),
        ("WARNING", "FAIL [two] Connection refused"),
    ]
