"""What a handler did not return from is not committed, however it ended."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from aiokafka import TopicPartition

from services.common.bus import Record
from services.common.bus.consume import Subscription
from services.common.topics import Topic
from tests.fixtures.waiting import eventually

_TOPIC = Topic("test.events.v1", partitions=1)
_PARTITION = TopicPartition(_TOPIC.name, 0)


class _Consumer:
    """The part of aiokafka's that a subscription uses, with one partition."""

    def __init__(self) -> None:
        self.position = 0
        self.committed = 0

    def assignment(self) -> set[TopicPartition]:
        return {_PARTITION}

    def pause(self, *partitions: TopicPartition) -> None:
        pass

    def resume(self, *partitions: TopicPartition) -> None:
        pass

    def seek(self, _partition: TopicPartition, offset: int) -> None:
        self.position = offset

    async def commit(self, offsets: dict[TopicPartition, int]) -> None:
        self.committed = offsets[_PARTITION]

    def read(self, count: int) -> list[Any]:
        first, self.position = self.position, self.position + count
        return [
            SimpleNamespace(
                topic=_TOPIC.name, partition=0, offset=offset, key=b"k", value=b"", headers=(), timestamp=0
            )
            for offset in range(first, self.position)
        ]


async def test_a_handler_that_waited_for_something_cancelled_gets_its_records_again() -> None:
    shared: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    handled: list[int] = []

    async def handle(records: Sequence[Record]) -> None:
        if not shared.cancelled():
            await shared
        handled.extend(record.offset for record in records)

    async def publish(_records: Sequence[Record]) -> None:
        raise AssertionError("nothing is malformed")

    consumer: Any = _Consumer()
    subscription = Subscription(_TOPIC, "group", handle, publish=publish, max_records=10, collect_s=0.0)
    subscription.take(consumer, consumer.read(2))
    await asyncio.sleep(0)
    subscription.take(consumer, consumer.read(1))  # which waits behind them
    shared.cancel()
    await eventually(lambda: not subscription.is_busy)
    assert (handled, consumer.committed, consumer.position) == ([], 0, 0)
    subscription.take(consumer, consumer.read(3))
    await eventually(lambda: consumer.committed == 3)
    assert handled == [0, 1, 2]
    await subscription.stop(1.0)
