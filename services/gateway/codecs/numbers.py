"""Long lists of numbers in JSON, packed without a Python object for each.

What makes objects takes 45 ns a number and holds the interpreter for the whole list. simdjson takes 14, and
is given a flat list a piece at a time, so that an image of 150,528 numbers keeps other threads waiting for
0.1 ms, not 8; lists in lists it reads in one piece, in 2 ms. It only ever says what the numbers are: where it
finds anything else, or a number that it does not read, the ordinary parser reads the list and finds the words
for what is wrong.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from math import prod
from typing import Any, Final

import numpy as np
import simdjson
from numpy.typing import NDArray

from services.gateway.datatypes import Datatype

#: Shorter lists cost less the ordinary way.
LONG_BYTES: Final = 1024
_PIECE_BYTES: Final = 32 << 10
#: What is no longer is read by a parser that is kept: a new one asks for twenty times as much memory.
_KEPT_BYTES: Final = 64 << 10
_OPEN, _CLOSE = b"["[0], b"]"[0]
_SPACE = b" \t\r\n"
#: What numbers and the space around them are written with.
_WRITTEN = b"0123456789.-+eE" + _SPACE
_DTYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "FP64": np.dtype("<f8")}
_PARSED: np.dtype[Any] = _DTYPES["FP64"]


def packed_numbers(datatype: Datatype, text: bytes, start: int, end: int) -> bytes | None:
    """The flat list of numbers `text[start:end]` as raw little-endian `datatype`: the nearest double of each,
    and of that the nearest FP32 where these are wanted. None for whatever else stands there, for types that
    are neither FP32 nor FP64, and for numbers that do not fit."""
    dtype = _DTYPES.get(datatype.name)
    if dtype is None:
        return None
    while start < end and text[start] in _SPACE:
        start += 1
    while end > start and text[end - 1] in _SPACE:
        end -= 1
    if end - start < 3 or text[start] != _OPEN or text[end - 1] != _CLOSE:
        return None
    if text.find(b"[", start + 1, end) >= 0:
        return None  # simdjson would flatten it
    at, last = start + 1, end - 1
    pieces: list[bytes] = []
    while True:
        cut = text.find(b",", at + _PIECE_BYTES, last)
        piece = _packed_piece(b"[%b]" % text[at : last if cut < 0 else cut], dtype)
        if piece is None:
            return None
        pieces.append(piece)
        if cut < 0:
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
        at = cut + 1


def packed_rows(
    datatype: Datatype, shape: tuple[int, ...], text: bytes, start: int, end: int
) -> tuple[int, bytes] | None:
    """The lists in lists `text[start:end]` as rows of `shape`, of which only the first size may be -1: how
    many rows there are, and their numbers as `packed_numbers` packs them. None as there, and for another
    shape."""
    dtype = _DTYPES.get(datatype.name)
    elements = prod(shape[1:])
    if dtype is None or len(shape) < 2 or min(shape[1:]) < 1:
        return None
    lists = text[start:end]
    data = _packed_piece(lists, dtype)
    if data is None:
        return None
    rows, rest = divmod(len(data), elements * datatype.itemsize)
    if rest or shape[0] not in (-1, rows):
        return None
    # simdjson says what the numbers are and that this is JSON, this that they stand where they should.
    row = _brackets(shape[1:])
    if lists.translate(None, _WRITTEN) != b"[%b%b]" % (row, (b"," + row) * (rows - 1)):
        return None
    return rows, data


@lru_cache(maxsize=16)
def _brackets(shape: tuple[int, ...]) -> bytes:
    """Brackets and commas of lists of `shape`."""
    inner = _brackets(shape[1:]) if len(shape) > 1 else b""
    return b"[" + b",".join([inner] * shape[0]) + b"]"


class _Kept(threading.local):
    """A parser for each thread that reads: what one has read is gone once it reads again."""

    def __init__(self) -> None:
        self.parser = simdjson.Parser()


_kept = _Kept()


def _packed_piece(text: bytes, dtype: np.dtype[Any]) -> bytes | None:
    """All numbers of the list `text`, and of the lists in it."""
    parser = _kept.parser if len(text) <= _KEPT_BYTES else simdjson.Parser()
    try:
        found = parser.parse(text)
        if not isinstance(found, simdjson.Array):
            return None
        numbers: NDArray[Any] = np.frombuffer(found.as_buffer(of_type="d"), dtype=_PARSED)
    except (ValueError, TypeError, RuntimeError):
        return None
    if not len(numbers):
        return None  # two commas in a row, or an empty list
    if dtype is not _PARSED:
        with np.errstate(over="ignore"):
            numbers = numbers.astype(dtype)
        if not np.isfinite(numbers).all():
            return None
    return numbers.tobytes()
