"""Which bucket a unit falls into. Pure; the ranges of buckets are the registry's, shipped in ServingConfig.

The unit is what an experiment assigns (a user, a session); a request without one is its own unit. BLAKE2b is
keyed with the salt, so that two experiments do not cut the population along the same lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Final

from headrace.v1.control_pb2 import BucketRange

BUCKETS: Final = 10_000


def unit_digest(unit: bytes) -> bytes:
    """The unit in prediction records: 64 bits, little-endian, the same for every model."""
    return blake2b(unit, digest_size=8).digest()


class Buckets:
    """The bucket of every unit under one salt."""

    __slots__ = ("_keyed",)

    def __init__(self, salt: str) -> None:
        # Made once: taking the key costs as much as hashing a unit.
        self._keyed = blake2b(digest_size=8, key=salt.encode()[:64])

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
    filled = [-1] * BUCKETS
    for part in ranges:
        if part.version not in known:
            raise ValueError(f"buckets name version {part.version!r}, which is not served")
        if not part.first <= part.last < BUCKETS:
            raise ValueError(f"no range of buckets: {part.first} to {part.last}")
        for number in range(part.first, part.last + 1):
            if filled[number] >= 0:
                raise ValueError(f"bucket {number} is given twice")
            filled[number] = known[part.version]
    if -1 in filled:
        raise ValueError(f"bucket {filled.index(-1)} belongs to no version")
    return filled
