"""One contract for every bus: in memory, over the embedded broker, over Apache Kafka."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import anyio.to_thread
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType

from services.common.bus import Bus, Handler, KafkaBus, Malformed, MemoryBus, Record, Standing
from services.common.bus.admin import ensure_topics
from services.common.bus.port import MAX_RECORD_BYTES
from services.common.errors import InvalidArgument, Unavailable
from services.common.topics import DEPLOYMENTS, KEYS, WORKERS, Topic, dead_letters
from tests.fixtures.waiting import PATIENCE_S, eventually, eventually_of, patience


def values(records: Sequence[Record]) -> list[bytes | None]:
    return [record.value for record in records]


def numbered(topic: Topic, count: int, keys: int = 5, start: int = 0) -> list[Record]:
    return [Record(topic.name, b"key-%d" % (i % keys), b"%d" % i) for i in range(start, start + count)]


def all_of(records: Sequence[Record], count: int) -> bool:
    return len(records) == count


class BusContract:
    """What a service may rely on. Each implementation provides `bus`, over which `topics` exist."""

    @pytest.fixture
    def topic(self) -> Topic:
        return Topic(f"test.{uuid.uuid4().hex[:12]}.v1", partitions=4)

    @pytest.fixture
    def state(self) -> Topic:
        return Topic(f"state.{uuid.uuid4().hex[:12]}.v1", partitions=1, compacted=True)

    @pytest.fixture
    def second(self) -> Topic:
        return Topic(f"second.{uuid.uuid4().hex[:12]}.v1", partitions=2)

    async def test_delivers_what_was_published_as_it_was_published(self, bus: Bus, topic: Topic) -> None:
        seen: list[Record] = []

        async def handler(records: Sequence[Record]) -> None:
            seen.extend(records)

        binary = bytes(range(256))
        sent = Record(
            topic.name,
            b"k",
            binary,
            (("traceparent", b"00-ab"), ("raw", b"\xff\x00")),
            timestamp_ms=1_750_000_000_123,
        )
        await bus.publish([sent, Record(topic.name, None, b"no key"), Record(topic.name, b"k", None)])
        async with bus.consume(topic, topic.name, handler):
            await eventually(lambda: len(seen) == 3)
        by_value = {record.value: record for record in seen}
        got = by_value[binary]
        assert (got.topic, got.key, got.headers, got.timestamp_ms) == (
            topic.name,
            b"k",
            sent.headers,
            sent.timestamp_ms,
        )
        assert by_value[b"no key"].key is None
        assert by_value[None].key == b"k"
        assert by_value[None].offset > got.offset
        assert by_value[None].partition == got.partition

    async def test_keeps_the_order_of_each_key_over_many_publishes(self, bus: Bus, topic: Topic) -> None:
        seen: list[Record] = []

        async def handler(records: Sequence[Record]) -> None:
            assert len(records) <= 50
            seen.extend(records)

        async with bus.consume(topic, topic.name, handler, max_records=50):
            for start in range(0, 600, 60):
                await bus.publish(numbered(topic, 60, keys=7, start=start))
            await eventually(lambda: len(seen) >= 600)
        per_key: dict[bytes | None, list[int]] = defaultdict(list)
        for record in seen:
            per_key[record.key].append(int(record.value or b""))
        assert sorted(number for numbers in per_key.values() for number in numbers) == list(range(600))
        assert all(numbers == sorted(numbers) for numbers in per_key.values())
        assert len({record.partition for record in seen}) > 1

    async def test_collects_what_comes_close_together_where_asked_to(self, bus: Bus, topic: Topic) -> None:
        sizes: list[int] = []

        async def handler(records: Sequence[Record]) -> None:
            sizes.append(len(records))

        async with bus.consume(topic, topic.name, handler, collect_s=1.0):
            await bus.publish(numbered(topic, 1, keys=1))
            await eventually(lambda: sizes == [1])
            for start in range(1, 41):
                await bus.publish(numbered(topic, 1, keys=1, start=start))
            await eventually(lambda: sum(sizes) == 41)
        # One delivery follows the first after the second, and holds nearly everything.
        assert len(sizes) <= 6

    async def test_redelivers_until_the_handler_returns(self, bus: Bus, topic: Topic) -> None:
        attempts: list[list[Record]] = []
        accepted: list[Record] = []

        async def handler(records: Sequence[Record]) -> None:
            attempts.append(list(records))
            if len(attempts) <= 3:
                raise ConnectionError("the database is away")
            accepted.extend(records)

        await bus.publish(numbered(topic, 20))
        async with bus.consume(topic, topic.name, handler, max_records=6):
            await eventually(lambda: len(accepted) >= 20)
        assert sorted(int(record.value or b"") for record in accepted) == list(range(20))
        for partition in {record.partition for record in accepted}:
            offsets = [record.offset for record in accepted if record.partition == partition]
            assert offsets == list(range(len(offsets)))
        assert len(attempts) > 3

    async def test_a_group_goes_on_behind_what_it_committed(self, bus: Bus, topic: Topic) -> None:
        first: list[Record] = []
        second: list[Record] = []
        other: list[Record] = []

        def into(target: list[Record]) -> Handler:
            async def handler(records: Sequence[Record]) -> None:
                target.extend(records)

            return handler

        await bus.publish(numbered(topic, 30))
        async with bus.consume(topic, topic.name, into(first)):
            await eventually(lambda: len(first) == 30)
        await bus.publish(numbered(topic, 10, start=30))
        async with (
            bus.consume(topic, topic.name, into(second)),
            bus.consume(topic, "other", into(other)),
        ):
            await eventually(lambda: len(second) >= 10 and len(other) >= 40)
        assert sorted(int(v or b"") for v in values(second)) == list(range(30, 40))
        assert sorted(int(v or b"") for v in values(other)) == list(range(40))

    async def test_a_handler_that_fails_to_the_end_commits_nothing(self, bus: Bus, topic: Topic) -> None:
        failed = asyncio.Event()
        seen: list[Record] = []

        async def failing(records: Sequence[Record]) -> None:
            failed.set()
            raise RuntimeError("still broken")

        async def working(records: Sequence[Record]) -> None:
            seen.extend(records)

        await bus.publish(numbered(topic, 8))
        async with bus.consume(topic, topic.name, failing):
            await asyncio.wait_for(failed.wait(), PATIENCE_S)
        assert await bus.lag(topic, topic.name) == 8
        async with bus.consume(topic, topic.name, working):
            await eventually(lambda: len(seen) >= 8)
        assert sorted(int(v or b"") for v in values(seen)) == list(range(8))

    async def test_malformed_records_go_to_the_dead_letters_and_the_rest_is_handled(
        self, bus: Bus, topic: Topic
    ) -> None:
        accepted: list[Record] = []
        buried: list[Record] = []
        outages = 1

        async def handler(records: Sequence[Record]) -> None:
            nonlocal outages
            for index, record in enumerate(records):
                if int(record.value or b"") % 5 == 3:
                    raise Malformed(index, "not a prediction")
            if outages:  # the batch fails after its malformed records were buried: they must not come again
                outages -= 1
                raise ConnectionError("the database is away")
            accepted.extend(records)

        async def undertaker(records: Sequence[Record]) -> None:
            buried.extend(records)

        await bus.publish(numbered(topic, 20, keys=3))
        async with (
            bus.consume(topic, topic.name, handler),
            bus.consume(dead_letters(topic, topic.name), "operator", undertaker),
        ):
            await eventually(lambda: len(accepted) >= 16 and len(buried) >= 4)
            await asyncio.sleep(0.1)
        assert sorted(int(v or b"") for v in values(accepted)) == [i for i in range(20) if i % 5 != 3]
        assert sorted(int(v or b"") for v in values(buried)) == [3, 8, 13, 18]
        headers = dict(buried[0].headers)
        assert headers["dlq-reason"] == b"not a prediction"
        assert headers["dlq-topic"].decode() == topic.name
        assert headers["dlq-offset"].isdigit()

    async def test_a_record_that_is_too_large_is_refused_by_name(self, bus: Bus, topic: Topic) -> None:
        with pytest.raises(InvalidArgument, match=topic.name):
            await bus.publish([Record(topic.name, b"k", bytes(MAX_RECORD_BYTES))])
        await bus.publish([Record(topic.name, b"k", bytes(MAX_RECORD_BYTES - 1000), (("name", b"v"),))])
        assert await bus.lag(topic, topic.name) == 1

    async def test_lag_counts_what_is_not_committed(self, bus: Bus, topic: Topic) -> None:
        seen: list[Record] = []

        async def handler(records: Sequence[Record]) -> None:
            seen.extend(records)

        assert await bus.lag(topic, topic.name) == 0
        await bus.publish(numbered(topic, 40))
        assert await bus.lag(topic, topic.name) == 40
        async with bus.consume(topic, topic.name, handler):
            await eventually(lambda: len(seen) == 40)
        assert await bus.lag(topic, topic.name) == 0
        await bus.publish(numbered(topic, 3))
        assert await bus.lag(topic, topic.name) == 3

    async def test_all_standings_are_told_at_once(self, bus: Bus, topic: Topic, second: Topic) -> None:
        handled: list[Record] = []

        async def handler(records: Sequence[Record]) -> None:
            handled.extend(records)

        await bus.publish([*numbered(topic, 40), *numbered(second, 7)])
        async with bus.consume(topic, topic.name, handler):
            await eventually(lambda: len(handled) == 40)
        asked = [(second, topic.name), (topic, topic.name), (topic, "nobody")]
        assert await bus.standings(asked) == [Standing(7, 7), Standing(40, 0), Standing(40, 40)]
        assert await bus.standings([]) == []

    async def test_members_of_a_group_share_the_partitions(self, bus: Bus, topic: Topic) -> None:
        seen: tuple[list[Record], list[Record]] = ([], [])

        async def left(records: Sequence[Record]) -> None:
            seen[0].extend(records)

        async def right(records: Sequence[Record]) -> None:
            seen[1].extend(records)

        async with bus.consume(topic, topic.name, left), bus.consume(topic, topic.name, right):
            async with patience("both members to get records"):
                start = 0
                while not (seen[0] and seen[1]):  # a join takes its time, and all may go to one until then
                    await bus.publish(numbered(topic, 16, keys=16, start=start))
                    start += 16
                    await asyncio.sleep(0.1)
            await eventually(lambda: len({*values(seen[0]), *values(seen[1])}) == start)

    async def test_a_handler_that_hangs_or_fails_holds_up_no_other_topic_of_its_group(
        self, bus: Bus, topic: Topic, second: Topic
    ) -> None:
        released = asyncio.Event()
        tried: list[int] = []
        stuck: list[Record] = []
        free: list[Record] = []

        async def hanging(records: Sequence[Record]) -> None:
            tried.append(len(records))
            if len(tried) == 1:
                raise ConnectionError("the database is away")
            await released.wait()
            stuck.extend(records)

        async def working(records: Sequence[Record]) -> None:
            free.extend(records)

        async with (
            bus.consume(topic, topic.name, hanging, max_records=5),
            bus.consume(second, topic.name, working),
        ):
            for start in range(0, 60, 20):
                await bus.publish([*numbered(topic, 20, start=start), *numbered(second, 20, start=start)])
                await eventually(partial(all_of, free, start + 20), on=free)
            assert not stuck
            await eventually(lambda: len(tried) > 1)
            released.set()
            await eventually(lambda: len(stuck) == 60, on=stuck)
        assert max(tried) <= 5
        for partition in {record.partition for record in stuck}:
            offsets = [record.offset for record in stuck if record.partition == partition]
            assert offsets == list(range(len(offsets)))
        assert await bus.lag(topic, topic.name) == await bus.lag(second, topic.name) == 0

    async def test_a_topic_that_a_group_leaves_is_taken_up_where_it_was_left(
        self, bus: Bus, topic: Topic, second: Topic
    ) -> None:
        left: list[Record] = []
        stayed: list[Record] = []
        taken_up: list[Record] = []

        def into(target: list[Record]) -> Handler:
            async def handler(records: Sequence[Record]) -> None:
                target.extend(records)

            return handler

        async with bus.consume(second, topic.name, into(stayed)):
            async with bus.consume(topic, topic.name, into(left)):
                await bus.publish([*numbered(topic, 10), *numbered(second, 10)])
                await eventually(lambda: len(left) == len(stayed) == 10)
            await bus.publish([*numbered(topic, 5, start=10), *numbered(second, 5, start=10)])
            async with bus.consume(topic, topic.name, into(taken_up)):
                await eventually(lambda: set(values(taken_up)) == {b"%d" % i for i in range(10, 15)})
                await eventually(lambda: set(values(stayed)) == {b"%d" % i for i in range(15)})
        assert len(left) == 10

    async def test_a_table_that_comes_late_is_told_everything_and_the_first_only_what_is_new(
        self, bus: Bus, state: Topic
    ) -> None:
        first: list[tuple[bytes, bytes | None]] = []
        late: dict[bytes, bytes | None] = {}
        await bus.publish([Record(state.name, b"a", b"1"), Record(state.name, b"b", b"2")])
        async with bus.table(state, lambda key, value: first.append((key, value))) as table:
            await table.ready(PATIENCE_S)
            await bus.publish([Record(state.name, b"a", b"3")])
            await eventually(lambda: len(first) == 3, on=first)
            async with bus.table(state, late.__setitem__) as other:
                await other.ready(PATIENCE_S)
                assert late == {b"a": b"3", b"b": b"2"}
                await bus.publish([Record(state.name, b"c", b"4")])
                await eventually(lambda: b"c" in late and len(first) >= 4, on=first)
            await bus.publish([Record(state.name, b"d", b"5")])
            await eventually(lambda: len(first) >= 5, on=first)
            assert table.readings == 1
        assert first == [(b"a", b"1"), (b"b", b"2"), (b"a", b"3"), (b"c", b"4"), (b"d", b"5")]
        assert b"d" not in late

    async def test_a_table_applies_the_last_value_of_each_key_then_every_change(
        self, bus: Bus, state: Topic
    ) -> None:
        applied: list[tuple[bytes, bytes | None]] = []
        for i in range(30):
            await bus.publish([Record(state.name, b"m%d" % (i % 3), b"%d" % i)])
        await bus.publish([Record(state.name, b"m1", None)])
        async with bus.table(state, lambda key, value: applied.append((key, value))) as table:
            await table.ready(PATIENCE_S)
            assert table.caught_up
            assert sorted(applied) == [(b"m0", b"27"), (b"m1", None), (b"m2", b"29")]
            applied.clear()
            await bus.publish([Record(state.name, b"m0", b"x"), Record(state.name, b"m0", b"y")])
            await eventually(lambda: len(applied) >= 2)
            assert applied == [(b"m0", b"x"), (b"m0", b"y")]

    async def test_a_table_of_an_empty_topic_is_ready(self, bus: Bus, state: Topic) -> None:
        async with bus.table(state, lambda key, value: None) as table:
            await table.ready(PATIENCE_S)
            assert table.readings == 1

    async def test_a_table_survives_values_that_are_refused(self, bus: Bus, state: Topic) -> None:
        applied: list[bytes] = []

        def apply(key: bytes, value: bytes | None) -> None:
            if value == b"bad":
                raise ValueError("unreadable")
            applied.append(key)

        await bus.publish([Record(state.name, b"a", b"bad"), Record(state.name, b"b", b"good")])
        async with bus.table(state, apply) as table:
            await table.ready(PATIENCE_S)
            await bus.publish([Record(state.name, b"c", b"bad"), Record(state.name, b"d", b"good")])
            await eventually(lambda: len(applied) >= 2)
        assert applied == [b"b", b"d"]

    async def test_every_table_reads_everything(self, bus: Bus, state: Topic) -> None:
        one: dict[bytes, bytes | None] = {}
        two: dict[bytes, bytes | None] = {}
        await bus.publish([Record(state.name, b"a", b"1"), Record(state.name, b"b", b"2")])
        async with bus.table(state, one.__setitem__) as first, bus.table(state, two.__setitem__) as second:
            await first.ready(PATIENCE_S)
            await second.ready(PATIENCE_S)
        assert one == two == {b"a": b"1", b"b": b"2"}


class TestMemoryBus(BusContract):
    @pytest.fixture
    def bus(self, topic: Topic, second: Topic, state: Topic) -> Bus:
        return MemoryBus([topic, second, state])

    async def test_publishing_fails_while_the_broker_is_away(self, topic: Topic) -> None:
        bus = MemoryBus([topic])
        bus.away = True
        with pytest.raises(Unavailable):
            await bus.publish(numbered(topic, 1))
        assert bus.records(topic.name) == []

    async def test_a_broker_that_lost_everything_is_read_again(self, topic: Topic, state: Topic) -> None:
        bus = MemoryBus([topic, state])
        seen: list[Record] = []
        known: dict[bytes, bytes | None] = {}

        async def handler(records: Sequence[Record]) -> None:
            seen.extend(records)

        await bus.publish([*numbered(topic, 5), Record(state.name, b"a", b"1")])
        async with bus.consume(topic, topic.name, handler), bus.table(state, known.__setitem__) as table:
            await table.ready(PATIENCE_S)
            await eventually(lambda: len(seen) == 5)
            bus.lose_everything()
            await bus.publish([*numbered(topic, 9, start=100), Record(state.name, b"b", b"2")])
            await eventually(lambda: len(seen) == 14 and b"b" in known)
            assert table.readings == 2
        assert known == {b"a": b"1", b"b": b"2"}


class OverKafka(BusContract):
    """The contract over a broker: `bootstrap` is provided by the subclass."""

    @pytest.fixture
    async def bus(self, bootstrap: str, topic: Topic, second: Topic, state: Topic) -> AsyncIterator[Bus]:
        await ensure_topics(bootstrap, [topic, second, state, dead_letters(topic, topic.name)])
        async with KafkaBus(bootstrap, "contract", session_timeout=2.0) as bus:
            yield bus

    async def test_topics_are_created_once_with_their_partitions(self, bootstrap: str, topic: Topic) -> None:
        assert await ensure_topics(bootstrap, [topic]) == [topic.name]
        assert await ensure_topics(bootstrap, [topic]) == []

    async def test_a_topic_that_is_not_there_holds_up_no_other_table(
        self, bootstrap: str, bus: Bus, state: Topic
    ) -> None:
        absent: dict[bytes, bytes | None] = {}
        known: dict[bytes, bytes | None] = {}
        later = replace(state, name=f"later.{uuid.uuid4().hex[:12]}.v1")
        async with bus.table(later, absent.__setitem__) as late, bus.table(state, known.__setitem__) as table:
            await table.ready(PATIENCE_S)
            await bus.publish([Record(state.name, b"a", b"1")])
            await eventually(lambda: b"a" in known)
            assert not late.caught_up
            await ensure_topics(bootstrap, [later])
            await bus.publish([Record(later.name, b"b", b"2")])
            await eventually(lambda: absent == {b"b": b"2"})
        assert known == {b"a": b"1"}

    async def test_what_the_broker_does_not_know_hides_no_other_and_all_share_two_connections(
        self, bus: Bus, topic: Topic, second: Topic, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened: list[tuple[str, int]] = []
        connect = asyncio.get_running_loop().create_connection

        async def counted(factory: Any, host: str, port: int, **options: Any) -> Any:
            opened.append((host, port))
            return await connect(factory, host, port, **options)

        await bus.publish([*numbered(topic, 5), *numbered(second, 5)])
        absent = replace(topic, name="never.made.v1")
        monkeypatch.setattr(asyncio.get_running_loop(), "create_connection", counted)
        asked = [(topic, "g"), (absent, "g"), (second, "g"), (second, "other")]
        assert await bus.standings(asked) == [Standing(5, 5), None, Standing(5, 5), Standing(5, 5)]
        together = len(opened)
        opened.clear()
        assert await bus.standings(asked[:1]) == [Standing(5, 5)]
        assert len(opened) == together > 0
        assert await bus.standings([(absent, "g")]) == [None]
        with pytest.raises(Unavailable, match=absent.name):
            await bus.lag(absent, "g")

    async def test_what_comes_while_threads_are_late_is_handled(
        self, bus: Bus, topic: Topic, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """FastStream calls a listener that is no coroutine in a thread. What new partitions had brought by
        then was forgotten as that of the partitions before."""
        late_s = 0.5
        in_thread = anyio.to_thread.run_sync
        seen: list[Record] = []

        async def late(*args: Any, **options: Any) -> Any:
            await asyncio.sleep(late_s)
            return await in_thread(*args, **options)

        async def handler(records: Sequence[Record]) -> None:
            if not seen:
                await asyncio.sleep(2 * late_s)
            seen.extend(records)

        monkeypatch.setattr(anyio.to_thread, "run_sync", late)
        await bus.publish(numbered(topic, 40))
        async with bus.consume(topic, topic.name, handler, max_records=5):
            await eventually(partial(all_of, seen, 40), on=seen)

    async def test_a_group_that_committed_beyond_the_end_starts_over(
        self, bootstrap: str, bus: Bus, topic: Topic
    ) -> None:
        """As where a commit that was held back while the broker was away reaches it when it is empty."""
        seen: list[Record] = []

        async def handler(records: Sequence[Record]) -> None:
            seen.extend(records)

        await commit(bootstrap, topic, topic.name, 50)
        await bus.publish(numbered(topic, 20))
        assert await bus.lag(topic, topic.name) == 20
        async with bus.consume(topic, topic.name, handler):
            await eventually(lambda: set(values(seen)) == {b"%d" % i for i in range(20)}, on=seen)
            await eventually_of(lambda: bus.lag(topic, topic.name), lambda lag: lag == 0)


class TestKafkaBusOnTheEmbeddedBroker(OverKafka):
    @pytest.fixture
    def bootstrap(self, kafka_bootstrap: str) -> str:
        return kafka_bootstrap


@pytest.mark.kafka
class TestKafkaBusOnApacheKafka(OverKafka):
    @pytest.fixture
    def bootstrap(self, apache_kafka: str) -> str:
        return apache_kafka

    @pytest.mark.parametrize("source", [DEPLOYMENTS, KEYS, WORKERS], ids=lambda topic: topic.name)
    async def test_a_compacted_topic_ends_its_segments_soon(self, bootstrap: str, source: Topic) -> None:
        """The segment being written is never compacted, and by default it is written for a week."""
        topic = replace(source, name=f"state.{uuid.uuid4().hex[:12]}.v1")
        await ensure_topics(bootstrap, [topic])
        config = await told(bootstrap, topic)
        assert config["cleanup.policy"] == "compact"
        assert int(config["segment.ms"]) <= 3_600_000
        assert float(config["min.cleanable.dirty.ratio"]) <= 0.1
        # A record larger than a segment would be refused.
        assert int(config["max.message.bytes"]) <= int(config["segment.bytes"]) <= 64 << 20
        if source is WORKERS:
            assert int(config["segment.ms"]) == int(config["delete.retention.ms"]) == 60_000
        else:
            assert int(config["delete.retention.ms"]) == 24 * 3_600_000

    async def test_a_clock_that_is_or_was_ahead_holds_nothing_up(self, bus: Bus, topic: Topic) -> None:
        """Kafka takes no record that is more than an hour ahead of its own clock."""
        seen: list[Record] = []

        async def handler(records: Sequence[Record]) -> None:
            seen.extend(records)

        now_ms = time.time_ns() // 1_000_000
        kept = [
            Record(topic.name, b"k", b"ahead", (("h", b"v"),), timestamp_ms=now_ms + 7_200_000),
            Record(topic.name, b"k", b"right", timestamp_ms=now_ms),
            Record(topic.name, b"other", b"beside", timestamp_ms=now_ms),
        ]
        await bus.publish(kept)
        async with bus.consume(topic, topic.name, handler):
            await eventually(lambda: len(seen) >= 3, on=seen)
        assert sorted((record.key, record.value, record.headers) for record in seen) == sorted(
            (record.key, record.value, record.headers) for record in kept
        )


async def commit(bootstrap: str, topic: Topic, group: str, offset: int) -> None:
    """Commit `offset` in every partition, in the name of the group and as nobody's member."""
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, group_id=group, enable_auto_commit=False)
    partitions = [TopicPartition(topic.name, number) for number in range(topic.partitions)]
    await consumer.start()
    try:
        consumer.assign(partitions)
        await consumer.commit(dict.fromkeys(partitions, offset))
    finally:
        await consumer.stop()


async def told(bootstrap: str, topic: Topic) -> dict[str, str]:
    """What the broker says a topic is configured with."""
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        (answer,) = await admin.describe_configs([ConfigResource(ConfigResourceType.TOPIC, topic.name)])
    finally:
        await admin.close()
    ((_code, _message, _kind, _name, entries),) = answer.resources
    return {entry[0]: entry[1] for entry in entries}
