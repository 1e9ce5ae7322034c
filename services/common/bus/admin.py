"""What is asked of the broker beside records: topics that must exist, and how far a group has come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, TopicAlreadyExistsError, for_code

from services.common.bus.port import MAX_RECORD_BYTES, Standing
from services.common.bus.stopping import stop_consumer
from services.common.errors import FailedPrecondition, Unavailable
from services.common.topics import Topic

log = logging.getLogger(__name__)

REQUEST_TIMEOUT_MS = 5000


async def ensure_topics(
    bootstrap: str, topics: Iterable[Topic], *, replication: int = 1, timeout: float = 30.0
) -> list[str]:
    """Create what is missing of `topics`, check the rest, return the names created. Safe to call again.

    Call it before any client connects: a broker that makes topics on first use gives them the wrong
    partition count. Raises Unavailable when the broker cannot be asked within `timeout` seconds,
    FailedPrecondition when a topic has fewer partitions than wanted (adding some would move keys). More than
    wanted is logged only.
    """
    wanted = {topic.name: topic for topic in topics}
    last: Exception | None = None
    created: list[str] = []
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    async with _admin(bootstrap) as admin:
                        return await _ensure(admin, wanted, replication, created)
                except (KafkaError, OSError, AssertionError) as error:
                    last = error
                    await asyncio.sleep(0.1)
    except TimeoutError:
        raise Unavailable(f"the event broker made no topics within {timeout:g} s: {last!r}") from last


async def lag(bootstrap: str, topic: Topic, group: str, *, timeout: float = 5.0) -> int:
    """Records in `topic` beyond what `group` has committed. Raises Unavailable when the broker is away."""
    return (await standing(bootstrap, topic, group, timeout=timeout)).lag


async def standing(bootstrap: str, topic: Topic, group: str, *, timeout: float = 5.0) -> Standing:
    """Where `group` stands in the partitions that `topic` has. Raises Unavailable when the broker is away or
    does not know the topic."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=bootstrap,
        request_timeout_ms=REQUEST_TIMEOUT_MS,
        fetch_max_wait_ms=20,
        enable_auto_commit=False,
        auto_offset_reset="earliest",
    )
    try:
        async with asyncio.timeout(timeout):
            async with _admin(bootstrap) as admin:
                count = (await _partition_counts(admin)).get(topic.name)
                if count is None:  # asking for it by name would make some brokers create it
                    raise Unavailable(f"the event broker knows no topic {topic.name}")
                # The broker is asked for named partitions: not every broker answers "all of the group's".
                partitions = [TopicPartition(topic.name, number) for number in range(count)]
                committed = await admin.list_consumer_group_offsets(group, partitions=partitions)
            await consumer.start()
            starts, ends = await high_watermarks(consumer, partitions)
    except (KafkaError, OSError, TimeoutError) as error:
        raise Unavailable(f"the event broker did not tell the lag of {group}: {error!r}") from error
    finally:
        await stop_consumer(consumer)
    done = {part: committed[part].offset if part in committed else -1 for part in partitions}
    left = sum(ends[part] - next_offset(starts[part], ends[part], done[part]) for part in partitions)
    return Standing(sum(ends.values()), left)


async def partition_counts(bootstrap: str, *, timeout: float = 5.0) -> dict[str, int]:
    """How many partitions each topic of the broker has. Raises Unavailable when the broker is away."""
    try:
        async with asyncio.timeout(timeout), _admin(bootstrap) as admin:
            return await _partition_counts(admin)
    except (KafkaError, OSError, TimeoutError) as error:
        raise Unavailable(f"the event broker did not tell its topics: {error!r}") from error


def next_offset(start: int, end: int, committed: int | None) -> int:
    """Where a group goes on in a partition that holds `start` to `end`. What was committed beyond the end is
    of a log that the broker has lost: such a group starts over, as it does behind what retention deleted."""
    return start if committed is None or not start <= committed <= end else committed


async def high_watermarks(
    consumer: AIOKafkaConsumer, partitions: list[TopicPartition]
) -> tuple[dict[TopicPartition, int], dict[TopicPartition, int]]:
    """First offset and the one after the last of each partition. Takes over the consumer's assignment.

    The end is what a fetch reports: asked by ListOffsets, one broker (Tansu) answers with the start of the
    last batch plus one, short by up to a batch.
    """
    starts = await consumer.beginning_offsets(partitions)
    near = await consumer.end_offsets(partitions)
    consumer.assign(partitions)
    for partition in partitions:
        consumer.seek(partition, max(starts[partition], near[partition] - 1))
    ends: dict[TopicPartition, int] = {}
    while len(ends) < len(partitions):
        await consumer.getmany(timeout_ms=20)
        marks = {partition: consumer.highwater(partition) for partition in partitions}
        ends = {partition: mark for partition, mark in marks.items() if mark is not None}
    return starts, ends


@asynccontextmanager
async def _admin(bootstrap: str) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap, request_timeout_ms=REQUEST_TIMEOUT_MS)
    try:
        await admin.start()
        yield admin
    finally:
        await admin.close()


async def _ensure(
    admin: AIOKafkaAdminClient, wanted: dict[str, Topic], replication: int, created: list[str]
) -> list[str]:
    present = await _partition_counts(admin)
    missing = [topic for name, topic in wanted.items() if name not in present]
    if missing:
        response = await admin.create_topics([_new(topic, replication) for topic in missing])
        for name, code, *_ in response.topic_errors:
            error = for_code(code)
            if code == 0:
                created.append(name)
            elif error is not TopicAlreadyExistsError:  # somebody else ensures the same topics
                raise error(f"topic {name}")
        present = await _partition_counts(admin)
        if not wanted.keys() <= present.keys():
            raise KafkaError("topics are not visible yet")
    for name, topic in wanted.items():
        if present[name] < topic.partitions:
            raise FailedPrecondition(
                f"topic {name} has {present[name]} partitions and needs {topic.partitions}", field=name
            )
        if present[name] > topic.partitions:
            log.warning("topic %s has %d partitions, %d expected", name, present[name], topic.partitions)
    return created


async def _partition_counts(admin: AIOKafkaAdminClient) -> dict[str, int]:
    # Asked for all topics, never by name: naming one makes some brokers create it.
    return {
        entry["topic"]: len(entry["partitions"])
        for entry in await admin.describe_topics()
        if entry["error_code"] == 0
    }


def _new(topic: Topic, replication: int) -> NewTopic:
    configs = {"max.message.bytes": str(MAX_RECORD_BYTES + (1 << 20)), **dict(topic.settings)}
    if topic.compacted:
        configs["cleanup.policy"] = "compact"
    return NewTopic(topic.name, topic.partitions, replication, topic_configs=configs)
