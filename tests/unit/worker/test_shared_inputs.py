"""Inputs in shared memory, as the worker takes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import DataType, SharedMemory, Signature, Tensor, TensorSpec

from services.common.clock import SystemClock
from services.common.errors import HeadraceError, InvalidArgument, Unimplemented
from services.common.shared_memory import DIRECTORY, inspect
from services.worker.input_layout import InputLayout
from services.worker.item import Answer, Item
from services.worker.servicer import Servicer, Version
from services.worker.shared_inputs import SharedInputs
from tests.fixtures.loaded_model import MemoryLog

VALUES = np.arange(16, dtype=np.float32)
FP32 = DataType.DATA_TYPE_FP32


class Taking:
    """A version of two inputs that only takes requests in."""

    timeout = 1.0

    def __init__(self) -> None:
        specs = [TensorSpec(name=name, datatype=FP32, shape=[-1, 4]) for name in ("x", "y")]
        self.layout = InputLayout(
            Signature(inputs=specs, outputs=[TensorSpec(name="z", datatype=FP32, shape=[-1])], batched=True)
        )
        self.items: list[Item] = []

    def submit(self, items: Sequence[Item]) -> None:
        self.items += items

    def cancel(self, item: Item) -> None:
        raise AssertionError(item)

    def find(self, _model: str, _version: str) -> Taking:
        return self


@pytest.fixture
def region() -> Iterator[Path]:
    path = DIRECTORY / f"headrace-test-{uuid4().hex}"
    path.write_bytes(VALUES.tobytes())
    yield path
    path.unlink(missing_ok=True)


def accepted(
    request: PredictRequest, *, allowed: bool = True, contents: list[memoryview | None] | None = None
) -> Item | HeadraceError | bytes:
    version = Taking()
    servicer = Servicer(version, MemoryLog(), SystemClock(), SharedInputs(allowed=allowed))
    settled: list[Answer] = []
    waiting: dict[int, tuple[Version, Item]] = {}
    apart = {0: contents} if contents is not None else {}
    servicer.accept([request], lambda _request, answer: settled.append(answer), waiting, apart)
    assert len(version.items) + len(settled) == 1
    return version.items[0] if version.items else settled[0]


def asked(key: str, offset: int = 0, byte_size: int = 32) -> PredictRequest:
    place = SharedMemory(key=key, offset=offset, byte_size=byte_size)
    return PredictRequest(
        id=1,
        model="m",
        version="1",
        inputs=[
            Tensor(name="y", datatype=FP32, shape=[2, 4], data=bytes(32)),
            Tensor(name="x", datatype=FP32, shape=[2, 4], shared_memory=place),
        ],
    )


def test_an_input_is_read_where_it_lies_and_stays_what_it_was(region: Path) -> None:
    item = accepted(asked(region.name, offset=16))
    region.write_bytes(bytes(64))
    region.unlink()
    assert isinstance(item, Item)
    assert [bytes(data) for data in item.data] == [VALUES[4:12].tobytes(), bytes(32)]
    assert item.nbytes == 64


def test_who_sends_both_ways_in_turn_is_understood(region: Path) -> None:
    version = Taking()
    servicer = Servicer(version, MemoryLog(), SystemClock(), SharedInputs(allowed=True))
    shared, sent, wrong = asked(region.name), asked(region.name), asked(region.name)
    for request in (sent, wrong):
        request.inputs[1].ClearField("shared_memory")
    sent.inputs[1].data = bytes(32)
    errors: list[Answer] = []
    for request in (shared, sent, shared, wrong, shared, shared, sent):
        servicer.accept([request], lambda _request, answer: errors.append(answer), {}, {})
    lying, given = VALUES[:8].tobytes(), bytes(32)
    assert [bytes(item.data[0]) for item in version.items] == [lying, given, lying, lying, lying, given]
    assert [type(error) for error in errors] == [InvalidArgument]


def test_an_input_that_came_apart_goes_with_it(region: Path) -> None:
    request = asked(region.name)
    request.inputs[0].ClearField("data")
    item = accepted(request, contents=[memoryview(b"\1" * 32), None])
    assert isinstance(item, Item)
    assert [bytes(data) for data in item.data] == [VALUES[:8].tobytes(), b"\1" * 32]


@pytest.mark.parametrize(
    ("offset", "byte_size", "why"),
    [
        (40, 32, "ends before"),
        (2**63, 32, "ends before"),
        (0, 16, "its shape asks for 32"),
        (0, 1 << 40, "larger than a request may be"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(region: Path, offset: int, byte_size: int, why: str) -> None:
    error = accepted(asked(region.name, offset, byte_size))
    assert isinstance(error, InvalidArgument)
    assert why in error.message
    assert error.field == "inputs.x"


def test_nothing_is_read_where_that_is_not_allowed(region: Path) -> None:
    error = accepted(asked(region.name), allowed=False)
    assert isinstance(error, Unimplemented)
    assert "reads no shared memory" in error.message


def test_another_object_of_the_name_is_refused(region: Path) -> None:
    request = asked(region.name)
    request.inputs[1].shared_memory.identity = inspect(region.name, "f")[1]
    assert isinstance(accepted(request), Item)
    # Made before the other one is gone: its number would be given again.
    other = region.with_name(f"{region.name}-new")
    other.write_bytes(bytes(64))
    other.rename(region)
    error = accepted(request)
    assert isinstance(error, InvalidArgument)
    assert "another object" in error.message
    assert error.field == "inputs.x"


def test_a_key_cannot_lead_elsewhere() -> None:
    error = accepted(asked("../../etc/passwd"))
    assert isinstance(error, InvalidArgument)
    assert error.field == "inputs.x"


def test_requests_without_shared_memory_are_refused_as_ever() -> None:
    request = asked("unused")
    request.inputs[1].ClearField("shared_memory")
    error = accepted(request)
    assert isinstance(error, InvalidArgument)
    assert "its shape asks for 32" in error.message
