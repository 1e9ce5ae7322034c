"""Batches through a backend, and members that fail."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import Code, DataType, Signature, TensorSpec

from services.common.errors import InvalidArgument
from services.worker.execution import Execution, Runner
from services.worker.input_layout import InputLayout
from services.worker.item import Answer, Batch, Item, Release
from services.worker.tensors import Array, Buffer, to_column

FP32 = DataType.DATA_TYPE_FP32
BYTES = DataType.DATA_TYPE_BYTES
SIGNATURE = Signature(
    inputs=[TensorSpec(name="x", datatype=FP32, shape=[-1])],
    outputs=[TensorSpec(name="y", datatype=FP32, shape=[-1])],
    batched=True,
)


class Doubling:
    """y = 2 x; refuses a negative x, breaks on 13, and forgets a row when it sees 99."""

    device = "cpu"
    padding = None

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def run(self, inputs: Mapping[str, Array], _outputs: Sequence[str]) -> dict[str, Array]:
        x = inputs["x"]
        self.sizes.append(len(x))
        if (x < 0).any():
            raise InvalidArgument("x is negative", field="inputs.x")
        if (x == 13).any():
            raise RuntimeError("unlucky")
        return {"y": (2 * x)[1:] if (x == 99).any() else 2 * x}

    def close(self) -> None: ...


def executed(
    *rows: list[float], max_rows: int = 64, deadline: float = math.inf
) -> tuple[Execution, list[Item], Doubling]:
    layout = InputLayout(SIGNATURE)
    backend = Doubling()

    def ignore(_request: PredictRequest, _answer: Answer) -> None: ...

    items = [
        Item(
            PredictRequest(id=i),
            len(values),
            ((), ((),)),
            (np.array(values, np.float32).tobytes(),),
            deadline,
            ignore,
        )
        for i, values in enumerate(rows)
    ]
    batch = Batch(items, sum(item.rows for item in items), Release.TURN)
    return Runner(backend, SIGNATURE, layout).execute(batch, max_rows), items, backend


def answers(execution: Execution) -> dict[int, list[float]]:
    found = {}
    for part in execution.parts:
        first = 0
        for item in part.items:
            data = part.columns[0].rows(first, item.rows)
            found[item.request.id] = np.frombuffer(data, np.float32).tolist()
            first += item.rows
    return found


def test_one_run_answers_all_with_their_own_rows() -> None:
    execution, _, backend = executed([1], [2, 3], [4])
    assert backend.sizes == [4]
    assert answers(execution) == {0: [2], 1: [4, 6], 2: [8]}
    assert (execution.failures, execution.reruns) == ([], 0)


@pytest.mark.parametrize(("bad", "code"), [(-1, Code.CODE_INVALID_ARGUMENT), (13, Code.CODE_INTERNAL)])
def test_only_the_bad_member_fails(bad: float, code: Code) -> None:
    execution, items, backend = executed([1], [2, bad], [4])
    assert backend.sizes == [4, 1, 3, 2, 1]
    assert answers(execution) == {0: [2], 2: [8]}
    ((item, error),) = execution.failures
    assert (item, error.code, execution.reruns) == (items[1], code, 4)
    assert (execution.fault is not None) == (code == Code.CODE_INTERNAL)


def test_an_output_with_too_few_rows_is_a_failure_not_a_wrong_answer() -> None:
    execution, items, _ = executed([1], [99], [4])
    assert answers(execution) == {0: [2], 2: [8]}
    assert [item for item, _ in execution.failures] == [items[1]]


def test_a_large_request_runs_in_slices() -> None:
    execution, _, backend = executed([float(i) for i in range(10)], max_rows=4)
    assert backend.sizes == [4, 4, 2]
    assert answers(execution) == {0: [2.0 * i for i in range(10)]}


def test_one_bad_member_of_many_is_found_by_halves() -> None:
    execution, items, backend = executed(*([float(i)] for i in range(14, 46)), [13.0], *([1.0],) * 31)
    assert [item for item, _ in execution.failures] == [items[32]]
    assert len(answers(execution)) == 63
    assert len(backend.sizes) == 13  # of 64 members: two runs a level, and the first


def test_nobody_is_looked_for_once_nobody_waits() -> None:
    execution, items, backend = executed([1], [13], [3], [4], deadline=0.0)
    assert backend.sizes == [4]
    assert [(item, error.code) for item, error in execution.failures] == [
        (item, Code.CODE_DEADLINE_EXCEEDED) for item in items
    ]
    assert (execution.parts, execution.reruns) == ([], 0)


def test_slices_end_when_nobody_waits_any_more() -> None:
    execution, items, backend = executed([float(i) for i in range(10)], max_rows=4, deadline=0.0)
    assert backend.sizes == [4]
    ((item, error),) = execution.failures
    assert (item, error.code) == (items[0], Code.CODE_DEADLINE_EXCEEDED)


def test_a_slice_with_too_few_rows_is_a_failure() -> None:
    execution, _, _ = executed([*range(9), 99], max_rows=4)
    assert len(execution.failures) == 1


def test_text_rows_are_found_by_where_they_start() -> None:
    column = to_column("y", BYTES, np.array([["a", "bcd"], [b"", "e"]], object), 2, batched=True)
    assert column.rows(0, 1) == b"\1\0\0\0a\3\0\0\0bcd"
    assert column.rows(1, 1) == b"\0\0\0\0\1\0\0\0e"
    assert column.rows(0, 2) == column.data


def test_outputs_take_the_datatype_of_the_signature() -> None:
    column = to_column("y", FP32, np.array([1.5, 2.5]), 2, batched=True)
    assert np.frombuffer(column.rows(1, 1), np.float32).tolist() == [2.5]


def test_many_rows_of_output_are_not_copied() -> None:
    array = np.arange(16384, dtype=np.float32).reshape(4096, 4)
    column = to_column("y", FP32, array, 4096, batched=True)
    assert np.shares_memory(array, np.frombuffer(column.data, np.float32))
    assert bytes(column.rows(7, 2)) == array[7:9].tobytes()
    turned = array.reshape(4, 4096).T
    assert bytes(to_column("y", FP32, turned, 4096, batched=True).rows(1, 1)) == turned[1].tobytes()


class Keeping(Doubling):
    """Keeps buffers for batches of up to four rows."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[int] = []

    def run_kept(self, data: Sequence[Buffer], rows: int) -> list[tuple[bytes, tuple[int, ...]]] | None:
        self.kept.append(rows)
        if rows > 4:
            return None
        return [((2 * np.frombuffer(data[0], np.float32)).tobytes(), ())]


