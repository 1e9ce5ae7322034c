"""One member of a consumer group, who reads several topics over one connection, carried by a FastStream batch
subscriber.

Acknowledgement is manual: FastStream's own NACK rewinds partition by partition and stops at the first
one that a rebalance has taken away, which would leave the others past records nobody handled.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Any

from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.errors import (
    ConsumerStoppedError,
    CorruptRecordException,
    IllegalStateError,
    KafkaError,
    UnsupportedCodecError,
)
from faststream import AckPolicy
from faststream.kafka import KafkaBroker, KafkaMessage
from faststream.message import StreamMessage

from services.common.bus.consume import Subscription
from services.common.bus.delivery import Backoff
from services.common.bus.fetch_wait import IDLE_LOOK_MS, FetchWait
from services.common.bus.port import MAX_RECORD_BYTES
from services.common.bus.stopping import has_broken, stop_consumer
from services.common.tasks import ended

log = logging.getLogger(__name__)

Batch = tuple[ConsumerRecord, ...]

CHECK_INTERVAL = 2.0
CHECK_TIMEOUT = 5.0
STOP_TIMEOUT = 5.0
#: How long one try to join the group may take. Who waits there for a client of which a task has ended (see
#: `has_broken`) would wait for ever.
START_TIMEOUT = 30.0
#: Where one topic is left, the group is joined anew after this time: who ends leaves them all, one by one.
REJOIN_AFTER = 1.0
#: When a partition is read again whose records could not be: a codec is missing here, or a checksum is wrong.
UNREADABLE_REST_S = 5.0
#: How long the loop that takes records sleeps at most where none come: it is woken when they do.
_TAKE_WITHIN_S = 1.0


class Membership:
    """Reads the topics of its subscriptions for as long as it has any, and gives each what is its own.

    What was subscribed before it first ran is joined at once; who comes or goes later has the group joined
    anew, in the background. A topic whose handler is slow or fails is paused, and holds up no other.
    """

    def __init__(self, broker: KafkaBroker, group: str, *, session_timeout: float) -> None:
        self._broker = broker
        self._group = group
        self._session_timeout = session_timeout
        self._subscriptions: dict[str, Subscription] = {}
        self._changed = asyncio.Event()
        self._is_over = False
        self._task: asyncio.Task[None] | None = None
        self._subscriber: Any = None
        self._wait = FetchWait(250, 500)

    def can_read(self, topic: str, group: str) -> bool:
        """Whether a subscription of `group` to `topic` may join. There is one to a topic at most."""
        return group == self._group and topic not in self._subscriptions and not self._is_over

    def join(self, subscription: Subscription) -> None:
        """Read for `subscription`, too. Waits for nothing."""
        self._subscriptions[subscription.topic.name] = subscription
        self._changed.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"consume as {self._group}")

    async def leave(self, subscription: Subscription) -> bool:
        """Read for `subscription` no more; wait for its handler, for a bounded time. True where it was the
        last one, which ends the membership."""
        await subscription.stop(STOP_TIMEOUT)
        del self._subscriptions[subscription.topic.name]
        if self._subscriptions:
            asyncio.get_running_loop().call_later(REJOIN_AFTER, self._changed.set)
            return False
        self._is_over = True
        if self._task is not None:
            await ended(self._task)
        return True

    async def _run(self) -> None:
        backoff = Backoff(0.2, 2.0)
        try:
            while True:
                try:
                    await self._read_until_changed()
                    backoff.reset()
                except Exception:
                    # Nobody would notice that nothing is read any more
                    log.exception("reading as %s failed, joining anew", self._group)
                    await self._stopped()
                    await asyncio.sleep(backoff.next())
        finally:
            await self._stopped()

    async def _read_until_changed(self) -> None:
        """Be a member of the group until it is to be joined anew."""
        self._changed.clear()
        await self._started()
        while not self._changed.is_set():
            with suppress(TimeoutError):
                # Not wait_for: before Python 3.12 it can lose the cancellation by a leave.
                async with asyncio.timeout(CHECK_INTERVAL):
                    await self._changed.wait()
            await self._check()
        await self._stopped()

    async def _started(self) -> None:
        """Join once the broker answers."""
        backoff = Backoff(0.2, 2.0)
        while not self._changed.is_set():
            self._subscriber = self._new_subscriber()
            try:
                async with asyncio.timeout(START_TIMEOUT):
                    await self._subscriber.start()
            except (KafkaError, OSError) as error:  # also where it took too long
                log.warning("cannot consume as %s yet: %r", self._group, error)
                await self._stopped()
                await asyncio.sleep(backoff.next())
            else:
                return

    async def _stopped(self) -> None:
        subscriber, self._subscriber = self._subscriber, None
        if subscriber is not None and subscriber.consumer is None:
            await subscriber.stop()
        elif subscriber is not None:
            await stop_consumer(subscriber.consumer, subscriber.stop)
        self._on_change()

    async def _check(self) -> None:
        """Look whether the broker still has what was read."""
        consumer = self._subscriber.consumer if self._subscriber is not None else None
        if consumer is None:
            return
        if has_broken(consumer):
            log.warning("a task of the client has ended: joining %s anew", self._group)
            self._changed.set()
            return
        for subscription in list(self._subscriptions.values()):
            try:
                async with asyncio.timeout(CHECK_TIMEOUT):
                    await subscription.rewind_if_lost(consumer)
            except (KafkaError, IllegalStateError, AssertionError, OSError, TimeoutError) as error:
                log.debug("positions in %s not checked: %r", subscription.topic.name, error)
        self._wait.look(consumer, asyncio.get_running_loop().time())

    async def _on_batch(self, batch: Batch) -> None:
        consumer = self._subscriber.consumer if self._subscriber is not None else None
        if consumer is None:
            return
        self._wait.heard(consumer, asyncio.get_running_loop().time())
        by_topic: dict[str, list[ConsumerRecord]] = defaultdict(list)
        for partition, records in _by_partition(batch).items():
            # Since they were read, it may have been taken away, or rewound: what lies before them failed. Or
            # it has no position, and is read again: no error of the group's may cost others their records.
            with suppress(KafkaError):
                if await consumer.position(partition) > records[-1].offset:
                    by_topic[partition.topic] += records
        for topic, of_topic in by_topic.items():
            if topic in self._subscriptions:
                self._subscriptions[topic].take(consumer, of_topic)

    def _on_change(self) -> None:
        for subscription in self._subscriptions.values():
            subscription.reassigned()

    def _new_subscriber(self) -> Any:
        collect_s = min(subscription.collect_s for subscription in self._subscriptions.values())
        # One broker (Tansu) looks for news again and again while a fetch waits: idle followers are most of
        # its work. With 250 ms a record arrives after 25 to 55 ms there (with 500 after 80 to 110), with 100
        # after 20, at twice the work.
        wait_ms = max(250, min(500, int(collect_s * 1000)))
        self._wait = FetchWait(wait_ms, 1000 if collect_s else 500)
        subscriber: Any = self._broker.subscriber(
            *self._subscriptions,
            batch=True,
            group_id=self._group,
            auto_offset_reset="earliest",
            ack_policy=AckPolicy.MANUAL,
            fetch_max_wait_ms=wait_ms,
            consumer_timeout_ms=IDLE_LOOK_MS,
            # All of a fetch is taken at once: this bounds what is held of it.
            fetch_max_bytes=MAX_RECORD_BYTES,
            max_partition_fetch_bytes=MAX_RECORD_BYTES,
            session_timeout_ms=int(self._session_timeout * 1000),
            heartbeat_interval_ms=int(self._session_timeout * 1000 / 4),
            rebalance_timeout_ms=int(self._session_timeout * 1000),
            listener=_Assignment(self._on_change),
            parser=_parse,
            decoder=_decode,
            persistent=False,
        )
        subscriber.get_msg = _Taking().next_batch
        subscriber(self._on_batch)
        return subscriber


class _Taking:
    """Takes what has come. In place of FastStream's own, which after each wait for records sleeps as long
    without taking any: it would have to wait shortly, and wake up twenty times a second."""

    def __init__(self) -> None:
        #: By partition, where a record lies that could not be read, and whether offsets before it have no
        #: record, as those have where a transaction ended.
        self._unreadable: dict[TopicPartition, tuple[int, bool]] = {}

    async def next_batch(self, consumer: AIOKafkaConsumer) -> Batch:
        """What has come, nothing after a while.

        One partition is asked after another: where one's records cannot be read, aiokafka forgets what it has
        taken of others in the same asking, and goes on behind it. That partition rests, and holds up no
        other, nor what lies before the record.
        """
        taken: list[ConsumerRecord] = []
        each: list[tuple[TopicPartition, ...]] = [(partition,) for partition in consumer.assignment()]
        for asked in each or [()]:  # where it has none, for the errors of its group
            begin = _parsed_to(consumer, asked)
            try:
                found = await consumer.getmany(*asked, max_records=self._readable(begin))
            except (UnsupportedCodecError, CorruptRecordException) as error:
                self._stopped(consumer, asked, begin, error)
            except (KafkaError, ConsumerStoppedError):
                if not taken:
                    raise
                break  # it comes again
            except Exception as error:  # of what parses records: a header's name that is no UTF-8, …
                self._stopped(consumer, asked, begin, error)
            else:
                taken += [record for records in found.values() for record in records]
        if not taken:
            waiter = consumer._fetcher._create_fetch_waiter()  # noqa: SLF001 - getmany would take, too
            await asyncio.wait({waiter}, timeout=_TAKE_WITHIN_S)
            if not waiter.done():
                waiter.cancel()
            else:
                waiter.result()  # an error of the group's
        return tuple(taken)

    def _readable(self, begin: Mapping[TopicPartition, int]) -> int | None:
        """How many records to take at most: those before the one that could not be read."""
        for partition, offset in begin.items():
            at, has_gaps = self._unreadable.get(partition, (0, False))
            if offset < at:
                return 1 if has_gaps else at - offset
        return None

    def _stopped(
        self,
        consumer: AIOKafkaConsumer,
        asked: Iterable[TopicPartition],
        begin: Mapping[TopicPartition, int],
        error: Exception,
    ) -> None:
        """A record cannot be read: what lies before it is read again, up to there. Where that is nothing,
        its partition rests."""
        for partition, at in _parsed_to(consumer, asked).items():
            known = self._unreadable.get(partition)
            if at > begin.get(partition, at) and known != (at, True):
                self._unreadable[partition] = at, known == (at, False)
                return
        for partition in asked:
            log.warning("%s cannot be read at offset %s, again in %g s: %r",
                        partition, begin.get(partition), UNREADABLE_REST_S, error)  # fmt: skip
            _rest(consumer, partition)


def _parsed_to(consumer: AIOKafkaConsumer, partitions: Iterable[TopicPartition]) -> dict[TopicPartition, int]:
    """How far aiokafka has read what it has fetched of them, of which it tells nobody."""
    fetched = {partition: consumer._fetcher._records.get(partition) for partition in partitions}  # noqa: SLF001
    parsed = {partition: getattr(one, "_partition_records", None) for partition, one in fetched.items()}
    return {partition: one.next_fetch_offset for partition, one in parsed.items() if one is not None}


def _rest(consumer: AIOKafkaConsumer, partition: TopicPartition) -> None:
    def go_on() -> None:
        with suppress(IllegalStateError):  # it went to somebody else meanwhile
            consumer.resume(partition)

    with suppress(IllegalStateError):
        consumer.pause(partition)
    asyncio.get_running_loop().call_later(UNREADABLE_REST_S, go_on)


class _Assignment(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka carries no types
    """Tells of each change of what a member was given, before and after it.

    Coroutines, since FastStream calls a function in a thread, which may come late: what the new assignment
    has brought meanwhile would be taken for what the old one left, and forgotten.
    """

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change

    async def on_partitions_revoked(self, revoked: Collection[TopicPartition]) -> None:
        self._on_change()

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        log.info("reading %s", ", ".join(sorted(f"{part.topic}/{part.partition}" for part in assigned)))
        self._on_change()


def _by_partition(batch: Batch) -> dict[TopicPartition, list[ConsumerRecord]]:
    parts: dict[TopicPartition, list[ConsumerRecord]] = defaultdict(list)
    for raw in batch:
        parts[TopicPartition(raw.topic, raw.partition)].append(raw)
    return parts


async def _parse(batch: Batch) -> StreamMessage[Any]:
    """Wrap without looking inside: FastStream's parser wants text headers and guesses at JSON."""
    return KafkaMessage(raw_message=batch, body=b"", consumer=None)  # type: ignore[arg-type]  # acknowledged by hand


async def _decode(message: StreamMessage[Any]) -> Batch:
    batch: Batch = message.raw_message
    return batch
