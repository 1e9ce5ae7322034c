"""What an executed batch leaves in the prediction log."""

from __future__ import annotations

import numpy as np
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, DataType, Signature, TensorSpec
from numpy.typing import NDArray

from services.common.eventlog.forms import learn
from services.common.eventlog.log import MAX_EVENT_BYTES
from services.worker.execution import Part
from services.worker.input_layout import InputLayout
from services.worker.item import Answer, Item
from services.worker.prediction_log import Entry, Made, PayloadPolicy, PredictionRecords, entries_of
from services.worker.record_columns import Answered
from services.worker.tensors import OutputColumn

FP32 = DataType.DATA_TYPE_FP32
SIGNATURE = Signature(
    inputs=[TensorSpec(name="x", datatype=FP32, shape=[-1, 2])],
    outputs=[TensorSpec(name="y", datatype=FP32, shape=[-1])],
    batched=True,
)
TIMES = Answered(started=10.0, finished=10.5, unix_us=2_000_000, compute_us=500_000)
RECORDS = PredictionRecords("worker-7", "net", "3", "sha256:abc", InputLayout(SIGNATURE))


def item(number: int, rows: int, variant: str = "a", experiment: str = "") -> Item:
    def ignore(_request: PredictRequest, _answer: Answer) -> None: ...

    request = PredictRequest(
        id=number,
        request_id=bytes([number]) * 16,
        variant=variant,
        experiment=experiment,
        unit_hash=number * 10,
        propensity=0.25,
        revision=4,
        attempt=number % 2,
        received_at_us=1_000_000,
    )
    data = np.full((rows, 2), number, np.float32).tobytes()
    made = Item(request, rows, ((), ((2,),)), (data,), 99.0, ignore)
    made.queued_at = 9.75
    made.queue_us = 250_000
    return made


def part(*items: Item) -> Part:
    rows = sum(one.rows for one in items)
    y = np.concatenate([np.full(one.rows, one.request.id * 100, np.float32) for one in items])
    column = OutputColumn("y", FP32, (), y.tobytes(), 4)
    return Part(items, rows, [b"".join(one.data[0] for one in items)], [column])


def read(made: Made) -> list[PredictionBatch]:
    return [PredictionBatch.FromString(record) for record in made.records]


def floats(data: bytes) -> NDArray[np.float32]:
    return np.frombuffer(data, np.float32)


def test_a_batch_is_one_record_of_columns() -> None:
    made = part(item(1, 1), item(2, 3, "b"), item(3, 1))
    (record,) = read(RECORDS.of_part(made, TIMES, PayloadPolicy()))
    assert RECORDS.key == b"net/3"
    assert (record.source, record.writer, record.model) == ("worker-7", PredictionBatch.WRITER_WORKER, "net")
    assert (record.version, record.artifact_digest, record.answered_at_us) == ("3", "sha256:abc", 2_000_000)
    assert len(record.batch_id) == 16
    assert record.request_ids == b"\1" * 16 + b"\2" * 16 + b"\3" * 16
    assert list(record.unit_hashes) == [10, 20, 30]
    assert [record.variant_names[index] for index in record.variants] == ["a", "b", "a"]
    assert list(record.rows) == [1, 3, 1]
    assert list(record.codes) == [Code.CODE_OK] * 3
    assert list(record.attempts) == [1, 0, 1]
    assert list(record.revisions) == [4] * 3
    assert list(record.propensities) == [0.25] * 3
    assert list(record.latency_us) == [1_000_000] * 3
    assert list(record.queue_us) == [250_000] * 3
    assert list(record.compute_us) == [500_000] * 3
    assert list(record.cached) == [False] * 3
    assert list(record.inputs[0].shape) == [5, 2]
    assert floats(record.inputs[0].data).tolist() == [1, 1, 2, 2, 2, 2, 2, 2, 3, 3]
    assert list(record.outputs[0].shape) == [5]
    assert floats(record.outputs[0].data).tolist() == [100, 200, 200, 200, 300]


