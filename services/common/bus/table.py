"""Following a compacted topic without a group: every process reads all of it and keeps what it needs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from services.common.bus.delivery import Backoff
from services.common.bus.port import MAX_RECORD_BYTES
from services.common.errors import Unavailable
from services.common.tasks import ended
from services.common.topics import Topic

log = logging.getLogger(__name__)

CHECK_INTERVAL = 2.0
REQUEST_TIMEOUT = 5.0


class _Lost(Exception):
    """The broker no longer has what was read from it."""


class _Log:
    """All partitions of one topic read in order, and checked to be the log that was read before.

    A memory-only broker that restarts has new records under old offsets. So the last record of a partition
    is read once more before anything behind it is believed, and every CHECK_INTERVAL when nothing is new:
    another record in its place, or an end before it, is _Lost.
    """

    def __init__(self, consumer: AIOKafkaConsumer, partitions: list[TopicPartition]) -> None:
        self._consumer = consumer
        self._partitions = partitions
        self._last: dict[TopicPartition, ConsumerRecord] = {}
        self._rewound: set[TopicPartition] = set()
        self._loop = asyncio.get_running_loop()
        self._check_at = self._loop.time() + CHECK_INTERVAL

    async def rewind(self) -> None:
        """Go to the first record of every partition."""
        self._consumer.assign(self._partitions)
        async with asyncio.timeout(REQUEST_TIMEOUT):
            starts = await self._consumer.beginning_offsets(self._partitions)
        for partition, offset in starts.items():
            self._consumer.seek(partition, offset)

    async def at_end(self) -> bool:
        """True when the last fetch of every partition left nothing behind."""
        for partition in self._partitions:
            # The mark comes with fetches; ListOffsets is short by up to a batch on one broker (Tansu).
            end = self._consumer.highwater(partition)
            if end is None or await self._consumer.position(partition) < end:
                return False
        return True

    async def next(self, *, checked: bool) -> list[ConsumerRecord]:
        """New keyed records, none after a short wait. Raises _Lost.

        `checked` reads the record before them again first; without it, a long log is read at full speed.
        """
        if self._loop.time() >= self._check_at:
            self._check_at = self._loop.time() + CHECK_INTERVAL
            for partition in self._last:
                self._back_to_last(partition)
        batches = await self._consumer.getmany(timeout_ms=500 if checked else 200)
        fresh: list[ConsumerRecord] = []
        for partition, records in batches.items():
            if partition in self._last and not self._follows(partition, records, checked=checked):
                self._back_to_last(partition)  # and these records come again behind it
                continue
            self._rewound.discard(partition)
            if records:
                self._last[partition] = records[-1]
            fresh += [record for record in records if record.key is not None]
        for partition, last in self._last.items():
            end = self._consumer.highwater(partition)
            if end is not None and end <= last.offset:
                raise _Lost
        return fresh

    def _follows(self, partition: TopicPartition, records: list[ConsumerRecord], *, checked: bool) -> bool:
        """Whether `records` is known to continue what was read; takes the record read again off its front."""
        last, first = self._last[partition], records[0]
        if first.offset < last.offset:  # the client went to the beginning: its position no longer existed
            raise _Lost
        if first.offset > last.offset:  # after going back to it, this means that compaction took the last one
            return not checked or partition in self._rewound
        if (first.timestamp, first.key, first.value) != (last.timestamp, last.key, last.value):
            raise _Lost
        del records[0]
        return True

    def _back_to_last(self, partition: TopicPartition) -> None:
        self._consumer.seek(partition, self._last[partition].offset)
        self._rewound.add(partition)


class KafkaTable:
    """Table over a Kafka topic, as a context manager. `refused` counts the records `apply` raised on."""

    def __init__(
        self, bootstrap: str, client_id: str, topic: Topic, apply: Callable[[bytes, bytes | None], None]
    ) -> None:
        self._bootstrap = bootstrap
        self._client_id = client_id
        self._topic = topic
        self._apply = apply
        self._caught_up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.refused = 0
        self.readings = 0

    @property
    def caught_up(self) -> bool:
        return self._caught_up.is_set()

    async def ready(self, timeout: float) -> None:
        """See Table."""
        try:
            await asyncio.wait_for(self._caught_up.wait(), timeout)
        except TimeoutError:
            raise Unavailable(f"{self._topic.name} was not read within {timeout:g} s") from None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name=f"table {self._topic.name}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            await ended(self._task)

    async def _run(self) -> None:
        backoff = Backoff(0.1, 2.0)
        while True:
            consumer = self._new_consumer()
            try:
                await consumer.start()
                backoff.reset()
                while True:
                    await self._read_all(consumer)
            except (KafkaError, OSError, TimeoutError) as error:
                log.warning("cannot follow %s, trying again: %r", self._topic.name, error)
                await asyncio.sleep(backoff.next())
            except Exception:
                # A table that silently stopped would serve old state for ever
                log.exception("following %s failed, starting over", self._topic.name)
                await asyncio.sleep(backoff.next())
            finally:
                with suppress(KafkaError, OSError):
                    await consumer.stop()

    async def _read_all(self, consumer: AIOKafkaConsumer) -> None:
        """Read from the beginning to the end, then go on; return when the broker has lost what was read."""
        log_ = _Log(consumer, await self._partitions(consumer))
        await log_.rewind()
        latest: dict[bytes, ConsumerRecord] = {}
        try:
            while not await log_.at_end():
                for record in await log_.next(checked=False):
                    # What is old news by the end must not be acted on: only the last value of a key counts.
                    latest.pop(record.key, None)
                    latest[record.key] = record
            self.readings += 1
            for record in latest.values():
                self._apply_one(record)
            self._caught_up.set()
            while True:
                for record in await log_.next(checked=True):
                    self._apply_one(record)
        except _Lost:
            log.warning("%s was lost by the broker, reading from the beginning", self._topic.name)

    async def _partitions(self, consumer: AIOKafkaConsumer) -> list[TopicPartition]:
        while True:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                # All topics are listed, since asking for one by name makes some brokers create it.
                await consumer.topics()
            numbers = consumer.partitions_for_topic(self._topic.name)
            if numbers:
                return [TopicPartition(self._topic.name, number) for number in sorted(numbers)]
            await asyncio.sleep(0.2)

    def _apply_one(self, record: ConsumerRecord) -> None:
        try:
            self._apply(record.key, record.value)
        except Exception:
            self.refused += 1
            log.exception("record of %s at offset %d was refused", record.topic, record.offset)

    def _new_consumer(self) -> AIOKafkaConsumer:
        return AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap,
            client_id=self._client_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            # Most of the time nothing changes. One broker (Tansu) looks for news only now and then while a
            # fetch waits: with this, changes take 35 ms there (half of them less), and a tenth of the work.
            fetch_max_wait_ms=250,
            max_partition_fetch_bytes=MAX_RECORD_BYTES,
            request_timeout_ms=int(REQUEST_TIMEOUT * 1000),
            retry_backoff_ms=100,
            metadata_max_age_ms=3000,
        )
