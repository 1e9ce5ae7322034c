"""Who gets which version: uniform, sticky, independent between salts, and one way only as a canary grows."""

from __future__ import annotations

import math

import pytest
from headrace.v1.control_pb2 import BucketRange, ServedVersion, ServingConfig
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.assignment import BUCKETS, Buckets, fill, unit_digest
from services.router.routing_table import Route

UNITS = [f"user-{n}".encode() for n in range(20_000)]


def two(canary: int) -> ServingConfig:
    """Version "2" has the last `canary` buckets."""
    ranges = [BucketRange(first=0, last=BUCKETS - canary - 1, version="1")] if canary < BUCKETS else []
    if canary:
        ranges.append(BucketRange(first=BUCKETS - canary, last=BUCKETS - 1, version="2"))
    return ServingConfig(
        model="m", salt="s", versions=[ServedVersion(version="1"), ServedVersion(version="2")], buckets=ranges
    )


@given(st.text(max_size=100))
@settings(max_examples=5, deadline=None)
def test_buckets_are_uniform_whatever_the_salt(salt: str) -> None:
    bucket = Buckets(salt).of
    counts = [0] * 100
    for unit in UNITS:
        counts[bucket(unit) * 100 // BUCKETS] += 1
    expected = len(UNITS) / 100
    chi_square = sum((count - expected) ** 2 / expected for count in counts)
    assert chi_square < 99 + 6 * math.sqrt(2 * 99)  # mean and six standard deviations of chi-square(99)


@given(st.integers(0, BUCKETS), st.integers(0, BUCKETS))
@settings(max_examples=30, deadline=None)
def test_a_growing_canary_moves_units_only_into_itself(one: int, other: int) -> None:
    small, large = (Route(two(size), 30.0) for size in sorted((one, other)))
    for unit in UNITS[:500]:
        before, after = small.assign(unit).version, large.assign(unit).version
        assert before == after or (before, after) == ("1", "2")


@given(st.binary(min_size=1))
def test_a_unit_stays_where_it_is(unit: bytes) -> None:
    route = Route(two(1000), 30.0)
    assert route.assign(unit) is route.assign(bytes(bytearray(unit)))
    assert len(unit_digest(unit)) == 8


def test_two_experiments_do_not_cut_along_the_same_line() -> None:
    one, two = Buckets("one").of, Buckets("two").of
    in_both = sum(one(unit) < 5000 and two(unit) < 5000 for unit in UNITS)
    assert abs(in_both - len(UNITS) / 4) < 6 * math.sqrt(len(UNITS) * 3 / 16)


def test_known_values_hold_so_that_a_release_moves_nobody() -> None:
    # From the definition: BLAKE2b with an 8-byte digest, little-endian, keyed with the salt.
    units = [f"user-{n}".encode() for n in range(3)]
    digests = [int.from_bytes(unit_digest(unit), "little") for unit in units]
    assert digests == [0x71A37A256575E32B, 0x88E1EA21865AAC9A, 0xC86BE95FC6C61746]
    assert [Buckets("salt").of(unit) for unit in units] == [668, 9628, 8360]


@given(st.lists(st.integers(0, BUCKETS - 1), max_size=20, unique=True))
@settings(max_examples=50, deadline=None)
def test_any_cut_is_filled_exactly(cuts: list[int]) -> None:
    starts = sorted({0, *cuts})
    ends = [*(start - 1 for start in starts[1:]), BUCKETS - 1]
    ranges = [
        BucketRange(first=first, last=last, version=str(number % 2))
        for number, (first, last) in enumerate(zip(starts, ends, strict=True))
    ]
    filled = fill(ranges, ["0", "1"])
    assert len(filled) == BUCKETS
    for number, (first, last) in enumerate(zip(starts, ends, strict=True)):
        assert set(filled[first : last + 1]) == {number % 2}


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ([(0, 9998, "1")], "bucket 9999 belongs to no version"),
        ([(0, 9999, "1"), (5, 5, "2")], "bucket 5 is given twice"),
        ([(0, 10000, "1")], "no range of buckets"),
        ([(7, 3, "1")], "no range of buckets"),
        ([(0, 9999, "3")], "name version '3'"),
        ([], "bucket 0 belongs to no version"),
    ],
)
def test_ranges_that_do_not_cover_once_are_refused(ranges: list[tuple[int, int, str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill([BucketRange(first=f, last=last, version=v) for f, last, v in ranges], ["1", "2"])
