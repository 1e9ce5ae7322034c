"""Chunks of the inbox, and arrays made of buffers."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as some

from services.analytics.arrays import bytes_array, numbers_array, texts_array, to_numpy
from services.analytics.chunks import pack, split, unpack


@given(some.lists(some.binary(max_size=50), max_size=20))
def test_what_was_packed_comes_out_again(values: list[bytes]) -> None:
    assert unpack(pack(values)) == values


@given(some.lists(some.integers(0, 100), max_size=30), some.integers(1, 150))
def test_runs_hold_all_in_order_and_no_more_than_allowed(sizes: list[int], at_most: int) -> None:
    runs = [sizes[run] for run in split(sizes, at_most)]
    assert [size for run in runs for size in run] == sizes
    assert all(run and (sum(run) <= at_most or len(run) == 1) for run in runs)


@pytest.mark.parametrize("kind", ["u1", "u4", "u8", "i4", "i8", "f4", "f8", "?"])
def test_arrays_of_numbers_are_those_that_arrow_makes(kind: str) -> None:
    values = np.random.default_rng(1).integers(0, 2, 13).astype(kind)
    made = numbers_array(values)
    made.validate(full=True)
    assert made.equals(pa.array(values))
    assert np.array_equal(to_numpy(made), values)
    assert len(numbers_array(values[:0])) == 0


def test_texts_and_bytes_are_those_that_arrow_makes() -> None:
    words = ["", "zwölf", "\ufffd", "a" * 1000]
    for made, wanted in (
        (texts_array(words), pa.array(words, pa.string())),
        (bytes_array([word.encode() for word in words]), pa.array([w.encode() for w in words], pa.binary())),
        (texts_array([]), pa.array([], pa.string())),
    ):
        made.validate(full=True)
        assert made.equals(wanted)
