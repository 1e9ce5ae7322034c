"""How many bytes of bodies the process holds, and large bodies read in threads, so that one of them does not
hold up every other request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from services.common.errors import ResourceExhausted, Unavailable
from services.common.lifecycle import roam

_THREADS = 2
_WAITING = 64
_RETRY_MS = 1000
#: Of what is left, how many times as much one key may have.
_SHARE: Final = 3

Done = Callable[[BaseException | None], None]


class Holder:
    """Whose bodies they are: those of one key, or of all callers without one."""

    def __init__(self) -> None:
        self.held = 0


class BodyBudget:
    """Bytes of unfinished and large bodies, of all connections together.

    No holder has more than three times what is left to others: one alone gets three quarters, two get three
    sevenths each, and who comes next finds room (dynamic thresholds, as in `jobs.shares`). One body of
    `least` bytes may have all that is left.
    """

    def __init__(self, limit: int, least: int) -> None:
        self._limit = limit
        self._least = least
        self.held = 0
        self.strangers = Holder()

    def take(self, size: int, holder: Holder) -> None:
        """Count `size` bytes more. Raises Unavailable where that is too many, ResourceExhausted where it is
        for `holder`; then nothing is counted."""
        held, own = self.held + size, holder.held + size
        left = self._limit - held
        if left < 0:
            raise Unavailable("The gateway holds too many unfinished bodies.", retry_after_ms=_RETRY_MS)
        if own > _SHARE * left and own > self._least:
            raise ResourceExhausted("Too many unfinished bodies are this key's.", retry_after_ms=_RETRY_MS)
        self.held, holder.held = held, own

    def give(self, size: int, holder: Holder) -> None:
        """The bytes are gone."""
        self.held -= size
        holder.held -= size


class Reading:
    """One body on its way through a thread. It stands where a call has its channel, to be cancelled alike."""

    def __init__(self, future: asyncio.Future[None]) -> None:
        self._future = future
        #: Nobody waits. The future alone does not say so: it may be done already, its callbacks yet to come.
        self.given_up = False

    def cancel(self, _ticket: int) -> None:
        """Nobody waits: `done` is not called any more."""
        self.given_up = True
        self._future.cancel()


class BodyReaders:
    """A few threads, and a bound on what waits for them."""

    def __init__(self, threads: int = _THREADS, waiting: int = _WAITING) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="body", initializer=roam)
        #: How many more may come.
        self.room = waiting

    def read(self, work: Callable[[], None], done: Done) -> Reading:
        """Run `work` in a thread, then `done` on the loop with what it raised. Raises Unavailable where too
        many wait already."""
        if not self.room:
            raise Unavailable("Too many large bodies at once.", retry_after_ms=_RETRY_MS)
        self.room -= 1
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        reading = Reading(future)

        def settle(settled: asyncio.Future[None]) -> None:
            self.room += 1
            if not reading.given_up and not settled.cancelled():
                done(settled.exception())

        future.add_done_callback(settle)
        return reading

    def close(self) -> None:
        """Take nothing more; what runs ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)
