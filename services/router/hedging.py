"""Requests that take longer than usual are asked a second time elsewhere (Dean and Barroso 2013, The Tail at
Scale).

Per version there is one queue of what was sent, in order, and one timer for its head; a deployment without
hedging has neither. Whether a hedge is allowed the retry budget says; what becomes of the two, the call.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Final

from services.router.group import Endpoint
from services.router.routing_table import Hedging

if TYPE_CHECKING:
    from services.router.call import Call

#: Answers that the quantile is taken of, and how many new ones make it stale.
_RECENT: Final = 256
_FRESH: Final = 64
#: Requests that are looked after at once; what is above goes without.
_MAX_WATCHED: Final = 16_384


class Attempt:
    """A request at one more endpoint than the one that was asked first."""

    __slots__ = ("endpoint", "local_id", "sent_at")

    def __init__(self, endpoint: Endpoint, sent_at: float) -> None:
        self.endpoint: Endpoint | None = endpoint  # None: it has answered
        self.sent_at = sent_at
        self.local_id = 0


class Usual:
    """How long the recent answers of a version took. Nothing is usual before `_FRESH` of them came."""

    __slots__ = ("_count", "_recent", "_sorted")

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._sorted: list[float] = []
        self._count = 0

    def observe(self, seconds: float) -> None:
        """An answer came after `seconds`, or was given up on after them."""
        self._recent.append(seconds)
        self._count += 1
        if self._count >= _FRESH:
            self._count = 0
            self._sorted = sorted(self._recent)

    def quantile(self, share: float) -> float | None:
        """What `share` of them did not take longer than, seconds."""
        known = self._sorted
        return known[min(int(share * len(known)), len(known) - 1)] if known else None


class Hedges:
    """The requests of one version that may become late."""

    def __init__(self) -> None:
        self.usual = Usual()
        self._sent: deque[tuple[Call, float]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._policy = Hedging(1.0, 0.0)

    def __len__(self) -> int:
        return len(self._sent)

    def watch(self, call: Call, policy: Hedging, now: float) -> None:
        """`call` was sent at `now`, for the first time."""
        self._policy = policy
        if len(self._sent) < _MAX_WATCHED:
            self._sent.append((call, now))
            if self._timer is None:
                self._wait(now)

    def _delay(self) -> float | None:
        usual = self.usual.quantile(self._policy.quantile)
        return None if usual is None else max(usual, self._policy.min_delay_s)

    def _wait(self, now: float) -> None:
        """Drop what is answered from the head, and sleep until the next one is late."""
        sent = self._sent
        while sent and sent[0][0].done:
            sent.popleft()
        delay = self._delay()
        if delay is None:
            sent.clear()  # too early to say what is late
        elif sent:
            patience = max(0.0005, sent[0][1] + delay - now)
            self._timer = asyncio.get_running_loop().call_later(patience, self._look)

    def _look(self) -> None:
        self._timer = None
        now = time.monotonic()
        delay = self._delay()
        while self._sent and delay is not None and self._sent[0][1] + delay <= now:
            call, _ = self._sent.popleft()
            call.hedge(now)
        self._wait(now)

    def close(self) -> None:
        """Look after nothing any more."""
        self._sent.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
