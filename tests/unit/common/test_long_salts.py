"""Salts longer than BLAKE2b takes as a key: models and experiments with long names are cut like any other."""

from __future__ import annotations

from hashlib import blake2b

import pytest

from services.common.assignment import BUCKETS, Buckets

UNITS = [f"user-{number}".encode() for number in range(200)]


def of(key: bytes, unit: bytes) -> int:
    return int.from_bytes(blake2b(unit, digest_size=8, key=key).digest(), "little") % BUCKETS


@pytest.mark.parametrize("length", [0, 1, 63, 64])
def test_what_is_no_longer_is_the_key_itself(length: int) -> None:
    buckets = Buckets("s" * length)
    assert [buckets.of(unit) for unit in UNITS] == [of(b"s" * length, unit) for unit in UNITS]


def test_what_is_longer_counts_to_its_end() -> None:
    longer, other = Buckets("s" * 65), Buckets("s" * 64 + "t")
    key = blake2b(b"s" * 65).digest()
    assert [longer.of(unit) for unit in UNITS] == [of(key, unit) for unit in UNITS]
    same = sum(longer.of(unit) == other.of(unit) for unit in UNITS)
    assert same < 5
