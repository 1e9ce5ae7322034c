"""Membership of the pool's consumer group by librdkafka, in a thread.

Rebalances are cooperative: a worker that joins takes some partitions, and the others go on with theirs
meanwhile. Partitions are paused while enough is at hand, so that the broker holds what waits, not the worker.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from services.common.bus import Record
from services.common.bus.admin import ensure_topics
from services.common.bus.port import MAX_RECORD_BYTES
from services.common.errors import HeadraceError, Unavailable
from services.common.topics import JOB_RESULTS, Topic, dead_letters
from services.worker.batch import outages
from services.worker.batch.port import Delivery
from services.worker.batch.producer import AckedProducer

log = logging.getLogger(__name__)

Assignment = Literal["cooperative-sticky", "range"]

#: Records at hand that nobody has asked for yet; partitions are paused above the first, resumed below the
#: second.
_ENOUGH, _FEW = 8, 4
_POLL_S, _POLL_PAUSED_S = 0.1, 0.01
_CHECK_S = 2.0
_ASK_S = 2.0
#: A member that lost its partitions and was given none joins again after this time, doubled each time.
_REJOIN_S, _REJOINS = 2.0, 8
_CLOSE_S = 5.0
_REMEMBERED = 256


class _Partition:
    """One partition while it is ours: what was delivered of it, oldest first."""

    def __init__(self) -> None:
        self.at_hand: deque[Delivery] = deque()
        self._settled: set[Delivery] = set()

    def settle(self, delivery: Delivery) -> int | None:
        """The offset to commit now that `delivery` is done; None while one before it is not. One of another
        time, or of a log that the broker has lost, changes nothing."""
        if delivery in self.at_hand:
            self._settled.add(delivery)
        reached = None
        while self.at_hand and self.at_hand[0] in self._settled:
            reached = self.at_hand.popleft()
            self._settled.discard(reached)
        return None if reached is None else reached.record.offset + 1


class KafkaChunks:
    """Chunks over a Kafka broker, as a context manager; entering waits for nothing.

    After `session_timeout` seconds of silence the partitions of a dead member go to the others. `assignment`
    is the group's protocol: not every broker carries the cooperative one to its end. A record that comes
    again while it is still in work here, or was just finished, is not done twice."""

    def __init__(
        self,
        bootstrap: str,
        client_id: str,
        topic: Topic,
        group: str,
        *,
        assignment: Assignment = "cooperative-sticky",
        session_timeout: float = 6.0,
    ) -> None:
        self._bootstrap = bootstrap
        self._topic = topic
        self._group = group
        self._starting: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._consumer_options: dict[str, Any] = {
            "bootstrap.servers": bootstrap,
            "client.id": client_id,
            "group.id": group,
            "partition.assignment.strategy": assignment,
            "session.timeout.ms": int(session_timeout * 1000),
            "heartbeat.interval.ms": int(session_timeout * 1000 / 6),
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "earliest",
            # One broker (Tansu) looks for news again and again while a fetch waits: 50 ms were a third of
            # what it did while nothing happened, and small jobs were no sooner done.
            "fetch.wait.max.ms": 250,
            "fetch.message.max.bytes": MAX_RECORD_BYTES,
            # What lies in the client's own queue is dropped by a pause and fetched again; with little in it a
            # fetch would be put off, by a second unless told otherwise.
            "queued.min.messages": 8 * _ENOUGH,
            "fetch.queue.backoff.ms": 10,
            "queued.max.messages.kbytes": 2 * MAX_RECORD_BYTES >> 10,
            "topic.metadata.refresh.interval.ms": 3000,
            "reconnect.backoff.max.ms": 1000,
            "allow.auto.create.topics": False,
        }
        self._cooperative = assignment == "cooperative-sticky"
        # The thread alone talks to the consumer: its calls wait for each other, also for a poll.
        self._to_commit: deque[tuple[_Partition, int, int]] = deque()
        # Known to the thread alone: what it was assigned, and of partitions that nothing has come of yet
        # where their reading began.
        self._held: dict[int, _Partition] = {}
        self._began: dict[int, int] = {}
        self._lost, self._given_none = False, False
        self._rejoins, self._rejoin_at = 0, 0.0
        self._producer = AckedProducer(bootstrap, client_id)
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._paused = False
        self._ready: deque[Delivery] = deque()
        # Records handed over by the thread, and those that the loop has seen.
        self._sent = self._seen = 0
        self._arrived = asyncio.Event()
        self._ours: dict[int, _Partition] = {}
        # By partition and offset: what is in somebody's hands, and what was done lately.
        self._in_hand: dict[tuple[int, int], Delivery] = {}
        self._done: OrderedDict[tuple[int, int], bytes | None] = OrderedDict()

    @property
    def partitions(self) -> int:
        """How many partitions are ours."""
        return len(self._ours)

    async def __aenter__(self) -> Self:
        await self._producer.__aenter__()
        self._starting = asyncio.create_task(self._start(), name="batch group")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, _CLOSE_S)
        await self._producer.__aexit__(kind, error, trace)

    async def next(self) -> Delivery:
        """See Chunks."""
        while not self._ready:
            self._arrived.clear()
            await self._arrived.wait()
        return self._ready.popleft()

    def settle(self, delivery: Delivery) -> None:
        """See Chunks."""
        record = delivery.record
        at = (record.partition, record.offset)
        if self._in_hand.get(at) is not delivery:
            return  # the broker has lost it, and something else is there now
        del self._in_hand[at]
        self._done[at] = record.value
        while len(self._done) > _REMEMBERED:
            self._done.popitem(last=False)
        self._settled(delivery)

    async def publish(self, records: Sequence[Record]) -> None:
        """See Chunks."""
        await self._producer.publish(records)

    async def _start(self) -> None:
        """Join once the topics are there: a broker that makes them on first use gives them another number of
        partitions."""
        while True:
            try:
                await ensure_topics(
                    self._bootstrap, [self._topic, dead_letters(self._topic, self._group), JOB_RESULTS]
                )
                break
            except Unavailable as error:
                log.warning("no topics of the pool yet: %s", error.message)
            except HeadraceError as error:
                log.warning("topics of the pool: %s", error.message)
                break
        self._thread = threading.Thread(target=self._run, name="batch-group", daemon=True)
        self._thread.start()

    def _settled(self, delivery: Delivery) -> None:
        partition = delivery.record.partition
        owned = self._ours.get(partition)
        reached = owned.settle(delivery) if owned is not None else None
        if owned is not None and reached is not None:
            self._to_commit.append((owned, partition, reached))

    def _run(self) -> None:
        """In the thread: poll, until told to stop."""
        consumer = Consumer(
            self._consumer_options | {"on_commit": _on_commit},
            logger=outages.log,
        )
        self._join(consumer)
        check_at = time.monotonic() + _CHECK_S
        try:
            while not self._stopping.is_set():
                at_hand = len(self._ready) + self._sent - self._seen
                try:
                    if not self._paused and at_hand >= _ENOUGH:
                        consumer.pause(consumer.assignment())
                        self._paused = True
                    elif self._paused and at_hand < _FEW:
                        consumer.resume(consumer.assignment())
                        self._paused = False
                    self._commit(consumer)
                    message = consumer.poll(_POLL_PAUSED_S if self._paused else _POLL_S)
                    if message is not None and not message.error():
                        self._sent += 1
                        self._loop.call_soon_threadsafe(self._on_record, _record(message))
                    if time.monotonic() > check_at:
                        check_at = time.monotonic() + _CHECK_S
                        self._rewind_if_lost(consumer)
                        self._join_again(consumer)
                except (KafkaException, RuntimeError) as error:
                    log.warning("polling %s: %s", self._topic.name, error)
                    self._stopping.wait(0.2)
        finally:
            with suppress(KafkaException, RuntimeError):
                self._commit(consumer, wait=True)
                consumer.close()

    def _join(self, consumer: Consumer) -> None:
        consumer.subscribe(
            [self._topic.name], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )

    def _join_again(self, consumer: Consumer) -> None:
        """Where all was lost and nothing given instead: the group was formed anew before its topic was, and
        the client remembers the topic as it was, so it does not notice that it is back. Not for ever: there
        may be more members than partitions."""
        # Only behind an assignment of none: to leave while a group is being formed leaves one broker (Tansu)
        # with a leader that never answers.
        if not self._given_none or self._rejoins >= _REJOINS or time.monotonic() < self._rejoin_at:
            return
        log.info("nothing of %s is ours any more, joining again", self._topic.name)
        self._given_none = False
        self._rejoins += 1
        consumer.unsubscribe()
        self._join(consumer)

    def _commit(self, consumer: Consumer, *, wait: bool = False) -> None:
        """Of each partition the last offset. One of an earlier assignment is dropped, its records come again:
        by now it may be another log, in which it would hide records."""
        offsets: dict[int, int] = {}
        while self._to_commit:
            partition, number, offset = self._to_commit.popleft()
            if self._held.get(number) is partition:
                offsets[number] = offset
        if not offsets:
            return
        parts = [TopicPartition(self._topic.name, number, offset) for number, offset in offsets.items()]
        with suppress(KafkaException):
            if wait:
                consumer.commit(offsets=parts, asynchronous=False)
            else:
                consumer.commit(offsets=parts, asynchronous=True)

    def _on_record(self, record: Record) -> None:
        self._seen += 1
        at = (record.partition, record.offset)
        owned = self._ours.get(record.partition)
        if owned is None:
            return
        known = self._in_hand.get(at)
        if known is not None and known.record.value == record.value:
            # It went away and came back while it was in work here; that work counts.
            owned.at_hand.append(known)
            return
        delivery = Delivery(record)
        owned.at_hand.append(delivery)
        if at in self._done and self._done[at] == record.value:
            self._settled(delivery)
            return
        self._in_hand[at] = delivery
        self._ready.append(delivery)
        self._arrived.set()

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        numbers = [part.partition for part in partitions]
        if self._cooperative:
            consumer.incremental_assign(partitions)
        else:
            consumer.assign(partitions)
        # librdkafka keeps a partition paused over a rebalance, even where it goes and comes back, and new
        # ones are not: all are looked at again.
        consumer.resume(consumer.assignment())
        self._paused = False
        self._given_none = self._lost and not numbers
        self._rejoin_at = time.monotonic() + _REJOIN_S * 2**self._rejoins
        self._begin(numbers)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._commit(consumer)  # whoever has them next begins behind what is done
        self._release(consumer, partitions)

    def _on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        self._lost = self._lost or bool(partitions)
        self._release(consumer, partitions)

    def _release(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        numbers = [part.partition for part in partitions]
        for number in numbers:
            self._held.pop(number, None)
        if self._cooperative:
            consumer.incremental_unassign(partitions)
        else:
            consumer.unassign()
        if numbers:
            self._loop.call_soon_threadsafe(self._revoked, numbers)

    def _begin(self, numbers: list[int]) -> None:
        """In the thread: what it reads of these partitions from now on has nothing to do with what came
        before."""
        begun = {number: _Partition() for number in numbers}
        self._held.update(begun)
        for number in numbers:
            self._began.pop(number, None)
        if begun:
            self._lost, self._rejoins = False, 0
            self._loop.call_soon_threadsafe(self._assigned, begun)

    def _assigned(self, begun: dict[int, _Partition]) -> None:
        """Ours from now on, or begun anew: what was delivered before counts no more."""
        log.info("reading %s: partitions %s", self._topic.name, sorted(begun))
        self._ours.update(begun)

    def _revoked(self, numbers: list[int]) -> None:
        """What is in work may end: its result counts, and whoever has the partition now does it once more.
        What nobody has begun is theirs."""
        for number in numbers:
            self._ours.pop(number, None)
        gone = [one for one in self._ready if one.record.partition in numbers]
        for delivery in gone:
            self._ready.remove(delivery)
            self._in_hand.pop((delivery.record.partition, delivery.record.offset), None)

    def _rewind_if_lost(self, consumer: Consumer) -> None:
        """Start over where a position lies beyond the end: the broker came back without its records, and
        answers such a fetch with nothing."""
        parts = consumer.position(consumer.assignment())
        # A position is known once something was read. Until then the committed one counts, which may be of
        # the log before: a commit that was held back while the broker was away is sent to the next one.
        unread = [part for part in parts if part.offset < 0]
        asked = [part for part in unread if part.partition not in self._began]
        if asked:
            with suppress(KafkaException):  # the broker is away: asked again at the next look
                began = consumer.committed(asked, timeout=_ASK_S)
                self._began.update({part.partition: part.offset for part in began if part.error is None})
        for part in parts:
            at = part.offset if part.offset >= 0 else self._began.get(part.partition, 0)
            _, high = consumer.get_watermark_offsets(part, cached=True)
            if 0 <= high < at:
                log.warning("%s/%d lost its records, reading from the beginning", part.topic, part.partition)
                consumer.seek(TopicPartition(part.topic, part.partition, 0))
                self._begin([part.partition])
                self._began[part.partition] = 0


def _record(message: Message) -> Record:
    return Record(
        topic=message.topic() or "",
        key=message.key(),
        value=message.value(),
        headers=tuple(message.headers() or ()),  # type: ignore[arg-type]  # pairs of text and bytes
        partition=_number(message.partition()),
        offset=_number(message.offset()),
        timestamp_ms=message.timestamp()[1],
    )


def _number(value: int | None) -> int:
    return -1 if value is None else value


def _on_commit(error: KafkaError | None, partitions: list[TopicPartition]) -> None:
    if error is not None:
        log.info("offsets not committed, the records come again: %s", error.str())
