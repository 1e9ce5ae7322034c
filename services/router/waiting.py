"""Requests that wait for a version that a worker is about to have: few, and not for long."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from services.common.errors import DeadlineExceeded
from services.router.endpoints import Endpoints
from services.router.routing_table import VersionKey

if TYPE_CHECKING:
    from services.router.call import Call
    from services.router.dispatch import Dispatcher


class Waiting:
    """Holds a call only while a worker is loading its version, at most `wait_s` and its own deadline, and at
    most `limit` calls in all."""

    def __init__(self, dispatcher: Dispatcher, endpoints: Endpoints, *, wait_s: float, limit: int) -> None:
        self._dispatcher = dispatcher
        self._endpoints = endpoints
        self._wait_s = wait_s
        self._limit = limit
        self._calls: dict[Call, tuple[VersionKey, asyncio.TimerHandle]] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call, key: VersionKey) -> bool:
        """Hold `call` until an endpoint is there; False where there is none to wait for, or no room."""
        now = time.monotonic()
        patience = min(call.began_at + self._wait_s, call.deadline) - now
        if patience <= 0 or len(self._calls) >= self._limit or not self._endpoints.coming(key):
            return False
        timer = asyncio.get_running_loop().call_later(patience, self._give_up, call)
        self._calls[call] = (key, timer)
        return True

    def withdraw(self, call: Call) -> None:
        """`call` was cancelled."""
        held = self._calls.pop(call, None)
        if held is not None:
            held[1].cancel()

    def wake(self) -> None:
        """Something changed: send those whose version can be answered now, refuse those that wait in vain."""
        for call, (key, _) in list(self._calls.items()):
            if self._endpoints.group(key).members:
                self.withdraw(call)
                call.resume()
            elif not self._endpoints.coming(key):
                self.withdraw(call)
                call.give_up(self._dispatcher.no_endpoint(call))

    def _give_up(self, call: Call) -> None:
        if self._calls.pop(call, None) is None:
            return
        if time.monotonic() >= call.deadline:
            call.refuse(DeadlineExceeded("no worker was ready before the deadline"))
        else:
            call.give_up(self._dispatcher.no_endpoint(call))
