"""Batches that run in threads: a thread that ends one goes on with the next at once, and the event loop hears
of the first meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from services.worker.item import Batch

_Ran = TypeVar("_Ran")

#: After this long a thread goes to the end of the pool's queue: other versions share it.
_CHAIN_S = 0.02


class HandedOver(Generic[_Ran]):
    """Batches of one version, in the order in which they were handed over, at most `slots` of them running at
    once. `execute` is called in a thread, `ran` on the event loop, once for each batch, with what `execute`
    returned or raised. `add` belongs to the event loop."""

    def __init__(
        self,
        pool: ThreadPoolExecutor,
        slots: int,
        execute: Callable[[Batch], _Ran],
        ran: Callable[[Batch, _Ran | Exception], None],
    ) -> None:
        self._pool = pool
        self._slots = slots
        self._execute = execute
        self._ran = ran
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Batch] = deque()
        self._threads = 0

    @property
    def busy(self) -> bool:
        """Whether a batch that is added now has to wait for another."""
        return self._threads >= self._slots

    def add(self, batch: Batch) -> None:
        """Run `batch` once a slot is free."""
        self._waiting.append(batch)
        self._start()

    def _start(self) -> None:
        if self._waiting and self._threads < self._slots:
            self._threads += 1
            self._queue(self._waiting.popleft())

    def _queue(self, batch: Batch) -> None:
        """Have a thread of the pool go on with `batch`; from any thread."""
        try:
            future = self._pool.submit(self._run, batch)
        except RuntimeError as error:  # the pool is closed
            future = Future()
            future.set_exception(error)
        future.add_done_callback(lambda done: self._loop.call_soon_threadsafe(self._over, batch, done))

    def _run(self, first: Batch) -> tuple[Batch, _Ran | Exception] | None:
        """In a thread; returns the last batch that it ran, None where another goes on in its place."""
        until = time.monotonic() + _CHAIN_S
        batch = first
        while True:
            result: _Ran | Exception
            try:
                result = self._execute(batch)
            except Exception as error:  # whoever waits for the batch is told
                result = error
            if not self._waiting:
                return batch, result
            try:
                following = self._waiting.popleft()
            except IndexError:  # another thread took it
                return batch, result
            self._loop.call_soon_threadsafe(self._ran, batch, result)
            if time.monotonic() >= until:
                # From here: the event loop would hear of it, and queue it, while the model stands still.
                self._queue(following)
                return None
            batch = following

    def _over(self, first: Batch, done: Future[tuple[Batch, _Ran | Exception] | None]) -> None:
        last: tuple[Batch, _Ran | Exception] | None
        try:
            last = done.result()
        except Exception as error:  # it was never begun: the pool is closed
            last = first, error
        if last is not None:
            self._threads -= 1
            self._start()
            self._ran(*last)
