"""What aiokafka makes of what a quiet bus asks of it: fetches wait as long as was said last, and records are
taken when they come."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.fetch import FetchRequest

from services.common.bus import Follower, KafkaBus, Record, fetch_wait
from services.common.bus.admin import ensure_topics
from services.common.topics import Topic
from tests.fixtures.waiting import PATIENCE_S, eventually


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How long the fetches may wait that were sent, ms."""
    sent: list[int] = []
    send = AIOKafkaClient.send

    async def noted(self: AIOKafkaClient, node_id: int, request: Any, **options: Any) -> Any:
        if isinstance(request, FetchRequest):
            sent.append(request._max_wait_ms)
        return await send(self, node_id, request, **options)

    monkeypatch.setattr(AIOKafkaClient, "send", noted)
    return sent


@pytest.fixture
async def topic(kafka_bootstrap: str) -> Topic:
    made = Topic(f"quiet.{uuid.uuid4().hex[:12]}.v1", partitions=1)
    await ensure_topics(kafka_bootstrap, [made])
    return made


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets after how many seconds it is quiet."""

    def after(seconds: float) -> None:
        monkeypatch.setattr(fetch_wait, "QUIET_AFTER_S", seconds)

    return after


async def test_a_follower_asks_to_wait_longer_when_it_is_quiet(
    kafka_bootstrap: str, topic: Topic, waits: list[int], hurried: Callable[[float], None]
) -> None:
    seen: dict[bytes, bytes | None] = {}
    hurried(0.5)
    following = Follower(kafka_bootstrap, "test")
    async with KafkaBus(kafka_bootstrap, "test") as bus, following.table(topic, seen.__setitem__) as table:
        await table.ready(PATIENCE_S)
        assert waits[0] == 250
        await eventually(lambda: waits[-1] == 500)
        hurried(3600.0)
        await bus.publish([Record(topic.name, b"key", b"value")])
        await eventually(lambda: seen == {b"key": b"value"} and waits[-1] == 250)


async def test_a_member_asks_to_wait_longer_when_it_is_quiet_and_takes_what_comes(
    kafka_bootstrap: str,
    topic: Topic,
    waits: list[int],
    hurried: Callable[[float], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Record] = []
    looks = 0
    get_many = AIOKafkaConsumer.getmany

    async def counted(self: Any, *partitions: Any, **options: Any) -> Any:
        nonlocal looks
        looks += 1
        return await get_many(self, *partitions, **options)

    async def handler(records: Sequence[Record]) -> None:
        seen.extend(records)

    monkeypatch.setattr(AIOKafkaConsumer, "getmany", counted)
    hurried(0.5)
    bus = KafkaBus(kafka_bootstrap, "test", session_timeout=1.0)
    async with bus, bus.consume(topic, "group", handler):
        await eventually(lambda: waits)
        assert waits[0] == 250
        await eventually(lambda: waits[-1] == 500)
        fetches, before = len(waits), looks
        await eventually(lambda: len(waits) >= fetches + 4)
        # It sleeps until something comes, for a second at most, and so for two fetches.
        assert looks - before <= 4
        hurried(3600.0)
        await bus.publish([Record(topic.name, b"key", b"value")])
        await eventually(lambda: seen and waits[-1] == 250)
