"""Requests that wait for a version that a worker is about to have: few, and not for long.

Routers and workers hear of a deployment at their own times, so for a moment nobody may even be loading what
is routed to already. That moment is waited for too, once: until a worker has had the version, later requests
are refused at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Container
from math import inf
from typing import TYPE_CHECKING

from services.common.errors import DeadlineExceeded
from services.router.endpoints import Endpoints
from services.router.routing_table import VersionKey

#: How long nobody may have a version, or be loading it, before requests for it are refused.
_GRACE_S = 1.0

if TYPE_CHECKING:
    from services.router.call import Call
    from services.router.dispatch import Dispatcher


class Waiting:
    """Holds a call only while a worker is loading its version, or may be about to, at most `wait_s` and its
    own deadline, and at most `limit` calls in all."""

    def __init__(self, dispatcher: Dispatcher, endpoints: Endpoints, *, wait_s: float, limit: int) -> None:
        self._dispatcher = dispatcher
        self._endpoints = endpoints
        self._wait_s = wait_s
        self._limit = limit
        self._calls: dict[Call, tuple[VersionKey, asyncio.TimerHandle]] = {}
        #: Since when no worker has, or is loading, what was asked for: no more than there are deployments.
        self._missing_since: dict[VersionKey, float] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call, key: VersionKey) -> bool:
        """Hold `call` until an endpoint is there; False where there is none to wait for, or no room."""
        now = time.monotonic()
        patience = min(call.began_at + self._wait_s, call.deadline, self._hope(key, now)) - now
        if patience <= 0 or len(self._calls) >= self._limit:
            return False
        timer = asyncio.get_running_loop().call_later(patience, self._give_up, call)
        self._calls[call] = (key, timer)
        return True

    def withdraw(self, call: Call) -> None:
        """`call` was cancelled."""
        held = self._calls.pop(call, None)
        if held is not None:
            held[1].cancel()

    def forget_all_but(self, served: Container[VersionKey]) -> None:
        """Nothing else is routed to any more."""
        for key in [key for key in self._missing_since if key not in served]:
            del self._missing_since[key]

    def wake(self) -> None:
        """Something changed: send those whose version can be answered now, refuse those that wait in vain."""
        now = time.monotonic()
        for key in [key for key in self._missing_since if self._endpoints.group(key).members]:
            del self._missing_since[key]
        for call, (key, _) in list(self._calls.items()):
            if self._endpoints.group(key).members:
                self.withdraw(call)
                call.resume()
            elif self._hope(key, now) <= now:
                self.withdraw(call)
                call.give_up(self._dispatcher.no_endpoint(call))

    def _hope(self, key: VersionKey, now: float) -> float:
        """Until when it makes sense to wait for `key`."""
        if self._endpoints.coming(key):
            self._missing_since.pop(key, None)
            return inf
        return self._missing_since.setdefault(key, now) + min(_GRACE_S, self._wait_s)

    def _give_up(self, call: Call) -> None:
        if self._calls.pop(call, None) is None:
            return
        if time.monotonic() >= call.deadline:
            call.refuse(DeadlineExceeded("no worker was ready before the deadline"))
        else:
            call.give_up(self._dispatcher.no_endpoint(call))
