"""The bus over a Kafka broker."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from types import TracebackType
from typing import Self

from aiokafka import AIOKafkaProducer
from aiokafka.errors import InvalidTimestampError, KafkaError, MessageSizeTooLargeError, ProducerClosed
from faststream.kafka import KafkaBroker

from services.common.bus import admin
from services.common.bus.consume import Subscription
from services.common.bus.delivery import Backoff
from services.common.bus.follower import Follower
from services.common.bus.membership import Membership
from services.common.bus.port import (
    MAX_RECORD_BYTES,
    METADATA_MAX_AGE_MS,
    Handler,
    Record,
    Standing,
    Table,
    check_size,
)
from services.common.bus.stopping import has_broken, stop_producer
from services.common.errors import InvalidArgument, Unavailable
from services.common.topics import Topic

log = logging.getLogger(__name__)
_faststream_log = logging.getLogger(f"{__name__}.faststream")
_faststream_log.setLevel(logging.ERROR)  # it warns of topics being made elsewhere, which is on purpose

#: In a record: its producer knows no time. The broker goes by its own then.
_NO_TIME = -1


class KafkaBus:
    """Bus over the broker at `bootstrap_servers` ("host:port,host:port").

    Entering opens nothing and never waits: a service starts while the broker is away. `publish_deadline`
    bounds each publish, seconds. `session_timeout` is after how many seconds of silence the partitions of a
    dead consumer go to the others of its group; a join takes up to half of it on some brokers. `follower`
    reads for the tables of this bus; one that several buses of a process share reads once for all of them.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        client_id: str,
        *,
        publish_deadline: float = 10.0,
        session_timeout: float = 6.0,
        follower: Follower | None = None,
    ) -> None:
        self._bootstrap = bootstrap_servers
        self._client_id = client_id
        self._follower = follower or Follower(bootstrap_servers, client_id)
        self._deadline = publish_deadline
        self._session_timeout = session_timeout
        self._producer: AIOKafkaProducer | None = None
        self._is_ahead = False
        self._memberships: list[Membership] = []
        self._starting = asyncio.Lock()
        self._broker = KafkaBroker(
            bootstrap_servers,
            client_id=client_id,
            consumer_only=True,
            apply_types=False,
            graceful_timeout=5.0,
            request_timeout_ms=10_000,
            retry_backoff_ms=100,
            # A topic that is made, or gets partitions, while a group reads is seen within this time.
            metadata_max_age_ms=3000,
            logger=_faststream_log,
        )

    async def __aenter__(self) -> Self:
        await self._broker.connect()  # consumers only: this prepares, no connection is made yet
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._broker.stop()
        await self._drop_producer()

    async def publish(self, records: Sequence[Record]) -> None:
        """See Bus."""
        for record in records:
            check_size(record)
        futures: list[asyncio.Future[object]] = []
        try:
            async with asyncio.timeout(self._deadline):
                producer = await self._started_producer()
                await _send(producer, records, futures)
                # Kafka takes nothing that is more than an hour ahead of its own clock, and never will before
                # then: a clock that is wrong, or was when an event was kept, must not hold it up.
                ahead = [place for place, future in enumerate(futures) if _is_ahead(future)]
                if ahead:
                    undated = [replace(records[place], timestamp_ms=_NO_TIME) for place in ahead]
                    futures = [future for future in futures if not _is_ahead(future)]
                    await _send(producer, undated, futures)
            for future in futures:
                future.result()
            self._tell_of_time(len(ahead))
        except MessageSizeTooLargeError as error:
            raise InvalidArgument(f"a record is larger than {MAX_RECORD_BYTES} bytes") from error
        except (KafkaError, OSError, TimeoutError) as error:
            if isinstance(error, ProducerClosed):
                await self._drop_producer()
            raise Unavailable(f"the event broker did not acknowledge: {error!r}") from error
        finally:
            for future in futures:
                future.add_done_callback(_retrieve)

    def consume(
        self, topic: Topic, group: str, handler: Handler, *, max_records: int = 500, collect_s: float = 0.0
    ) -> AbstractAsyncContextManager[None]:
        """See Bus."""
        subscription = Subscription(
            topic,
            group,
            handler,
            publish=self.publish,
            max_records=max_records,
            collect_s=collect_s,
        )
        return self._consuming(subscription, group)

    def table(
        self, topic: Topic, apply: Callable[[bytes, bytes | None], None]
    ) -> AbstractAsyncContextManager[Table]:
        """See Bus."""
        return self._follower.table(topic, apply)

    async def lag(self, topic: Topic, group: str) -> int:
        """See Bus."""
        return await admin.lag(self._bootstrap, topic, group)

    async def standings(self, wanted: Sequence[tuple[Topic, str]]) -> list[Standing | None]:
        """See Bus."""
        return await admin.standings(self._bootstrap, wanted)

    @asynccontextmanager
    async def _consuming(self, subscription: Subscription, group: str) -> AsyncIterator[None]:
        """What a process reads as one group it reads as one member, over one connection. A topic that is read
        twice needs a second member."""
        for membership in self._memberships:
            if membership.can_read(subscription.topic.name, group):
                break
        else:
            membership = Membership(self._broker, group, session_timeout=self._session_timeout)
            self._memberships.append(membership)
        membership.join(subscription)
        try:
            yield
        finally:
            if await membership.leave(subscription):
                self._memberships.remove(membership)

    async def _started_producer(self) -> AIOKafkaProducer:
        """The one producer, started. The caller's timeout bounds the wait for a broker that is away."""
        async with self._starting:
            if self._producer is not None and has_broken(self._producer):
                await self._drop_producer()
            backoff = Backoff(0.1, 1.0)
            while self._producer is None:
                producer = self._new_producer()
                try:
                    await producer.start()
                except Exception as error:  # uvloop's too, which is none of aiokafka's: see has_broken
                    log.debug("the producer is not started yet: %r", error)
                    await producer.stop()
                    await asyncio.sleep(backoff.next())
                except BaseException:
                    await producer.stop()
                    raise
                else:
                    self._producer = producer
            return self._producer

    def _new_producer(self) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            bootstrap_servers=self._bootstrap,
            client_id=self._client_id,
            acks="all",
            linger_ms=2,
            max_batch_size=512 << 10,
            max_request_size=MAX_RECORD_BYTES,
            # Batches give up before their publish does: few arrive after their caller was told of failure.
            request_timeout_ms=int(self._deadline * 800),
            retry_backoff_ms=100,
            metadata_max_age_ms=METADATA_MAX_AGE_MS,
        )

    def _tell_of_time(self, ahead: int) -> None:
        """So many records of a publish were ahead of the broker's time; the log is told when that begins."""
        if ahead and not self._is_ahead:
            log.warning("%d records are ahead of the broker's time: published without one", ahead)
        self._is_ahead = ahead > 0

    async def _drop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await stop_producer(producer)


async def _send(
    producer: AIOKafkaProducer, records: Sequence[Record], futures: list[asyncio.Future[object]]
) -> None:
    """Hand `records` over and wait until each is settled; their futures are added to `futures`."""
    for record in records:
        future = await producer.send(
            record.topic,
            value=record.value,
            key=record.key,
            headers=list(record.headers),
            timestamp_ms=record.timestamp_ms or None,
        )
        futures.append(future)
    if futures:
        await asyncio.wait(futures)


def _is_ahead(future: asyncio.Future[object]) -> bool:
    """Whether the broker has refused the record of a settled future for its time."""
    return not future.cancelled() and isinstance(future.exception(), InvalidTimestampError)


def _retrieve(future: asyncio.Future[object]) -> None:
    """Look at the outcome nobody waits for any more, else asyncio reports it as forgotten."""
    if not future.cancelled():
        future.exception()
