"""Long lists of numbers, packed piece by piece, are what the parser of short ones says, or left to it."""

from __future__ import annotations

import math
import struct
from unittest.mock import patch

import msgspec
import pytest
from headrace.v1.tensor_pb2 import Signature, TensorSpec
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import HeadraceError
from services.gateway.codecs import numbers, tensors
from services.gateway.codecs.numbers import packed_numbers, packed_rows
from services.gateway.datatypes import BY_NAME, Datatype
from services.gateway.signature import compile_signature

FP32, FP64 = BY_NAME["FP32"], BY_NAME["FP64"]
_decoder = msgspec.json.Decoder(list[float])


def ordinary(datatype: Datatype, text: bytes) -> bytes | None:
    try:
        flat = _decoder.decode(text)
        return struct.pack(f"<{len(flat)}{datatype.code}", *flat)
    except (msgspec.DecodeError, UnicodeDecodeError, struct.error, OverflowError):
        return None


def in_pieces(datatype: Datatype, text: bytes, size: int = 16) -> bytes | None:
    with patch.object(numbers, "_PIECE_BYTES", size):
        return packed_numbers(datatype, b"%%" + text + b"%", 2, 2 + len(text))


digits = st.text("0123456789", min_size=1, max_size=25)
written = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(repr),
    st.integers(-(1 << 70), 1 << 70).map(str),
    st.sampled_from(
        [
            "0", "-0", "-0.0", "1e39", "-1e39", "3.4028235e38", "3.4028235677973366e38", "3.40282357e38",
            "1e-46", "-1e-400", "1e400", "9007199254740993", "18446744073709551616", "1E+05", "1.0e-5",
            "0.1000000000000000055511151231257827021181583404541015625", "2.2250738585072011e-308", "1e99999",
            "0.00000000000000000000000000000000000000000000117549435", "16777217", "16777217.0000000001",
        ]
    ),
    st.tuples(digits, digits, st.sampled_from(["", "e5", "E-12", "e+30", "e-320"])).map(
        lambda parts: f"{parts[0].lstrip('0') or '0'}.{parts[1]}{parts[2]}"
    ),
)  # fmt: skip
spaces = st.text(" \t\r\n", max_size=2)
listed = st.lists(st.tuples(spaces, written, spaces).map("".join), min_size=1, max_size=12)


@given(st.lists(listed, min_size=1, max_size=3))
def test_a_parser_that_was_used_before_reads_the_same_as_a_new_one(lists: list[list[str]]) -> None:
    for one in lists:
        text = f"[{','.join(one)}]".encode()
        with patch.object(numbers, "_KEPT_BYTES", 0):
            new = packed_numbers(FP64, text, 0, len(text))
        assert packed_numbers(FP64, text, 0, len(text)) == new
        assert (
            packed_numbers(FP64, text + b"]", 0, len(text) + 1) is None
        )  # what comes next is read all the same


@given(listed, spaces, spaces, st.sampled_from([FP32, FP64]))
def test_numbers_are_those_of_the_ordinary_parser(
    items: list[str], before: str, after: str, datatype: Datatype
) -> None:
    text = f"{before}[{','.join(items)}]{after}".encode()
    packed = in_pieces(datatype, text)
    expected = ordinary(datatype, text)
    assert packed in (expected, None)
    if all(abs(float(item)) < 1e30 and len(item) < 18 for item in items):
        assert packed is not None  # of what clients send nothing is left


odd = st.sampled_from(
    ["", "01", "1.", ".5", "+1", "NaN", "Infinity", "true", "null", '"1"', '","', "[1]", "{}", "1 2", "1]",
     "]", "[", "\\u0031", "--1", "1e", "0x1", "\0", "é", "1,", "/**/1", "1}"]
)  # fmt: skip


@given(st.lists(written, max_size=6), odd, st.lists(written, max_size=6), st.integers(1, 40))
def test_what_is_no_list_of_numbers_is_left(
    before: list[str], wrong: str, after: list[str], size: int
) -> None:
    text = f"[{','.join([*before, wrong, *after])}]".encode()
    packed = in_pieces(FP64, text, size)
    expected = ordinary(FP64, text)
    assert packed in (expected, None)
    if expected is None:
        assert packed is None


@pytest.mark.parametrize("text", [b"", b"[", b"[]", b"{}", b"1", b"[[1,2]]", b"[1]]", b"[1][2]", b'["a"]'])
def test_other_values_are_left(text: bytes) -> None:
    assert in_pieces(FP32, text) is None


def test_types_that_are_no_floats_are_left() -> None:
    assert in_pieces(BY_NAME["INT64"], b"[1,2,3]") is None
    assert in_pieces(BY_NAME["FP16"], b"[1,2,3]") is None
    assert in_pieces(BY_NAME["BF16"], b"[1,2,3]") is None


def nested(shape: tuple[int, ...], items: list[str]) -> str:
    if not shape:
        return items[0]
    size = len(items) // shape[0]
    return f"[{','.join(nested(shape[1:], items[at : at + size]) for at in range(0, len(items), size))}]"


@given(
    st.lists(st.integers(1, 3), min_size=2, max_size=4),
    st.lists(st.sampled_from(["1", " -2.5", "1e3 ", "\n0.25\t"]), min_size=1, max_size=5),
    st.none()
    | st.tuples(st.integers(0, 400), st.sampled_from([*"[],1 ", "], [", "null", ""]), st.integers(0, 3)),
)
def test_rows_of_lists_are_those_of_the_ordinary_parser(
    sizes: list[int], items: list[str], wrong: tuple[int, str, int] | None
) -> None:
    shape = tuple(sizes)
    text = nested(shape, (items * 81)[: math.prod(shape)])
    if wrong is not None:
        at = wrong[0] % (len(text) + 1)
        text = text[:at] + wrong[1] + text[at + wrong[2] :]
    raw = text.encode()
    packed = packed_rows(FP32, (-1, *shape[1:]), b" " + raw + b" ", 1, 1 + len(raw))
    spec = compile_signature(
        Signature(
            inputs=[TensorSpec(name="x", datatype=FP32.number, shape=(-1, *shape[1:]))],
            outputs=[TensorSpec(name="y", datatype=FP32.number, shape=[-1])],
            batched=True,
        )
    ).inputs[0]
    with patch.object(tensors, "LONG_BYTES", 1 << 30):
        try:
            expected = tensors.tensor_from_json(spec, raw, "inputs")
        except HeadraceError:
            assert packed is None
            return
    assert packed == (expected.shape[0], expected.data)
    assert packed_rows(FP32, (expected.shape[0] + 1, *shape[1:]), raw, 0, len(raw)) is None


@pytest.mark.parametrize("shape", [(-1,), (3,), (-1, -1), (-1, 0)])
def test_rows_of_no_fixed_size_are_left(shape: tuple[int, ...]) -> None:
    assert packed_rows(FP32, shape, b"[[1,2,3]]", 0, 9) is None
