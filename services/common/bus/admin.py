"""What is asked of the broker beside records: topics that must exist, and how far a group has come."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager, suppress

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    CorruptRecordException,
    GroupCoordinatorNotAvailableError,
    KafkaError,
    TopicAlreadyExistsError,
    UnsupportedCodecError,
    for_code,
)
from aiokafka.structs import OffsetAndMetadata

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
    """Records in `topic` beyond what `group` has committed. Raises Unavailable when the broker is away or
    does not know the topic."""
    (found,) = await standings(bootstrap, [(topic, group)], timeout=timeout)
    if found is None:
        raise Unavailable(f"the event broker knows no topic {topic.name}")
    return found.lag


async def standings(
    bootstrap: str, wanted: Sequence[tuple[Topic, str]], *, timeout: float = 5.0
) -> list[Standing | None]:
    """Where each group stands in what partitions its topic has, None where the broker knows no such topic.
    However many are asked for, it is asked the same few times over the same connections. Raises Unavailable
    when the broker is away."""
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
                # Asking for a topic by name would make some brokers create it, and not every broker answers
                # "all of the group's": it is asked for named partitions.
                counts = await _partition_counts(admin)
                asked = {
                    topic.name: [TopicPartition(topic.name, number) for number in range(counts[topic.name])]
                    for topic, _ in wanted
                    if topic.name in counts
                }
                committed = {
                    group: await _committed(admin, group, [part for name in names for part in asked[name]])
                    for group, names in _by_group(wanted, asked).items()
                }
            everything = [part for parts in asked.values() for part in parts]
            if not everything:
                return [None for _ in wanted]
            await consumer.start()
            # Read after what was committed: where nothing is left, all was done that was there by then.
            starts, ends = await high_watermarks(consumer, everything)
    except (KafkaError, OSError, TimeoutError) as error:
        groups = ", ".join(sorted({group for _, group in wanted}))
        raise Unavailable(f"the event broker did not tell the lag of {groups}: {error!r}") from error
    finally:
        await stop_consumer(consumer)

    def standing(parts: list[TopicPartition], group: str) -> Standing:
        marks = {part: committed[group][part].offset for part in parts if part in committed[group]}
        left = [ends[part] - next_offset(starts[part], ends[part], marks.get(part, -1)) for part in parts]
        return Standing(sum(ends[part] for part in parts), sum(left))

    return [standing(asked[topic.name], group) if topic.name in asked else None for topic, group in wanted]


def _by_group(wanted: Sequence[tuple[Topic, str]], known: Collection[str]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for topic, group in wanted:
        if topic.name in known:
            found.setdefault(group, set()).add(topic.name)
    return found


async def committed(
    bootstrap: str, group: str, partitions: list[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata]:
    """What `group` has committed in each of `partitions`, offset -1 where nothing."""
    async with _admin(bootstrap) as admin:
        return await _committed(admin, group, partitions)


async def _committed(
    admin: AIOKafkaAdminClient, group: str, partitions: list[TopicPartition]
) -> dict[TopicPartition, OffsetAndMetadata]:
    while True:
        found: dict[TopicPartition, OffsetAndMetadata] = {}
        # A new broker makes its topic of groups when first asked.
        with suppress(GroupCoordinatorNotAvailableError):
            found = await admin.list_consumer_group_offsets(group, partitions=partitions)
        # One that has yet to load its groups says so of the whole answer, where aiokafka does not look: then
        # nothing is in it, not even that nothing was committed.
        if found.keys() >= set(partitions):
            return found
        await asyncio.sleep(0.1)


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
        try:
            await consumer.getmany(timeout_ms=20)
        except (UnsupportedCodecError, CorruptRecordException):
            pass  # the end is known all the same
        except KafkaError:
            raise
        except Exception as error:  # of what parses records, see `membership`
            log.debug("what lies at an end cannot be read: %r", error)
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
