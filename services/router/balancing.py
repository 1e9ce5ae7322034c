"""Which endpoint takes a request: filter → scorer → picker.

The filter is the caller's (only endpoints that can answer are offered, those already tried are left out); a
picker here chooses among what is offered, by a score where it uses one. Nothing here does I/O, randomness is
seeded, and `now` is given, so every choice can be replayed.
"""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final, Protocol, TypeVar

from headrace.v1.control_pb2 import Balancing

#: Time constant of the latency estimate, seconds.
_TAU_S: Final = 10.0
#: What a failure makes of an estimate that knows better: fast failures must not attract requests.
_PENALTY_S: Final = 0.05
_PENALTY_CAP_S: Final = 1.0
#: No answer is believed to be faster, so that weights stay finite.
_FASTEST_S: Final = 1e-6
#: Points of one endpoint on the hash ring.
_POINTS: Final = 100
#: An endpoint may hold this much more than the mean before the ring goes on to the next.
_BOUND: Final = 1.25
#: One that holds requests and has answered none for so long, and for so many times as long as it usually
#: takes, may have stopped: while there are others, they are asked.
_SILENT_S: Final = 0.5
_SILENT_TIMES: Final = 4.0


class PeakEwma:
    """A latency estimate that follows a rise at once and a fall slowly (as in Finagle's load balancer)."""

    __slots__ = ("_at", "_value", "heard_at", "unanswered_since", "usual")

    def __init__(self) -> None:
        self._value = 0.0
        self._at = 0.0
        #: When something was answered last, and `last` as of then; 0 where nothing was.
        self.heard_at = 0.0
        self.usual = 0.0
        #: Since when it has answered nothing though a request was given up; 0 where none was.
        self.unanswered_since = 0.0

    def value(self, now: float) -> float:
        """Seconds, fading while nothing is observed: an endpoint that was slow is tried again."""
        return self._value * math.exp((self._at - now) / _TAU_S) if self._value else 0.0

    @property
    def last(self) -> float:
        """Seconds as of the last observation, not faded; 0 where there was none."""
        return self._value

    def observe(self, seconds: float, now: float) -> None:
        """An answer came after `seconds`."""
        if seconds >= self._value:
            self._value = seconds
        else:
            keep = math.exp((self._at - now) / _TAU_S)
            self._value = self._value * keep + seconds * (1 - keep)
        self._at = self.heard_at = now
        self.usual = self._value
        self.unanswered_since = 0.0

    def late(self, seconds: float, now: float) -> None:
        """A request was given up after `seconds`: an answer takes at least as long."""
        if seconds > self.value(now):
            self._value, self._at = seconds, now
        if not self.unanswered_since:
            self.unanswered_since = max(self.heard_at, now - seconds)

    def penalise(self, now: float) -> None:
        """A failure came, however fast. Many at once say no more than a few."""
        value = self.value(now)
        self._value = max(value, min(value * 2, _PENALTY_CAP_S), _PENALTY_S)
        self._at = self.heard_at = now
        self.usual = self._value
        self.unanswered_since = 0.0


class Candidate(Protocol):
    """What a picker sees of an endpoint."""

    worker_id: str
    in_flight: int
    latency: PeakEwma
    #: Since when it holds requests without a break. Such as were given up leave none.
    busy_since: float


C = TypeVar("C", bound=Candidate)


class Picker(Protocol):
    """Chooses one of `candidates`, which are never empty."""

    def pick(self, candidates: Sequence[C], unit_hash: int, now: float) -> C:
        """`unit_hash` is what stickiness goes by, `now` the loop's time."""
        ...


class LeastLatency:
    """The better of two drawn at random, by expected latency times requests in flight.

    Two choices are nearly as good as all of them and, with several routers, do not all run to the same one.
    """

    def __init__(self, rng: random.Random) -> None:
        self._random = rng.random

    def pick(self, candidates: Sequence[C], unit_hash: int, now: float) -> C:
        count = len(candidates)
        if count == 1:
            return candidates[0]
        first = int(self._random() * count)
        second = int(self._random() * (count - 1))
        if second >= first:
            second += 1
        one, two = candidates[first], candidates[second]
        return one if score(one, now) <= score(two, now) else two


