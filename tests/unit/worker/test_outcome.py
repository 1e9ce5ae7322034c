"""What the members of a batch that ran are answered: decided once, and logged as it is answered."""

from __future__ import annotations

from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, DataType, Signature, TensorSpec

from services.common.clock import ManualClock
from services.common.errors import Internal
from services.worker.execution import Execution, Part
from services.worker.input_layout import InputLayout
from services.worker.item import Answer, Batch, Item, Release
from services.worker.outcome import Outcome, outcome_of
from services.worker.prediction_log import PayloadPolicy, PredictionRecords
from services.worker.tensors import OutputColumn

FP32 = DataType.DATA_TYPE_FP32
SIGNATURE = Signature(
    inputs=[TensorSpec(name="x", datatype=FP32, shape=[-1])],
    outputs=[TensorSpec(name="y", datatype=FP32, shape=[-1])],
    batched=True,
)
RECORDS = PredictionRecords("worker-7", "net", "3", "sha256:abc", InputLayout(SIGNATURE))
OK, LATE, CANCELLED, INTERNAL = (
    Code.CODE_OK,
    Code.CODE_DEADLINE_EXCEEDED,
    Code.CODE_CANCELLED,
    Code.CODE_INTERNAL,
)


def items_of(*deadlines: float) -> list[Item]:
    """`deadlines` in seconds from now on."""

    def ignore(_request: PredictRequest, _answer: Answer) -> None: ...

    return [
        Item(
            PredictRequest(id=number, request_id=bytes([number]) * 16),
            1,
            ((), ((),)),
            (bytes(4),),
            ManualClock().monotonic() + deadline,
            ignore,
        )
        for number, deadline in enumerate(deadlines)
    ]


def part(*items: Item) -> Part:
    column = OutputColumn("y", FP32, (), bytes(4 * len(items)), 4)
    return Part(items, len(items), [bytes(4 * len(items))], [column])


def decided(
    items: list[Item], *parts: Part, failed: tuple[Item, ...] = (), took: float = 0.001
) -> tuple[Outcome, dict[int, Code]]:
    """And what the log says, by the number of the item."""
    clock = ManualClock()
    failures = [(item, Internal("the model failed on this input")) for item in failed]
    execution = Execution(list(parts), list(failures), 0.0, 0.0, 0.0)
    batch = Batch(items, len(items), Release.TURN)
    outcome = outcome_of(batch, execution, clock.monotonic() - took, RECORDS, PayloadPolicy(), clock)
    logged: dict[int, Code] = {}
    for record in map(PredictionBatch.FromString, outcome.records):
        for place in range(len(record.request_ids) // 16):
            code = record.codes[place] if record.codes else OK
            assert logged.setdefault(record.request_ids[16 * place], code) == code
    return outcome, logged


def test_where_all_is_well_nothing_is_said_of_each() -> None:
    items = items_of(5.0, 5.0)
    outcome, logged = decided(items, part(*items))
    assert outcome.codes is None
    assert logged == {0: OK, 1: OK}


def test_one_whose_deadline_passes_is_late_however_many_are_not() -> None:
    items = items_of(5.0, 0.0, 0.001)
    outcome, logged = decided(items, part(*items))
    assert outcome.codes == {id(items[0]): OK, id(items[1]): LATE, id(items[2]): OK}
    assert logged == {0: OK, 1: LATE, 2: OK}


def test_one_that_has_gone_is_cancelled() -> None:
    items = items_of(5.0, 5.0)
    items[0].abandon()
    outcome, logged = decided(items, part(*items))
    assert outcome.codes == {id(items[0]): CANCELLED, id(items[1]): OK}
    assert logged == {0: CANCELLED, 1: OK}


def test_one_that_failed_is_logged_beside_the_others() -> None:
    items = items_of(5.0, 5.0, 5.0)
    outcome, logged = decided(items, part(items[0], items[2]), failed=(items[1],))
    assert outcome.codes == {id(items[0]): OK, id(items[2]): OK}
    assert logged == {0: OK, 1: INTERNAL, 2: OK}


def test_every_part_of_a_batch_is_answered_and_logged() -> None:
    items = items_of(5.0, 5.0)
    outcome, logged = decided(items, part(items[0]), part(items[1]))
    assert outcome.codes == {id(item): OK for item in items}
    assert logged == {0: OK, 1: OK}


def test_a_run_takes_its_time_and_at_least_a_microsecond() -> None:
    items = items_of(5.0)
    for took, compute_us in ((0.25, 250_000), (0.0, 1)):
        outcome, _ = decided(items, part(*items), took=took)
        assert abs(outcome.times.compute_us - compute_us) <= 1
