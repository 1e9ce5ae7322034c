"""Priority classes: who may wait, and who leaves first when not all can leave at once. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import IntEnum

from headrace.v1.dataplane_pb2 import Origin, PredictRequest, Priority


class Rank(IntEnum):
    """The classes, most urgent first."""

    HIGH = 0
    NORMAL = 1
    LOW = 2


#: All of them; iterating over an enumeration itself is slow.
RANKS = tuple(Rank)

#: Rows of each class that leave while the others wait as well.
WEIGHTS = (8, 4, 1)

_BY_PRIORITY: dict[int, Rank] = {
    Priority.PRIORITY_HIGH: Rank.HIGH,
    Priority.PRIORITY_NORMAL: Rank.NORMAL,
    Priority.PRIORITY_LOW: Rank.LOW,
}
_ONLINE = Origin.ORIGIN_ONLINE
_NORMAL, _LOW = Rank.NORMAL, Rank.LOW
# Of the queue, a class has its weight in 64ths for itself: 1/8, 1/16 and 1/64.
_RESERVED_PARTS = 64
# LOW never holds more than this part of the queue.
_LOW_PART = 4


def rank_of(request: PredictRequest) -> Rank:
    """The class of `request`. Shadow and batch traffic is LOW whatever it asks for; a priority that this
    build does not know is NORMAL."""
    if request.origin > _ONLINE:
        return _LOW
    priority = request.priority
    return _BY_PRIORITY.get(priority, _NORMAL) if priority else _NORMAL


def roomy(most: int) -> int:
    """As long as a queue of `most` holds no more than this, there is room for every class."""
    return most // _LOW_PART


def most_of(rank: Rank, most: int, one_batch: int = 0) -> int:
    """How much of a queue of `most` the class may ever hold: what the others have for themselves is not for
    it, and LOW gets a quarter, or `one_batch` where that is more."""
    limit = most - sum(_reserved(other, most) for other in RANKS if other != rank)
    return min(limit, max(most // _LOW_PART, one_batch)) if rank == Rank.LOW else limit


def room_for(rank: Rank, held: Sequence[int], most: int, one_batch: int = 0) -> int:
    """How much more the class may bring into a queue of `most`, of which each class holds `held`.

    Every class has a part that no other takes, the more urgent the larger; the rest is for whoever comes
    first. So LOW cannot fill the queue, HIGH is refused last, and nobody is shut out by the others alone."""
    kept = sum(max(0, _reserved(other, most) - held[other]) for other in RANKS if other != rank)
    room = most - sum(held) - kept
    return min(room, most_of(rank, most, one_batch) - held[rank])


def _reserved(rank: Rank, most: int) -> int:
    return most * WEIGHTS[rank] // _RESERVED_PARTS


class FairShare:
    """Stride scheduling (Waldspurger & Weihl 1995): each class has a pass that grows by rows / weight as its
    rows leave, and the class with the least pass is next. A class that has been away comes back at the pass
    that is being served, so it saves nothing up.

    With rows of at most R in a request, a waiting class is next after at most (w + 1) R rows of each other
    class, where w is how many times the other's weight is its own."""

    def __init__(self) -> None:
        self._passes = [0.0] * len(RANKS)
        self._now = 0.0

    def joins(self, rank: Rank) -> None:
        """The class had nothing waiting and now has."""
        self._passes[rank] = max(self._passes[rank], self._now)

    def order(self, ranks: Collection[Rank]) -> list[Rank]:
        """`ranks` by whose turn it is; the more urgent first where that is equal."""
        return sorted(ranks, key=self._turn) if len(ranks) > 1 else list(ranks)

    def next(self, ranks: Collection[Rank]) -> Rank:
        """The first of `order`."""
        return min(ranks, key=self._turn) if len(ranks) > 1 else next(iter(ranks))

    def left(self, rank: Rank, rows: int) -> None:
        """`rows` of the class left while others had to wait."""
        self._now = max(self._now, self._passes[rank])
        self._passes[rank] += rows / WEIGHTS[rank]

    def _turn(self, rank: Rank) -> tuple[float, Rank]:
        return self._passes[rank], rank
