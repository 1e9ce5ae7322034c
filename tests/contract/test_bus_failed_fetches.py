"""Following goes on where a consumer is stopped right after its fetch has failed: aiokafka rests then, and
ends whoever stops it."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer
from aiokafka.errors import KafkaConnectionError

from services.common.bus import Follower, KafkaBus, Record, follower
from services.common.bus.admin import ensure_topics
from services.common.errors import Unavailable
from services.common.topics import Topic
from tests.fixtures.waiting import eventually


async def test_a_follower_survives_a_failed_fetch(
    kafka_bootstrap: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = Topic(f"state.{uuid.uuid4().hex[:12]}.v1", partitions=1, compacted=True)
    await ensure_topics(kafka_bootstrap, [topic])
    seen: dict[bytes, bytes | None] = {}
    following = Follower(kafka_bootstrap, "test")
    consumers: list[AIOKafkaConsumer] = []
    new_consumer, next_of = following._new_consumer, following._next
    failed = False

    def kept() -> AIOKafkaConsumer:
        consumers.append(new_consumer())
        return consumers[-1]

    async def send(*_: Any, **__: Any) -> None:
        nonlocal failed
        failed = True
        raise KafkaConnectionError("as it happens")

    async def next_batches(consumer: AIOKafkaConsumer) -> follower.Batches:
        if failed and consumer is consumers[0]:
            raise Unavailable("the broker did not tell its topics")
        return await next_of(consumer)

    monkeypatch.setattr(following, "_new_consumer", kept)
    monkeypatch.setattr(following, "_next", next_batches)
    async with KafkaBus(kafka_bootstrap, "test") as bus, following.table(topic, seen.__setitem__) as table:
        await table.ready(30)
        # Its next fetch fails, and it rests for longer than anybody waits here.
        monkeypatch.setattr(consumers[0]._fetcher, "_retry_backoff", 3600)
        monkeypatch.setattr(consumers[0]._client, "send", send)
        await eventually(lambda: failed)
        await eventually(lambda: len(consumers) == 2)
        await bus.publish([Record(topic.name, b"key", b"value")])
        await eventually(lambda: seen.get(b"key") == b"value", on=seen)
