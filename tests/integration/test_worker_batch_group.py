"""The pool's consumer group over real brokers: settled once, taken over, not done twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, TopicPartition

from deploy.embedded.apache_kafka import ApacheKafkaServer
from deploy.embedded.tansu import TansuServer
from services.common.bus import KafkaBus, Record
from services.common.bus.admin import ensure_topics, lag
from services.common.errors import InvalidArgument, Unavailable
from services.common.topics import Topic
from services.worker.batch.group import Assignment, KafkaChunks
from services.worker.batch.port import Delivery
from tests.fixtures.waiting import PATIENCE_S, eventually, eventually_of

PARTITIONS = 8


class Member:
    """Takes what comes, and settles it where it is told to."""

    def __init__(self, chunks: KafkaChunks, *, settles: bool = True) -> None:
        self.chunks = chunks
        self.taken: list[Delivery] = []
        self.settles = settles

    async def run(self) -> None:
        while True:
            delivery = await self.chunks.next()
            self.taken.append(delivery)
            if self.settles:
                self.chunks.settle(delivery)

    @property
    def values(self) -> list[bytes]:
        return [delivery.record.value or b"" for delivery in self.taken]


class Pool:
    """One topic and the members that read it."""

    def __init__(self, bootstrap: str, assignment: Assignment, stack: AsyncExitStack) -> None:
        self.bootstrap = bootstrap
        self.topic = Topic(f"batch.chunks.{uuid4().hex[:8]}.v1", PARTITIONS)
        self.group = self.topic.name.split(".")[2]
        self.assignment = assignment
        self._stack = stack

    async def join(self, *, settles: bool = True) -> Member:
        chunks = KafkaChunks(
            self.bootstrap, "test", self.topic, self.group, assignment=self.assignment, session_timeout=2.0
        )
        member = Member(await self._stack.enter_async_context(chunks), settles=settles)
        task = asyncio.create_task(member.run())
        self._stack.callback(task.cancel)
        return member

    async def put(self, first: int, count: int) -> None:
        async with KafkaBus(self.bootstrap, "test") as bus:
            await bus.publish(
                [Record(self.topic.name, b"%d" % i, b"%d" % i) for i in range(first, first + count)]
            )

    async def lag(self) -> int:
        return await lag(self.bootstrap, self.topic, self.group)


async def settled(pool: Pool) -> None:
    await eventually_of(pool.lag, lambda left: left == 0)


class GroupContract:
    @pytest.fixture
    async def pool(self, broker: tuple[str, Assignment]):  # type: ignore[no-untyped-def]  # a generator fixture
        async with AsyncExitStack() as stack:
            pool = Pool(*broker, stack)
            await ensure_topics(pool.bootstrap, [pool.topic])
            yield pool

    async def test_every_chunk_comes_once_and_is_committed(self, pool: Pool) -> None:
        member = await pool.join()
        await pool.put(0, 80)
        await eventually(lambda: len(member.taken) >= 80)
        await settled(pool)
        assert sorted(map(int, member.values)) == list(range(80))

    async def test_only_a_few_are_fetched_ahead(self, pool: Pool) -> None:
        chunks = KafkaChunks(
            pool.bootstrap, "test", pool.topic, pool.group, assignment=pool.assignment, session_timeout=2.0
        )
        async with chunks:
            await pool.put(0, 120)
            await eventually(lambda: len(chunks._ready) >= 8)
            await asyncio.sleep(1.0)
            # Partitions that came while others were paused bring one each on top.
            assert len(chunks._ready) <= 8 + PARTITIONS
            taken = [await asyncio.wait_for(chunks.next(), PATIENCE_S) for _ in range(120)]
        assert sorted(int(one.record.value or b"") for one in taken) == list(range(120))

    async def test_what_was_not_settled_comes_again_to_whoever_takes_over(self, pool: Pool) -> None:
        async with AsyncExitStack() as leaving:
            first = await Pool.join(_on(pool, leaving), settles=False)
            await pool.put(0, 20)
            await eventually(lambda: len(first.taken) >= 8)
            settled_ones = first.taken[:3]
            for delivery in settled_ones:
                first.chunks.settle(delivery)
            await asyncio.sleep(0.5)
        second = await pool.join()
        done = {int(one.record.value or b"") for one in settled_ones}
        await eventually(lambda: set(map(int, second.values)) | done == set(range(20)))
        await settled(pool)

    async def test_a_member_that_joins_takes_its_share_and_nothing_is_lost(self, pool: Pool) -> None:
        first = await pool.join()
        await pool.put(0, 50)
        await eventually(lambda: len(first.taken) >= 50)
        second = await pool.join()
        await eventually(lambda: second.chunks.partitions > 0 and first.chunks.partitions < PARTITIONS)
        await eventually(lambda: first.chunks.partitions + second.chunks.partitions == PARTITIONS)
        await pool.put(50, 100)
        await eventually(lambda: len(set(first.values) | set(second.values)) == 150)
        await settled(pool)
        assert second.taken

    async def test_who_has_enough_during_a_rebalance_reads_on_later(self, pool: Pool) -> None:
        """Its partitions are paused then, and librdkafka leaves them so."""
        chunks = KafkaChunks(
            pool.bootstrap, "test", pool.topic, pool.group, assignment=pool.assignment, session_timeout=2.0
        )
        async with chunks:
            first = Member(chunks)
            await pool.put(0, 120)
            await eventually(lambda: chunks._paused)
            second = await pool.join()
            await eventually(lambda: second.chunks.partitions > 0)
            await eventually(lambda: chunks.partitions + second.chunks.partitions == PARTITIONS)
            taking = asyncio.create_task(first.run())
            await eventually(lambda: len(set(first.values) | set(second.values)) == 120)
            await settled(pool)
            taking.cancel()

    async def test_work_in_hand_during_a_rebalance_is_not_begun_again_here(self, pool: Pool) -> None:
        first = await pool.join(settles=False)
        await pool.put(0, 16)
        await eventually(lambda: len(first.taken) >= 16)
        async with AsyncExitStack() as leaving:
            second = await Pool.join(_on(pool, leaving), settles=False)
            await eventually(lambda: second.chunks.partitions > 0)
            await eventually(lambda: first.chunks.partitions + second.chunks.partitions == PARTITIONS)
        await eventually(lambda: first.chunks.partitions == PARTITIONS)
        for delivery in first.taken:
            first.chunks.settle(delivery)
        await settled(pool)
        assert len(first.taken) == 16

    async def test_what_is_published_is_acknowledged(self, pool: Pool) -> None:
        member = await pool.join()
        await member.chunks.publish(
            [Record(pool.topic.name, b"k", b"%d" % i, (("h", b"\xff"),)) for i in range(20)]
        )
        await eventually(lambda: len(member.taken) == 20)
        assert member.taken[0].record.headers == (("h", b"\xff"),)
        with pytest.raises(InvalidArgument):
            await member.chunks.publish([Record(pool.topic.name, b"k", bytes(17 << 20))])

    async def test_a_group_that_committed_beyond_the_end_starts_over(self, pool: Pool) -> None:
        """As where a commit that was held back while the broker was away reaches it when it is empty."""
        await asyncio.to_thread(commit, pool, 50)
        await pool.put(0, 20)
        assert await pool.lag() == 20
        member = await pool.join()
        await eventually(lambda: set(map(int, member.values)) == set(range(20)), on=member.taken)
        await settled(pool)
        await pool.put(20, 20)
        await eventually(lambda: set(map(int, member.values)) == set(range(40)), on=member.taken)
        await settled(pool)


def commit(pool: Pool, offset: int) -> None:
    """Commit `offset` in every partition, in the name of the group and as nobody's member."""
    consumer = Consumer({"bootstrap.servers": pool.bootstrap, "group.id": pool.group})
    partitions = [TopicPartition(pool.topic.name, number, offset) for number in range(PARTITIONS)]
    done = consumer.commit(offsets=partitions, asynchronous=False)
    consumer.close()
    assert [(part.offset, part.error) for part in done] == [(offset, None)] * PARTITIONS