def score(candidate: Candidate, now: float) -> float:
    """Expected seconds until one more request would be answered; the smaller the better."""
    waiting = candidate.in_flight
    if not waiting:
        # Nothing known, or nothing heard for long: worth a try.
        return candidate.latency.value(now) or _FASTEST_S
    # While it holds requests, silence makes no endpoint faster, and an unknown one gets one try at a time.
    # What it holds takes at least as long as it has been silent.
    return max(candidate.latency.last or _PENALTY_S, silence(candidate, now)) * (waiting + 1)


def silence(candidate: Candidate, now: float) -> float:
    """For how many seconds it has held requests and answered none."""
    return now - max(candidate.latency.heard_at, candidate.busy_since) if candidate.in_flight else 0.0


def silent(candidate: Candidate, now: float) -> bool:
    """Whether it may have stopped. Its connection finds out for sure, but later."""
    for_s = silence(candidate, now)
    return for_s > _SILENT_S and for_s > _SILENT_TIMES * candidate.latency.usual


class RoundRobin:
    """One after the other."""

    def __init__(self) -> None:
        self._next = 0

    def pick(self, candidates: Sequence[C], unit_hash: int, now: float) -> C:
        count = len(candidates)
        first = self._next + 1
        for turn in range(first, first + count):
            if not silent(candidates[turn % count], now):
                first = turn
                break
        self._next = first % count
        return candidates[self._next]


class Weighted:
    """At random, in proportion to the rate at which each has been answering. What is silent is as slow as
    that."""

    def __init__(self, rng: random.Random) -> None:
        self._random = rng

    def pick(self, candidates: Sequence[C], unit_hash: int, now: float) -> C:
        seconds = [
            silence(candidate, now) if silent(candidate, now) else candidate.latency.value(now)
            for candidate in candidates
        ]
        known = [value for value in seconds if value]
        typical = sum(known) / len(known) if known else 1.0
        weights = [1 / max(value or typical, _FASTEST_S) for value in seconds]
        return self._random.choices(candidates, weights)[0]


class ConsistentHash:
    """The same endpoint for a unit while the set of endpoints stays, and while it is neither overloaded nor
    silent.

    Bounded loads (Mirrokni, Thorup, Zadimoghaddam 2016): an endpoint that holds more than 1.25 times the mean
    is passed over for the next on the ring, so a hot unit cannot bury one worker.
    """

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._points: list[int] = []
        self._owners: list[int] = []

    def pick(self, candidates: Sequence[C], unit_hash: int, now: float) -> C:
        names = tuple(candidate.worker_id for candidate in candidates)
        if names != self._names:
            self._build(names)
        limit = math.ceil(_BOUND * (sum(c.in_flight for c in candidates) + 1) / len(candidates))
        start = bisect_left(self._points, unit_hash)
        for step in range(len(self._owners)):
            candidate = candidates[self._owners[(start + step) % len(self._owners)]]
            if candidate.in_flight < limit and not silent(candidate, now):
                return candidate
        return candidates[unit_hash % len(candidates)]

    def _build(self, names: tuple[str, ...]) -> None:
        ring = sorted(
            (int.from_bytes(blake2b(f"{name}#{point}".encode(), digest_size=8).digest(), "little"), index)
            for index, name in enumerate(names)
            for point in range(_POINTS)
        )
        self._names = names
        self._points = [point for point, _ in ring]
        self._owners = [owner for _, owner in ring]


def picker(balancing: Balancing, rng: random.Random) -> Picker:
    """The picker that a deployment asks for; least latency where it makes no statement."""
    if balancing == Balancing.BALANCING_ROUND_ROBIN:
        return RoundRobin()
    if balancing == Balancing.BALANCING_WEIGHTED:
        return Weighted(rng)
    if balancing == Balancing.BALANCING_CONSISTENT_HASH:
        return ConsistentHash()
    return LeastLatency(rng)
