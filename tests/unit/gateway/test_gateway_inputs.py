"""Native inputs of every form become the same tensors; what is wrong is named."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from headrace.v1.tensor_pb2 import Signature, TensorSpec
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidArgument, MalformedBody
from services.gateway.codecs.native import decode_body
from services.gateway.codecs.rows import tensors_of_input, tensors_of_inputs
from services.gateway.codecs.tensors import pack_flat, tensor_from_flat, tensor_from_json
from services.gateway.datatypes import BY_NAME, Datatype
from services.gateway.jobs.specs import spec_of_json
from services.gateway.signature import ModelSignature, compile_signature


def model(*inputs: tuple[str, str, list[int], list[str]], batched: bool = True) -> ModelSignature:
    return compile_signature(
        Signature(
            inputs=[
                TensorSpec(name=name, datatype=f"DATA_TYPE_{kind}", shape=shape, columns=columns)
                for name, kind, shape, columns in inputs
            ],
            outputs=[TensorSpec(name="y", datatype="DATA_TYPE_FP32", shape=[-1])],
            batched=batched,
        )
    )


TABLE = model(("x", "FP32", [-1, 2], ["age", "income"]))
IMAGE = model(("image", "UINT8", [-1, 2, 2], []))
WHOLE = model(("x", "FP64", [3], []), batched=False)


@pytest.mark.parametrize(
    "inputs",
    [
        [[1, 2], [3, 4.5]],
        {"x": [[1, 2], [3, 4.5]]},
        {"age": [1, 3], "income": [2, 4.5]},
        [{"age": 1, "income": 2}, {"income": 4.5, "age": 3}],
        [{"x": [1, 2]}, {"x": [3, 4.5]}],
        [{"name": "x", "data": [[1, 2], [3, 4.5]]}],
        [{"name": "x", "shape": [2, 2], "datatype": "FP32", "data": [1, 2, 3, 4.5]}],
    ],
)
def test_every_form_is_the_same_tensor(inputs: Any) -> None:
    for text in (json.dumps(inputs), json.dumps(inputs, indent=2)):
        (tensor,) = tensors_of_inputs(TABLE, text.encode())
        assert (tensor.name, list(tensor.shape)) == ("x", [2, 2])
        assert struct.unpack("<4f", tensor.data) == (1, 2, 3, 4.5)


@pytest.mark.parametrize(
    ("signature", "value", "shape"),
    [
        (TABLE, [1, 2], [1, 2]),
        (TABLE, {"age": 1, "income": 2}, [1, 2]),
        (TABLE, [[1, 2]], [1, 2]),
        (IMAGE, [[1, 2], [3, 4]], [1, 2, 2]),
        (WHOLE, [1, 2, 3], [3]),
        (model(("text", "BYTES", [-1], [])), "a", [1]),
        (model(("text", "BYTES", [-1, 1], [])), "a", [1, 1]),
    ],
)
def test_single_input(signature: ModelSignature, value: Any, shape: list[int]) -> None:
    (tensor,) = tensors_of_input(signature, json.dumps(value).encode())
    assert list(tensor.shape) == shape


@pytest.mark.parametrize(
    ("signature", "text", "field"),
    [
        (TABLE, '[{"age": 1, "income": "a"}]', "inputs[0].income"),
        (TABLE, '[{"age": 1, "income": 2}, 3]', "inputs[1]"),
        (TABLE, '[{"age": 1, "income": 2, "city": 3}]', "inputs[0].city"),
        (TABLE, '{"age": [1], "income": [1, 2]}', "inputs.income"),
        (TABLE, '{"age": 1, "income": [1]}', "inputs.age"),
        (TABLE, '{"age": [], "income": []}', "inputs"),
        (TABLE, '{"x": 3}', "inputs.x"),
        (TABLE, '{"x": [[1, 2]], "y": [[1, 2]]}', "inputs.y"),
        (TABLE, '[{"name": "x", "datatype": "FP64", "data": [[1, 2]]}]', "inputs[0].datatype"),
        (TABLE, '[{"name": "x", "shape": [2, 2], "data": [[1, 2]]}]', "inputs[0].shape"),
        (TABLE, '[{"name": "x", "shape": [2, 2], "data": [1, 2, 3]}]', "inputs[0].data"),
        (TABLE, '[{"name": "x", "shape": [-1, 2], "data": [1, 2]}]', "inputs[0].shape"),
        (TABLE, "7", "inputs"),
        (TABLE, "[[[1], 2]]", "inputs[0][0]"),
        (IMAGE, "[[[1, 2], [3, 256]]]", "inputs[0][1][1]"),
        (IMAGE, "[[[1, 2], [3, -1]]]", "inputs[0][1][1]"),
        (IMAGE, "[[[1, 2], [3]]]", "inputs[0][1]"),
        (IMAGE, "[[[1, 2], [3, 4]], [[1, 2]]]", "inputs[1]"),
        (IMAGE, "[[[1, 2], 5]]", "inputs[0][1]"),
        (WHOLE, "[1, 2]", "inputs"),
        (model(("a", "BOOL", [-1], [])), "[true, 1]", "inputs[1]"),
        (model(("a", "FP16", [-1], [])), "[70000]", "inputs[0]"),
        (model(("a", "BF16", [-1], [])), "[1]", "inputs"),
        (model(("a", "FP32", [-1], []), ("b", "FP32", [-1], [])), "[1]", "inputs"),
    ],
)
def test_the_wrong_element_is_named(signature: ModelSignature, text: str, field: str) -> None:
    with pytest.raises(InvalidArgument) as raised:
        tensors_of_inputs(signature, text.encode())
    assert raised.value.field == field
    assert field in raised.value.message


MANY = 4000


@pytest.mark.parametrize(
    "inputs",
    [
        {"age": [1.5] * MANY, "income": [2] * MANY},
        [{"age": 1.5, "income": 2}] * MANY,
        {"age": [1.5] * MANY, "income": [2] * (MANY - 1) + ["a"]},
        {"age": [1.5] * MANY, "income": [2] * (MANY - 1) + [1e39]},
    ],
)
def test_work_in_python_does_not_grow_with_columns_and_rows(inputs: Any) -> None:
    """A loop per element would hold up every other request for as long as the body is large."""
    raw, events, field = json.dumps(inputs).encode(), 0, None

    def count(_frame: Any, _event: str, _argument: Any) -> None:
        nonlocal events
        events += 1

    sys.setprofile(count)
    try:
        tensors_of_inputs(TABLE, raw)
    except InvalidArgument as error:
        field = error.field
    finally:
        sys.setprofile(None)
    assert field in (None, f"inputs.income[{MANY - 1}]")
    assert 0 < events < MANY / 4


def test_errors_do_not_repeat_endless_names() -> None:
    with pytest.raises(InvalidArgument) as raised:
        tensors_of_inputs(TABLE, json.dumps({"a" * 100_000: 1}).encode())
    assert len(raised.value.message) < 1000
    assert raised.value.field == "inputs." + "a" * 64


@pytest.mark.parametrize(
    ("decode", "raw"),
    [(decode_body, '{"model": "m", "%s": 1}'), (spec_of_json, '{"model": "m", "exclude_from": ["%s"]}')],
)
def test_errors_of_a_body_do_not_repeat_all_of_it(decode: Callable[[bytes], object], raw: str) -> None:
    """Three times 32 MB would keep the loop that answers them for half a second."""
    with pytest.raises(InvalidArgument) as raised:
        decode((raw % ("k" * 100_000)).encode())
    assert len(raised.value.message) + len(raised.value.field or "") < 1000


def test_single_input_errors_have_no_row_index() -> None:
    with pytest.raises(InvalidArgument) as raised:
        tensors_of_input(TABLE, b'{"age": 1, "income": null}')
    assert raised.value.field == "input.income"
    assert "NaN in binary tensors" in raised.value.message  # what else could be done
    with pytest.raises(InvalidArgument) as raised:
        tensors_of_input(TABLE, b"[1, null]")
    assert raised.value.field == "input[1]"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["x", "age", "a"]), inner),
    max_leaves=12,
)


@given(json_values, st.sampled_from([TABLE, IMAGE, WHOLE, model(("t", "BYTES", [-1], []))]))
def test_no_value_is_anything_but_a_tensor_or_a_4xx(value: Any, signature: ModelSignature) -> None:
    raw = msgspec.Raw(json.dumps(value).encode())
    for read in (tensors_of_inputs, tensors_of_input):
        names, refused = [], None
        try:
            names = [tensor.name for tensor in read(signature, raw)]
        except InvalidArgument as error:  # anything else fails the test
            refused = error
        if refused is None:
            assert names == [spec.name for spec in signature.inputs]
        else:
            assert refused.field or isinstance(refused, MalformedBody)


NUMERIC = [d for d in BY_NAME.values() if d.dtype is not None]


@given(st.data(), st.sampled_from(NUMERIC))
def test_packing_is_what_numpy_says(data: st.DataObject, datatype: Datatype) -> None:
    if datatype.python is bool:
        element: st.SearchStrategy[Any] = st.booleans()
    elif datatype.python is int:
        element = st.integers(datatype.low, datatype.high)
    else:
        width = 8 * datatype.itemsize
        element = st.floats(width=width, allow_nan=False, allow_infinity=False)  # type: ignore[arg-type]  # 16, 32 or 64
    values = data.draw(st.lists(st.lists(element, min_size=3, max_size=3), min_size=1, max_size=4))
    spec = model(("x", datatype.name, [-1, 3], [])).inputs[0]
    expected = np.array(values, dtype=datatype.dtype)
    raw = json.dumps(values).encode()
    tensor = tensor_from_json(spec, raw, "inputs")
    assert tensor.data == expected.tobytes()
    flat = [one for row in values for one in row]
    assert pack_flat(datatype, flat) == tensor.data
    shape = (len(values), 3)
    assert tensor_from_flat(spec, json.dumps(flat).encode(), shape, "inputs.x").data == tensor.data
