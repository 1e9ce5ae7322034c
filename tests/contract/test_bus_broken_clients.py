"""The bus goes on where a task of aiokafka's has ended: it tells nobody, and sends or reads no more.

So it does on uvloop where a connection is reset and something is sent in the same turn of the loop, before
the client has seen it: the transport raises a RuntimeError then, for which aiokafka is not prepared.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

import pytest
from aiokafka.conn import AIOKafkaConnection
from aiokafka.errors import KafkaConnectionError
from aiokafka.protocol.commit import OffsetCommitRequest
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.protocol.group import HeartbeatRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.produce import ProduceRequest

from services.common.bus import Follower, KafkaBus, Record, membership, stopping
from services.common.bus.admin import ensure_topics
from services.common.errors import Unavailable
from services.common.topics import Topic
from tests.fixtures.waiting import PATIENCE_S, eventually


class Breaking:
    """Connections on which the next request of one kind fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._kind: type | None = None
        self._before = 0
        self._error: Exception = RuntimeError()
        send = AIOKafkaConnection.send

        def sent(connection: AIOKafkaConnection, request: Any, *args: Any, **options: Any) -> Any:
            if self._kind is not None and isinstance(request, self._kind):
                self._before -= 1
                if self._before < 0:
                    self._kind = None
                    raise self._error
            return send(connection, request, *args, **options)

        monkeypatch.setattr(AIOKafkaConnection, "send", sent)

    def next(self, kind: type, error: Exception | None = None, *, before: int = 0) -> None:
        """By default as where uvloop has closed the transport already. `before` of them go well first."""
        self._kind = kind
        self._before = before
        self._error = error or RuntimeError("unable to perform operation on <TCPTransport>")

    async def happened(self) -> None:
        await eventually(lambda: self._kind is None)


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Breaking:
    return Breaking(monkeypatch)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[AIOKafkaConnection]:
    """All that are made."""
    made: list[AIOKafkaConnection] = []
    connect = AIOKafkaConnection.connect

    async def recorded(connection: AIOKafkaConnection) -> None:
        made.append(connection)
        await connect(connection)

    monkeypatch.setattr(AIOKafkaConnection, "connect", recorded)
    return made


@pytest.fixture
async def topic(kafka_bootstrap: str) -> Topic:
    made = Topic(f"broken.{uuid.uuid4().hex[:12]}.v1", partitions=1)
    await ensure_topics(kafka_bootstrap, [made])
    return made


async def test_publishing_goes_on_where_nothing_was_sent_any_more(
    kafka_bootstrap: str, topic: Topic, breaking: Breaking
) -> None:
    async with KafkaBus(kafka_bootstrap, "test") as bus:
        await bus.publish([Record(topic.name, b"k", b"1")])
        breaking.next(ProduceRequest)
        with pytest.raises(Unavailable):
            await bus.publish([Record(topic.name, b"k", b"2")])
        await bus.publish([Record(topic.name, b"k", b"3")])


async def test_publishing_goes_on_where_the_connection_is_lost_while_it_is_made(
    kafka_bootstrap: str, topic: Topic, breaking: Breaking
) -> None:
    breaking.next(MetadataRequest)
    async with KafkaBus(kafka_bootstrap, "test") as bus:
        await bus.publish([Record(topic.name, b"k", b"1")])
    await breaking.happened()


async def test_publishing_goes_on_where_brokers_were_asked_for_no_more(
    kafka_bootstrap: str, topic: Topic, breaking: Breaking
) -> None:
    async with KafkaBus(kafka_bootstrap, "test", publish_deadline=3.0) as bus:
        await bus.publish([Record(topic.name, b"k", b"1")])
        breaking.next(MetadataRequest)
        assert bus._producer is not None
        bus._producer.client.force_metadata_update()
        await breaking.happened()
        # A connection that is lost has them asked for again.
        breaking.next(ProduceRequest, KafkaConnectionError("as it happens"))
        await bus.publish([Record(topic.name, b"k", b"2")])


