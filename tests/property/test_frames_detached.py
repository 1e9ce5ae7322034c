"""Frames without their large tensors, held against the parser: nothing is lost, nothing is made up."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from headrace.v1.dataplane_pb2 import Hello, PredictRequest, RequestFrame
from headrace.v1.tensor_pb2 import DataType, Tensor
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.frames.detached import LARGE_BYTES, Buffer, detach, detach_parts
from services.common.frames.messages import item_header, item_payloads, varint

SIZES = st.sampled_from((0, 1, 100, LARGE_BYTES - 1, LARGE_BYTES, LARGE_BYTES + 7, 70_000, 2_100_000))
TYPES = st.sampled_from(
    (DataType.DATA_TYPE_FP32, DataType.DATA_TYPE_BYTES, DataType.DATA_TYPE_BOOL, DataType.DATA_TYPE_UINT8)
)
TENSORS = st.builds(
    lambda name, datatype, shape, size, fill: Tensor(
        name=name, datatype=datatype, shape=shape, data=bytes([fill]) * size
    ),
    st.text(max_size=5),
    TYPES,
    st.lists(st.integers(-1, 1 << 40), max_size=4),
    SIZES,
    st.integers(0, 255),
)
ITEMS = st.builds(
    lambda number, model, inputs, outputs: PredictRequest(
        id=number, model=model, inputs=inputs, outputs=outputs, received_at_us=number
    ),
    st.integers(0, 1 << 63),
    st.text(max_size=8),
    st.lists(TENSORS, max_size=3),
    st.lists(st.text(max_size=3), max_size=2),
)
FRAMES = st.builds(
    lambda hello, items, cancels: RequestFrame(hello=hello, items=items, cancels=cancels),
    st.none() | st.just(Hello(protocol=1)),
    st.lists(ITEMS, max_size=3),
    st.lists(st.integers(0, 1 << 63), max_size=3),
)
_CHECKED = (DataType.DATA_TYPE_BYTES, DataType.DATA_TYPE_BOOL)


def put_together(payload: bytes) -> RequestFrame | None:
    """What `detach` makes of `payload`, with the data where it was."""
    found = detach(payload)
    if found is None:
        return None
    frame = RequestFrame.FromString(found.frame)
    assert len(frame.items) == len(found.items)
    for position, contents in found.contents.items():
        inputs = frame.items[position].inputs
        assert len(inputs) == len(contents)
        for tensor, content in zip(inputs, contents, strict=True):
            if content is not None:
                assert not tensor.data
                tensor.data = bytes(content)
    return frame


@settings(max_examples=60, deadline=None)
@given(FRAMES)
def test_a_frame_is_the_same_in_parts(frame: RequestFrame) -> None:
    payload = frame.SerializeToString()
    large = any(
        len(tensor.data) >= LARGE_BYTES and tensor.datatype not in _CHECKED
        for item in frame.items
        for tensor in item.inputs
    )
    found = detach(payload)
    assert (found is not None) == large
    if found is not None:
        assert put_together(payload) == frame
        assert [bytes(item) for item in found.items] == item_payloads(payload)
        assert len(found.frame) < len(payload)


def in_parts(item: PredictRequest, apart: int, id_end: bytes) -> list[Buffer]:
    """`item` as its frame's parts: the first inputs, so many of them, each as head and data."""
    parts: list[Buffer] = []
    rest = PredictRequest()
    rest.CopyFrom(item)
    del rest.inputs[:apart]
    for tensor in item.inputs[:apart]:
        head = tensor.SerializeToString()
        data = tensor.data
        assert head.endswith(data)
        head = head[: len(head) - len(data)]
        parts += (b"\x22" + varint(len(head) + len(data)) + head, memoryview(data))
    parts += (rest.SerializeToString(), id_end)
    return [item_header(sum(map(len, parts))), *parts]


