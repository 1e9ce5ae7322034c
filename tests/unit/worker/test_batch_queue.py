"""What leaves the queue, when, and why."""

from __future__ import annotations

from math import inf
from typing import Any

import pytest
from headrace.v1.dataplane_pb2 import PredictRequest, Priority

from services.common.errors import DeadlineExceeded, HeadraceError, InvalidArgument, ResourceExhausted
from services.worker.batch_queue import BatchPolicy, BatchQueue
from services.worker.item import Answer, Batch, Item, Release
from services.worker.run_time import RunTime

LOW, HIGH = Priority.PRIORITY_LOW, Priority.PRIORITY_HIGH


def item(
    rows: int = 1,
    deadline: float = 100.0,
    key: int = 0,
    size: int = 4,
    priority: Priority = Priority.PRIORITY_UNSPECIFIED,
) -> Item:
    def ignore(_request: PredictRequest, _answer: Answer) -> None: ...

    return Item(
        PredictRequest(priority=priority), rows, ((), ((key,),)), (bytes(size * rows),), deadline, ignore
    )


def queue_of(
    policy: BatchPolicy, *items: Item, run_time: RunTime | None = None, now: float = 0.0
) -> BatchQueue:
    queue = BatchQueue(policy, run_time or RunTime())
    for one in items:
        assert offer(queue, one, now) is None
    return queue


def offer(queue: BatchQueue, one: Item, now: float = 0.0, floor: float = 0.0) -> HeadraceError | None:
    return next((refusal for _, refusal in queue.offer([one], now, floor)), None)


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


@pytest.mark.parametrize("arrived", [0.0, 7.0])
def test_the_delay_counts_from_when_it_came(arrived: float) -> None:
    queue = queue_of(BatchPolicy(max_rows=8, max_delay=0.01), item(), now=arrived)
    assert queue.wake_at() == pytest.approx(arrived + 0.01)


def test_a_batch_that_is_just_full_does_not_wait_for_the_delay() -> None:
    queue = queue_of(BatchPolicy(max_rows=4, max_delay=1.0), item(4))
    assert queue.full
    assert released(queue).reason is Release.FULL


def test_a_batch_is_full_by_rows_that_can_run_together() -> None:
    queue = queue_of(BatchPolicy(max_rows=4, max_delay=1.0), item(3), item(3, key=1))
    assert not queue.full
    assert offer(queue, item(1, key=1)) is None
    assert queue.full


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


def test_a_preferred_size_counts_without_a_delay_too() -> None:
    queue = queue_of(BatchPolicy(max_rows=16, preferred_rows=(4, 8)), *[item() for _ in range(11)])
    batch = released(queue)
    assert (batch.rows, batch.reason) == (8, Release.PREFERRED)
    assert released(queue).rows == 3


def test_no_preferred_size_is_above_the_largest() -> None:
    assert BatchPolicy(max_rows=4, preferred_rows=(2, 8)).preferred(10) == 2


def test_a_batch_grows_where_nobody_asked_for_its_size_and_fits_into_the_queue() -> None:
    policy = BatchPolicy(max_rows=64, max_queue_rows=100, grows=True)
    assert policy.grown(256) == BatchPolicy(max_rows=256, max_queue_rows=256, grows=True)
    assert policy.grown(80) == BatchPolicy(max_rows=80, max_queue_rows=100, grows=True)
    assert policy.grown(16) == policy
    assert BatchPolicy(max_rows=64).grown(256) == BatchPolicy(max_rows=64)


def test_a_tight_deadline_ends_the_wait() -> None:
    queue = queue_of(BatchPolicy(max_rows=8, max_delay=1.0), item(deadline=0.1), run_time=measured(0.02))
    assert 0.05 < queue.wake_at() < 0.08
    assert released(queue, queue.wake_at()).reason is Release.DEADLINE


def test_few_rows_wait_longer_for_company_than_a_whole_batch_could() -> None:
    run_time = measured(0.0, per_row=0.01)
    queue = queue_of(BatchPolicy(max_rows=64, max_delay=1.0), item(deadline=0.5), run_time=run_time)
    assert 0.45 < queue.wake_at() < 0.49


