"""One topic as a member of a group reads it: a batch at a time is handled, committed, and rested after."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import IllegalStateError

from services.common.bus.delivery import Backoff, dead_letter, deliver, pause_s
from services.common.bus.port import Handler, Record
from services.common.topics import Topic

log = logging.getLogger(__name__)

COMMIT_TIMEOUT = 5.0


class Subscription:
    """Hands the records of one topic to one handler. Whoever reads them gives them to `take`.

    One batch is in work, and what comes meanwhile waits: then, and while the reader rests, its partitions are
    paused, so that no more than two fetches' records are held and no fetch waits for what is not wanted yet.
    """

    def __init__(
        self,
        topic: Topic,
        group: str,
        handler: Handler,
        *,
        publish: Callable[[Sequence[Record]], Awaitable[None]],
        max_records: int,
        collect_s: float,
    ) -> None:
        self.topic = topic
        self.collect_s = collect_s
        self._group = group
        self._handler = handler
        self._publish = publish
        self._max_records = max_records
        self._backoff = Backoff(0.1, 5.0)
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._consumer: AIOKafkaConsumer | None = None
        self._pending: list[ConsumerRecord] = []
        self._paused: set[TopicPartition] = set()
        # What was buried may be in another member's hands, or in a log that a memory-only broker has lost.
        self._buried: dict[TopicPartition, set[int]] = {}
        self._committing: asyncio.Future[None] | None = None
        self._epoch = 0

    @property
    def is_busy(self) -> bool:
        """True while records are in work or rested after."""
        return self._task is not None

    def take(self, consumer: AIOKafkaConsumer, records: Sequence[ConsumerRecord]) -> None:
        """Handle `records`, which `consumer` has just read, behind those that are in work."""
        if self._stopping.is_set():
            return
        self._consumer = consumer
        self._pending += records
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name=f"handle {self.topic.name} as {self._group}")
        else:
            self._pause()

    def reassigned(self) -> None:
        """Partitions come or go. What was read waits no more: it comes again, to whoever has its partition. A
        commit under way is given up: the client would try it again in the name of the group as it is then,
        over a log that may be another one."""
        self._epoch += 1
        self._pending.clear()
        self._paused.clear()
        self._buried.clear()
        if self._committing is not None:
            self._committing.cancel()

    async def rewind_if_lost(self, consumer: AIOKafkaConsumer) -> None:
        """Start over where a position lies beyond the end: the broker came back without its records.

        Kafka answers such a fetch with an error and the client resets; some brokers answer with nothing.
        """
        lost = []
        for partition in self._partitions(consumer):
            end = consumer.highwater(partition)
            if end is not None and await consumer.position(partition) > end:
                lost.append(partition)
        if not lost or self.is_busy:
            return
        for partition in lost:
            log.warning("%s lost its records, reading from the beginning", partition)
            self._buried.pop(partition, None)
        # All at once: what the first one brings is worked at, and the others would wait for the next look.
        await consumer.seek_to_beginning(*lost)

    async def stop(self, timeout: float) -> None:
        """Take no more, and wait for what is in work, `timeout` seconds at most."""
        self._stopping.set()
        self._pending.clear()
        task = self._task
        if task is not None:
            await asyncio.wait({task}, timeout=timeout)
            task.cancel()
            await asyncio.wait({task})

    async def _work(self) -> None:
        try:
            while self._pending and not self._stopping.is_set():
                batch = self._pending[: self._max_records]
                del self._pending[: self._max_records]
                rest_s = await self._handle(batch)
                if rest_s:
                    self._pause()
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._stopping.wait(), rest_s)
        finally:
            self._task = None
            self._resume()

    async def _handle(self, batch: Sequence[ConsumerRecord]) -> float:
        """Deliver and commit one batch; how many seconds to rest after it."""
        epoch, consumer = self._epoch, self._consumer
        records = [_record(raw) for raw in batch if not self._is_buried(raw)]

        async def bury(record: Record, reason: str) -> None:
            await self._publish([dead_letter(record, self.topic, self._group, reason)])
            log.error("%s/%d@%d is malformed: %s", record.topic, record.partition, record.offset, reason)
            if epoch == self._epoch:
                at = TopicPartition(record.topic, record.partition)
                self._buried.setdefault(at, set()).add(record.offset)

        began = asyncio.get_running_loop().time()
        try:
            await deliver(records, self._handler, bury)
        except Exception as error:
            wait = self._backoff.next()
            log.warning("handler of %s as %s failed, again in %.1f s: %r",
                        self.topic.name, self._group, wait, error)  # fmt: skip
            if epoch == self._epoch:
                self._give_back(consumer, batch)
            return wait
        except asyncio.CancelledError:
            # Where it is not `stop`, the handler waited for something that was cancelled. Whatever comes next
            # would be committed, and this batch with it.
            if epoch == self._epoch:
                self._give_back(consumer, batch)
            raise
        self._backoff.reset()
        took = asyncio.get_running_loop().time() - began
        # Offsets from before the change may be those of a log that a memory-only broker has lost: in the next
        # one they would hide records. What was handled comes again instead.
        if epoch == self._epoch:
            await self._commit(consumer, batch)
        if not self.collect_s or len(batch) >= self._max_records:
            return 0.0
        return pause_s(self.collect_s, took, taken=len(batch), left=_left(consumer, batch))

    def _give_back(self, consumer: AIOKafkaConsumer, batch: Sequence[ConsumerRecord]) -> None:
        """`batch`, and what was read behind it, is read again."""
        _rewind(consumer, [*batch, *self._pending])
        self._pending.clear()

    async def _commit(self, consumer: AIOKafkaConsumer, batch: Sequence[ConsumerRecord]) -> None:
        """Commit behind the batch. A failure is no harm: the records come again, and handlers expect that."""
        offsets = {TopicPartition(raw.topic, raw.partition): raw.offset + 1 for raw in batch}
        commit = self._committing = asyncio.ensure_future(consumer.commit(offsets))
        try:
            await asyncio.wait({commit}, timeout=COMMIT_TIMEOUT)
        finally:
            commit.cancel()
        await asyncio.wait({commit})
        if commit.cancelled():
            log.warning("offsets of %s as %s not committed in time", self.topic.name, self._group)
            return
        try:
            commit.result()
        except Exception as error:  # whatever it was: what else was read is waiting
            log.warning("offsets of %s as %s not committed: %r", self.topic.name, self._group, error)
        else:
            for partition in offsets:
                self._buried.pop(partition, None)

    def _is_buried(self, raw: ConsumerRecord) -> bool:
        """True for a record already in the dead-letter queue that comes again because its batch failed."""
        return raw.offset in self._buried.get(TopicPartition(raw.topic, raw.partition), ())

    def _pause(self) -> None:
        if self._consumer is not None:
            partitions = self._partitions(self._consumer)
            self._consumer.pause(*partitions)
            self._paused.update(partitions)

    def _resume(self) -> None:
        paused, self._paused = self._paused, set()
        for partition in paused:
            with suppress(IllegalStateError):  # it went to somebody else meanwhile
                if self._consumer is not None:
                    self._consumer.resume(partition)

    def _partitions(self, consumer: AIOKafkaConsumer) -> list[TopicPartition]:
        return [partition for partition in consumer.assignment() if partition.topic == self.topic.name]


def _rewind(consumer: AIOKafkaConsumer, records: Iterable[ConsumerRecord]) -> None:
    """Put every partition of `records` back to its first one, whichever of them are still assigned."""
    first: dict[TopicPartition, int] = {}
    for raw in records:
        first.setdefault(TopicPartition(raw.topic, raw.partition), raw.offset)
    for partition, offset in first.items():
        with suppress(IllegalStateError):  # its new owner starts at the committed offset
            consumer.seek(partition, offset)


def _left(consumer: AIOKafkaConsumer, batch: Sequence[ConsumerRecord]) -> int:
    """How many records of the partitions of `batch` are known to lie behind it."""
    left = 0
    for partition, last in {TopicPartition(raw.topic, raw.partition): raw.offset for raw in batch}.items():
        with suppress(AssertionError):  # its new owner reads on
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
