"""How many bytes of bodies the process holds, and large bodies read in threads, so that one of them does not
hold up every other request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from services.common.errors import Unavailable
from services.common.lifecycle import roam

_THREADS = 2
_WAITING = 64
_RETRY_MS = 1000

Done = Callable[[BaseException | None], None]


class BodyBudget:
    """Bytes of unfinished and large bodies, of all connections together."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0

    def take(self, size: int) -> None:
        """Count `size` bytes more. Raises Unavailable where that is too many; then nothing is counted."""
        if self.held + size > self._limit:
            raise Unavailable("The gateway holds too many unfinished bodies.", retry_after_ms=_RETRY_MS)
        self.held += size

    def give(self, size: int) -> None:
        """The bytes are gone."""
        self.held -= size


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
