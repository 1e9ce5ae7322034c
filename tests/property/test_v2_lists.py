"""Long bodies whose lists are cut out say what the whole says, or are left to the parser of the whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import DataType, Signature, TensorSpec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from services.common.errors import HeadraceError
from services.gateway.codecs import v2
from services.gateway.codecs.v2_lists import cut_out
from services.gateway.signature import compile_signature
from tests.fixtures.mutations import MUTATIONS, Mutation, mutated

SIGNATURE = compile_signature(
    Signature(
        batched=True,
        inputs=[
            TensorSpec(name="x", datatype=DataType.DATA_TYPE_FP32, shape=[-1, 2]),
            TensorSpec(name="n", datatype=DataType.DATA_TYPE_INT16, shape=[-1, 1]),
            TensorSpec(name="t", datatype=DataType.DATA_TYPE_BYTES, shape=[-1, 1]),
        ],
        outputs=[TensorSpec(name="y", datatype=DataType.DATA_TYPE_FP32, shape=[-1, 2])],
    )
)
LISTS = st.sampled_from(
    [[1, 2.5], [[1, 2.5]], [1], [[7]], ["a"], [], [None], [[1, 2], [3, 4]], ['["list 0"]'], {"a": [1]}, 5]
)
NAMES = st.sampled_from(["x", "n", "t", '"data":[1,2]', 'data": [', "}"])


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    inputs = []
    for _ in range(draw(st.integers(1, 3))):
        name = draw(NAMES)
        one: dict[str, Any] = {"name": name, "shape": [1, 2 if name == "x" else 1], "data": draw(LISTS)}
        one["datatype"] = {"n": "INT16", "t": "BYTES"}.get(name, "FP32")
        if draw(st.booleans()):
            one["parameters"] = {draw(st.sampled_from(["p", "data"])): draw(st.sampled_from([1, "]", "x"]))}
        inputs.append({key: one[key] for key in draw(st.permutations(sorted(one)))})
    body: dict[str, Any] = {"inputs": inputs, "id": draw(NAMES), "data": draw(LISTS)}
    keys = draw(st.permutations(["inputs", *draw(st.lists(st.sampled_from(["id", "data"]), unique=True))]))
    indent = draw(st.sampled_from([None, 0, 1]))
    return json.dumps({key: body[key] for key in keys}, indent=indent).encode()


def whole(**changed: Any) -> bytes:
    inputs = [
        {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [[1, 2.5]]},
        {"name": "n", "shape": [1, 1], "datatype": "INT16", "data": [7]} | changed,
        {"name": "t", "shape": [1, 1], "datatype": "BYTES", "parameters": {"binary_data_size": 5}},
    ]
    return json.dumps({"inputs": inputs}).encode()


def outcome(body: bytes, raw: bytes) -> tuple[bytes, str] | None:
    """What is asked for; None where it is refused: which of two faults is named may differ."""
    request = PredictRequest(model="m")
    try:
        asked, binary = v2.decode_request(body + raw, b"%d" % len(body))
        state = v2.fill_request(request, SIGNATURE, asked, binary)
    except HeadraceError:
        return None
    return request.SerializeToString(deterministic=True), state.id


@given(bodies() | st.just(whole()), st.none() | MUTATIONS, st.sampled_from([b"", b"\x01\0\0\0a"]))
@example(whole(), None, b"\x01\0\0\0a")
@example(whole(data=[40_000]), None, b"\x01\0\0\0a")
@example(whole(), ("replace", 71, ord("]")), b"\x01\0\0\0a")
@settings(max_examples=400, deadline=None)
def test_a_body_says_the_same_with_its_lists_cut_out(
    body: bytes, mutation: Mutation | None, raw: bytes
) -> None:
    if mutation is not None:
        body = mutated(body, mutation)
    ordinary = outcome(body, raw)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v2, "LONG_BODY_BYTES", 0)
        assert outcome(body, raw) == ordinary


def test_lists_are_cut_out_where_they_are() -> None:
    body = whole()
    found = cut_out(body, len(body))
    assert found is not None
    rest, lists = found
    assert [bytes(one) for one in lists] == [b"[[1, 2.5]]", b"[7]"]
    assert json.loads(rest)["inputs"][1]["data"] == ["list 1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(v2, "LONG_BODY_BYTES", 0)
        patch.setattr(v2, "parse_request", None)  # not asked
        asked, _binary = v2.decode_request(body, None)
    assert [bytes(one.data) for one in asked.inputs] == [b"[[1, 2.5]]", b"[7]", b""]


@pytest.mark.parametrize("body", [b"", b'"data"', b'"data":', b'"data": [', b'"data":[1,2', b'"data":["a"]'])
def test_what_has_no_such_list_is_left_alone(body: bytes) -> None:
    assert cut_out(body, len(body)) is None
