"""When batches run: on the next turn of the event loop, after the longest wait, or as a running one ends."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil, inf
from typing import Protocol

from headrace.v1.tensor_pb2 import Code

from services.common.clock import Clock
from services.common.errors import HeadraceError, Unavailable
from services.worker.batch_queue import BatchPolicy, BatchQueue, too_late
from services.worker.item import Batch, Item
from services.worker.run_time import RunTime

# Expired requests are told within this many seconds; a smaller step would scan a long queue for each of them.
_EXPIRY_STEP_S = 0.005
# After this long of running models inline, other work of the event loop gets its turn.
_INLINE_TURN_S = 0.004


class Timer(Protocol):
    """A callback that was scheduled."""

    def cancel(self) -> None: ...


class Turns(Protocol):
    """The part of an event loop that the batcher lives on; tests give it simulated time."""

    def time(self) -> float: ...

    def call_soon(self, callback: Callable[[], object]) -> object: ...

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer: ...


class LoopTurns:
    """The running event loop. Its own clock is not used: uvloop's stands still while callbacks run."""

    def __init__(self, clock: Clock) -> None:
        self.time = clock.monotonic
        self._loop = asyncio.get_running_loop()
        self.call_soon = self._loop.call_soon

    def call_at(self, when: float, callback: Callable[[], object]) -> Timer:
        """Call back at `when` or up to 1 ms later, never before: uvloop rounds to whole milliseconds."""
        return self._loop.call_later(max(0, ceil((when - self.time()) * 1e3)) / 1e3, callback)


