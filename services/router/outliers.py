"""Which endpoints of one version are left out for a while: Envoy's outlier ejection with Envoy's defaults,
and a breaker that lets one request try before it lets all back. Pure; `now` is given.

    closed ──5 errors in a row──▶ open ──30 s × ejections, at most 300 s──▶ half-open ──an answer──▶ closed
                                    ▲                                           │
                                    └───────────────── an error ────────────────┘

An endpoint is judged per version, as a host is per cluster in Envoy: a version that fails on a worker says
nothing about the others there. What differs from Envoy:

* A lost connection is no error here. It takes the endpoint out by itself and brings it back by itself.
* At most 10% of the version's endpoints are out, and one always may be. But one out of one does not leave
  nobody: where every endpoint would be out, all of them serve (`offered`), and who has a fallback is told.
* Ejection ends with one request as a probe, not with all of them.

How much one endpoint may hold at once is bounded by its frame channel, which refuses what is above.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final, Generic, TypeVar

from headrace.v1.tensor_pb2 import Code

#: A request that an endpoint held for less than this before its deadline passed blames nobody, seconds.
_HUNG_S: Final = 0.25
_ANSWERS: Final = frozenset({Code.CODE_OK, Code.CODE_INVALID_ARGUMENT})
_ERRORS: Final = frozenset(
    {Code.CODE_UNAVAILABLE, Code.CODE_INTERNAL, Code.CODE_UNKNOWN, Code.CODE_DATA_LOSS}
)


class Verdict(Enum):
    """What one reply says about the endpoint that gave it."""

    ANSWERED = "answered"
    FAILED = "failed"
    #: Neither: it is full, the request was cancelled, the caller had no patience, the connection went away.
    NOTHING = "nothing"


class State(Enum):
    """Of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


@dataclass(frozen=True, slots=True)
class OutlierPolicy:
    """When an endpoint is ejected and for how long. The defaults are Envoy's."""

    #: Errors in a row; 0: nobody is ever ejected.
    consecutive: int = 5
    #: A healthy interval of this length takes back one ejection.
    interval_s: float = 10.0
    #: Times the number of ejections, at most `cap_s`.
    base_s: float = 30.0
    cap_s: float = 300.0
    #: Of the version's endpoints, out at once; one always may be.
    share: float = 0.1


@dataclass(slots=True)
class Breaker:
    """What is on record about one endpoint."""

    #: When the state began; replies to requests sent before say nothing about it.
    since: float = -math.inf
    state: State = State.CLOSED
    failures: int = 0
    #: What an answer usually took before the first error since the last answer, seconds; and when the last
    #: error came.
    usual_s: float = math.inf
    failed_at: float = -math.inf
    ejections: int = 0
    #: Open: when it ends. Closed: when the next ejection is taken back.
    until: float = 0.0


def verdict(code: Code, *, lost: bool, held_s: float, expected_s: float) -> Verdict:
    """Judge a reply with `code` that came `held_s` after the request was sent; `expected_s` is usual."""
    if code in _ANSWERS:
        return Verdict.ANSWERED
    if lost:
        return Verdict.NOTHING
    if code in _ERRORS:
        return Verdict.FAILED
    if code == Code.CODE_DEADLINE_EXCEEDED and held_s >= max(_HUNG_S, 2 * expected_s):
        return Verdict.FAILED
    return Verdict.NOTHING


E = TypeVar("E", bound=Hashable)