def test_records_name_the_experiments_that_assigned_and_are_silent_where_none_did() -> None:
    (silent,) = read(RECORDS.of_part(part(item(1, 1)), TIMES, PayloadPolicy()))
    assert (list(silent.experiments), list(silent.experiment_ids)) == ([], [])
    mixed = [item(1, 1, "a", "exp_b"), item(2, 1), item(3, 1, "a", "exp_a"), item(4, 1, "a", "exp_b")]
    alike = [item(1, 1, "a", "exp_b"), item(3, 2, "a", "exp_b")]
    for items, ids, places in ((mixed, ["exp_b", "exp_a"], [1, 0, 2, 1]), (alike, ["exp_b"], [1, 1])):
        for _ in range(2):  # the second time, what was kept is used
            (record,) = read(RECORDS.of_part(part(*items), TIMES, PayloadPolicy()))
            assert (list(record.experiment_ids), list(record.experiments)) == (ids, places)
            assert len(record.rows) == len(items)


def test_the_policy_may_keep_tensors_out() -> None:
    (record,) = read(RECORDS.of_part(part(item(1, 1)), TIMES, PayloadPolicy(enabled=False)))
    assert not record.inputs
    assert not record.outputs
    assert list(record.rows) == [1]


def test_failed_members_stand_with_their_codes_and_without_rows() -> None:
    good, late, bad = item(1, 2), item(2, 1), item(3, 1)
    made = part(good, late)

    def code(one: Item) -> Code:
        return Code.CODE_DEADLINE_EXCEEDED if one is late else Code.CODE_OK

    entries = [*entries_of(made, code), Entry(bad, Code.CODE_INVALID_ARGUMENT)]
    records = read(RECORDS.of_entries(entries, TIMES, PayloadPolicy()))
    by_id = {
        record.request_ids[16 * i]: record.codes[i] for record in records for i in range(len(record.rows))
    }
    assert by_id == {1: 0, 2: Code.CODE_DEADLINE_EXCEEDED, 3: Code.CODE_INVALID_ARGUMENT}
    (with_tensors,) = [record for record in records if record.inputs]
    assert list(with_tensors.rows) == [2]
    assert floats(with_tensors.outputs[0].data).tolist() == [100, 100]


def test_large_batches_are_cut_into_several_records() -> None:
    made = part(*[item(i, 10) for i in range(1, 9)])
    records = read(RECORDS.of_part(made, TIMES, PayloadPolicy(record_bytes=300)))
    assert len(records) == 4
    assert len({record.batch_id for record in records}) == 4
    assert b"".join(record.request_ids for record in records) == bytes(
        byte for i in range(1, 9) for byte in [i] * 16
    )
    for record in records:
        assert sum(record.rows) == record.inputs[0].shape[0] == len(floats(record.outputs[0].data))


def test_inputs_too_large_are_left_out_and_their_outputs_kept() -> None:
    made = RECORDS.of_part(
        part(item(1, 1), item(2, 50), item(3, 1)),
        TIMES,
        PayloadPolicy(small_bytes=210, large_bytes_per_s=0),
    )
    without = [record for record in read(made) if not record.inputs]
    full = [record for record in read(made) if record.inputs]
    assert [list(record.rows) for record in without] == [[50]]
    assert floats(without[0].outputs[0].data).tolist() == [200] * 50
    assert [floats(record.inputs[0].data).tolist() for record in full] == [[1, 1], [3, 3]]
    assert [floats(record.outputs[0].data).tolist() for record in full] == [[100], [300]]
    assert made.omitted == 1


def logged_with_inputs(policy: PayloadPolicy, *at_s: float, rows: tuple[int, ...] = (25,)) -> list[bool]:
    """Whether batches of requests of so many rows, 8 bytes each, are logged with inputs at these seconds."""
    records = PredictionRecords("worker-7", "net", "3", "sha256:abc", InputLayout(SIGNATURE))
    found = []
    for at in at_s:
        times = Answered(started=at, finished=at, unix_us=2_000_000, compute_us=1)
        made = records.of_part(part(*[item(i, count) for i, count in enumerate(rows, 1)]), times, policy)
        (record,) = read(made)
        assert len(floats(record.outputs[0].data)) == sum(record.rows) == sum(rows)
        assert made.omitted == (0 if record.inputs else len(rows))
        found.append(bool(record.inputs))
    return found


