"""How one batch meets its handler, whatever the bus."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from services.common.bus import Malformed, Record
from services.common.bus.delivery import Backoff, dead_letter, deliver, pause_s
from services.common.bus.port import MAX_RECORD_BYTES, check_size
from services.common.topics import Topic

TOPIC = Topic("test.events.v1")


def batch(*values: bytes) -> list[Record]:
    return [Record(TOPIC.name, b"k", value, partition=2, offset=i) for i, value in enumerate(values)]


async def test_each_malformed_record_is_buried_once_and_the_rest_accepted_in_order() -> None:
    accepted: list[bytes | None] = []
    buried: list[tuple[bytes | None, str]] = []

    async def handler(records: Sequence[Record]) -> None:
        for index, record in enumerate(records):
            if record.value == b"bad":
                raise Malformed(index, f"number {record.offset}")
        accepted.extend(record.value for record in records)

    async def bury(record: Record, reason: str) -> None:
        buried.append((record.value, reason))

    await deliver(batch(b"bad", b"1", b"bad", b"2", b"bad"), handler, bury)
    assert accepted == [b"1", b"2"]
    assert buried == [(b"bad", "number 0"), (b"bad", "number 2"), (b"bad", "number 4")]


async def test_a_batch_of_nothing_else_never_reaches_the_handler_empty() -> None:
    calls: list[int] = []

    async def handler(records: Sequence[Record]) -> None:
        calls.append(len(records))
        raise Malformed(0, "no")

    async def bury(record: Record, reason: str) -> None: ...

    await deliver(batch(b"a", b"b"), handler, bury)
    assert calls == [2, 1]


@pytest.mark.parametrize("index", [-1, 2])
async def test_a_handler_that_names_no_record_of_its_batch_is_a_failure(index: int) -> None:
    buried: list[Record] = []

    async def handler(records: Sequence[Record]) -> None:
        raise Malformed(index, "confused")

    async def bury(record: Record, reason: str) -> None:
        buried.append(record)

    with pytest.raises(IndexError):
        await deliver(batch(b"a", b"b"), handler, bury)
    assert buried == []


async def test_a_dead_letter_queue_that_is_away_fails_the_batch() -> None:
    async def handler(records: Sequence[Record]) -> None:
        raise Malformed(0, "no")

    async def bury(record: Record, reason: str) -> None:
        raise ConnectionError("away")

    with pytest.raises(ConnectionError):
        await deliver(batch(b"a"), handler, bury)


def test_a_dead_letter_says_where_it_came_from_and_keeps_its_content() -> None:
    record = Record(TOPIC.name, b"k", b"v", (("traceparent", b"00"),), partition=3, offset=17)
    letter = dead_letter(record, TOPIC, "drift", "cut short")
    assert (letter.topic, letter.key, letter.value) == ("test.events.v1.drift.dlq", b"k", b"v")
    assert dict(letter.headers) == {
        "traceparent": b"00",
        "dlq-topic": b"test.events.v1",
        "dlq-partition": b"3",
        "dlq-offset": b"17",
        "dlq-reason": b"cut short",
    }


@pytest.mark.parametrize(
    "record",
    [
        Record(TOPIC.name, b"k", bytes(MAX_RECORD_BYTES)),
        Record(TOPIC.name, bytes(MAX_RECORD_BYTES), None),
        Record(TOPIC.name, bytes(MAX_RECORD_BYTES // 2), bytes(MAX_RECORD_BYTES)),
        Record(TOPIC.name, b"k", b"v", (("name", bytes(MAX_RECORD_BYTES)),)),
        Record(TOPIC.name, b"k", b"v", tuple([("n" * 1000, b"")] * 20_000)),
    ],
    ids=["value", "key", "key and value", "header", "headers"],
)
def test_a_dead_letter_that_would_be_too_large_is_cut(record: Record) -> None:
    letter = dead_letter(record, TOPIC, "drift", "cut short")
    check_size(letter)
    assert dict(letter.headers)["dlq-reason"] == b"cut, since it is too large: cut short"
    assert len(letter.key or b"") == min(len(record.key or b""), 64 << 10)
    assert (letter.value is None) == (record.value is None)


def test_backoff_doubles_up_to_its_cap_and_starts_over() -> None:
    backoff = Backoff(0.1, 1.0)
    waits = [backoff.next() for _ in range(200)]
    for wait, nominal in zip(waits, [0.1, 0.2, 0.4, 0.8, *[1.0] * 196], strict=True):
        assert nominal * 0.5 <= wait <= nominal * 1.5
    assert len(set(waits)) > 100  # two clients that fail together do not come back together
    backoff.reset()
    assert backoff.next() <= 0.15


def test_a_reader_rests_longer_the_longer_a_batch_takes_it() -> None:
    rests = [pause_s(0.5, took, taken=10, left=0) for took in (0.0, 0.01, 0.1, 0.2, 0.4, 30.0)]
    assert rests == pytest.approx([0.5, 0.5, 0.8, 1.6, 2.0, 2.0])


def test_a_reader_that_is_behind_rests_no_longer_than_asked_for() -> None:
    assert pause_s(0.5, 1.0, taken=10, left=10) == 2.0  # what came meanwhile is no backlog
    assert pause_s(0.5, 1.0, taken=10, left=11) == 0.5


def test_a_reader_that_collects_nothing_never_rests() -> None:
    assert pause_s(0.0, 1.0, taken=1, left=0) == 0.0
