"""The quick way of the most common request says what the ordinary way says, or leaves it to that."""

from __future__ import annotations

import struct
from itertools import product
from typing import Any

import orjson
import pytest
from headrace.v1.control_pb2 import ServedVersion, ServingConfig
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest, SealedReply
from headrace.v1.tensor_pb2 import DataType, Signature, Task, Tensor, TensorSpec
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgument
from services.gateway.catalogue import served_model
from services.gateway.codecs import native
from services.gateway.codecs.compiled import compile_answer, compile_request
from services.gateway.codecs.rows_body import decode_long, decode_rows, with_context
from services.gateway.signature import ModelSignature, compile_signature

FP32, FP64, INT64 = DataType.DATA_TYPE_FP32, DataType.DATA_TYPE_FP64, DataType.DATA_TYPE_INT64
ID = bytes(range(16))


def signature(*outputs: tuple[str, DataType, list[int]], **more: Any) -> ModelSignature:
    given_more = {"task": Task.TASK_CLASSIFICATION} | more
    return compile_signature(
        Signature(
            inputs=[TensorSpec(name="x", datatype=FP32, shape=[-1, 3])],
            outputs=[TensorSpec(name=name, datatype=kind, shape=shape) for name, kind, shape in outputs],
            batched=True,
            **given_more,
        )
    )


LABEL = ("label", INT64, [-1])
PROBABLE = ("p", FP32, [-1, 3])
SIGNATURES = {
    "label and probabilities": signature(LABEL, PROBABLE, probability_output="p", classes=["a", "b%", 'c"']),
    "labels without names": signature(LABEL, PROBABLE, probability_output="p"),
    "probabilities alone": signature(
        PROBABLE, prediction_output="p", probability_output="p", classes=["a", "b"]
    ),
    "a value": signature(("y", FP64, [-1, 1]), task=Task.TASK_REGRESSION),
    "a plain value": signature(("y%s", FP32, [-1]), task=Task.TASK_REGRESSION),
    "a vector": signature(("v", FP32, [-1, 4]), task=Task.TASK_EMBEDDING),
}


def tensor(spec: Any, values: list[float]) -> Tensor:
    shape = [1, *spec.shape[1:]]
    count = shape[1] if len(shape) == 2 else 1
    picked = [int(abs(v)) % 5 if spec.datatype.python is int else v for v in values[:count]]
    data = struct.pack(f"<{count}{spec.datatype.code}", *picked)
    return Tensor(name=spec.name, datatype=spec.datatype.number, shape=shape, data=data)


numbers = st.floats(width=32, allow_nan=True, allow_infinity=True) | st.floats(0, 1, width=32)
finite = st.floats(-1000, 1000, width=32)


@pytest.mark.parametrize(("name", "single"), list(product(SIGNATURES, [False, True])))
@given(
    values=st.lists(finite, min_size=4, max_size=4),
    last=numbers,
    cached=st.booleans(),
    variant=st.sampled_from(["", "x%d"]),
    experiment=st.sampled_from(["", "exp_%1"]),
)
def test_answers_are_those_of_the_ordinary_way(
    name: str, single: bool, values: list[float], last: float, cached: bool, variant: str, experiment: str
) -> None:
    shape = SIGNATURES[name]
    values = [*values[:2], last, values[3]]
    reply = PredictReply(version="1", variant=variant, cached=cached, experiment=experiment)
    reply.outputs.extend(
        tensor(spec, [1.0] * 4 if spec.datatype.python is int else values) for spec in shape.outputs
    )
    answer = compile_answer("m%", "1", variant, shape, experiment)
    assert answer is not None
    text = answer.text(
        SealedReply.FromString(reply.SerializeToString()), ID.hex().encode(), 1.25, single=single
    )
    ordinary = native.encode_answer(ID.hex(), "m%", shape, reply, single=single, latency_ms=1.25)
    if text is not None:
        assert orjson.loads(text) == orjson.loads(ordinary)
        assert list(orjson.loads(text)) == list(orjson.loads(ordinary))
    else:
        assert b"null" in ordinary


def test_what_is_not_one_row_of_the_declared_form_is_left() -> None:
    shape = SIGNATURES["label and probabilities"]
    answer = compile_answer("m", "1", "", shape)
    assert answer is not None

    def said(**changes: Any) -> bytes | None:
        reply = PredictReply(version="1", **changes)
        if "outputs" not in changes:
            reply.outputs.extend(tensor(spec, [0.25, 0.5, 0.25, 0]) for spec in shape.outputs)
        return answer.text(SealedReply.FromString(reply.SerializeToString()), b"i", 1.0, single=False)

    assert said() is not None
    assert said(fallback=True) is None
    assert said(outputs=[tensor(shape.outputs[0], [1.0])]) is None
    turned = tensor(shape.outputs[1], [0.25, 0.5, 0.25])
    turned.shape[:] = [3, 1]
    assert said(outputs=[tensor(shape.outputs[0], [1.0]), turned]) is None


