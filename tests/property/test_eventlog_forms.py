"""Records joined as bytes are those joined as messages, byte for byte, whatever was joined before."""

from __future__ import annotations

from google.protobuf.message import DecodeError
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.eventlog import PredictionJoin
from services.common.eventlog.forms import delimited, fields, learn
from services.common.eventlog.framing import Event
from tests.fixtures.prediction_log import START_US, prediction_batch

#: Fields that a worker writes last: what comes from a clock or names the request, and tensors.
_LAST = (1, 7, 8, 9, 18, 19, 20, 22, 23)

numbers = st.integers(0, (1 << 32) - 1) | st.integers(0, 300)


@st.composite
def records(draw: st.DrawFn) -> bytes:
    """One record as a router or as a worker writes it, of few forms, so that many are alike."""
    count = draw(st.integers(1, 3))
    first = draw(st.integers(0, 1000))
    experiments = draw(st.sampled_from(([], [], [1])))
    record = prediction_batch(
        list(range(first, first + count)),
        variant=draw(st.sampled_from("ab")),
        rows=draw(st.sampled_from((1, 1, 3))),
        attempts=[draw(st.sampled_from((0, 0, 0, 1))) for _ in range(count)],
        codes=[draw(st.sampled_from((*[Code.CODE_OK] * 6, Code.CODE_INTERNAL))) for _ in range(count)],
        labels=None,
        payload=False,
        latency_us=[draw(numbers) for _ in range(count)],
        queue_us=[draw(numbers) for _ in range(count)],
        compute_us=draw(numbers),
        answered_at_us=START_US + draw(st.integers(-(10**6), 10**6)),
        experiments=experiments * count,
        experiment_ids=["exp_a"] * len(experiments),
    )
    rows = sum(rows for rows, code in zip(record.rows, record.codes, strict=True) if code == Code.CODE_OK)
    if rows and draw(st.integers(0, 5)):
        width = draw(st.sampled_from((1, 1, 40)))
        data = draw(st.binary(min_size=4, max_size=4)) * width * rows
        record.inputs.add(name="x", datatype="DATA_TYPE_FP32", shape=[rows, width], data=data)
        record.outputs.add(name="y", datatype="DATA_TYPE_FP32", shape=[rows], data=data[: 4 * rows])
    data = record.SerializeToString()
    return data if draw(st.integers(0, 3)) == 0 else as_a_worker_writes(data)


def as_a_worker_writes(data: bytes) -> bytes:
    found = list(fields(data))
    order = [one for one in found if one[0] not in _LAST]
    order += [one for number in _LAST for one in found if one[0] == number]
    return b"".join([data[tag:end] for _, tag, _, end in order])


def events_of(values: list[bytes]) -> list[Event]:
    return [Event(b"cancer/1", value, (), 7, len(value)) for value in values]


def joined(join: PredictionJoin, events: list[Event]) -> list[Event]:
    steps = join.steps(events)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return list(end.value)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(records(), min_size=1, max_size=12), min_size=1, max_size=4))
def test_joining_as_bytes_gives_what_joining_as_messages_gives(publishes: list[list[bytes]]) -> None:
    learning, small, general = PredictionJoin(), PredictionJoin(most_forms=2), PredictionJoin(most_forms=0)
    for values in publishes:
        events = events_of(values)
        expected = joined(general, events)
        assert joined(learning, events) == expected
        assert joined(learning, events) == expected  # and where each form is known by now
        assert joined(small, events) == expected


@settings(max_examples=150, deadline=None)
@given(records(), records(), st.data())
def test_what_is_damaged_is_treated_as_it_always_was(one: bytes, other: bytes, data: st.DataObject) -> None:
    """No form takes for its own what is no such record."""
    image = bytearray(other)
    at = data.draw(st.integers(0, len(image) - 1), label="byte")
    if data.draw(st.booleans(), label="cut"):
        del image[at:]
    else:
        image[at] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    learning, general = PredictionJoin(), PredictionJoin(most_forms=0)
    joined(learning, events_of([one, other]))
    events = events_of([one, bytes(image), one, other])
    got, expected = joined(learning, events), joined(general, events)
    assert [messages(event) for event in got] == [messages(event) for event in expected]


def messages(event: Event) -> object:
    """Damage may leave what protobuf reads but would write otherwise."""
    try:
        return PredictionBatch.FromString(event.value)
    except DecodeError:  # its bytes are what counts
        return event.value


@given(records())
def test_the_records_of_our_writers_have_a_form(value: bytes) -> None:
    record = PredictionBatch.FromString(value)
    form = learn(value, record, ())
    assert form is not None
    cut = form.cut(value)
    assert cut is not None
    assert cut[:3] == (record.batch_id, record.answered_at_us, record.request_ids)
    assert list(cut[7:]) == [tensor.data for tensor in (*record.inputs, *record.outputs)]


@given(st.integers(1, 40), st.binary(max_size=300))
def test_a_delimited_field_is_read_back(number: int, data: bytes) -> None:
    written = delimited(number, data)
    assert [(field, written[start:end]) for field, _, start, end in fields(written)] == (
        [(number, data)] if data else []
    )
