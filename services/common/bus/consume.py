"""One consumer group's reading of one topic, carried by a FastStream batch subscriber.

Acknowledgement is manual: FastStream's own NACK rewinds partition by partition and stops at the first
one that a rebalance has taken away, which would leave the others past records nobody handled.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import IllegalStateError, KafkaError
from faststream import AckPolicy
from faststream.kafka import KafkaBroker, KafkaMessage
from faststream.message import StreamMessage

from services.common.bus.delivery import Backoff, dead_letter, deliver, pause_s
from services.common.bus.port import MAX_RECORD_BYTES, Handler, Record
from services.common.tasks import ended
from services.common.topics import Topic

log = logging.getLogger(__name__)

Batch = tuple[ConsumerRecord, ...]

CHECK_INTERVAL = 2.0
COMMIT_TIMEOUT = 5.0


class _Assignment(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka carries no types
    """Counts the changes of what a member was given: `epoch` differs before and after each of them."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self.epoch = 0
        self._on_change = on_change

    def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        self._changed()

    def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        log.info("reading %s", ", ".join(sorted(f"{part.topic}/{part.partition}" for part in assigned)))
        self._changed()

    def _changed(self) -> None:
        self.epoch += 1
        self._on_change()


class Subscription:
    """Context manager over one subscriber: started in the background, watched, stopped on leaving."""

    def __init__(
        self,
        broker: KafkaBroker,
        topic: Topic,
        group: str,
        handler: Handler,
        *,
        publish: Callable[[Sequence[Record]], Awaitable[None]],
        max_records: int,
        collect_s: float,
        session_timeout: float,
    ) -> None:
        self._topic = topic
        self._group = group
        self._handler = handler
        self._publish = publish
        self._max_records = max_records
        self._collect_s = collect_s
        self._backoff = Backoff(0.1, 5.0)
        self._stopping = asyncio.Event()
        self._busy = asyncio.Lock()
        self._buried: dict[TopicPartition, set[int]] = {}
        self._task: asyncio.Task[None] | None = None
        # What was buried may be in another member's hands, or in a log that a memory-only broker has lost.
        self._assignment = _Assignment(self._on_change)
        self._committing: asyncio.Future[None] | None = None
        self._subscriber = broker.subscriber(
            topic.name,
            batch=True,
            group_id=group,
            auto_offset_reset="earliest",
            ack_policy=AckPolicy.MANUAL,
            max_records=max_records,
            # An idle FastStream loop waits this long twice, the second time deaf: this bounds the latency.
            batch_timeout_ms=max(50, min(250, int(collect_s * 500))),
            # One broker (Tansu) looks for news again and again while a fetch waits: idle followers are most
            # of its work. With 250 ms a record arrives after 25 to 55 ms there (with 500 after 110), with 100
            # after 20, at twice the work.
            fetch_max_wait_ms=max(250, min(500, int(collect_s * 1000))),
            max_partition_fetch_bytes=MAX_RECORD_BYTES,
            session_timeout_ms=int(session_timeout * 1000),
            heartbeat_interval_ms=int(session_timeout * 1000 / 4),
            rebalance_timeout_ms=int(session_timeout * 1000),
            listener=self._assignment,
            parser=_parse,
            decoder=_decode,
            persistent=False,
        )
        self._subscriber(self._on_batch)

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"consume {self._topic.name} as {self._group}")

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        if self._task is not None:
            await ended(self._task)
        await self._subscriber.stop()

    async def _run(self) -> None:
        """Start once the broker answers, then look again and again whether it still has what was read."""
        backoff = Backoff(0.2, 2.0)
        while True:
            try:
                await self._subscriber.start()
                break
            except (KafkaError, OSError) as error:
                log.warning("cannot consume %s yet: %r", self._topic.name, error)
                await self._subscriber.stop()
                await asyncio.sleep(backoff.next())
        while True:
            await asyncio.sleep(CHECK_INTERVAL)
            consumer = self._subscriber.consumer
            if consumer is None:
                continue
            try:
                async with self._busy, asyncio.timeout(COMMIT_TIMEOUT):
                    await self._rewind_if_lost(consumer)
            except (KafkaError, IllegalStateError, OSError, TimeoutError) as error:
                log.debug("positions in %s not checked: %r", self._topic.name, error)

    async def _on_batch(self, batch: Batch) -> None:
        consumer = self._subscriber.consumer
        if consumer is None or self._stopping.is_set():
            return
        async with self._busy:
            epoch = self._assignment.epoch
            records = [_record(raw) for raw in batch if not self._is_buried(raw)]

            async def bury(record: Record, reason: str) -> None:
                await self._publish([dead_letter(record, self._topic, self._group, reason)])
                log.error("%s/%d@%d is malformed: %s", record.topic, record.partition, record.offset, reason)
                if epoch == self._assignment.epoch:
                    at = TopicPartition(record.topic, record.partition)
                    self._buried.setdefault(at, set()).add(record.offset)

            began = asyncio.get_running_loop().time()
            try:
                await deliver(records, self._handler, bury)
            except Exception as error:
                wait = self._backoff.next()
                log.warning("handler of %s as %s failed, again in %.1f s: %r",
                            self._topic.name, self._group, wait, error)  # fmt: skip
                if epoch == self._assignment.epoch:
                    _rewind(consumer, batch)
            else:
                self._backoff.reset()
                # Offsets from before the change may be those of a log that a memory-only broker has lost:
                # in the next one they would hide records. What was handled comes again instead.
                took = asyncio.get_running_loop().time() - began
                if epoch == self._assignment.epoch:
                    await self._commit(consumer, batch)
                if not self._collect_s or len(batch) >= self._max_records:
                    return
                wait = pause_s(self._collect_s, took, taken=len(batch), left=_left(consumer, batch))
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), wait)

    async def _commit(self, consumer: AIOKafkaConsumer, batch: Batch) -> None:
        """Commit behind the batch. A failure is no harm: the records come again, and handlers expect that."""
        offsets = {TopicPartition(raw.topic, raw.partition): raw.offset + 1 for raw in batch}
        commit = self._committing = asyncio.ensure_future(consumer.commit(offsets))
        try:
            await asyncio.wait({commit}, timeout=COMMIT_TIMEOUT)
        finally:
            commit.cancel()
        await asyncio.wait({commit})
        if commit.cancelled():
            log.warning("offsets of %s as %s not committed in time", self._topic.name, self._group)
            return
        try:
            commit.result()
        except (KafkaError, IllegalStateError, OSError, TimeoutError) as error:
            log.warning("offsets of %s as %s not committed: %r", self._topic.name, self._group, error)
        else:
            for partition in offsets:
                self._buried.pop(partition, None)

    def _on_change(self) -> None:
        """Partitions come or go. A commit under way is given up: the client would try it again in the name of
        the group as it is then, over a log that may be another one."""
        self._buried.clear()
        if self._committing is not None:
            self._committing.cancel()

    def _is_buried(self, raw: ConsumerRecord) -> bool:
        """True for a record already in the dead-letter queue that comes again because its batch failed."""
        return raw.offset in self._buried.get(TopicPartition(raw.topic, raw.partition), ())

    async def _rewind_if_lost(self, consumer: AIOKafkaConsumer) -> None:
        """Start over where a position lies beyond the end: the broker came back without its records.

        Kafka answers such a fetch with an error and the client resets; some brokers answer with nothing.
        """
        for partition in consumer.assignment():
            end = consumer.highwater(partition)
            if end is not None and await consumer.position(partition) > end:
                log.warning("%s lost its records, reading from the beginning", partition)
                self._buried.pop(partition, None)
                await consumer.seek_to_beginning(partition)