@given(
    rows=st.lists(st.lists(finite | st.integers(-9, 9), min_size=3, max_size=3), min_size=1, max_size=5),
    user=st.none() | st.text(max_size=140) | st.integers(-(1 << 63), (1 << 63) - 1),
    session=st.none() | st.text(max_size=600) | st.integers(-9, 9),
    attributes=st.none()
    | st.dictionaries(
        st.text(max_size=70),
        st.text(max_size=300) | st.integers(-(1 << 63), (1 << 64) - 1) | finite | st.booleans() | st.none(),
        max_size=3,
    ),
)
def test_requests_are_those_of_the_ordinary_way(
    rows: list[list[float]],
    user: str | int | None,
    session: str | int | None,
    attributes: dict[str, Any] | None,
) -> None:
    shape = SIGNATURES["a value"]
    raw = orjson.dumps(
        {"model": "m", "inputs": rows, "user_id": user, "session_id": session, "attributes": attributes}
    )
    body = decode_rows(raw)
    assert body is not None
    assert body.inputs is not None
    made = compile_request(shape, "m", "k")
    assert made is not None
    quick = with_context(made.serialized(body.inputs, ID, 17, body.user_id), body)
    ordinary = PredictRequest(request_id=ID, received_at_us=17, key_id="k", model="m")
    try:
        native.fill_request(ordinary, shape, native.decode_body(raw))
    except InvalidArgument:
        assert quick is None  # the ordinary way has the words for it
        return
    if quick is None:
        assert len(str(user).encode()) > 127
    else:
        assert PredictRequest.FromString(quick) == ordinary


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model": "m", "inputs": [[1, 2]]}',
        b'{"model": "m", "inputs": [[1, 2, 3], [1]]}',
        b'{"model": "m", "inputs": []}',
        b'{"model": "m", "inputs": [[1, 2, 1e300]]}',
    ],
)
def test_rows_that_do_not_fit_are_left(raw: bytes) -> None:
    body = decode_rows(raw)
    made = compile_request(SIGNATURES["a value"], "m", "k")
    assert body is not None
    assert made is not None
    assert made.serialized(body.inputs or [], ID, 17, None) is None


@pytest.mark.parametrize(
    "raw",
    [
        b"[",
        b"{}x",
        b'{"inputs": {"x": [1]}}',
        b'{"inputs": [["1"]]}',
        b'{"inputs": [[true]]}',
        b'{"version": "1"}',
        b"\xff",
    ],
)
def test_other_bodies_are_left(raw: bytes) -> None:
    assert decode_rows(raw) is None


def test_models_of_another_form_have_no_plan() -> None:
    whole = Signature(
        inputs=[TensorSpec(name="x", datatype=INT64, shape=[-1, 3])],
        outputs=[TensorSpec(name="y", datatype=FP32, shape=[-1, 2, 2])],
        batched=True,
    )
    config = ServingConfig(model="m", revision=1, versions=[ServedVersion(version="1", signature=whole)])
    shape = served_model(config).default.signature
    assert compile_request(shape, "m", "k") is None
    assert compile_answer("m", "1", "", shape) is None


def long_body(rows: list[Any], **more: Any) -> bytes:
    return orjson.dumps({"model": "m", "inputs": rows, **more})


@pytest.mark.parametrize(
    ("more", "other"),
    [({"user_id": "u"}, b""), ({"session_id": 3, "attributes": {"a": 1}}, b""), ({}, b'"user_id":"[1]",')],
)
def test_long_bodies_are_what_the_ordinary_way_reads(more: dict[str, Any], other: bytes) -> None:
    shape = SIGNATURES["label and probabilities"]
    compiled = compile_request(shape, "m", "k")
    assert compiled is not None
    for rows in (1, 400, 3000):
        raw = long_body([[row, 0.5, -1e-3] for row in range(rows)], **more).replace(b"{", b"{" + other, 1)
        found = decode_long(raw)
        assert found is not None
        body, start, end = found
        made = compiled.packed(raw, start, end, ID, 5, body.user_id)
        assert made is not None
        request, apart, count = made
        assert count == rows
        assert (apart is not None) == (rows == 3000)
        full = with_context(request, body)
        assert full is not None
        quick = PredictRequest.FromString(b"".join((*(apart or ()), full)))
        ordinary = PredictRequest(model="m", key_id="k", request_id=ID, received_at_us=5)
        native.fill_request(ordinary, shape, native.decode_body(raw))
        assert quick == ordinary


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b'{"inputs"',
        b'{"inputs":[[1,2,3]',
        b'{"inputs":[[1,2,3]],"inputs":[[4,5,6]]}',
        b'{"inputs":[[1,2,3]],"input":[1,2,3]}',
        b'{"inputs":[[1,2,3]],"note":1}',
        b'{"inputs":{"x":[[1,2,3]]}}',
        b'{"inputs":[{"a":1}]}',
        b'{"inputs":["rows"],"user_id":"1"}',
        b'{"user_id":"inputs","attributes":{"inputs":[[4,5,6]]}}',
        b'{"user_id":"inputs","inputs":3}',
        b'{"inputs":[[1,2,3]],"user_id":"' + b"u" * 5000 + b'"}',
    ],
)
def test_long_bodies_of_another_form_are_left(raw: bytes) -> None:
    found = decode_long(raw)
    if found is not None:  # what is no list of rows is left by who packs them
        compiled = compile_request(SIGNATURES["a value"], "m", "k")
        assert compiled is not None
        assert compiled.packed(raw, found[1], found[2], ID, 5, None) is None


def test_long_users_and_rows_of_images() -> None:
    shape = compile_signature(
        Signature(
            inputs=[TensorSpec(name="x", datatype=FP32, shape=[-1, 2, 2])],
            outputs=[TensorSpec(name="y", datatype=FP32, shape=[-1])],
            batched=True,
        )
    )
    compiled = compile_request(shape, "m", "k")
    assert compiled is not None
    text = b"[[[1,2],[3,4]],[[5,6],[7,8]]]"
    made = compiled.packed(text, 0, len(text), ID, 5, "u" * 127)
    assert made is not None
    request = PredictRequest.FromString(made[0])
    assert (list(request.inputs[0].shape), request.unit) == ([2, 2, 2], "u" * 127)
    assert struct.unpack("<8f", request.inputs[0].data) == (1, 2, 3, 4, 5, 6, 7, 8)
    assert compiled.packed(text, 0, len(text), ID, 5, "u" * 128) is None
    assert compiled.serialized([[1.0, 2.0]], ID, 5, None) is None
