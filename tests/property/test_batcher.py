"""The batcher under random interleavings in simulated time: whatever arrives, is cancelled or fails, every
waiter is settled once, with its own rows, in time or with a refusal."""

from __future__ import annotations

from headrace.v1.dataplane_pb2 import PredictReply
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted
from services.worker.batch_queue import BatchPolicy
from services.worker.priorities import Rank
from tests.fixtures.batching import World

# The batcher looks for expired requests in steps of 5 ms.
EXPIRY_STEP = 0.005 + 1e-9

frames = st.lists(
    st.tuples(
        st.integers(1, 12),  # rows
        st.sampled_from([0.001, 0.004, 0.02, 0.1, 5.0]),  # seconds to the deadline
        st.integers(0, 2),  # merge key
        st.sampled_from(Rank),
    ),
    min_size=1,
    max_size=12,
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("frame"), frames),
        st.tuples(st.just("cancel"), st.integers(0, 120)),
        st.tuples(st.just("wait"), st.sampled_from([0.0, 0.0005, 0.003, 0.01, 0.2])),
    ),
    min_size=1,
    max_size=30,
)
policies = st.builds(
    BatchPolicy,
    max_rows=st.sampled_from([1, 4, 8, 32]),
    max_delay=st.sampled_from([0.0, 0.002, 0.01]),
    preferred_rows=st.sampled_from([(), (4,), (2, 8)]),
    max_queue_rows=st.sampled_from([16, 64, 1000]),
).flatmap(lambda policy: st.sampled_from([policy, policy.parted()]))


@settings(max_examples=300, deadline=None)
@given(
    policy=policies,
    slots=st.integers(1, 3),
    fixed=st.sampled_from([0.0, 0.001, 0.015]),
    per_row=st.sampled_from([0.0, 0.0002, 0.002]),
    ahead_below=st.sampled_from([0.0, 0.005, 1.0]),
    script=steps,
)
def test_every_waiter_is_settled_once_with_its_own_rows(
    policy: BatchPolicy,
    slots: int,
    fixed: float,
    per_row: float,
    ahead_below: float,
    script: list[tuple[str, object]],
) -> None:
    world = World(policy, slots, fixed, per_row, ahead_below)
    for action, value in script:
        if action == "frame":
            assert isinstance(value, list)
            world.submit(*(list(column) for column in zip(*value, strict=True)))
        elif action == "cancel":
            assert isinstance(value, int)
            world.cancel(value)
        else:
            assert isinstance(value, float)
            world.turns.run_until(world.turns.now + value)
    world.turns.run_until(world.turns.now + 60.0)

    longest_run = fixed + per_row * max(policy.max_rows, 12)
    for identifier, item in world.items.items():
        answers = world.answers[identifier]
        if identifier in world.cancelled:
            assert answers == [] or answers[0][0] <= world.cancelled[identifier]
            continue
        assert len(answers) == 1
        when, answer = answers[0]
        if isinstance(answer, PredictReply):
            assert answer.outputs[0].data == item.data[0]
        else:
            # A request of 12 rows is more than LOW ever gets of the smallest queue.
            refusals = DeadlineExceeded | ResourceExhausted
            assert isinstance(answer, refusals | InvalidArgument if item.rows > 4 else refusals)
            if isinstance(answer, DeadlineExceeded):
                assert when <= item.deadline + EXPIRY_STEP
        # Whoever started in time may end late, by one run at most, or by the one before it too.
        runs = 2 if ahead_below else 1
        assert when <= item.deadline + runs * longest_run + EXPIRY_STEP
    # Within its class and key, whoever came first left first.
    left: dict[object, list[int]] = {}
    for batch in world.ran:
        for item in batch.items:
            left.setdefault((item.key, item.rank), []).append(item.request.id)
    assert all(identifiers == sorted(identifiers) for identifiers in left.values())
    # Rows in = rows out, each in one batch at most, no batch larger than allowed or of mixed keys.
    batched = [item for batch in world.ran for item in batch.items]
    assert len(batched) == len(set(map(id, batched)))
    for batch in world.ran:
        assert batch.rows == sum(item.rows for item in batch.items)
        assert batch.rows <= policy.max_rows or len(batch.items) == 1
        assert len({item.key for item in batch.items}) == 1
        assert len(batch.items) == 1 or not policy.apart
    assert world.most_running <= slots
    assert world.most_ahead <= (slots if ahead_below else 0)
    assert world.batcher.idle
    assert world.turns.pending == 0


@settings(max_examples=150, deadline=None)
@given(script=st.lists(frames, min_size=1, max_size=10), cancels=st.sets(st.integers(0, 100)))
def test_cancelled_peers_change_nothing_for_the_others(
    script: list[list[tuple[int, float, int, Rank]]], cancels: set[int]
) -> None:
    world = World(BatchPolicy(max_rows=8), 1, 0.001, 0.0)
    for frame in script:
        world.submit([f[0] for f in frame], [60.0] * len(frame), [f[2] for f in frame])
        world.turns.run_until(world.turns.now + 0.0015)
        for identifier in cancels:
            world.cancel(identifier)
    world.turns.run_until(world.turns.now + 60.0)
    for identifier, item in world.items.items():
        if identifier in world.cancelled:
            continue
        ((_, answer),) = world.answers[identifier]
        assert isinstance(answer, PredictReply)
        assert answer.outputs[0].data == item.data[0]


@settings(max_examples=150, deadline=None)
@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=60), limit=st.integers(1, 100))
def test_the_queue_never_holds_more_rows_than_allowed(sizes: list[int], limit: int) -> None:
    world = World(BatchPolicy(max_rows=4, max_queue_rows=max(limit, 20)), 1, 0.01, 0.0)
    for rows in sizes:
        world.submit([rows], [60.0], [0])
        assert world.batcher.queued_rows <= max(limit, 20)
    world.turns.run_until(600.0)
    answered = [answers[0][1] for answers in world.answers.values()]
    assert len(answered) == len(sizes)
    assert world.batcher.queued_rows == 0


@settings(max_examples=100, deadline=None)
@given(flood=st.integers(10, 60), key_count=st.integers(1, 3), delay=st.sampled_from([0.0, 0.002]))
def test_no_merge_key_starves(flood: int, key_count: int, delay: float) -> None:
    policy = BatchPolicy(max_rows=4, max_delay=delay, max_queue_rows=100_000)
    world = World(policy, 1, 0.001, 0.0)
    # Far more than the model can take soon, of other keys, and then one of its own.
    for number in range(flood):
        world.submit([4], [1000.0], [1 + number % key_count])
    world.submit([1], [1000.0], [0])
    # Every key has its turn: one run for each of the others, the delay, and its own run.
    world.turns.run_until(world.turns.now + (key_count + 2) * 0.001 + delay + 0.002)
    assert world.answers[flood], "it waited behind every request of the other keys"