async def test_no_connection_is_kept_where_brokers_were_asked_for_no_more(
    kafka_bootstrap: str, topic: Topic, breaking: Breaking, connections: list[AIOKafkaConnection]
) -> None:
    async def handler(records: Sequence[Record]) -> None:
        seen.append(len(records))

    seen: list[int] = []
    async with KafkaBus(kafka_bootstrap, "test", session_timeout=2.0) as bus:
        await bus.publish([Record(topic.name, b"k", b"1")])
        assert bus._producer is not None
        breaking.next(MetadataRequest)
        bus._producer.client.force_metadata_update()
        await breaking.happened()
        async with bus.consume(topic, "group", handler):
            await eventually(lambda: seen, on=seen)
            breaking.next(MetadataRequest)
            await breaking.happened()
    assert connections
    assert [connection for connection in connections if connection.connected()] == []


async def test_following_goes_on(kafka_bootstrap: str, topic: Topic, breaking: Breaking) -> None:
    seen: dict[bytes, bytes | None] = {}
    following = Follower(kafka_bootstrap, "test")
    async with KafkaBus(kafka_bootstrap, "test") as bus, following.table(topic, seen.__setitem__) as table:
        await table.ready(PATIENCE_S)
        breaking.next(FetchRequest)
        await breaking.happened()
        await bus.publish([Record(topic.name, b"key", b"value")])
        await eventually(lambda: seen.get(b"key") == b"value", on=seen)


async def test_consuming_goes_on(kafka_bootstrap: str, topic: Topic, breaking: Breaking) -> None:
    seen: list[bytes | None] = []

    async def handler(records: Sequence[Record]) -> None:
        seen.extend(record.value for record in records)

    async with (
        KafkaBus(kafka_bootstrap, "test", session_timeout=2.0) as bus,
        bus.consume(topic, "group", handler),
    ):
        for value, kind in ((b"1", FetchRequest), (b"2", HeartbeatRequest), (b"3", MetadataRequest)):
            await bus.publish([Record(topic.name, b"k", value)])
            await eventually(lambda: value in seen, on=seen)  # noqa: B023 - called before the next one
            breaking.next(kind)
            await breaking.happened()
        await bus.publish([Record(topic.name, b"k", b"4")])
        await eventually(lambda: b"4" in seen, on=seen)


@pytest.mark.parametrize("before", [0, 1])
async def test_consuming_begins_though_the_connection_is_lost_while_the_group_is_joined(
    kafka_bootstrap: str,
    topic: Topic,
    breaking: Breaking,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    before: int,
) -> None:
    """What is lost is the connection for the first look around, or, in vain waited for, one of the next."""
    monkeypatch.setattr(stopping, "STOP_TIMEOUT_S", 1.0)
    patience_s = membership.START_TIMEOUT
    monkeypatch.setattr(membership, "START_TIMEOUT", 0.5)
    seen: list[bytes | None] = []

    async def handler(records: Sequence[Record]) -> None:
        seen.extend(record.value for record in records)

    async with KafkaBus(kafka_bootstrap, "test", session_timeout=2.0) as bus:
        await bus.publish([Record(topic.name, b"k", b"1")])
        breaking.next(MetadataRequest, before=before)
        async with bus.consume(topic, "group", handler):
            await breaking.happened()
            await eventually(lambda: membership.__name__ in {record.name for record in caplog.records})
            monkeypatch.setattr(membership, "START_TIMEOUT", patience_s)  # a join that goes well takes longer
            await eventually(lambda: seen == [b"1"], on=seen)


async def test_what_was_read_is_handled_though_a_commit_was_not_sent(
    kafka_bootstrap: str, topic: Topic, breaking: Breaking
) -> None:
    seen: list[bytes | None] = []

    async def handler(records: Sequence[Record]) -> None:
        if not seen:
            breaking.next(OffsetCommitRequest)
        seen.extend(record.value for record in records)

    numbers = [b"%d" % number for number in range(5)]
    async with KafkaBus(kafka_bootstrap, "test", session_timeout=2.0) as bus:
        await bus.publish([Record(topic.name, b"k", number) for number in numbers])
        async with bus.consume(topic, "group", handler, max_records=1):
            await eventually(lambda: seen == numbers, on=seen)