def test_some_large_inputs_are_logged_within_their_rate() -> None:
    policy = PayloadPolicy(small_bytes=100, record_bytes=300, large_bytes_per_s=100)
    # 200 bytes each of 300 at the beginning, 100 more a second: what is owed is paid before the next.
    logged = logged_with_inputs(policy, 9.0, 9.0, 9.0, 9.5, 10.5, 12.0, 12.5)
    assert logged == [True, True, False, False, True, False, True]


def test_requests_of_a_batch_are_logged_with_their_inputs_all_or_none() -> None:
    policy = PayloadPolicy(small_bytes=100, record_bytes=900, large_bytes_per_s=400)
    assert logged_with_inputs(policy, 9.0, 9.0, 9.0, 10.0, rows=(25, 30, 20)) == [True, True, False, True]


def test_small_inputs_are_logged_at_any_rate() -> None:
    policy = PayloadPolicy(small_bytes=200, large_bytes_per_s=0)
    assert all(logged_with_inputs(policy, 9.0, 9.0, 9.0, rows=(25, 1, 25)))
    made = RECORDS.of_part(part(item(1, 25), item(2, 26)), TIMES, policy)
    assert [(list(one.rows), len(one.inputs)) for one in read(made)] == [([25], 1), ([26], 0)]


def test_outputs_too_large_are_left_out_too() -> None:
    made = RECORDS.of_part(
        part(item(1, 1), item(2, 60), item(3, 1)),
        TIMES,
        PayloadPolicy(request_bytes=210, large_bytes_per_s=0),
    )
    bare = [record for record in read(made) if not record.outputs]
    assert [(list(record.rows), len(record.inputs)) for record in bare] == [([60], 0)]
    assert sorted(row for record in read(made) for row in record.rows) == [1, 1, 60]
    assert made.omitted == 1


def test_inputs_that_no_record_can_hold_are_left_out() -> None:
    """Else the log would take none of the batch, and all of it would be refused."""
    records = PredictionRecords("worker-7", "net", "3", "sha256:abc", InputLayout(SIGNATURE))
    large = item(2, MAX_EVENT_BYTES // 8)
    made = records.of_part(part(item(1, 1), large), TIMES, PayloadPolicy(request_bytes=MAX_EVENT_BYTES))
    assert max(map(len, made.records)) < MAX_EVENT_BYTES
    assert [(list(one.rows), len(one.inputs)) for one in read(made)] == [([1], 1), ([large.rows], 0)]
    assert made.omitted == 1


def test_many_small_requests_stay_one_record() -> None:
    made = part(*[item(i, 10) for i in range(1, 9)])
    (record,) = read(RECORDS.of_part(made, TIMES, PayloadPolicy(request_bytes=100)))
    assert len(record.rows) == 8
    assert record.inputs
    assert record.outputs


def test_latency_without_a_receipt_counts_from_the_arrival_here() -> None:
    one = item(1, 1)
    one.request.received_at_us = 0
    (record,) = read(RECORDS.of_part(part(one), TIMES, PayloadPolicy()))
    assert list(record.latency_us) == [750_000]


def test_batches_of_one_size_have_one_form() -> None:
    """Or they could be joined only by parsing each of them."""
    for policy in (PayloadPolicy(), PayloadPolicy(enabled=False)):
        records = [
            RECORDS.of_part(part(item(number, 1), item(number + 2, 2)), TIMES, policy).records[0]
            for number in (1, 5)
        ]
        learned = learn(records[0], PredictionBatch.FromString(records[0]), ())
        assert learned is not None
        cut = learned.cut(records[1])
        assert cut is not None
        assert cut[2] == b"\5" * 16 + b"\7" * 16
        assert [floats(data).tolist() for data in cut[7:]] == (
            [[5, 5, 7, 7, 7, 7], [500, 700, 700]] if policy.enabled else []
        )
