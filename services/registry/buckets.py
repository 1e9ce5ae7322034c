"""Which version owns which of the 10,000 buckets. Pure: old ranges and new weights in, new ranges out.

A unit (a user) hashes to one bucket for ever, so a bucket that changes hands is a user who changes version.
Everything here serves one aim: as few of them as arithmetic allows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

BUCKETS = 10_000


@dataclass(frozen=True, slots=True)
class Range:
    """Buckets `first` … `last`, both included, owned by `version`."""

    first: int
    last: int
    version: str

    @property
    def size(self) -> int:
        return self.last - self.first + 1


def allocate(old: Sequence[Range], weights: Mapping[str, int]) -> list[Range]:
    """Ranges that give every version exactly its weight (in 1/10,000), moving as few buckets as possible.

    `old` covers 0 … 9999 or is empty; `weights` add up to 10,000 (ValueError else). The buckets that
    change hands number the sum of what the growing versions gain, which no allocation can undercut: a
    growing version loses none, a shrinking one gains none. The result is sorted, covers every bucket once
    and holds no two neighbours of one version. Given the same arguments it is always the same.
    """
    if sum(weights.values()) != BUCKETS or min(weights.values()) < 0:
        raise ValueError(f"weights must be non-negative and add up to {BUCKETS}")
    kept: list[Range] = []
    freed: list[Range] = [] if old else [Range(0, BUCKETS - 1, "")]
    owned = counts(old)
    growing = {version for version, weight in weights.items() if weight > owned.get(version, 0)}
    for version, count in owned.items():
        surplus = max(0, count - weights.get(version, 0))
        stays, goes = _release([r for r in old if r.version == version], surplus, _edges(old, growing))
        kept += stays
        freed += goes
    missing = {version: weight - owned.get(version, 0) for version, weight in weights.items()}
    return merged(kept + _hand_out(merged(freed), kept, {v: n for v, n in missing.items() if n > 0}))


def counts(ranges: Iterable[Range]) -> dict[str, int]:
    """Buckets owned by each version, in order of first appearance."""
    owned: dict[str, int] = {}
    for piece in ranges:
        owned[piece.version] = owned.get(piece.version, 0) + piece.size
    return owned


def merged(ranges: Iterable[Range]) -> list[Range]:
    """The same buckets and owners, sorted, neighbours of one version joined."""
    result: list[Range] = []
    for piece in sorted(ranges, key=lambda r: r.first):
        if result and result[-1].version == piece.version and result[-1].last + 1 == piece.first:
            result[-1] = Range(result[-1].first, piece.last, piece.version)
        else:
            result.append(piece)
    return result


def _edges(ranges: Iterable[Range], growing: set[str]) -> set[int]:
    """First and last buckets of the ranges that will grow: what is freed beside them needs no new range."""
    return {edge for r in ranges if r.version in growing for edge in (r.first, r.last)}


def _release(ranges: list[Range], surplus: int, edges: set[int]) -> tuple[list[Range], list[Range]]:
    """Cut `surplus` buckets out of one version's ranges: what it keeps, and what it gives up (version "").

    Ranges that touch a growing neighbour go first and are cut from that side, which also makes a rollback
    return the very users that a canary took; small ones go before large ones, so that fragments vanish.
    """
    kept: list[Range] = []
    freed: list[Range] = []

    def touches(r: Range) -> bool:
        return r.first - 1 in edges or r.last + 1 in edges

    for piece in sorted(ranges, key=lambda r: (not touches(r), r.size, r.first)):
        take = min(surplus, piece.size)
        surplus -= take
        if take == 0:
            kept.append(piece)
        elif take == piece.size:
            freed.append(Range(piece.first, piece.last, ""))
        elif piece.first - 1 in edges and piece.last + 1 not in edges:
            freed.append(Range(piece.first, piece.first + take - 1, ""))
            kept.append(Range(piece.first + take, piece.last, piece.version))
        else:
            freed.append(Range(piece.last - take + 1, piece.last, ""))
            kept.append(Range(piece.first, piece.last - take, piece.version))
    return kept, freed


def _hand_out(freed: list[Range], kept: list[Range], missing: dict[str, int]) -> list[Range]:
    """Give every freed bucket to a version that lacks some, beside its own buckets where possible."""
    ends = {r.last: r.version for r in kept}
    starts = {r.first: r.version for r in kept}
    given: list[Range] = []
    rest: list[Range] = []

    def give(version: str, wanted: int) -> int:
        count = min(missing.get(version, 0), wanted)
        if count:
            missing[version] -= count
        return count

    for piece in freed:
        first, last = piece.first, piece.last
        if left := give(ends.get(first - 1, ""), last - first + 1):
            given.append(Range(first, first + left - 1, ends[first - 1]))
            first += left
        if right := give(starts.get(last + 1, ""), last - first + 1):
            given.append(Range(last - right + 1, last, starts[last + 1]))
            last -= right
        if first <= last:
            rest.append(Range(first, last, ""))
    for piece in rest:
        first = piece.first
        for version in missing:
            if count := give(version, piece.last - first + 1):
                given.append(Range(first, first + count - 1, version))
                first += count
    return given