def test_the_largest_batch_that_makes_every_deadline() -> None:
    run_time = measured(0.0, per_row=0.01)
    queue = queue_of(BatchPolicy(max_rows=64), *[item(deadline=0.055) for _ in range(20)], run_time=run_time)
    batch = released(queue)
    assert (batch.rows, batch.reason) == (5, Release.DEADLINE)


def test_the_earliest_deadline_of_a_batch_decides_how_large_it_gets() -> None:
    run_time = measured(0.0, per_row=0.01)
    patient = [item() for _ in range(19)]
    queue = queue_of(BatchPolicy(max_rows=64), item(deadline=0.055), *patient, run_time=run_time)
    assert released(queue).rows == 5


def test_what_runs_only_in_a_while_is_late_by_then() -> None:
    hopeless, good = item(deadline=0.1), item(deadline=10.0)
    queue = queue_of(BatchPolicy(), hopeless, good)
    batch, late = queue.release(0.0, ahead=0.2)
    assert late == [hopeless]
    assert batch is not None
    assert batch.items == [good]


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


def test_the_queue_is_bounded_in_bytes_alone() -> None:
    # 64 parts, of which HIGH has 8 for itself and LOW one; LOW never holds more than 16.
    queue = BatchQueue(BatchPolicy(max_queue_bytes=6400), RunTime())
    assert isinstance(offer(queue, item(size=1601, priority=LOW)), InvalidArgument)
    assert offer(queue, item(size=1000, priority=LOW)) is None
    assert isinstance(offer(queue, item(size=601, priority=LOW)), ResourceExhausted)
    assert offer(queue, item(size=600, priority=LOW)) is None
    assert offer(queue, item(size=4000)) is None
    assert isinstance(offer(queue, item(size=1)), ResourceExhausted)
    assert offer(queue, item(size=800, priority=HIGH)) is None
    assert queue.nbytes == 6400


def test_as_many_rows_as_may_ever_wait_are_taken_at_once() -> None:
    policy = BatchPolicy(max_queue_rows=64)
    assert isinstance(offer(BatchQueue(policy, RunTime()), item(56)), InvalidArgument)
    assert offer(BatchQueue(policy, RunTime()), item(55)) is None


def test_nobody_waits_who_cannot_be_answered_in_time_by_the_fastest_run() -> None:
    queue = BatchQueue(BatchPolicy(), RunTime())
    assert isinstance(offer(queue, item(deadline=3.04), now=3.0, floor=0.05), DeadlineExceeded)
    assert offer(queue, item(deadline=3.06), now=3.0, floor=0.05) is None


# In those that follow a row takes 10 ms and a batch has ten.


@pytest.mark.parametrize(("max_queue", "most"), [(0.505, 50), (0.001, 10)])
def test_no_more_wait_than_leave_in_the_time_allowed_but_one_batch_always(
    max_queue: float, most: int
) -> None:
    queue = BatchQueue(BatchPolicy(max_rows=10, max_queue=max_queue), measured(0.0, per_row=0.01))
    while (refusal := offer(queue, item())) is None:
        assert queue.rows <= most
    assert isinstance(refusal, ResourceExhausted)
    assert queue.rows == most


def test_who_comes_to_an_empty_queue_is_taken_however_long_it_runs() -> None:
    """Later it would be refused as well, however often it comes again."""
    queue = BatchQueue(BatchPolicy(max_rows=10, max_queue=1.0), measured(0.0, per_row=0.01))
    assert offer(queue, item(150)) is None
    assert isinstance(offer(queue, item(1)), ResourceExhausted)


@pytest.mark.parametrize(
    ("deadline", "floor", "taken"),
    [(0.35, 0.0, False), (0.45, 0.0, True), (0.45, 0.1, False), (0.55, 0.1, True)],
)
def test_who_would_wait_beyond_the_deadline_is_refused_at_once(
    deadline: float, floor: float, taken: bool
) -> None:
    queue = queue_of(BatchPolicy(max_rows=10), item(40), run_time=measured(0.0, per_row=0.01))
    refusal = offer(queue, item(deadline=deadline), floor=floor)
    assert refusal is None if taken else isinstance(refusal, ResourceExhausted)


def test_who_still_fits_into_the_next_run_is_taken_whatever_the_pace_says() -> None:
    queue = queue_of(BatchPolicy(max_rows=10), item(5), run_time=measured(0.0, per_row=0.01))
    assert offer(queue, item(5, deadline=0.045)) is None
    assert isinstance(offer(queue, item(1, deadline=0.045)), ResourceExhausted)


