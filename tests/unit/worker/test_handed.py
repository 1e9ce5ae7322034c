"""Batches in threads: each reported once, in order, never more at once than there are slots."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.worker import handed
from services.worker.batch_queue import BatchPolicy
from services.worker.handed import HandedOver
from services.worker.item import Batch, Release
from tests.fixtures.batching import World
from tests.fixtures.waiting import PATIENCE_S, eventually, until


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


class Threads:
    """Runs batches, of which those of 13 rows fail, and remembers what it heard on the loop."""

    def __init__(self, pool: ThreadPoolExecutor, slots: int) -> None:
        self.gate = threading.Event()
        self.heard: list[tuple[int, int | Exception]] = []
        self.most = 0
        self.ran = 0
        self._running = 0
        self._lock = threading.Lock()
        self.handed = HandedOver(pool, slots, self._execute, self._ran)

    def _execute(self, batch: Batch) -> int:
        with self._lock:
            self._running += 1
            self.most = max(self.most, self._running)
        assert self.gate.wait(PATIENCE_S)
        with self._lock:
            self._running -= 1
            self.ran += 1
        if batch.rows == 13:
            raise ValueError("unlucky")
        return 2 * batch.rows

    def _ran(self, batch: Batch, result: int | Exception) -> None:
        self.heard.append((batch.rows, result))

    def add(self, *rows: int) -> None:
        for count in rows:
            self.handed.add(Batch([], count, Release.FULL))


@pytest.mark.parametrize("slots", [1, 2])
async def test_each_is_reported_once_and_no_more_run_than_slots(pool: ThreadPoolExecutor, slots: int) -> None:
    threads = Threads(pool, slots)
    threads.add(*range(1, 11))
    assert threads.handed.busy
    threads.gate.set()
    await eventually(lambda: len(threads.heard) == 10)
    found = threads.heard if slots == 1 else sorted(threads.heard, key=lambda one: one[0])
    assert found == [(rows, 2 * rows) for rows in range(1, 11)]
    assert threads.most <= slots
    await eventually(lambda: not threads.handed.busy)
    threads.add(20)
    await eventually(lambda: threads.heard[-1] == (20, 40))


@pytest.mark.parametrize("slots", [1, 2])
async def test_a_thread_whose_time_is_over_is_followed_without_the_event_loop(
    pool: ThreadPoolExecutor, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handed, "_CHAIN_S", 0.0)
    threads = Threads(pool, slots)
    threads.add(*range(1, 11))
    threads.gate.set()
    until(lambda: threads.ran == 10)  # the event loop stands still meanwhile
    assert threads.heard == []
    await eventually(lambda: len(threads.heard) == 10)
    found = threads.heard if slots == 1 else sorted(threads.heard, key=lambda one: one[0])
    assert found == [(rows, 2 * rows) for rows in range(1, 11)]
    assert threads.most <= slots
    await eventually(lambda: not threads.handed.busy)
    threads.add(20)
    await eventually(lambda: threads.heard[-1] == (20, 40))


async def test_other_versions_have_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handed, "_CHAIN_S", 0.0)
    order: list[str] = []
    with ThreadPoolExecutor(1) as pool:
        threads = Threads(pool, 1)
        threads.add(1, 2, 3)
        pool.submit(lambda: order.append(f"after {threads.ran}"))
        threads.gate.set()
        await eventually(lambda: len(threads.heard) == 3)
    assert order == ["after 1"]


async def test_what_follows_in_a_closed_pool_is_reported_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handed, "_CHAIN_S", 0.0)
    with ThreadPoolExecutor(1) as pool:
        threads = Threads(pool, 1)
        threads.add(1, 2, 3)
        pool.shutdown(wait=False)
        threads.gate.set()
    await eventually(lambda: len(threads.heard) == 3)
    assert threads.heard[0] == (1, 2)
    assert all(isinstance(result, RuntimeError) for _, result in threads.heard[1:])
    assert not threads.handed.busy


async def test_one_that_fails_does_not_keep_the_next(pool: ThreadPoolExecutor) -> None:
    threads = Threads(pool, 1)
    threads.gate.set()
    threads.add(1, 13, 2)
    await eventually(lambda: len(threads.heard) == 3)
    assert [rows for rows, _ in threads.heard] == [1, 13, 2]
    assert isinstance(threads.heard[1][1], ValueError)


async def test_what_a_closed_pool_never_began_is_reported_too() -> None:
    with ThreadPoolExecutor(1) as pool:
        threads = Threads(pool, 2)
        threads.add(1, 2)
        pool.shutdown(wait=False, cancel_futures=True)
        threads.gate.set()
    await eventually(lambda: len(threads.heard) == 2)
    outcomes = dict(threads.heard)
    assert outcomes[1] == 2
    assert isinstance(outcomes[2], BaseException)


def test_whole_and_short_batches_are_given_out_one_ahead() -> None:
    world = World(BatchPolicy(max_rows=4), 1, 0.004, 0.0, ahead_below=0.005)
    world.run_time.observe(4, 0.004, 0.0)
    world.submit([4, 4, 4, 3], [60.0] * 4, [0] * 4)
    world.turns.run_until(0.001)
    assert [batch.rows for batch in world.ran] == [4, 4]
    world.turns.run_until(0.005)
    assert [batch.rows for batch in world.ran] == [4, 4, 4]
    # The last is not whole: it may grow until a slot is free.
    world.turns.run_until(0.009)
    assert [batch.rows for batch in world.ran] == [4, 4, 4]
    world.turns.run_until(0.02)
    assert [batch.rows for batch in world.ran] == [4, 4, 4, 3]


def test_long_batches_are_not_given_out_ahead() -> None:
    world = World(BatchPolicy(max_rows=4), 1, 0.006, 0.0, ahead_below=0.005)
    world.run_time.observe(4, 0.006, 0.0)
    world.submit([4, 4], [60.0] * 2, [0] * 2)
    world.turns.run_until(0.005)
    assert len(world.ran) == 1