class Batcher:
    """Dynamic batching of one model version.

    `run` is called with each batch and must settle its items and call `finished` once, before it returns or
    later; at most `slots` batches run at a time, not counting those that stepped aside. Where batches are
    whole and run for less than `ahead_below` seconds, as many more are given to `run` ahead: a thread that
    has its next batch at hand need not wait for the event loop to hear of the last one. (Of longer ones that
    wait is nothing, and who is urgent would stand behind one run more.) Every submitted item is settled
    exactly once: by `run`, or here with RESOURCE_EXHAUSTED (queue full), DEADLINE_EXCEEDED (expired, or
    cannot make it any more), UNAVAILABLE (closed). Cancelling an item affects no other."""

    def __init__(
        self,
        turns: Turns,
        policy: BatchPolicy,
        run_time: RunTime,
        run: Callable[[Batch], None],
        *,
        slots: int = 1,
        ahead_below: float = 0.0,
    ) -> None:
        self._turns = turns
        self._queue = BatchQueue(policy, run_time, slots)
        self._run_time = run_time
        self._run = run
        self._slots = slots
        self._ahead_below = ahead_below
        self._running = 0
        # Batches that run beside the slots.
        self._aside = 0
        self._armed = False
        self._turning = False
        self._draining = False
        self._closed: HeadraceError | None = None
        self._timer: Timer | None = None
        self._timer_at = inf
        self._idle: asyncio.Event | None = None
        #: Requests refused here, by the name of the code.
        self.refused: Counter[str] = Counter()

    @property
    def policy(self) -> BatchPolicy:
        return self._queue.policy

    @policy.setter
    def policy(self, policy: BatchPolicy) -> None:
        self._queue.policy = policy
        self._arm()

    @property
    def queued_rows(self) -> int:
        return self._queue.rows

    @property
    def queued_rows_of(self) -> list[int]:
        """`queued_rows` by priority class, most urgent first."""
        return self._queue.rows_of

    @property
    def queued(self) -> int:
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing runs."""
        return not self._running and not self._aside and not self._queue.rows

    def submit(self, items: Sequence[Item]) -> None:
        """Queue requests that arrived together; they may run from the next turn of the event loop on."""
        now = self._turns.time()
        if self._closed is not None:
            refused = [(item, self._closed) for item in items]
        else:
            refused = self._queue.offer(items, now, self._run_time.floor(now))
        for item, refusal in refused:
            self._refuse(item, refusal)
        self._arm()

    def cancel(self, item: Item) -> None:
        """Its caller has gone. It leaves the queue; if it runs already, its answer is dropped."""
        item.abandon()
        self._queue.remove(item)
        self._signal_idle()

    def finished(self) -> None:
        """A batch that `run` was given has been settled."""
        self._running -= 1
        self._arm()
        self._signal_idle()

    def step_aside(self) -> None:
        """A batch that `run` was given leaves its slot to others and goes on beside them."""
        self._running -= 1
        self._aside += 1
        self._arm()

    def finished_aside(self) -> None:
        """A batch that stepped aside has been settled."""
        self._aside -= 1
        self._signal_idle()

    async def drain(self) -> None:
        """Return once everything queued and running has been settled. Nothing waits for company any more."""
        self._draining = True
        self._arm()
        if self._idle is None or self._idle.is_set():  # else whoever drains it already would wait for ever
            self._idle = asyncio.Event()
        self._signal_idle()
        await self._idle.wait()

    def close(self, reason: HeadraceError | None = None) -> None:
        """Refuse what waits and whatever is submitted from now on."""
        self._closed = reason or Unavailable("the model version is being unloaded")
        for item in self.withdraw_all():
            self._refuse(item, self._closed)

    def withdraw_all(self) -> list[Item]:
        """Take out what waits, those of one priority class and merge key in order of arrival. To settle them
        is the caller's from now on."""
        waiting = list(self._queue)
        for item in waiting:
            self._queue.remove(item)
        self._disarm_timer()
        self._signal_idle()
        return waiting

    def _refuse(self, item: Item, error: HeadraceError) -> None:
        if not item.done:
            self.refused[Code.Name(error.code)] += 1
            item.settle(error)

    def _arm(self) -> None:
        if not self._armed and not self._turning and self._queue.rows:
            self._armed = True
            self._turns.call_soon(self._turn)

    def _turn(self) -> None:
        self._armed = False
        self._turning = True
        try:
            interrupted = self._release_ripe()
        finally:
            self._turning = False
        if interrupted:
            self._arm()
        self._set_timer()
        self._signal_idle()

    def _release_ripe(self) -> bool:
        """Run what is ripe while slots are free; True when it stopped only to let the event loop turn."""
        started = now = self._turns.time()
        while self._queue.rows and (ahead := self._ahead()) is not None:
            batch, late = self._queue.release(now, ahead=ahead, drain=self._draining)
            for item in late:
                self._refuse(item, too_late())
            if batch is None:
                break
            self._running += 1
            self._run(batch)
            now = self._turns.time()
            if now - started > _INLINE_TURN_S:
                return True
        return False

    def _ahead(self) -> float | None:
        """How many seconds before it runs the next batch may leave; None: not now."""
        if self._running < self._slots:
            return 0.0
        if self._running >= 2 * self._slots or not self._ahead_below or not self._queue.full:
            return None
        took = self._run_time.estimate(self._queue.whole)
        return took if 0.0 < took < self._ahead_below else None

    def _set_timer(self) -> None:
        """Wake at the next release, or, where no slot is free, for requests that expire meanwhile."""
        if self._armed or not self._queue.rows:
            self._disarm_timer()
            return
        when = max(self._queue.earliest_deadline, self._turns.time() + _EXPIRY_STEP_S)
        if self._running < self._slots:
            when = min(when, self._queue.wake_at())
        if when < self._timer_at or self._timer is None:
            self._disarm_timer()
            if when < inf:
                self._timer, self._timer_at = self._turns.call_at(when, self._on_timer), when

    def _on_timer(self) -> None:
        self._timer, self._timer_at = None, inf
        now = self._turns.time()
        if self._queue.earliest_deadline <= now:
            for item in self._queue.expire(now):
                self._refuse(item, too_late())
        self._turn()

    def _disarm_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer, self._timer_at = None, inf

    def _signal_idle(self) -> None:
        if self._idle is not None and self.idle:
            self._idle.set()
