"""More than the model can take, in simulated time: what is answered is answered in time, at the rate that the
model has, and who is refused is refused at once and told when to come back."""

from __future__ import annotations

from headrace.v1.dataplane_pb2 import PredictReply
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import ResourceExhausted
from services.worker.batch_queue import BatchPolicy
from services.worker.priorities import Rank
from tests.fixtures.batching import World


def offered(world: World, rate: float, seconds: float, timeout: float, ranks: list[Rank]) -> None:
    """Requests of one row at `rate` a second, evenly, in frames of a millisecond, whatever is answered."""
    sent, end = 0, world.turns.now + seconds
    began = world.turns.now
    while world.turns.now < end:
        due = int((world.turns.now - began) * rate) - sent
        if due > 0:
            frame = [ranks[(sent + n) % len(ranks)] for n in range(due)]
            world.submit([1] * due, [timeout] * due, [0] * due, frame)
            sent += due
        world.turns.run_until(world.turns.now + 0.001)


@settings(max_examples=25, deadline=None)
@given(
    max_rows=st.sampled_from([1, 8, 32]),
    run=st.sampled_from([0.002, 0.02, 0.1]),
    max_queue=st.sampled_from([0.1, 1.0]),
    slots=st.integers(1, 2),
    factor=st.sampled_from([2.0, 5.0]),
    timeout=st.sampled_from([0.5, 30.0]),
)
def test_twice_the_load_gives_no_less_and_refuses_at_once(
    max_rows: int, run: float, max_queue: float, slots: int, factor: float, timeout: float
) -> None:
    policy = BatchPolicy(max_rows=max_rows, max_queue_rows=100_000, max_queue=max_queue)
    world = World(policy, slots, run, 0.0)
    world.run_time.observe(max_rows, run, 0.0)  # as the warm-up does
    capacity = slots * max_rows / run
    rate = min(factor * capacity, 20_000.0)
    seconds = min(4.0, 6000 / rate)
    offered(world, rate, seconds, timeout, [Rank.NORMAL])
    good = sum(isinstance(answers[0][1], PredictReply) for answers in world.answers.values() if answers)
    runs = seconds / run
    if rate >= 2 * capacity and runs >= 20:
        assert good >= 0.9 * capacity * seconds
    world.turns.run_until(world.turns.now + 60.0)
    for identifier, answers in world.answers.items():
        ((when, answer),) = answers
        arrived = world.items[identifier].deadline - timeout
        if isinstance(answer, PredictReply):
            assert when <= world.items[identifier].deadline + run
            # Its wait, the run that was under way, and its own.
            assert when - arrived <= max(max_queue, run) * 1.25 + 2 * run + 0.01
        elif isinstance(answer, ResourceExhausted):
            assert when - arrived <= 0.001
            assert answer.retry_after_ms


@settings(max_examples=40, deadline=None)
@given(
    backlog=st.integers(20, 400), run=st.sampled_from([0.005, 0.03]), max_queue=st.sampled_from([0.1, 0.5])
)
def test_who_comes_back_when_told_is_taken(backlog: int, run: float, max_queue: float) -> None:
    world = World(BatchPolicy(max_rows=4, max_queue=max_queue), 1, run, 0.0)
    world.submit([1], [60.0], [0])
    world.turns.run_until(1.0)  # now it is known how long a run takes
    world.submit([1] * backlog, [60.0] * backlog, [0] * backlog)
    (_, refusal), *_ = [*world.answers[backlog], (0.0, None)]
    if refusal is None:
        return
    assert isinstance(refusal, ResourceExhausted)
    assert refusal.retry_after_ms
    # About as long as the queue may be: neither at once nor long after it is empty.
    assert max_queue * 0.9 <= refusal.retry_after_ms / 1e3 <= max_queue * 1.1 + 2 * run
    world.turns.run_until(1.0 + refusal.retry_after_ms / 1e3)
    number = len(world.items)
    world.submit([1], [60.0], [0])
    world.turns.run_until(120.0)
    ((_, answer),) = world.answers[number]
    assert isinstance(answer, PredictReply)


def test_the_urgent_are_taken_where_others_are_refused() -> None:
    world = World(BatchPolicy(max_rows=8, max_queue=0.2), 1, 0.01, 0.0)
    offered(world, 2400.0, 3.0, 30.0, [Rank.NORMAL, Rank.NORMAL, Rank.HIGH, Rank.LOW])
    world.turns.run_until(60.0)
    answered = {
        rank: [
            isinstance(world.answers[number][0][1], PredictReply)
            for number, item in world.items.items()
            if item.rank == rank
        ]
        for rank in Rank
    }
    share = {rank: sum(good) / len(good) for rank, good in answered.items()}
    # 600 of 2,400 a second are HIGH, 1,200 NORMAL, 600 LOW; 800 can be answered, two thirds of them HIGH.
    assert share[Rank.HIGH] > 0.8
    assert share[Rank.HIGH] > share[Rank.NORMAL] > share[Rank.LOW] > 0.03


def test_who_cannot_be_answered_in_time_is_told_before_its_time_is_over() -> None:
    world = World(BatchPolicy(max_rows=1, max_queue=10.0), 1, 0.01, 0.0)
    world.submit([1], [60.0], [0])
    world.turns.run_until(1.0)
    world.submit([1] * 100, [0.5] * 100, [0] * 100)
    told = {n: answers[0][1] for n, answers in world.answers.items() if answers}
    refused = [n for n, answer in told.items() if isinstance(answer, ResourceExhausted)]
    assert 45 <= len(refused) <= 55
    world.turns.run_until(60.0)
    assert all(isinstance(world.answers[n][0][1], PredictReply) for n in world.items if n not in refused)