@pytest.mark.parametrize(
    ("held", "one", "wait"),
    [
        ({Priority.PRIORITY_NORMAL: 20, LOW: 20}, Priority.PRIORITY_NORMAL, 20 * 5 / 4),
        ({HIGH: 16, LOW: 24}, HIGH, 16 * 9 / 8),
        ({Priority.PRIORITY_NORMAL: 10, LOW: 20}, LOW, 30),  # all that there are
    ],
)
def test_the_wait_of_a_class_is_its_own_and_meanwhile_the_shares_of_the_others(
    held: dict[Priority, int], one: Priority, wait: float
) -> None:
    waiting = [item(rows, priority=priority) for priority, rows in held.items()]
    policy = BatchPolicy(max_rows=10, max_queue_rows=1000)
    queue = queue_of(policy, *waiting, run_time=measured(0.0, per_row=0.01))
    assert isinstance(offer(queue, item(deadline=0.01 * wait - 0.005, priority=one)), ResourceExhausted)
    assert offer(queue, item(deadline=0.01 * wait + 0.005, priority=one)) is None


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


def test_apart_each_leaves_by_itself_in_its_turn() -> None:
    policy = BatchPolicy(max_rows=4).parted()
    queue = queue_of(policy, item(1), item(20), item(2, key=1), item(1), item(1, priority=HIGH))
    batches = [released(queue) for _ in range(5)]
    assert [len(batch.items) for batch in batches] == [1] * 5
    assert [batch.rows for batch in batches] == [1, 1, 2, 20, 1]
    assert {batch.reason for batch in batches} == {Release.TURN, Release.ALONE}
    assert (queue.rows, queue.nbytes, queue.wake_at()) == (0, 0, inf)


@pytest.mark.parametrize(("max_queue", "most"), [(0.055, 5), (0.001, 1)])
def test_apart_no_more_wait_than_leave_in_the_time_allowed_but_one_always(
    max_queue: float, most: int
) -> None:
    policy = BatchPolicy(max_rows=10, max_queue=max_queue).parted()
    queue = BatchQueue(policy, measured(0.0, per_row=0.01))
    while offer(queue, item()) is None:
        assert queue.rows <= most
    assert queue.rows == most


def test_apart_who_would_wait_beyond_the_deadline_is_refused_at_once() -> None:
    policy, run_time = BatchPolicy(max_rows=10, max_queue=0.001).parted(), measured(0.0, per_row=0.01)
    assert offer(BatchQueue(policy, run_time), item(8, deadline=0.01)) is None  # nobody is before it
    queue = queue_of(BatchPolicy(max_rows=10).parted(), item(), item(), item(), run_time=run_time)
    assert isinstance(offer(queue, item(deadline=0.025), floor=0.01), ResourceExhausted)
    assert offer(queue, item(deadline=0.045), floor=0.01) is None


def test_apart_the_pace_is_that_of_a_run_for_each() -> None:
    policy = BatchPolicy(max_rows=64, max_queue=0.0205).parted()
    queue = BatchQueue(policy, measured(0.0015, per_row=0.0005))  # 2 ms a request, 33 for 64 rows together
    while offer(queue, item()) is None:
        assert queue.rows <= 10
    assert queue.rows == 10


@pytest.mark.parametrize("asked", [{"max_delay": 0.01}, {"preferred_rows": (4,)}])
def test_who_asks_for_batches_gets_them(asked: dict[str, Any]) -> None:
    policy = BatchPolicy(**asked)
    assert policy.parted() == policy


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


def test_requests_of_one_frame_are_told_apart() -> None:
    queue = BatchQueue(BatchPolicy(max_queue_bytes=6400), RunTime())
    frame = [item(), item(key=1), item(size=1000, priority=LOW), item(key=1, priority=HIGH)]
    assert queue.offer(frame, 0.0, 0.0) == []
    assert queue.rows_of == [1, 2, 1]
    assert [released(queue).items for _ in range(2)] == [[frame[3], frame[1]], [frame[0], frame[2]]]
    assert queue.rows_of == [0, 0, 0]
    assert offer(queue, item(size=1600, priority=LOW)) is None  # nothing is left of what LOW held
