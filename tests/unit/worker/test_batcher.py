"""When the batcher acts, in simulated time: what changes while requests wait, and how it comes to its end."""

from __future__ import annotations

import asyncio

import pytest
from headrace.v1.dataplane_pb2 import PredictRequest
from headrace.v1.tensor_pb2 import Code

from services.common.errors import HeadraceError, Unavailable
from services.worker.batch_queue import BatchPolicy
from services.worker.batcher import Batcher
from services.worker.item import Answer, Batch, Item
from services.worker.run_time import RunTime
from tests.fixtures.batching import SimulatedTurns
from tests.fixtures.waiting import patience

PATIENT = BatchPolicy(max_rows=8, max_delay=1.0)


class Bench:
    """A batcher whose batches run until `finish`."""

    def __init__(
        self, policy: BatchPolicy, run_time: RunTime | None = None, ahead_below: float = 0.0
    ) -> None:
        self.turns = SimulatedTurns()
        self.ran: list[Batch] = []
        #: What became of whom, and when.
        self.told: list[tuple[int, Answer, float]] = []
        self.batcher = Batcher(self.turns, policy, run_time or RunTime(), self.run, ahead_below=ahead_below)
        self.takes = 0.0

    def run(self, batch: Batch) -> None:
        self.ran.append(batch)
        if self.takes:
            self.turns.now += self.takes
            self.finish(batch)

    def finish(self, batch: Batch) -> None:
        for one in batch.items:
            one.settle(b"")
        self.batcher.finished()

    def submit(self, *deadlines: float) -> list[Item]:
        first = len(self.told)
        items = [
            Item(PredictRequest(id=first + number), 1, ((), ((1,),)), (b"x",), deadline, self._settle)
            for number, deadline in enumerate(deadlines)
        ]
        self.batcher.submit(items)
        return items

    def _settle(self, request: PredictRequest, answer: Answer) -> None:
        self.told.append((request.id, answer, self.turns.now))

    def turn(self) -> None:
        self.turns.run_until(self.turns.now)


def code(answer: Answer) -> Code:
    return answer.code if isinstance(answer, HeadraceError) else Code.CODE_OK


def test_a_new_policy_counts_for_those_who_wait_already() -> None:
    bench = Bench(PATIENT)
    bench.submit(100.0)
    bench.turn()
    assert bench.ran == []
    bench.batcher.policy = BatchPolicy(max_rows=8)
    bench.turn()
    assert len(bench.ran) == 1


def test_who_has_gone_waits_no_more() -> None:
    bench = Bench(PATIENT)
    items = bench.submit(100.0, 100.0)
    bench.batcher.cancel(items[0])
    assert bench.batcher.queued_rows == 1
    bench.turns.run_until(2.0)
    assert [batch.items for batch in bench.ran] == [[items[1]]]


def test_a_batch_that_steps_aside_makes_room_and_is_still_waited_for() -> None:
    bench = Bench(BatchPolicy(max_rows=1))
    bench.submit(100.0, 100.0)
    bench.turn()
    assert len(bench.ran) == 1
    bench.batcher.step_aside()
    bench.turn()
    assert len(bench.ran) == 2
    bench.batcher.finished()
    assert not bench.batcher.idle
    bench.batcher.finished_aside()
    assert bench.batcher.idle


def test_running_inline_lets_the_event_loop_turn_between() -> None:
    bench = Bench(BatchPolicy(max_rows=1))
    bench.takes = 0.005
    seen: list[int] = []
    bench.submit(100.0, 100.0, 100.0)
    bench.turns.call_soon(lambda: seen.append(len(bench.ran)))
    bench.turns.run_until(1.0)
    assert seen == [1]
    assert len(bench.ran) == 3


def test_quick_inline_runs_follow_each_other_at_once() -> None:
    bench = Bench(BatchPolicy(max_rows=1))
    bench.takes = 0.0005
    seen: list[int] = []
    bench.submit(100.0, 100.0, 100.0)
    bench.turns.call_soon(lambda: seen.append(len(bench.ran)))
    bench.turns.run_until(1.0)
    assert seen == [3]


def test_who_expires_while_another_runs_is_told_within_5_ms() -> None:
    bench = Bench(BatchPolicy(max_rows=1))
    bench.submit(100.0, 1.0, 3.0, 1.002)
    bench.turns.run_until(10.0)
    assert [(identifier, code(answer)) for identifier, answer, _ in bench.told] == [
        (number, Code.CODE_DEADLINE_EXCEEDED) for number in (1, 3, 2)
    ]
    for (_, _, when), deadline in zip(bench.told, (1.0, 1.002, 3.0), strict=True):
        assert deadline <= when <= deadline + 0.0051
    assert bench.batcher.refused == {"CODE_DEADLINE_EXCEEDED": 3}
    assert bench.batcher.queued_rows == 0


