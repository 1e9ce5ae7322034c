"""Dead-letter queues looked at and replayed, on the embedded broker and on Apache Kafka."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import CoordinatorLoadInProgressError
from aiokafka.protocol.commit import OffsetFetchRequest, OffsetFetchResponse_v3

from services.common.bus import DeadLetters, KafkaBus, Malformed, Record
from services.common.bus.admin import ensure_topics
from services.common.bus.port import MAX_RECORD_BYTES
from services.common.errors import NotFound, Unavailable
from services.common.topics import REPLAY, Topic, dead_letters
from tests.fixtures.waiting import eventually


class OverBroker:
    @pytest.fixture
    def topic(self) -> Topic:
        return Topic(f"test.{uuid.uuid4().hex[:12]}.v1", partitions=2)

    @pytest.fixture
    async def bus(self, bootstrap: str, topic: Topic) -> AsyncIterator[KafkaBus]:
        await ensure_topics(bootstrap, [topic, dead_letters(topic, topic.name)])
        async with KafkaBus(bootstrap, "test", session_timeout=2.0) as bus:
            yield bus

    async def test_a_poisoned_record_is_shown_with_its_reason_and_comes_back(
        self, bootstrap: str, bus: KafkaBus, topic: Topic
    ) -> None:
        seen: dict[tuple[int, int], Record] = {}  # by place: a record may be delivered more than once
        healed = False

        async def handler(records: Sequence[Record]) -> None:
            for index, record in enumerate(records):
                if record.value == b"bad" and not healed:
                    raise Malformed(index, "cannot be read")
            seen.update({(record.partition, record.offset): record for record in records})

        office = DeadLetters(bootstrap, bus.publish)
        queue = dead_letters(topic, topic.name).name
        sent = [Record(topic.name, b"k", value, (("trace", b"1"),)) for value in (b"a", b"bad", b"b", b"bad")]
        async with bus.consume(topic, topic.name, handler):
            await bus.publish(sent)
            await eventually(lambda: len(seen) == 2)
            letters = await office.letters(queue, 10)
            assert [letter.record.value for letter in letters] == [b"bad", b"bad"]
            assert {letter.reason for letter in letters} == {"cannot be read"}
            assert {letter.topic for letter in letters} == {topic.name}
            assert letters[0].record.headers == (("trace", b"1"),)
            assert letters[0].offset < letters[1].offset
            assert await _waiting(office, queue) == 2
            assert len(await office.letters(queue, 1)) == 1

            healed = True
            assert await office.replay(queue, 1) == 1
            await eventually(lambda: len(seen) == 3)
            assert await _waiting(office, queue) == 1
            assert await office.replay(queue, 10) == 1
            assert await office.replay(queue, 10) == 0
            await eventually(lambda: len(seen) == 4)
        assert await office.letters(queue, 10) == []
        last = seen[max(seen)]
        assert last == Record(
            topic.name,
            b"k",
            b"bad",
            (("trace", b"1"),),
            partition=last.partition,
            offset=last.offset,
            timestamp_ms=last.timestamp_ms,
        )

    async def test_what_was_replayed_is_known_to_a_broker_that_loads_its_groups(
        self, bootstrap: str, bus: KafkaBus, topic: Topic, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It says so for a while after it has started; aiokafka takes that for a group without a mark."""
        office = DeadLetters(bootstrap, bus.publish)
        queue = dead_letters(topic, topic.name).name
        await bus.publish([Record(queue, b"k", b"v", (("dlq-topic", topic.name.encode()),))])
        assert await office.replay(queue, 10) == 1
        send, loading = AIOKafkaClient.send, 0

        async def answered(self: AIOKafkaClient, node_id: int, request: Any, **options: Any) -> Any:
            nonlocal loading
            if isinstance(request, OffsetFetchRequest) and loading:
                loading -= 1
                return OffsetFetchResponse_v3(0, [], CoordinatorLoadInProgressError.errno)
            return await send(self, node_id, request, **options)

        monkeypatch.setattr(AIOKafkaClient, "send", answered)
        loading = 2
        assert await office.replay(queue, 10) == 0
        loading = 2
        assert await office.letters(queue, 10) == []
        loading = 2
        assert await _waiting(office, queue) == 0
        loading = 2
        assert await bus.lag(Topic(queue), REPLAY) == 0
        assert loading == 0

    @pytest.mark.parametrize(
        ("value", "headers"),
        [(b"bad", [("content-type", None)]), (bytes(MAX_RECORD_BYTES + 1000), [("name", b"v")])],
        ids=["null header", "too large"],
    )
    async def test_whatever_a_broker_takes_from_others_fits_into_the_queue(
        self,
        bootstrap: str,
        bus: KafkaBus,
        topic: Topic,
        value: bytes,
        headers: list[tuple[str, bytes | None]],
    ) -> None:
        """What could not be buried would hold up everything behind it for ever."""
        seen: list[Record] = []

        async def handler(records: Sequence[Record]) -> None:
            for index, record in enumerate(records):
                if record.value != b"good":
                    raise Malformed(index, "cannot be read")
            seen.extend(records)

        async with AIOKafkaProducer(bootstrap_servers=bootstrap, max_request_size=32 << 20) as others:
            await others.send_and_wait(topic.name, value, key=b"k", headers=headers)
            await others.send_and_wait(topic.name, b"good", key=b"k")
        async with bus.consume(topic, topic.name, handler):
            await eventually(lambda: len(seen) == 1)
        queue = dead_letters(topic, topic.name).name
        (letter,) = await DeadLetters(bootstrap, bus.publish).letters(queue, 10)
        assert (letter.topic, letter.record.key) == (topic.name, b"k")
        assert letter.reason.endswith("cannot be read")
        assert value.startswith(letter.record.value or b"none")

    async def test_a_header_that_is_null_is_no_obstacle(
        self, bootstrap: str, bus: KafkaBus, topic: Topic
    ) -> None:
        """Of a record that was put into the queue by others, by a tool for such queues, say."""
        queue = dead_letters(topic, topic.name).name
        headers = [("dlq-topic", topic.name.encode()), ("dlq-reason", None), ("content-type", None)]
        async with AIOKafkaProducer(bootstrap_servers=bootstrap) as others:
            await others.send_and_wait(queue, b"v", key=b"k", headers=headers)
        office = DeadLetters(bootstrap, bus.publish)
        (letter,) = await office.letters(queue, 10)
        assert (letter.topic, letter.reason) == (topic.name, "")
        assert letter.record.headers == (("content-type", b""),)
        assert await office.replay(queue, 10) == 1

    async def test_only_queues_can_be_replayed(self, bootstrap: str, bus: KafkaBus, topic: Topic) -> None:
        office = DeadLetters(bootstrap, bus.publish)
        for name in (topic.name, "nothing.dlq"):
            with pytest.raises(NotFound) as refused:
                await office.replay(name, 1)
            assert refused.value.field == "topic"
        assert topic.name not in {queue.topic for queue in await office.queues()}


async def _waiting(office: DeadLetters, name: str) -> int:
    return next(queue.waiting for queue in await office.queues() if queue.topic == name)


class TestOnTheEmbeddedBroker(OverBroker):
    @pytest.fixture
    def bootstrap(self, kafka_bootstrap: str) -> str:
        return kafka_bootstrap


@pytest.mark.kafka
class TestOnApacheKafka(OverBroker):
    @pytest.fixture
    def bootstrap(self, apache_kafka: str) -> str:
        return apache_kafka


async def test_a_broker_that_is_away_is_told_so() -> None:
    async def publish(_records: Sequence[Record]) -> None:
        raise AssertionError("nothing to publish")

    with pytest.raises(Unavailable):
        await DeadLetters("127.0.0.1:1", publish).queues()