def _on(pool: Pool, stack: AsyncExitStack) -> Pool:
    """The same pool, whose members leave with `stack`."""
    other = Pool(pool.bootstrap, pool.assignment, stack)
    other.topic, other.group = pool.topic, pool.group
    return other


class TestOnTansu(GroupContract):
    @pytest.fixture
    def broker(self, kafka_bootstrap: str) -> tuple[str, Assignment]:
        return kafka_bootstrap, "range"


@pytest.mark.kafka
class TestOnApacheKafka(GroupContract):
    @pytest.fixture
    def broker(self, apache_kafka: str) -> tuple[str, Assignment]:
        return apache_kafka, "cooperative-sticky"

    async def test_a_join_leaves_the_others_their_partitions(self, pool: Pool) -> None:
        first = await pool.join()
        await eventually(lambda: first.chunks.partitions == PARTITIONS)
        kept = set(first.chunks._ours)
        second = await pool.join()
        fewest = PARTITIONS

        def shared() -> bool:
            nonlocal fewest, kept
            fewest = min(fewest, first.chunks.partitions)
            kept &= set(first.chunks._ours)
            return second.chunks.partitions == PARTITIONS // 2

        await eventually(shared)
        assert fewest == PARTITIONS // 2
        assert kept == set(first.chunks._ours)


async def test_a_broker_that_comes_back_empty_is_read_from_its_beginning(
    new_tansu: Callable[[], TansuServer],
) -> None:
    broker = new_tansu()
    async with AsyncExitStack() as stack:
        pool = Pool(broker.url, "range", stack)
        await ensure_topics(pool.bootstrap, [pool.topic])
        member = await pool.join()
        await pool.put(0, 100)
        await eventually(lambda: len(member.taken) == 100)
        broker.kill()
        broker.start(timeout=PATIENCE_S)
        # The members are back before anybody makes the topic.
        await asyncio.sleep(3.0)
        await ensure_topics(pool.bootstrap, [pool.topic])
        await pool.put(1000, 20)
        await eventually(lambda: set(map(int, member.values)) >= set(range(1000, 1020)))
        await settled(pool)


@pytest.mark.kafka
async def test_publishing_while_the_broker_is_away_says_so_or_waits(
    new_apache_kafka: Callable[[], ApacheKafkaServer],
) -> None:
    broker = new_apache_kafka()
    async with AsyncExitStack() as stack:
        pool = Pool(broker.url, "cooperative-sticky", stack)
        await ensure_topics(pool.bootstrap, [pool.topic])
        member = await pool.join()
        await pool.put(0, 5)
        await eventually(lambda: len(member.taken) == 5)
        broker.kill()
        waiting = asyncio.create_task(member.chunks.publish([Record(pool.topic.name, b"k", b"5")]))
        await asyncio.sleep(0.5)
        assert not waiting.done()
        broker.start(timeout=PATIENCE_S)
        try:
            await waiting
        except Unavailable:
            await member.chunks.publish([Record(pool.topic.name, b"k", b"5")])
        await eventually(lambda: b"5" in member.values)
