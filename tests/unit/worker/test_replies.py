"""Replies written by hand are read by the generated code."""

from __future__ import annotations

import numpy as np
import pytest
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.tensor_pb2 import Code, DataType

from services.common.errors import ResourceExhausted
from services.common.tensors import decode_bytes
from services.worker.execution import Part
from services.worker.item import Answer, Item
from services.worker.record_columns import Answered
from services.worker.replies import Replies, error_reply
from services.worker.tensors import to_column
from services.worker.wire import Kept, varint

FP32, BYTES = DataType.DATA_TYPE_FP32, DataType.DATA_TYPE_BYTES
TIMES = Answered(0.0, 0.0, 0, 300)


def item(number: int, rows: int, variant: str = "a", queue_us: int = 0, experiment: str = "") -> Item:
    def ignore(_request: PredictRequest, _answer: Answer) -> None: ...

    request = PredictRequest(id=number, variant=variant, experiment=experiment)
    made = Item(request, rows, ((), ()), (b"",), 99.0, ignore)
    made.queue_us = queue_us
    return made


def part(items: list[Item]) -> Part:
    rows = sum(one.rows for one in items)
    y = np.arange(rows * 2, dtype=np.float32).reshape(rows, 2)
    text = np.array([b"x" * n for n in range(rows)], dtype=object)
    columns = [
        to_column("y", FP32, y, rows, batched=True),
        to_column("text", BYTES, text, rows, batched=True),
    ]
    return Part(tuple(items), rows, [b""], columns)


def test_every_member_gets_its_own_rows_id_variant_and_times() -> None:
    replies = Replies("7", batched=True)
    items = [item(1, 2), item(1 << 40, 1, "b", 5), item(200, 3, "", 1 << 31), item(2, 3, "b", 5)]
    items += [item(3, 1, "b", 5, "exp_1"), item(4, 1, "b", 5)]
    for _ in range(2):  # the second time, what was kept is used
        read = [PredictReply.FromString(reply) for reply in replies.of_part(part(items), TIMES)]
        assert [r.id for r in read] == [1, 1 << 40, 200, 2, 3, 4]
        assert [r.variant for r in read] == ["a", "b", "", "b", "b", "b"]
        assert [r.experiment for r in read] == ["", "", "", "", "exp_1", ""]
        assert [r.queue_us for r in read] == [0, 5, 1 << 31, 5, 5, 5]
        assert {(r.version, r.compute_us, r.code) for r in read} == {("7", 300, Code.CODE_OK)}
        first = 0
        for one, reply in zip(items, read, strict=True):
            y, text = reply.outputs
            assert (y.name, y.datatype, list(y.shape)) == ("y", FP32, [one.rows, 2])
            assert np.frombuffer(y.data, np.float32).tolist() == list(
                range(2 * first, 2 * (first + one.rows))
            )
            assert (text.name, text.datatype, list(text.shape)) == ("text", BYTES, [one.rows])
            assert [len(element) for element in decode_bytes(text.data)] == list(
                range(first, first + one.rows)
            )
            first += one.rows


def test_a_model_without_rows_gives_its_output_whole() -> None:
    column = to_column("y", FP32, np.array(3, np.float32), 1, batched=False)
    (reply,) = Replies("7", batched=False).of_part(Part((item(1, 1),), 1, [b""], [column]), TIMES)
    (y,) = PredictReply.FromString(reply).outputs
    assert (list(y.shape), np.frombuffer(y.data, np.float32).tolist()) == ([], [3.0])


def test_an_error_says_when_to_come_back() -> None:
    request = PredictRequest(id=3, version="1", variant="a", experiment="exp_1")
    reply = error_reply(request, ResourceExhausted("full", retry_after_ms=70), 9)
    assert (reply.id, reply.code, reply.retry_after_ms) == (3, Code.CODE_RESOURCE_EXHAUSTED, 70)
    assert (reply.message, reply.version, reply.variant, reply.compute_us) == ("full", "1", "a", 9)
    assert reply.experiment == "exp_1"


@pytest.mark.parametrize("number", [0, 1, 127, 128, 16383, 16384, 1 << 32, (1 << 64) - 1])
def test_varints_are_those_of_protobuf(number: int) -> None:
    assert b"\x08" + varint(number) == (PredictReply(id=number).SerializeToString() or b"\x08\0")


def test_what_is_kept_is_bounded() -> None:
    kept: Kept[int, bytes] = Kept(3)
    for number in range(10):
        kept[number] = b""
        assert len(kept) <= 3
        assert number in kept
