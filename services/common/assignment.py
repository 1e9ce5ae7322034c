"""Which bucket a unit falls into. Pure; the ranges of buckets are the registry's, shipped in ServingConfig.

The unit is what an experiment assigns (a user, a session); a request without one is its own unit. BLAKE2b is
keyed with the salt, so that two experiments do not cut the population along the same lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Final, cast

from headrace.v1.control_pb2 import BucketRange

BUCKETS: Final = 10_000


def unit_digest(unit: bytes) -> bytes:
    """The unit in prediction records: 64 bits, little-endian, the same for every model."""
    return blake2b(unit, digest_size=8).digest()


class Buckets:
    """The bucket of every unit under one salt."""

    __slots__ = ("_keyed",)

    def __init__(self, salt: str) -> None:
        key = salt.encode()
        if len(key) > blake2b.MAX_KEY_SIZE:
            key = blake2b(key).digest()  # cut off, it would be that of other models with long names
        # Made once: taking the key costs as much as hashing a unit.
        self._keyed = blake2b(digest_size=8, key=key)

    def of(self, unit: bytes) -> int:
        """0 … 9999, uniform over units, and the same for a unit as long as the salt stays."""
        state = self._keyed.copy()
        state.update(unit)
        return int.from_bytes(state.digest(), "little") % BUCKETS


def fill(ranges: Iterable[BucketRange], versions: Sequence[str]) -> list[int]:
    """For every bucket the index of its version in `versions`.

    Raises ValueError unless the ranges cover every bucket exactly once with versions that are there.
    """
    known = {version: index for index, version in enumerate(versions)}
    filled = claim((part.first, part.last, _index(known, part.version)) for part in ranges)
    if None in filled:
        raise ValueError(f"bucket {filled.index(None)} belongs to no version")
    return cast("list[int]", filled)


def claim(ranges: Iterable[tuple[int, int, int]]) -> list[int | None]:
    """For every bucket who owns it. A range is the first bucket, the last, and who owns both and all between.

    Raises ValueError where a range is none, or a bucket is given twice.
    """
    owners: list[int | None] = [None] * BUCKETS
    for first, last, owner in ranges:
        if not 0 <= first <= last < BUCKETS:
            raise ValueError(f"no range of buckets: {first} to {last}")
        free = owners[first : last + 1]
        if free.count(None) < len(free):
            number = next(number for number in range(first, last + 1) if owners[number] is not None)
            raise ValueError(f"bucket {number} is given twice")
        owners[first : last + 1] = [owner] * len(free)
    return owners


def _index(known: dict[str, int], version: str) -> int:
    if version not in known:
        raise ValueError(f"buckets name version {version!r}, which is not served")
    return known[version]