@settings(max_examples=150, deadline=None)
@given(ITEMS, st.integers(0, 3), st.lists(st.tuples(st.integers(0, 6), st.integers(0, 80)), max_size=2))
def test_a_frame_that_comes_in_parts_is_the_frame_of_the_whole(
    item: PredictRequest, apart: int, changes: list[tuple[int, int]]
) -> None:
    parts = in_parts(item, apart, b"\x08\x07")
    for part, at in changes:  # something out of place
        if part < len(parts) and at < len(parts[part]) < LARGE_BYTES:
            changed = bytearray(parts[part])
            changed[at] ^= 1 << at % 8
            parts[part] = bytes(changed)
    payload = b"".join(parts)
    found = detach_parts(parts)
    if found is None:
        return
    assert b"".join((parts[0], *found.apart, *found.items)) == payload
    if any(part == 0 for part, _at in changes):
        return  # nobody looks at the header
    try:
        expected = RequestFrame.FromString(payload)
    except DecodeError:
        with pytest.raises(DecodeError):
            RequestFrame.FromString(found.frame)
        return
    frame = RequestFrame.FromString(found.frame)
    for tensor, content in zip(frame.items[0].inputs, found.contents[0], strict=True):
        if content is not None:
            assert len(content) >= LARGE_BYTES
            assert tensor.datatype not in _CHECKED
            tensor.data = bytes(content)
    assert frame == expected


def test_parts_as_a_gateway_sends_them_are_not_joined() -> None:
    image = Tensor(name="x", datatype=DataType.DATA_TYPE_FP32, shape=[1, 9000], data=bytes(36_000))
    item = PredictRequest(id=3, model="m", inputs=[image, Tensor(name="y", data=b"1234")])
    parts = in_parts(item, 1, b"\x08\x07")
    found = detach_parts(parts)
    assert found is not None
    assert found.apart == tuple(parts[1:-1])
    assert found.items == [b"\x08\x07"]
    (content, nothing) = found.contents[0]
    assert content is not None
    assert content == image.data
    assert nothing is None
    assert detach_parts([item_header(3), b"\x08\x03"]) is None


LARGE = RequestFrame(
    items=[
        PredictRequest(
            id=3,
            model="m",
            inputs=[
                Tensor(name="x", datatype=DataType.DATA_TYPE_FP32, shape=[1, 9000], data=bytes(36_000)),
                Tensor(name="y", datatype=DataType.DATA_TYPE_FP32, shape=[1], data=b"1234"),
            ],
        )
    ],
    cancels=[1, 2],
).SerializeToString()
# Where lengths and tags stand; the data itself says nothing.
_PLACES = [*range(60), *range(len(LARGE) - 40, len(LARGE))]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(_PLACES), st.integers(0, 255)), min_size=1, max_size=3), st.data())
def test_whatever_is_out_of_place_is_read_as_the_parser_reads_it(
    changes: list[tuple[int, int]], data: st.DataObject
) -> None:
    changed = bytearray(LARGE)
    for at, value in changes:
        changed[at] = value
    payload = bytes(changed)[: data.draw(st.sampled_from((len(changed), len(changed) - 1, 40, 36_020)))]
    try:
        expected = RequestFrame.FromString(payload)
    except DecodeError:
        expected = None
    try:
        found = put_together(payload)
    except DecodeError:
        assert expected is None
        return
    if found is not None:
        assert found == expected


def test_data_given_twice_is_left_to_the_parser() -> None:
    tensor = Tensor(name="x", datatype=DataType.DATA_TYPE_FP32, data=bytes(40_000)).SerializeToString()
    tensor += Tensor(data=b"\1" * 36_000).SerializeToString()
    inputs = b"\x22" + _varint(len(tensor)) + tensor
    assert detach(b"\x12" + _varint(len(inputs)) + inputs) is None


def _varint(number: int) -> bytes:
    return bytes((number & 127 | 128, number >> 7 & 127 | 128, number >> 14))
