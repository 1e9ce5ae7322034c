"""Records of predictions that are published together become one, and say the same."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code

from services.common.bus import MemoryBus, Record
from services.common.clock import SystemClock
from services.common.eventlog import EventLog, PredictionJoin, join_predictions
from services.common.eventlog.framing import Event
from services.common.topics import PREDICTIONS
from tests.fixtures.prediction_log import START_US, prediction_batch
from tests.fixtures.waiting import PATIENCE_S

CLOCK = SystemClock()


def event(record: PredictionBatch, headers: tuple[tuple[str, bytes], ...] = ()) -> Event:
    value = record.SerializeToString()
    return Event(f"{record.model}/{record.version}".encode(), value, headers, 7, len(value))


def read(events: list[Event]) -> list[PredictionBatch]:
    return [PredictionBatch.FromString(event.value) for event in events]


def test_records_of_one_version_become_one_with_every_request_in_order() -> None:
    records = [
        prediction_batch([1, 2], rows=[1, 2], labels=[1, 0, 1], latency_us=[5, 6], variant="a"),
        prediction_batch([3], codes=[Code.CODE_INTERNAL], answered_at_us=START_US, variant="a"),
        prediction_batch([4], labels=[1], answered_at_us=START_US + 90, variant="a"),
    ]
    first, third = records[0], records[2]
    given = [event(first), event(third)]
    (joined,) = read(join_predictions(given))
    assert joined.batch_id == first.batch_id
    assert joined.request_ids == first.request_ids + third.request_ids
    assert list(joined.rows) == [1, 2, 1]
    assert list(joined.latency_us) == [5, 6, 2000]
    assert joined.answered_at_us == START_US + 90
    assert list(joined.answered_before_us) == [89, 89, 0]
    assert (list(joined.variant_names), list(joined.variants)) == (["a"], [0, 0, 0])
    (x,), (label,) = joined.inputs, joined.outputs
    assert list(x.shape) == [4, 2]
    assert x.data == first.inputs[0].data + third.inputs[0].data
    assert list(label.shape) == [4]
    assert np.frombuffer(label.data, "<i8").tolist() == [1, 0, 1, 1]
    assert joined.source == first.source
    assert joined.artifact_digest == first.artifact_digest
    # Requests that failed carry no tensors: their record is of another layout.
    assert len(join_predictions([event(record) for record in records])) == 2


def test_records_keep_the_experiment_of_every_request() -> None:
    """Those that name the same ones are joined, those that name none or others stay apart."""
    same = {"experiment_ids": ["exp_a"], "variant": "a"}
    records = [
        prediction_batch([1, 2], experiments=[1, 0], **same),
        prediction_batch([3], variant="a"),
        prediction_batch([4], experiments=[1], **same),
        prediction_batch([5], experiments=[1], experiment_ids=["exp_b"], variant="a"),
        prediction_batch([6], variant="a"),
    ]
    joined = read(join_predictions([event(record) for record in records]))
    assert [(list(one.experiment_ids), list(one.experiments)) for one in joined] == [
        (["exp_a"], [1, 0, 1]),
        ([], []),
        (["exp_b"], [1]),
    ]
    assert [len(one.rows) for one in joined] == [3, 2, 1]


@pytest.mark.parametrize("most_forms", [0, 1024])
@pytest.mark.parametrize("apart_s", [4290, 4300, 86_400])
def test_times_are_kept_however_long_the_broker_was_away(most_forms: int, apart_s: int) -> None:
    """Within a joined record there is room for 71 minutes."""
    times = [START_US + number * apart_s * 1_000_000 for number in range(2) for _ in range(40)]
    given = [event(prediction_batch([n], answered_at_us=at)) for n, at in enumerate(times)]
    steps, records = PredictionJoin(most_forms).steps(given), list[PredictionBatch]()
    while not records:
        try:
            next(steps)
        except StopIteration as end:
            records = read(end.value)
    assert np.concatenate([_answered_at(record) for record in records]).tolist() == times
    assert (len(records) == 1) == (apart_s == 4290)


def _answered_at(record: PredictionBatch) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    before = record.answered_before_us or [0] * (len(record.request_ids) // 16)
    return record.answered_at_us - np.array(before, dtype=np.int64)


def test_joining_the_same_again_gives_the_same() -> None:
    events = [event(prediction_batch([n])) for n in range(5)]
    assert join_predictions(events) == join_predictions(list(events))


@pytest.mark.parametrize(
    "other",
    [
        prediction_batch([2], version="2"),
        prediction_batch([2], variant="another"),
        prediction_batch([2], source="worker-2"),
        prediction_batch([2], writer=PredictionBatch.WRITER_ROUTER),
        prediction_batch([2], payload=False),
    ],
)
def test_records_that_differ_stay_apart(other: PredictionBatch) -> None:
    events = [event(prediction_batch([1])), event(other), event(prediction_batch([3]))]
    joined = read(join_predictions(events))
    assert len(joined) == 2
    assert joined[0].request_ids == read(events)[0].request_ids + read(events)[2].request_ids
    assert joined[1] == other


def test_what_cannot_be_joined_is_passed_on_as_it_is() -> None:
    whole = prediction_batch([1])
    whole.inputs[0].shape[:] = [2]  # one tensor for all, not rows
    cut = prediction_batch([2])
    del cut.latency_us[:]
    large = prediction_batch([3])
    large.inputs[0].data = bytes(300 << 10)
    garbage = Event(b"k", b"\xff\xff", (), 7, 2)
    headers = (("traceparent", b"00-1"),)
    events = [
        event(whole), event(whole), event(cut), event(cut), event(large), event(large), garbage, garbage,
        event(prediction_batch([4]), headers), event(prediction_batch([5]), headers),
    ]  # fmt: skip
    assert join_predictions(events) == events


def test_a_joined_record_is_bounded() -> None:
    events = [event(prediction_batch(range(n, n + 300))) for n in range(0, 6000, 300)]
    joined = read(join_predictions(events))
    assert [len(record.request_ids) // 16 for record in joined] == [2100, 2100, 1800]


class Interrupted(MemoryBus):
    """Takes what is published, and the process dies before it hears of it."""

    async def publish(self, records: Sequence[Record]) -> None:
        await super().publish(records)
        await asyncio.Event().wait()


async def test_after_a_crash_the_same_records_are_published_again(tmp_path: Path) -> None:
    """Else readers, who know records by their ids, would count requests twice."""
    dying, bus = Interrupted([PREDICTIONS]), MemoryBus([PREDICTIONS])
    topic = PREDICTIONS.name
    log = EventLog(tmp_path, dying, topic, clock=CLOCK, linger=0.001, join=PredictionJoin())
    await log.start()
    for n in range(3):
        log.append(b"cancer/1", prediction_batch([n]).SerializeToString())
    async with asyncio.timeout(PATIENCE_S):
        while not dying.records(topic):  # noqa: ASYNC110 - the bus sets no event
            await asyncio.sleep(0.002)
    log.append(b"cancer/1", prediction_batch([3]).SerializeToString())
    await log.close(CLOCK.monotonic())
    again = EventLog(tmp_path, bus, topic, clock=CLOCK, linger=0.001, join=PredictionJoin())
    await again.start()
    again.append(b"cancer/1", prediction_batch([4]).SerializeToString())
    await again.close(CLOCK.monotonic() + 5)
    before, after = dying.records(topic), bus.records(topic)
    assert [record.value for record in after][:1] == [record.value for record in before]
    ids = b"".join(PredictionBatch.FromString(record.value or b"").request_ids for record in after)
    assert [ids[i : i + 8] for i in range(0, 80, 16)] == [n.to_bytes(8, "big") for n in range(5)]


async def test_the_log_lingers_between_publishes_too(tmp_path: Path) -> None:
    bus = MemoryBus([PREDICTIONS])
    sizes: list[int] = []
    publish = bus.publish

    async def counting(records: Sequence[Record]) -> None:
        sizes.append(len(records))
        await publish(records)

    bus.publish = counting  # type: ignore[method-assign]  # a spy
    log = EventLog(tmp_path, bus, PREDICTIONS.name, clock=CLOCK, linger=30.0)
    await log.start()
    for n in range(50):
        log.append(b"k", b"%d" % n)
        await asyncio.sleep(0)
    await log.close(CLOCK.monotonic() + 5)
    assert sizes == [50]