class Outliers(Generic[E]):
    """The breakers of one version's endpoints. Empty while all is well: healthy versions pay nothing."""

    __slots__ = ("_policy", "breakers", "due", "ejected_total", "spared_total")

    def __init__(self, policy: OutlierPolicy) -> None:
        self._policy = policy
        #: Endpoints with something on record; all others are closed.
        self.breakers: dict[E, Breaker] = {}
        #: Half-open endpoints that wait for a request to try them.
        self.due: list[E] = []
        self.ejected_total = 0
        #: Endpoints that would have been ejected, had not enough been out already.
        self.spared_total = 0

    def usual(self, endpoint: E, estimate_s: float, sent_at: float) -> float:
        """What an answer to a request sent at `sent_at` usually takes, by an estimate that follows what was
        never answered, too. Where errors were known by then, it is what it was before them: else an endpoint
        that hangs would be given ever more time."""
        breaker = self.breakers.get(endpoint)
        if breaker is None or sent_at < breaker.failed_at:
            return estimate_s
        return min(estimate_s, breaker.usual_s)

    def judge(
        self, endpoint: E, said: Verdict, count: int, sent_at: float, now: float, usual_s: float = math.inf
    ) -> bool:
        """Take one reply to a request sent at `sent_at`, of a version with `count` endpoints, where an answer
        usually takes `usual_s`; whether `offered` would now say something else."""
        breaker = self.breakers.get(endpoint)
        if breaker is None:
            if said is not Verdict.FAILED or not self._policy.consecutive:
                return False
            breaker = self.breakers[endpoint] = Breaker()
        if sent_at < breaker.since:
            return False
        if said is Verdict.ANSWERED:
            return self._answered(endpoint, breaker, now)
        if breaker.state is State.HALF_OPEN:
            if said is Verdict.FAILED:
                self._eject(endpoint, breaker, now)
            elif endpoint not in self.due:
                self.due.append(endpoint)
        elif breaker.state is State.CLOSED and said is Verdict.FAILED:
            breaker.failures += 1
            breaker.usual_s, breaker.failed_at = min(breaker.usual_s, usual_s), now
            if breaker.failures >= self._policy.consecutive:
                breaker.failures = 0
                if self._out >= max(1, int(self._policy.share * count)):
                    self.spared_total += 1
                else:
                    self._eject(endpoint, breaker, now)
                    return True
        return False

    def probe(self, ready: Iterable[E], tried: Iterable[E]) -> E | None:
        """A half-open endpoint that this request shall try; nobody else is sent there until `judge` hears of
        it."""
        for endpoint in self.due:
            if endpoint in ready and endpoint not in tried:
                self.due.remove(endpoint)
                return endpoint
        return None

    def offered(self, ready: tuple[E, ...]) -> tuple[tuple[E, ...], bool]:
        """Those of `ready` that take requests, and whether none of them should."""
        if not self._out:
            return ready, False
        kept = tuple(endpoint for endpoint in ready if self._closed(endpoint))
        return (kept, False) if kept or not ready else (ready, True)

    def sweep(self, now: float) -> None:
        """End ejections that are over, forgive those long ago."""
        for endpoint, breaker in list(self.breakers.items()):
            if breaker.until > now:
                continue
            if breaker.state is State.OPEN:
                breaker.state, breaker.since = State.HALF_OPEN, now
                self.due.append(endpoint)
            elif breaker.state is State.CLOSED:
                if not breaker.ejections and not breaker.failures:
                    del self.breakers[endpoint]
                breaker.ejections = max(0, breaker.ejections - 1)
                breaker.until = now + self._policy.interval_s

    def forget(self, endpoint: E) -> None:
        """It left, or is another process now."""
        if self.breakers.pop(endpoint, None) is not None and endpoint in self.due:
            self.due.remove(endpoint)

    def _answered(self, endpoint: E, breaker: Breaker, now: float) -> bool:
        breaker.failures, breaker.usual_s = 0, math.inf
        if breaker.state is State.CLOSED:
            return False
        # Also straight from open, which takes requests where all of its peers are out, too.
        breaker.state, breaker.since = State.CLOSED, now
        breaker.until = now + self._policy.interval_s
        if endpoint in self.due:
            self.due.remove(endpoint)
        return True

    def _eject(self, endpoint: E, breaker: Breaker, now: float) -> None:
        policy = self._policy
        if breaker.ejections * policy.base_s < policy.cap_s:
            breaker.ejections += 1
        breaker.state, breaker.since = State.OPEN, now
        breaker.until = now + min(policy.base_s * breaker.ejections, policy.cap_s)
        if endpoint in self.due:
            self.due.remove(endpoint)
        self.ejected_total += 1

    def _closed(self, endpoint: E) -> bool:
        breaker = self.breakers.get(endpoint)
        return breaker is None or breaker.state is State.CLOSED

    @property
    def _out(self) -> int:
        return sum(breaker.state is not State.CLOSED for breaker in self.breakers.values())