@pytest.mark.parametrize(
    ("rows", "max_rows", "outputs", "kept", "sizes"),
    [
        (3, 64, (), [3], []),
        (4, 4, (), [4], []),
        (5, 64, (), [5], [5]),  # for these there are no buffers
        (4, 3, (), [], [3, 1]),  # never more rows at once than asked for
        (3, 64, ("y",), [], [3]),  # buffers are for all outputs
    ],
)
def test_kept_buffers_are_for_whole_batches_of_all_outputs(
    rows: int, max_rows: int, outputs: tuple[str, ...], kept: list[int], sizes: list[int]
) -> None:
    backend = Keeping()
    data = np.arange(rows, dtype=np.float32)
    runner = Runner(backend, SIGNATURE, InputLayout(SIGNATURE))
    (column,), _, _ = runner.run((outputs, ((),)), [data.tobytes()], rows, max_rows)
    assert (backend.kept, backend.sizes) == (kept, sizes)
    assert (column.name, column.datatype) == ("y", FP32)
    assert np.frombuffer(column.rows(0, rows), np.float32).tolist() == (2 * data).tolist()


def test_a_slice_with_another_number_of_rows_fails_all_of_it() -> None:
    execution, items, backend = executed([1.0, 2.0, 99.0], max_rows=2)
    assert [item for item, _ in execution.failures] == items
    assert isinstance(execution.fault, ValueError)
    assert backend.sizes == [2, 1]


class Slow(Doubling):
    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> dict[str, Array]:
        time.sleep(SLOW_S)  # so that it counts beside all else
        return super().run(inputs, outputs)


SLOW_S = 0.002


@pytest.mark.parametrize("x", [[1.0, 2.0], [1.0, -1.0], [13.0], [13.0, 1.0, 2.0], [-1.0]])
def test_the_parts_of_the_time_make_up_all_of_it(x: list[float]) -> None:
    backend = Slow()
    _, items, _ = executed(*([value] for value in x))
    runner = Runner(backend, SIGNATURE, InputLayout(SIGNATURE))
    started = time.perf_counter()
    execution = runner.execute(Batch(items, len(items), Release.TURN), 64)
    took = time.perf_counter() - started
    assert min(execution.prepare, execution.infer, execution.cut) >= 0
    assert execution.prepare + execution.infer + execution.cut <= took
    assert execution.infer >= SLOW_S * len(backend.sizes)
