"""Tensors between the wire and numpy."""

from __future__ import annotations

import pytest
from headrace.v1.tensor_pb2 import DataType

from services.common.errors import InvalidArgument
from services.common.tensors import encode_bytes, to_array


def test_texts_become_an_array_of_their_shape() -> None:
    array = to_array(encode_bytes([b"a\0", b"", b"b", b"c"]), DataType.DATA_TYPE_BYTES, (2, 2))
    assert array.tolist() == [[b"a\0", b""], [b"b", b"c"]]
    assert to_array(b"", DataType.DATA_TYPE_BYTES, (0, 3)).shape == (0, 3)


@pytest.mark.parametrize("shape", [(3,), (0,), (2, 2), (1 << 48,), (-1,)])
def test_one_text_fills_no_shape_of_another_size(shape: tuple[int, ...]) -> None:
    """Not even by being repeated, and no memory is taken for what is not there."""
    with pytest.raises(InvalidArgument, match="do not fill"):
        to_array(encode_bytes([b"text"]), DataType.DATA_TYPE_BYTES, shape)
