"""A member that loses partitions while it is at their records goes on with those that it has."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition

from services.common.bus import KafkaBus, Record, membership
from services.common.bus.admin import ensure_topics
from services.common.topics import Topic
from tests.fixtures.waiting import PATIENCE_S, eventually, eventually_of


@pytest.fixture
async def topic(kafka_bootstrap: str) -> Topic:
    made = Topic(f"left.{uuid.uuid4().hex[:12]}.v1", partitions=4)
    await ensure_topics(kafka_bootstrap, [made])
    return made


async def test_what_was_read_since_is_handled(kafka_bootstrap: str, topic: Topic) -> None:
    """How far a partition goes aiokafka tells of its own ones only, with an AssertionError of others."""
    released, began = asyncio.Event(), asyncio.Event()
    first: list[Record] = []
    second: list[Record] = []

    async def slow(records: Sequence[Record]) -> None:
        began.set()
        await released.wait()
        first.extend(records)

    async def quick(records: Sequence[Record]) -> None:
        second.extend(records)

    async with (
        KafkaBus(kafka_bootstrap, "one", session_timeout=2.0) as one,
        KafkaBus(kafka_bootstrap, "two", session_timeout=2.0) as two,
    ):
        await one.publish([Record(topic.name, b"key-%d" % number, b"v") for number in range(40)])
        async with one.consume(topic, topic.name, slow, collect_s=0.1):
            await asyncio.wait_for(began.wait(), PATIENCE_S)
            async with two.consume(topic, topic.name, quick, collect_s=0.1):
                # The second has its half, and so the first has read its own again.
                await eventually(lambda: len(second) > 0)
                released.set()
                await eventually_of(lambda: one.lag(topic, topic.name), lambda lag: lag == 0)


async def test_consuming_goes_on_where_a_partition_goes_while_it_is_looked_at(
    kafka_bootstrap: str, topic: Topic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where positions are asked for that are being reset: another member joins meanwhile, and aiokafka
    asserts that what it is asked for next is still its own."""
    seen: list[bytes | None] = []
    asked = False
    highwater = AIOKafkaConsumer.highwater

    def gone_at_first(self: AIOKafkaConsumer, partition: TopicPartition) -> int | None:
        nonlocal asked
        assert asked or not (asked := True), "Partition is not assigned"
        mark: int | None = highwater(self, partition)
        return mark

    async def handler(records: Sequence[Record]) -> None:
        seen.extend(record.value for record in records)

    monkeypatch.setattr(membership, "CHECK_INTERVAL", 0.1)
    async with (
        KafkaBus(kafka_bootstrap, "test", session_timeout=2.0) as bus,
        bus.consume(topic, topic.name, handler),
    ):
        await bus.publish([Record(topic.name, b"k", b"1")])
        await eventually(lambda: b"1" in seen, on=seen)
        monkeypatch.setattr(AIOKafkaConsumer, "highwater", gone_at_first)
        await eventually(lambda: asked)
        await bus.publish([Record(topic.name, b"k", b"2")])
        await eventually(lambda: b"2" in seen, on=seen)
