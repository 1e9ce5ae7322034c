"""Records that wait in the inbox lie there in chunks: as many rows of a database as there are records would
cost more than everything else that is done with them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

_NUMBER = np.dtype(">u4")


def pack(values: Sequence[bytes]) -> bytes:
    """How many values there are and how long each is, as big-endian 32-bit numbers, then the values."""
    header = np.array([len(values), *map(len, values)], dtype=_NUMBER)
    return b"".join((header.tobytes(), *values))


def unpack(data: bytes) -> list[bytes]:
    """The values that `pack` joined."""
    count = int.from_bytes(data[:4], "big")
    start = 4 * (1 + count)
    lengths = np.frombuffer(data, _NUMBER, count, offset=4).tolist()
    return [data[first:end] for first, end in pairwise(accumulate(lengths, initial=start))]


def split(sizes: Sequence[int], at_most: int) -> list[slice]:
    """Runs of neighbours of at most so much together; a larger one is alone."""
    runs: list[slice] = []
    first = held = 0
    for place, size in enumerate(sizes):
        if place > first and held + size > at_most:
            runs.append(slice(first, place))
            first, held = place, 0
        held += size
    if sizes:
        runs.append(slice(first, len(sizes)))
    return runs