def _rewind(consumer: AIOKafkaConsumer, batch: Batch) -> None:
    """Put every partition of `batch` back to its first record, whichever of them are still assigned."""
    first: dict[TopicPartition, int] = {}
    for raw in batch:
        first.setdefault(TopicPartition(raw.topic, raw.partition), raw.offset)
    for partition, offset in first.items():
        with suppress(IllegalStateError):  # its new owner starts at the committed offset
            consumer.seek(partition, offset)


def _left(consumer: AIOKafkaConsumer, batch: Batch) -> int:
    """How many records of the partitions of `batch` are known to lie behind it."""
    left = 0
    for partition, last in {TopicPartition(raw.topic, raw.partition): raw.offset for raw in batch}.items():
        with suppress(IllegalStateError):  # its new owner reads on
            left += max(0, (consumer.highwater(partition) or 0) - last - 1)
    return left


def _record(raw: ConsumerRecord) -> Record:
    return Record(
        topic=raw.topic,
        key=raw.key,
        value=raw.value,
        headers=tuple(raw.headers),
        partition=raw.partition,
        offset=raw.offset,
        timestamp_ms=raw.timestamp,
    )


async def _parse(batch: Batch) -> StreamMessage[Any]:
    """Wrap without looking inside: FastStream's parser wants text headers and guesses at JSON."""
    return KafkaMessage(raw_message=batch, body=b"", consumer=None)  # type: ignore[arg-type]  # acknowledged by hand


async def _decode(message: StreamMessage[Any]) -> Batch:
    batch: Batch = message.raw_message
    return batch
