"""What leaves the queue, when, and why."""

from __future__ import annotations

from math import inf

import pytest
from headrace.v1.dataplane_pb2 import PredictRequest

from services.common.errors import DeadlineExceeded, HeadraceError, InvalidArgument, ResourceExhausted
from services.worker.batch_queue import BatchPolicy, BatchQueue
from services.worker.item import Answer, Batch, Item, Release
from services.worker.run_time import RunTime


def item(rows: int = 1, deadline: float = 100.0, key: int = 0, size: int = 4) -> Item:
    def ignore(_request: PredictRequest, _answer: Answer) -> None: ...

    return Item(PredictRequest(), rows, ((), ((key,),)), (bytes(size * rows),), deadline, ignore)


def queue_of(
    policy: BatchPolicy, *items: Item, run_time: RunTime | None = None, now: float = 0.0
) -> BatchQueue:
    queue = BatchQueue(policy, run_time or RunTime())
    for one in items:
        assert offer(queue, one, now) is None
    return queue


def offer(queue: BatchQueue, one: Item, now: float = 0.0) -> HeadraceError | None:
    return next((refusal for _, refusal in queue.offer([one], now, 0.0)), None)


def released(queue: BatchQueue, now: float = 0.0, *, drain: bool = False) -> Batch:
    batch, late = queue.release(now, drain=drain)
    assert batch is not None
    assert late == []
    return batch


def measured(seconds: float, per_row: float = 0.0) -> RunTime:
    run_time = RunTime()
    for i in range(20):
        rows = 1 + i % 16
        run_time.observe(rows, seconds + per_row * rows, 0.0)
    return run_time


def test_without_a_delay_whatever_waits_leaves() -> None:
    queue = queue_of(BatchPolicy(max_rows=8), item(2), item(3))
    batch = released(queue)
    assert (batch.rows, len(batch.items), batch.reason) == (5, 2, Release.TURN)
    assert (queue.rows, queue.nbytes, len(queue)) == (0, 0, 0)


def test_rows_count_not_requests() -> None:
    queue = queue_of(BatchPolicy(max_rows=8), item(5), item(3), item(4))
    assert released(queue).rows == 8
    assert released(queue).rows == 4


def test_a_request_that_does_not_fit_opens_the_next_batch() -> None:
    queue = queue_of(BatchPolicy(max_rows=8), item(5), item(4))
    batch = released(queue)
    assert (batch.rows, batch.reason) == (5, Release.FULL)
    assert released(queue).rows == 4


def test_a_request_larger_than_a_batch_runs_alone() -> None:
    queue = queue_of(BatchPolicy(max_rows=8), item(20), item(1))
    batch = released(queue)
    assert (batch.rows, batch.reason) == (20, Release.ALONE)
    assert released(queue).rows == 1


def test_with_a_delay_the_oldest_decides() -> None:
    queue = queue_of(BatchPolicy(max_rows=8, max_delay=0.01), item())
    assert offer(queue, item(), 0.006) is None
    assert queue.release(0.009) == (None, [])
    assert queue.wake_at() == pytest.approx(0.01)
    batch = released(queue, 0.01)
    assert (batch.rows, batch.reason) == (2, Release.DELAY)


def test_a_full_batch_does_not_wait_for_the_delay() -> None:
    queue = queue_of(BatchPolicy(max_rows=4, max_delay=1.0), *[item() for _ in range(5)])
    assert released(queue).reason is Release.FULL
    assert queue.release(0.0) == (None, [])


def test_draining_does_not_wait_for_the_delay() -> None:
    queue = queue_of(BatchPolicy(max_rows=4, max_delay=1.0), item())
    assert released(queue, drain=True).reason is Release.DRAIN


def test_a_preferred_size_is_taken_exactly_and_at_once() -> None:
    policy = BatchPolicy(max_rows=16, max_delay=1.0, preferred_rows=(4, 8))
    queue = queue_of(policy, *[item() for _ in range(11)])
    assert released(queue).rows == 8
    assert queue.release(0.0) == (None, [])
    queue = queue_of(policy, *[item() for _ in range(3)])
    assert queue.release(0.0) == (None, [])
    assert offer(queue, item()) is None
    batch = released(queue)
    assert (batch.rows, batch.reason) == (4, Release.PREFERRED)


