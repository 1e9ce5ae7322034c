"""Answers given before, for deployments whose answers depend on nothing but the inputs.

The first request for a key looks it up and, on a miss, is computed; equal ones that come meanwhile wait for
it (single flight) and get a copy of its answer. Where it fails they go their own ways: errors are not shared.
Where it is cancelled or late, which is its own caller's doing, the next one is computed in its place. Nobody
waits for a request of a less urgent class: that may wait long, or be refused, where his would not.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Final, Protocol
from zlib import crc32

import structlog
from google.protobuf.message import DecodeError
from headrace.v1.dataplane_pb2 import PredictReply, Priority
from headrace.v1.tensor_pb2 import Code

from services.common.errors import DeadlineExceeded, Internal
from services.common.shared_memory import in_shared_memory
from services.router.cache_key import cache_key
from services.router.prediction_log import HitLog
from services.router.result_store import Found
from services.router.routing_table import CachePolicy
from services.router.stats import Stats

if TYPE_CHECKING:
    from services.router.call import Call

log = structlog.get_logger(__name__)

_OK: Final = Code.CODE_OK
_LATE: Final = Code.CODE_DEADLINE_EXCEEDED
_URGENT: Final = Priority.PRIORITY_HIGH
_LOW: Final = Priority.PRIORITY_LOW
#: Bytes of the checksum before each value kept.
_SEAL: Final = 4
#: Of the time that answers are kept, the share by which it may be shorter.
_JITTER: Final = 0.1


class Store(Protocol):
    """The part of ResultStore that decides nothing."""

    def ask(self, key: bytes, found: Found) -> bool:
        """Look up; False: a miss, and `found` is never called."""
        ...

    def keep(self, key: bytes, value: bytes, ttl_ms: int) -> None:
        """Store soon."""
        ...


class Flight:
    """The requests for one key that are under way."""

    __slots__ = ("asking", "followers", "key", "leader", "policy")

    def __init__(self, key: bytes, policy: CachePolicy, leader: Call) -> None:
        self.key = key
        self.policy = policy
        #: The one that is looked up or computed; None: all have gone.
        self.leader: Call | None = leader
        self.followers: dict[Call, asyncio.TimerHandle] = {}
        #: Whether the store has not answered yet.
        self.asking = False


class ResultCache:
    """Stands between routing and sending. Every call that `enter` takes is answered or sent, once."""

    def __init__(self, store: Store, hit_log: HitLog, stats: Stats, seed: int | None = None) -> None:
        self._random = random.Random(seed).random
        self._store = store
        self._log = hit_log
        self._stats = stats
        self._flights: dict[bytes, Flight] = {}
        self._given: list[tuple[Call, bytes]] = []

    def __len__(self) -> int:
        return len(self._flights)

    def enter(self, call: Call, policy: CachePolicy) -> None:
        """Take a call that was routed and not sent."""
        if call.target is None:
            raise RuntimeError("a call enters the cache before it was routed")
        if in_shared_memory(call.request):  # its inputs are not known here
            call.send(call.began_at)
            return
        key = cache_key(call.target, call.request)
        flight = self._flights.get(key)
        if flight is not None and (flight.asking or not _before(call, flight.leader)):
            self._follow(flight, call)
            return
        flight = call.flight = self._flights[key] = Flight(key, policy, call)
        flight.asking = self._store.ask(key, lambda value: self._found(flight, value))
        if not flight.asking:
            self._stats.cache(call.target.key, "miss")
            call.send(call.began_at)

    def leave(self, call: Call) -> None:
        """Nobody waits for `call` any more: one of its followers is computed in its place."""
        flight = call.flight
        call.flight = None
        if flight is None or self._withdraw(flight, call):
            return
        self._replace_leader(flight)

    def settle(self, call: Call, reply: PredictReply) -> None:
        """`call` is about to be answered with `reply`: keep it, and give it to those who wait for it."""
        flight = call.flight
        call.flight = None
        if flight is None or self._withdraw(flight, call):
            return
        if reply.code == _LATE:
            self._replace_leader(flight)
            return
        self._land(flight)
        followers = self._release(flight)
        if reply.code != _OK or call.fell_back:
            for follower in followers:
                self._send(follower)
            return
        kept = PredictReply(outputs=reply.outputs, parameters=reply.parameters).SerializeToString()
        if len(kept) <= flight.policy.max_entry_bytes:
            # What was computed in one burst must not have to be computed again in one.
            ttl_ms = flight.policy.ttl_ms * (1 - _JITTER * self._random())
            self._store.keep(flight.key, _sealed(kept), max(1, round(ttl_ms)))
        for follower in followers:
            self._give(follower, kept, "joined")

    def _found(self, flight: Flight, value: bytes | None) -> None:
        """The store has answered, or has not in time."""
        flight.asking = False
        leader = flight.leader
        if leader is None:
            return
        kept = None if value is None else _opened(value)
        if kept is not None:
            self._land(flight)
            leader.flight = None
            for call in (leader, *self._release(flight)):
                self._give(call, kept, "hit")
            return
        if value is not None:
            log.warning("result_cache_entry_unreadable", model=leader.request.model)
        first = leader
        for follower in flight.followers:
            if _before(follower, first):
                first = follower
        if first is not leader:
            self._withdraw(flight, first)
            flight.leader = first
            self._follow(flight, leader)
        if first.target is not None:
            self._stats.cache(first.target.key, "miss")
        self._send(first)

    def _follow(self, flight: Flight, call: Call) -> None:
        """Let `call` wait for what becomes of `flight`."""
        patience = max(0.0, call.deadline - time.monotonic())
        flight.followers[call] = asyncio.get_running_loop().call_later(patience, self._expire, call)
        call.flight = flight

    def _replace_leader(self, flight: Flight) -> None:
        """The next one is looked up or computed, or nobody any more."""
        flight.leader = next(iter(flight.followers), None)
        if flight.leader is None:
            self._land(flight)
            return
        flight.followers.pop(flight.leader).cancel()
        if not flight.asking:
            self._send(flight.leader)

    def _land(self, flight: Flight) -> None:
        """Nobody joins `flight` any more. Where somebody more urgent came, nobody did already."""
        if self._flights.get(flight.key) is flight:
            del self._flights[flight.key]

    def _release(self, flight: Flight) -> list[Call]:
        followers, flight.followers = flight.followers, {}
        for follower, timer in followers.items():
            timer.cancel()
            follower.flight = None
        return list(followers)

    def _withdraw(self, flight: Flight, call: Call) -> bool:
        """Whether `call` was a follower, and is no more."""
        timer = flight.followers.pop(call, None)
        if timer is not None:
            timer.cancel()
        return timer is not None

    def _give(self, call: Call, value: bytes, how: str) -> None:
        """Answer with `value` at the end of this loop turn, so that its hits are logged together."""
        if call.target is not None:
            self._stats.cache(call.target.key, how)
        self._given.append((call, value))
        if len(self._given) == 1:
            asyncio.get_running_loop().call_soon(self._answer)

    def _answer(self) -> None:
        given, self._given = self._given, []
        hits: list[tuple[Call, PredictReply]] = []
        for call, value in given:
            if call.done:
                continue
            try:
                hits.append((call, PredictReply.FromString(value)))
            except DecodeError:
                log.warning("result_cache_entry_unreadable", model=call.request.model)
                self._send(call)
        if not hits:
            return
        try:
            logged = self._log.append(hits)
        except Exception:  # else nobody would answer them
            log.exception("hits_not_logged", requests=len(hits))
            logged = False
        for call, reply in hits:
            if not logged:
                # A worker logs it, or refuses.
                self._send(call)
                continue
            try:
                call.answer_cached(reply)
            except Exception:
                log.exception("cached_answer_failed", model=call.request.model)

    def _expire(self, call: Call) -> None:
        if not call.done:
            call.refuse(DeadlineExceeded("an equal request was not answered before the deadline"))

    def _send(self, call: Call) -> None:
        try:
            call.send(time.monotonic())
        except Exception:
            log.exception("routing_failed", model=call.request.model)
            if not call.done:
                call.refuse(Internal("the request could not be routed"))


def _before(call: Call, other: Call | None) -> bool:
    """Whether `call` is of a more urgent class."""
    if other is None:
        return False
    mine, theirs = call.request.priority, other.request.priority
    return mine != theirs and (mine == _URGENT or theirs == _LOW)


def _sealed(kept: bytes) -> bytes:
    """What is stored: whatever else comes to stand under the key, even an empty value, is told from it."""
    return crc32(kept).to_bytes(_SEAL, "little") + kept


def _opened(value: bytes) -> bytes | None:
    """What was sealed; None where `value` is something else."""
    kept = value[_SEAL:]
    return kept if kept and value[:_SEAL] == crc32(kept).to_bytes(_SEAL, "little") else None
