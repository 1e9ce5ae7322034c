"""Records of other producers, which may be compressed."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import aiokafka.codec
import pyarrow as pa
import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record import default_records
from aiokafka.record.util import calc_crc32c
from confluent_kafka import Producer

from services.common.bus import KafkaBus, Record, membership
from services.common.bus.admin import ensure_topics
from services.common.topics import Topic
from tests.fixtures.waiting import eventually, eventually_of

NAMES = {2: "snappy", 4: "zstd"}
#: Where a batch has its checksum, which is of all that stands behind it.
_CRC = slice(17, 21)


def compressed(value: bytes, codec: int, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A batch of one record, as other clients write it."""
    name = NAMES[codec]
    with monkeypatch.context() as patched:
        patched.setattr(aiokafka.codec, f"has_{name}", lambda: True)
        patched.setattr(
            default_records, f"{name}_encode", lambda data: pa.compress(bytes(data), codec=name, asbytes=True)
        )
        return bytes(batch_builder(codec, value).build())


def batch_builder(codec: int, value: bytes, headers: Sequence[tuple[str, bytes]] = ()) -> Any:
    builder = default_records._DefaultRecordBatchBuilderPy(
        2,
        codec,
        is_transactional=0,
        producer_id=-1,
        producer_epoch=-1,
        base_sequence=-1,
        batch_size=1 << 20,
    )
    builder.append(0, 1_750_000_000_000, b"k", value, list(headers))
    return builder


def garbled(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A batch said to be compressed that is not."""
    with monkeypatch.context() as patched:
        patched.setattr(default_records, "gzip_encode", lambda data: b"no gzip" + bytes(data)[:100])
        return bytes(batch_builder(1, b"{}" * 2000).build())


def misnamed(_monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A batch whose record has a header of a name that is no UTF-8, which no broker and few clients mind."""
    batch = bytearray(batch_builder(0, b"{}", [("\u00ff", b"value")]).build())
    at = batch.index(b"\xc3\xbf")
    batch[at : at + 2] = b"\xff\xff"
    batch[_CRC] = calc_crc32c(bytes(batch[_CRC.stop :])).to_bytes(4, "big")
    return bytes(batch)


def foreign(codec: int, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A batch in a codec that is missing here."""
    monkeypatch.setattr(aiokafka.codec, f"has_{NAMES[codec]}", lambda: False)
    return compressed(b"{}" * 2000, codec, monkeypatch)


async def publish_batch(bootstrap: str, topic: Topic, batch: bytes) -> None:
    async with AIOKafkaProducer(bootstrap_servers=bootstrap) as others:
        await others.partitions_for(topic.name)
        request = ProduceRequest(None, -1, 5000, [(topic.name, [(0, batch)])])
        await others.client.send(others.client.get_random_node(), request)


@pytest.mark.parametrize("codec", ["gzip", "snappy", "lz4", "zstd"])
async def test_what_librdkafka_compresses_is_read(kafka_bootstrap: str, codec: str) -> None:
    topic = Topic(f"{codec}.{uuid.uuid4().hex[:12]}.v1", partitions=1)
    await ensure_topics(kafka_bootstrap, [topic])
    values = [b'{"job": %d, "inputs": [[1.0, 2.0], [1.0, 2.0]]}' % number for number in range(200)]
    seen: list[bytes | None] = []

    async def handler(records: Sequence[Record]) -> None:
        seen.extend(record.value for record in records)

    others = Producer({"bootstrap.servers": kafka_bootstrap, "compression.type": codec, "linger.ms": 100})
    for value in values:
        others.produce(topic.name, value)
    await asyncio.to_thread(others.flush)
    async with KafkaBus(kafka_bootstrap, "test") as bus, bus.consume(topic, topic.name, handler):
        await eventually(lambda: len(seen) >= len(values), on=seen)
    assert seen == values


@pytest.mark.parametrize("unreadable", [*[partial(foreign, codec) for codec in NAMES], garbled, misnamed])
async def test_a_topic_that_cannot_be_read_costs_no_other_of_its_group_its_records(
    kafka_bootstrap: str,
    monkeypatch: pytest.MonkeyPatch,
    unreadable: Callable[[pytest.MonkeyPatch], bytes],
) -> None:
    """aiokafka forgets what it has taken of some partitions where the next one's cannot be read."""
    group = uuid.uuid4().hex[:12]
    jobs, results = (Topic(f"{name}.{group}.v1", partitions=1) for name in ("jobs", "results"))
    await ensure_topics(kafka_bootstrap, [jobs, results])
    monkeypatch.setattr(membership, "UNREADABLE_REST_S", 0.1)
    seen: list[bytes | None] = []

    async def handler(records: Sequence[Record]) -> None:
        seen.extend(record.value for record in records)

    async def submitted(records: Sequence[Record]) -> None:
        raise AssertionError(f"it can be read: {records}")

    await publish_batch(kafka_bootstrap, jobs, unreadable(monkeypatch))
    numbers = [b"%d" % number for number in range(100)]
    async with (
        KafkaBus(kafka_bootstrap, "test", session_timeout=2.0) as bus,
        bus.consume(results, group, handler),
        bus.consume(jobs, group, submitted),
    ):
        for number in numbers:
            await bus.publish([Record(results.name, b"k", number)])
        await eventually_of(lambda: bus.lag(results, group), lambda lag: lag == 0)
    assert list(dict.fromkeys(seen)) == numbers


@pytest.mark.parametrize("unreadable", [partial(foreign, 4), garbled, misnamed])
async def test_what_lies_before_a_record_that_cannot_be_read_is_handled(
    kafka_bootstrap: str,
    monkeypatch: pytest.MonkeyPatch,
    unreadable: Callable[[pytest.MonkeyPatch], bytes],
) -> None:
    """All of one fetch are parsed together, and what was parsed is lost where one cannot be."""
    jobs = Topic(f"jobs.{uuid.uuid4().hex[:12]}.v1", partitions=1)
    await ensure_topics(kafka_bootstrap, [jobs])
    monkeypatch.setattr(membership, "UNREADABLE_REST_S", 0.1)
    seen: list[bytes | None] = []

    async def handler(records: Sequence[Record]) -> None:
        seen.extend(record.value for record in records)

    numbers = [b"%d" % number for number in range(100)]
    async with KafkaBus(kafka_bootstrap, "test", session_timeout=2.0) as bus:
        for start in (0, 60):
            await bus.publish([Record(jobs.name, b"k", number) for number in numbers[start : start + 60]])
        await publish_batch(kafka_bootstrap, jobs, unreadable(monkeypatch))
        async with bus.consume(jobs, jobs.name, handler):
            await eventually_of(lambda: bus.lag(jobs, jobs.name), lambda lag: lag == 1)
    assert seen == numbers
