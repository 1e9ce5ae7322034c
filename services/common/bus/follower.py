"""Following compacted topics without a group: every process reads all of them and keeps what it needs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import KafkaError

from services.common.bus.admin import partition_counts
from services.common.bus.delivery import Backoff
from services.common.bus.fetch_wait import IDLE_LOOK_MS, FetchWait, News
from services.common.bus.port import MAX_RECORD_BYTES, METADATA_MAX_AGE_MS, Table
from services.common.bus.stopping import has_broken, stop_consumer
from services.common.bus.table import KafkaTable
from services.common.bus.topic_log import Lost, TopicLog
from services.common.errors import Unavailable
from services.common.tasks import ended
from services.common.topics import Topic

log = logging.getLogger(__name__)

Batches = Mapping[TopicPartition, Sequence[ConsumerRecord]]

CHECK_INTERVAL = 2.0
#: The same while nothing is said: each check has the broker send something again.
QUIET_CHECK_INTERVAL = 6.0
REQUEST_TIMEOUT = 5.0
#: How long at most until a topic that was read to its end is seen to be.
_CATCHING_UP_S = 0.05


class Follower:
    """Reads all topics that a process follows by one consumer, so that one fetch waits at the broker for all
    of them: brokers and clients pay by the fetch, and hardly by what it asks for.

    It runs while there are tables. The tables of a topic share its reading (see TopicLog). A topic that is
    not there yet, or was lost, holds up no other.
    """

    def __init__(self, bootstrap: str, client_id: str, *, quiet_wait_ms: int = 500) -> None:
        """`quiet_wait_ms`: how long a fetch waits where nothing was said for a minute. On Tansu the next
        change comes up to half of that later: longer is for those whom that does not matter to."""
        self._bootstrap = bootstrap
        self._client_id = client_id
        self._logs: dict[str, TopicLog] = {}
        self._task: asyncio.Task[None] | None = None
        self._is_assigned = False
        self._waiting: asyncio.Timeout | None = None
        self._check_at = 0.0
        self._ask_at = 0.0
        self._ask_backoff = Backoff(0.1, 1.0)
        # Most of the time nothing changes. With 250 ms changes take 35 ms on Tansu (half of them less), and a
        # tenth of the work of 50 ms; with 500, in a quiet minute, the first takes 80 ms, and 250 at most.
        self._fetch_wait = FetchWait(250, quiet_wait_ms)
        self._news = News()

    @asynccontextmanager
    async def table(self, topic: Topic, apply: Callable[[bytes, bytes | None], None]) -> AsyncIterator[Table]:
        """See Bus."""
        table = KafkaTable(topic, apply)
        following = self._logs.setdefault(topic.name, TopicLog(topic))
        following.join(table)
        self._look_again()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"follow topics as {self._client_id}")
        try:
            yield table
        finally:
            following.tables.remove(table)
            if not following.tables:
                del self._logs[topic.name]
            self._look_again()
            if not self._logs:
                task, self._task = self._task, None
                await ended(task)

    def _look_again(self) -> None:
        """Other partitions are to be read than are."""
        self._is_assigned = False
        self._ask_backoff.reset()
        self._ask_at = 0.0
        if self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(asyncio.get_running_loop().time())

    async def _run(self) -> None:
        backoff = Backoff(0.1, 2.0)
        while True:
            consumer = self._new_consumer()
            self._is_assigned = False
            try:
                await consumer.start()
                while True:
                    await self._read(consumer)
                    backoff.reset()
            except (KafkaError, OSError, TimeoutError, Unavailable) as error:
                log.warning("cannot follow topics, trying again: %r", error)
                await asyncio.sleep(backoff.next())
            except Exception:
                # A table that silently stopped would serve old state for ever
                log.exception("following topics failed, starting over")
                for following in self._logs.values():
                    following.begin_again()
                await asyncio.sleep(backoff.next())
            finally:
                await stop_consumer(consumer)

    async def _read(self, consumer: AIOKafkaConsumer) -> None:
        """What one fetch brings, for every topic."""
        now = asyncio.get_running_loop().time()
        if has_broken(consumer):
            raise KafkaError("a task of the client has ended")
        if any(not following.partitions for following in self._logs.values()) and now >= self._ask_at:
            await self._ask_for_partitions()
        if not self._is_assigned:
            await self._assign(consumer)
        if now >= self._check_at:
            self._fetch_wait.look(consumer, now)
            self._check_at = now + (QUIET_CHECK_INTERVAL if self._fetch_wait.is_quiet else CHECK_INTERVAL)
            for following in self._logs.values():
                following.check(consumer)
        batches = await self._next(consumer)
        now = asyncio.get_running_loop().time()
        if batches and self._news.is_in(batches, now):
            self._fetch_wait.heard(consumer, now)
        for following in list(self._logs.values()):
            if not self._is_assigned:
                return  # a table came or went meanwhile; what was read here comes again
            try:
                following.read(consumer, batches)
                await following.settle(consumer)
            except Lost:
                log.warning("%s was lost by the broker, reading from the beginning", following.topic.name)
                following.begin_again()
                self._look_again()

    async def _ask_for_partitions(self) -> None:
        counts = await partition_counts(self._bootstrap, timeout=REQUEST_TIMEOUT)
        for name, following in self._logs.items():
            if not following.partitions and name in counts:
                following.partitions = [TopicPartition(name, number) for number in range(counts[name])]
                self._is_assigned = False
        self._ask_at = asyncio.get_running_loop().time() + self._ask_backoff.next()

    async def _assign(self, consumer: AIOKafkaConsumer) -> None:
        """Have `consumer` read what is followed, each topic from where its reading is."""
        self._is_assigned = True  # until somebody comes or goes, which may be while it waits here
        logs = list(self._logs.values())
        consumer.assign([partition for following in logs for partition in following.partitions])
        unread = [partition for following in logs for partition in following.unread()]
        starts: dict[TopicPartition, int] = {}
        if unread:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                starts = await consumer.beginning_offsets(unread)
        for following in logs:
            following.seek(consumer, starts)

    async def _next(self, consumer: AIOKafkaConsumer) -> Batches:
        """What has come; nothing once there is something else to do."""
        now = asyncio.get_running_loop().time()
        until = self._check_at
        if any(not following.partitions for following in self._logs.values()):
            until = min(until, self._ask_at)
        if any(following.is_catching_up for following in self._logs.values()):
            until = min(until, now + _CATCHING_UP_S)
        wait_s = max(0.0, until - now)
        try:
            async with asyncio.timeout(None) as self._waiting:
                if not consumer.assignment():
                    await asyncio.sleep(wait_s)
                    return {}
                batches: Batches = await consumer.getmany(timeout_ms=int(wait_s * 1000) + 1)
                return batches
        except TimeoutError:
            return {}
        finally:
            self._waiting = None

    def _new_consumer(self) -> AIOKafkaConsumer:
        return AIOKafkaConsumer(
            bootstrap_servers=self._bootstrap,
            client_id=self._client_id,
            enable_auto_commit=False,
            auto_offset_reset="earliest",
            fetch_max_wait_ms=self._fetch_wait.ms,
            consumer_timeout_ms=IDLE_LOOK_MS,
            max_partition_fetch_bytes=MAX_RECORD_BYTES,
            request_timeout_ms=int(REQUEST_TIMEOUT * 1000),
            retry_backoff_ms=100,
            metadata_max_age_ms=METADATA_MAX_AGE_MS,
        )
