"""A membership reads on whatever happens to it, and ends when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.consumer.fetcher import Fetcher, FetchResult, PartitionRecords
from aiokafka.errors import KafkaError

from services.common.bus import Handler, Record, membership
from services.common.bus.consume import Subscription
from services.common.bus.membership import Membership
from services.common.topics import Topic
from tests.fixtures.waiting import eventually, patience

_TOPIC = Topic("test.events.v1")
_PARTITION = TopicPartition(_TOPIC.name, 0)


class _Subscriber:
    """What FastStream makes; `errors` are raised by its starts, one after another."""

    consumer = None

    def __init__(self, errors: list[Exception], started: asyncio.Event) -> None:
        self._errors = errors
        self._started = started

    async def start(self) -> None:
        if self._errors:
            raise self._errors.pop(0)
        self._started.set()

    async def stop(self) -> None:
        pass


@pytest.fixture
def errors() -> list[Exception]:
    return []


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, errors: list[Exception]) -> asyncio.Event:
    began = asyncio.Event()
    monkeypatch.setattr(Membership, "_new_subscriber", lambda _self: _Subscriber(errors, began))
    return began


async def unread(records: Sequence[Record]) -> None:
    raise AssertionError(f"nothing is read: {records}")


def of_nobody(handle: Handler = unread) -> tuple[Membership, Subscription]:
    async def publish(records: Sequence[Record]) -> None:
        raise AssertionError(f"nothing is buried: {records}")

    broker: Any = None
    subscription = Subscription(_TOPIC, "group", handle, publish=publish, max_records=1, collect_s=0.0)
    return Membership(broker, "group", session_timeout=2.0), subscription


async def test_it_joins_anew_after_what_nobody_expected(
    errors: list[Exception], started: asyncio.Event
) -> None:
    errors += [RuntimeError("unable to perform operation on <TCPTransport>"), ValueError("so much")]
    member, subscription = of_nobody()
    member.join(subscription)
    async with patience("the third try to join"):
        await started.wait()
    assert await member.leave(subscription)


@pytest.mark.parametrize("turns", range(6))
async def test_who_leaves_while_the_group_is_to_be_joined_anew_is_let_go(
    started: asyncio.Event, monkeypatch: pytest.MonkeyPatch, turns: int
) -> None:
    """In whichever turn of the loop: `asyncio.wait_for` would lose the cancellation in some of them."""
    monkeypatch.setattr(membership, "CHECK_INTERVAL", 3600.0)
    member, subscription = of_nobody()
    member.join(subscription)
    async with patience("the join"):
        await started.wait()
    for _ in range(3):
        await asyncio.sleep(0)
    member._changed.set()
    for _ in range(turns):
        await asyncio.sleep(0)
    async with patience("the end"):
        assert await member.leave(subscription)


class _Positions:
    """A consumer of two partitions, the first of which is being reset while its group fails."""

    def __init__(self) -> None:
        self._fetcher = SimpleNamespace()

    async def position(self, partition: TopicPartition) -> int:
        if partition.partition == 0:
            raise KafkaError("of the group")
        return 1

    def assignment(self) -> set[TopicPartition]:
        return set()

    async def commit(self, _offsets: object) -> None:
        pass


async def test_an_error_of_the_group_costs_no_partition_the_records_that_were_read() -> None:
    handled: list[int] = []

    async def handle(records: Sequence[Record]) -> None:
        handled.extend(record.partition for record in records)

    member, subscription = of_nobody(handle)
    member._subscriptions[_TOPIC.name] = subscription
    member._subscriber = SimpleNamespace(consumer=_Positions())
    read: Any = [
        SimpleNamespace(
            topic=_TOPIC.name, partition=partition, offset=0, key=b"k", value=b"v", headers=(), timestamp=0
        )
        for partition in (0, 1)
    ]
    await member._on_batch(tuple(read))
    await eventually(lambda: handled == [1], on=handled)
    await subscription.stop(1.0)


class _Fetching:
    """A consumer of one partition, as aiokafka is: of offsets 0 to 4, 1 and 3 are where transactions ended,
    and 4 cannot be read."""

    def __init__(self) -> None:
        self.fetches = 0
        self.paused = False
        self.position = 0
        self._subscriptions = SimpleNamespace(reassignment_in_progress=False)
        self._fetcher: Any = self
        self._records: dict[TopicPartition, FetchResult] = {}
        self._wait_consume_future = None

    def assignment(self) -> set[TopicPartition]:
        return {_PARTITION}

    async def getmany(self, *partitions: TopicPartition, max_records: int | None = None) -> Any:
        if self.paused:
            return {}
        try:
            return await Fetcher.fetched_records(self, partitions, 0, max_records)
        finally:
            self._fetch()

    def pause(self, *_partitions: TopicPartition) -> None:
        self.paused = True

    def resume(self, *_partitions: TopicPartition) -> None:
        self.paused = False

    def consumed_to(self, position: int) -> None:
        self.position = position

    def _notify(self, _waiter: object) -> None:
        pass

    def _create_fetch_waiter(self) -> asyncio.Future[None]:
        waiter = asyncio.get_running_loop().create_future()
        waiter.set_result(None)
        return waiter

    def _fetch(self) -> None:
        if _PARTITION in self._records:
            return
        self.fetches += 1
        batches = [_Batch(0), _Batch(1, is_control_batch=True), _Batch(2), _Batch(3, is_control_batch=True)]
        left: Any = [batch for batch in (*batches, _Batch(4)) if batch.offset >= self.position]
        unpacked = SimpleNamespace(has_next=lambda: left, next_batch=lambda: left.pop(0))
        given: Any = SimpleNamespace(active=True, state_value=lambda _partition: self)
        records = PartitionRecords(_PARTITION, unpacked, None, self.position, None, None, True, 0)
        self._records[_PARTITION] = FetchResult(
            _PARTITION, assignment=given, partition_records=records, backoff=0
        )


class _Batch:
    """One record, or the end of a transaction."""

    key, value, timestamp, timestamp_type, headers = None, b"", 0, 0, ()
    checksum = None

    def __init__(self, offset: int, *, is_control_batch: bool = False) -> None:
        self.offset, self.next_offset, self.is_control_batch = offset, offset + 1, is_control_batch

    def validate_crc(self) -> bool:
        return self.offset != 4

    def __iter__(self) -> Iterator[_Batch]:
        return iter([self])


async def test_what_lies_before_an_unreadable_record_is_taken_though_offsets_are_missing() -> None:
    """Whoever writes in transactions leaves offsets without records."""
    consumer, taking = _Fetching(), membership._Taking()
    taken: list[int] = []
    for _ in range(100):
        taken += [record.offset for record in await taking.next_batch(consumer)]
        if consumer.paused:
            break
    assert taken == [0, 2]
    assert consumer.paused, "it is asked for again and again"