def test_who_comes_later_and_expires_earlier_is_told_in_time_too() -> None:
    bench = Bench(BatchPolicy(max_rows=1))
    bench.submit(100.0, 3.0)
    bench.turns.run_until(0.5)
    bench.submit(1.0)
    bench.turns.run_until(2.0)
    assert [code(answer) for _, answer, _ in bench.told] == [Code.CODE_DEADLINE_EXCEEDED]
    assert bench.told[0][2] <= 1.0051


def measured(seconds: float) -> RunTime:
    run_time = RunTime()
    for _ in range(20):
        run_time.observe(1, seconds, 0.0)
    return run_time


def test_who_cannot_make_it_any_more_is_told_when_a_run_ends() -> None:
    bench = Bench(BatchPolicy(max_rows=1), measured(0.1))
    bench.submit(100.0, 1.05, 100.0)
    bench.turns.run_until(1.0)
    bench.finish(bench.ran[0])
    bench.turn()
    assert [(identifier, code(answer)) for identifier, answer, _ in bench.told] == [
        (0, Code.CODE_OK),
        (1, Code.CODE_DEADLINE_EXCEEDED),
    ]
    assert [one.id for one in bench.ran[1].items] == [2]


def test_apart_the_next_one_is_given_ahead_and_is_late_by_the_one_before_it_alone() -> None:
    run_time = RunTime()
    for rows in (1, 4):
        run_time.observe(rows, 0.001 * rows, 0.0)
    bench = Bench(BatchPolicy(max_rows=4).parted(), run_time, ahead_below=0.005)
    bench.submit(100.0, 0.0045, 100.0, 100.0, 100.0)
    bench.turn()
    assert [batch.items[0].id for batch in bench.ran] == [0, 1]
    assert bench.told == []
    bench.finish(bench.ran[0])
    bench.turn()
    assert [batch.items[0].id for batch in bench.ran] == [0, 1, 2]


@pytest.mark.parametrize("how", ["finished", "aside", "cancelled", "closed"])
async def test_draining_waits_for_nobodys_company_and_ends_with_the_last(how: str) -> None:
    bench = Bench(PATIENT)
    items = bench.submit(100.0)
    bench.turn()
    drained = [asyncio.create_task(bench.batcher.drain()) for _ in range(2)]
    await asyncio.sleep(0)
    if how == "finished":
        bench.turn()
        bench.submit(100.0)  # from a router that does not know yet
        bench.finish(bench.ran[0])
        bench.turn()
        await asyncio.sleep(0)
        assert not any(task.done() for task in drained)
        bench.finish(bench.ran[1])
    elif how == "aside":
        bench.turn()
        bench.batcher.step_aside()
        bench.batcher.finished_aside()
    elif how == "cancelled":
        bench.batcher.cancel(items[0])
    else:
        bench.batcher.close()
    async with patience("both who drain it"):
        await asyncio.gather(*drained)


async def test_what_is_idle_is_drained_and_what_comes_afterwards_is_waited_for() -> None:
    bench = Bench(PATIENT)
    async with patience("nothing"):
        await bench.batcher.drain()
    bench.submit(100.0)
    again = asyncio.create_task(bench.batcher.drain())
    await asyncio.sleep(0)
    bench.turn()
    assert not again.done()
    bench.finish(bench.ran[0])
    async with patience("the one that came"):
        await again


async def test_draining_ends_where_the_last_cannot_make_it_any_more() -> None:
    bench = Bench(BatchPolicy(max_rows=1), measured(0.1))
    bench.submit(100.0, 1.05)
    bench.turns.run_until(1.0)
    drained = asyncio.create_task(bench.batcher.drain())
    await asyncio.sleep(0)
    bench.finish(bench.ran[0])
    bench.turn()
    async with patience("the end"):
        await drained
    assert [code(answer) for _, answer, _ in bench.told] == [Code.CODE_OK, Code.CODE_DEADLINE_EXCEEDED]


def test_a_closed_batcher_refuses_who_waits_and_who_comes_and_leaves_nothing_behind() -> None:
    bench = Bench(PATIENT)
    bench.submit(100.0)
    bench.turn()
    reason = Unavailable("evicted")
    bench.batcher.close(reason)
    bench.submit(100.0)
    assert [answer for _, answer, _ in bench.told] == [reason, reason]
    assert bench.batcher.refused == {"CODE_UNAVAILABLE": 2}
    bench.turn()
    assert bench.turns.pending == 0
    assert bench.ran == []