def test_a_tight_deadline_ends_the_wait() -> None:
    queue = queue_of(BatchPolicy(max_rows=8, max_delay=1.0), item(deadline=0.1), run_time=measured(0.02))
    assert 0.05 < queue.wake_at() < 0.08
    assert released(queue, queue.wake_at()).reason is Release.DEADLINE


def test_the_largest_batch_that_makes_every_deadline() -> None:
    run_time = measured(0.0, per_row=0.01)
    queue = queue_of(BatchPolicy(max_rows=64), *[item(deadline=0.055) for _ in range(20)], run_time=run_time)
    batch = released(queue)
    assert (batch.rows, batch.reason) == (5, Release.DEADLINE)


def test_what_cannot_make_it_is_found_on_the_way() -> None:
    run_time = measured(0.05)
    hopeless, good = item(deadline=0.51), item(deadline=10.0)
    queue = queue_of(BatchPolicy(), hopeless, good, run_time=run_time)
    batch, late = queue.release(0.5)
    assert late == [hopeless]
    assert batch is not None
    assert batch.items == [good]


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (item(5), ResourceExhausted),
        (item(11), InvalidArgument),
        (item(1, deadline=0.0), DeadlineExceeded),
        (item(1, size=180), ResourceExhausted),
        (item(1, size=2000), InvalidArgument),
    ],
)
def test_refusals(one: Item, expected: type[HeadraceError]) -> None:
    policy = BatchPolicy(max_queue_rows=10, max_queue_bytes=220)
    queue = queue_of(policy, item(6))
    assert isinstance(offer(queue, one), expected)
    assert queue.rows == 6


def test_a_full_queue_says_when_to_come_back() -> None:
    policy = BatchPolicy(max_rows=10, max_queue_rows=100)
    queue = queue_of(policy, *[item(10) for _ in range(8)], run_time=measured(0.1))
    refusal = offer(queue, item(10))
    assert refusal is not None
    assert refusal.retry_after_ms == pytest.approx(800, rel=0.05)


def test_removal_and_expiry_keep_the_books() -> None:
    first, second, third = item(2, deadline=1.0), item(3, deadline=2.0, key=1), item(1, deadline=3.0)
    queue = queue_of(BatchPolicy(), first, second, third)
    assert queue.remove(third)
    assert not queue.remove(third)
    assert queue.earliest_deadline == 1.0
    assert queue.expire(1.5) == [first]
    assert (queue.rows, queue.earliest_deadline) == (3, 2.0)
    assert queue.remove(second)
    assert (queue.rows, queue.nbytes, queue.earliest_deadline, queue.wake_at()) == (0, 0, inf, inf)


def test_merge_keys_take_turns() -> None:
    queue = queue_of(BatchPolicy(max_rows=2), *[item(key=i % 2) for i in range(8)])
    keys = [released(queue).items[0].key[1][0][0] for _ in range(4)]
    assert keys == [0, 1, 0, 1]


@pytest.mark.parametrize("how", ["cancelled", "expired", "late"])
def test_idle_time_after_a_backlog_went_unanswered_is_no_service_time(how: str) -> None:
    run_time = measured(0.001, 0.00001)
    queue = BatchQueue(BatchPolicy(max_rows=64, max_queue=1.0), run_time)
    waiting = [item(deadline=2.0) for _ in range(200)]
    assert queue.offer(waiting, 1.0, 0.0) == []
    assert released(queue, 1.0).rows == 64
    if how == "cancelled":
        assert sum(queue.remove(one) for one in waiting) == 136
    elif how == "expired":
        assert len(queue.expire(2.0)) == 136
    else:
        batch, late = queue.release(2.0)
        assert batch is None
        assert len(late) == 136
    assert offer(queue, item(), 6.0) is None
    released(queue, 6.0)
    assert queue.offer([item() for _ in range(1000)], 6.0, 0.0) == []


def test_the_pace_is_still_learned_while_a_backlog_loses_some_to_their_callers() -> None:
    queue = BatchQueue(BatchPolicy(max_rows=8, max_queue=1.0), measured(0.0001))
    now = 0.0
    waiting = [item() for _ in range(400)]
    assert queue.offer(waiting, now, 0.0) == []
    while queue.rows > 20:
        released(queue, now)
        assert queue.remove(next(iter(queue)))
        now += 0.1  # far slower than the runs themselves
    refused = queue.offer([item() for _ in range(400)], now, 0.0)
    assert len(refused) > 200
