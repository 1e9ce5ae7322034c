"""What lies in the dead-letter queues, and sending it back to where it came from.

The group `topics.REPLAY` marks how far a queue was replayed, so its lag is what still lies there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from services.common.bus.admin import REQUEST_TIMEOUT_MS, committed, high_watermarks, next_offset
from services.common.bus.port import Record
from services.common.bus.stopping import stop_consumer
from services.common.errors import NotFound, Unavailable
from services.common.topics import REPLAY

_ENDING = ".dlq"
_MARKS = ("dlq-topic", "dlq-partition", "dlq-offset", "dlq-reason")
_WITHIN_S = 15.0
_POLL_MS = 200
#: Polls without a record after which what is missing was deleted by the broker.
_MOST_SILENT = 25

Publish = Callable[[Sequence[Record]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Letter:
    """One record of a queue: where it came from and why it could not be handled there. `record` is as it was
    consumed, without the marks of the queue; its partition and offset are the queue's."""

    record: Record
    topic: str
    partition: int
    offset: int
    reason: str


@dataclass(frozen=True, slots=True)
class Queue:
    """One queue; `waiting` records were not replayed."""

    topic: str
    waiting: int


class DeadLetters:
    """The queues of the broker at `bootstrap`. Methods raise Unavailable while it is away, NotFound for what
    is no queue."""

    def __init__(self, bootstrap: str, publish: Publish) -> None:
        self._bootstrap = bootstrap
        self._publish = publish
        self._replaying = asyncio.Lock()

    async def queues(self) -> list[Queue]:
        """All of them, by name."""
        async with self._asking():
            names = await self._names()
            return [Queue(name, await self._waiting(name, parts)) for name, parts in sorted(names.items())]

    async def letters(self, topic: str, limit: int) -> list[Letter]:
        """The first `limit` that wait."""
        async with self._asking(), self._reading(topic) as (consumer, ends):
            return [letter_of(record) for record in await _some(consumer, ends, limit)]

    async def replay(self, topic: str, limit: int) -> int:
        """Publish the first `limit` that wait to their own topics and count them as replayed; how many they
        were. One that was published may be so again where this is interrupted: consumers know duplicates."""
        async with self._replaying, self._asking(), self._reading(topic) as (consumer, ends):
            records = await _some(consumer, ends, limit)
            if not records:
                return 0
            letters = [letter_of(record) for record in records]
            await self._publish(
                [
                    Record(letter.topic, letter.record.key, letter.record.value, letter.record.headers)
                    for letter in letters
                ]
            )
            await consumer.commit(
                {TopicPartition(topic, record.partition): record.offset + 1 for record in records}
            )
            return len(records)

    async def _names(self) -> dict[str, int]:
        """Queues with their partition counts."""
        admin = AIOKafkaAdminClient(bootstrap_servers=self._bootstrap, request_timeout_ms=REQUEST_TIMEOUT_MS)
        try:
            await admin.start()
            return {
                entry["topic"]: len(entry["partitions"])
                for entry in await admin.describe_topics()
                if entry["error_code"] == 0 and entry["topic"].endswith(_ENDING)
            }
        finally:
            await admin.close()

    async def _waiting(self, topic: str, partitions: int) -> int:
        async with self._consumer() as consumer:
            parts = [TopicPartition(topic, number) for number in range(partitions)]
            marks = await committed(self._bootstrap, REPLAY, parts)
            starts, ends = await high_watermarks(consumer, parts)
        return sum(ends[part] - next_offset(starts[part], ends[part], marks[part].offset) for part in parts)

    @asynccontextmanager
    async def _reading(self, topic: str) -> AsyncIterator[tuple[AIOKafkaConsumer, dict[TopicPartition, int]]]:
        """A consumer that stands where the replay of `topic` goes on, and where each partition ends."""
        partitions = (await self._names()).get(topic)
        if partitions is None:
            raise NotFound(f"There is no dead-letter queue {topic[:256]!r}.", field="topic")
        parts = [TopicPartition(topic, number) for number in range(partitions)]
        async with self._consumer() as consumer:
            # Not the consumer's `committed`: a broker that has yet to load its groups has none for it.
            marks = await committed(self._bootstrap, REPLAY, parts)
            starts, ends = await high_watermarks(consumer, parts)
            for part in parts:
                consumer.seek(part, next_offset(starts[part], ends[part], marks[part].offset))
            yield consumer, ends

    @asynccontextmanager
    async def _consumer(self) -> AsyncIterator[AIOKafkaConsumer]:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap,
            group_id=REPLAY,
            request_timeout_ms=REQUEST_TIMEOUT_MS,
            fetch_max_wait_ms=50,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
        )
        try:
            await consumer.start()
            yield consumer
        finally:
            await stop_consumer(consumer)

    @asynccontextmanager
    async def _asking(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(_WITHIN_S):
                yield
        except (KafkaError, OSError, TimeoutError, AssertionError) as error:
            raise Unavailable("The event broker does not answer.", retry_after_ms=1000) from error


def letter_of(record: Record) -> Letter:
    """What a record of a queue says of itself."""
    marks = {name: value.decode("utf-8", "replace") for name, value in record.headers if name in _MARKS}
    own = tuple((name, value) for name, value in record.headers if name not in _MARKS)
    return Letter(
        record=Record(
            record.topic,
            record.key,
            record.value,
            own,
            partition=record.partition,
            offset=record.offset,
            timestamp_ms=record.timestamp_ms,
        ),
        topic=marks.get("dlq-topic", ""),
        partition=_number(marks.get("dlq-partition")),
        offset=_number(marks.get("dlq-offset")),
        reason=marks.get("dlq-reason", ""),
    )


async def _some(consumer: AIOKafkaConsumer, ends: Mapping[TopicPartition, int], limit: int) -> list[Record]:
    """Up to `limit` records from where the consumer stands to `ends`; those of a partition in order. A fetch
    that brings nothing says nothing: on a busy machine the answer is still under way."""
    found: list[Record] = []
    silent = 0
    while len(found) < limit and silent < _MOST_SILENT:
        fetched = await consumer.getmany(timeout_ms=_POLL_MS, max_records=limit - len(found))
        silent = 0 if fetched else silent + 1
        for records in fetched.values():
            found += [
                Record(
                    one.topic,
                    one.key,
                    one.value,
                    tuple((name, value or b"") for name, value in one.headers),  # it may be null
                    partition=one.partition,
                    offset=one.offset,
                    timestamp_ms=one.timestamp,
                )
                for one in records
            ]
        if all([await consumer.position(part) >= end for part, end in ends.items()]):
            break
    return found


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isdecimal() else -1
