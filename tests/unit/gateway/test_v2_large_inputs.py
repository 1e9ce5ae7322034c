"""Large binary inputs of the Open Inference Protocol: sent on from the body, with what the small ones say."""

from __future__ import annotations

import json

import pytest
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import DataType, Signature, TensorSpec

from services.common.errors import HeadraceError, InvalidArgument
from services.common.frames.detached import Buffer
from services.gateway.codecs import v2
from services.gateway.signature import compile_signature

FP32, BYTES = DataType.DATA_TYPE_FP32, DataType.DATA_TYPE_BYTES
SIGNATURE = compile_signature(
    Signature(
        batched=True,
        inputs=[
            TensorSpec(name="image", datatype=FP32, shape=[-1, 100, 100]),
            TensorSpec(name="scale", datatype=FP32, shape=[-1, 1]),
            TensorSpec(name="text", datatype=BYTES, shape=[-1, 1]),
        ],
        outputs=[TensorSpec(name="y", datatype=FP32, shape=[-1, 2])],
    )
)
IMAGE = bytes(range(250)) * 320  # two of them, 80,000 bytes
SCALE = bytes(8)
TEXT = (20_000).to_bytes(4, "little") + b"a" * 20_000 + (30_000).to_bytes(4, "little") + b"b" * 30_000


def body(image: bytes = IMAGE, rows: int = 2) -> tuple[bytes, bytes]:
    inputs = [
        {
            "name": name,
            "shape": [count, *shape],
            "datatype": datatype,
            "parameters": {"binary_data_size": len(data)},
        }
        for name, count, shape, datatype, data in (
            ("text", 2, [1], "BYTES", TEXT),
            ("image", rows, [100, 100], "FP32", image),
            ("scale", 2, [1], "FP32", SCALE),
        )
    ]
    head = json.dumps({"inputs": inputs, "parameters": {"user_id": "u"}}).encode()
    return head + TEXT + image + SCALE, str(len(head)).encode()


def read(raw: bytes, length: bytes, *, apart: bool) -> tuple[PredictRequest, list[Buffer]]:
    asked, binary = v2.decode_request(raw, length)
    request = PredictRequest(model="m")
    parts: list[Buffer] = []
    v2.fill_request(request, SIGNATURE, asked, binary, parts if apart else None)
    return request, parts


def test_what_comes_apart_and_what_stays_make_the_same_request() -> None:
    raw, length = body()
    whole, none = read(raw, length, apart=False)
    rest, parts = read(raw, length, apart=True)
    assert not none
    assert [tensor.name for tensor in rest.inputs] == ["scale", "text"]
    views = [part for part in parts if isinstance(part, memoryview)]
    assert [view.obj for view in views] == [raw]  # not copied
    together = PredictRequest.FromString(b"".join((*parts, rest.SerializeToString())))
    assert {t.name: t.SerializeToString() for t in together.inputs} == {
        t.name: t.SerializeToString() for t in whole.inputs
    }
    for request in (together, whole):
        request.ClearField("inputs")
    assert together == whole


@pytest.mark.parametrize(("image", "rows"), [(IMAGE[:-4], 2), (IMAGE + IMAGE[:40_000], 3)])
def test_large_inputs_are_refused_with_the_same_words(image: bytes, rows: int) -> None:
    raw, length = body(image, rows)
    said: list[HeadraceError] = []
    for apart in (False, True):
        with pytest.raises(InvalidArgument) as refused:
            read(raw, length, apart=apart)
        said.append(refused.value)
    assert (said[0].message, said[0].field) == (said[1].message, said[1].field)


def alone(shape: list[int], *, batched: bool) -> list[int] | None:
    """The shape of 24 bytes that are all of a body; None where they are refused."""
    x = TensorSpec(name="x", datatype=FP32, shape=shape)
    signature = compile_signature(Signature(batched=batched, inputs=[x], outputs=[x]))
    try:
        asked, binary = v2.raw_request(signature, bytes(24))
        v2.fill_request(PredictRequest(model="m"), signature, asked, binary)
    except InvalidArgument:
        return None
    return asked.inputs[0].shape


def test_bytes_alone_say_one_size_that_varies() -> None:
    assert alone([-1, 3], batched=True) == [2, 3]
    assert alone([-1, -1], batched=True) == [1, 6]
    assert alone([-1, 2, -1], batched=True) == [1, 2, 3]
    assert alone([2, 3], batched=False) == [2, 3]
    assert alone([-1, -1], batched=False) is None
    assert alone([-1, -1, -1], batched=True) is None
    assert alone([-1, 4], batched=True) is None
    assert alone([5], batched=False) is None
