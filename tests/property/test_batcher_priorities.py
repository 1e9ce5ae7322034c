"""Priority classes under load: shares by weight, nobody starves, and who is refused."""

from __future__ import annotations

from headrace.v1.dataplane_pb2 import PredictReply
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import ResourceExhausted
from services.worker.batch_queue import BatchPolicy
from services.worker.priorities import RANKS, WEIGHTS, Rank, room_for
from tests.fixtures.batching import World

POLICY = BatchPolicy(max_rows=13, max_queue_rows=100_000)


def served_rows(world: World) -> list[int]:
    """Rows that ran, by class."""
    rows = [0] * len(RANKS)
    for batch in world.ran:
        for item in batch.items:
            rows[item.rank] += item.rows
    return rows


@settings(max_examples=60, deadline=None)
@given(
    backlog=st.permutations([rank for rank in RANKS for _ in range(400)]),
    keys=st.integers(1, 3),
    batches=st.integers(3, 25),
)
def test_classes_share_by_their_weights(backlog: list[Rank], keys: int, batches: int) -> None:
    world = World(POLICY, 1, 0.001, 0.0)
    count = len(backlog)
    world.submit([1] * count, [1e6] * count, [i % keys for i in range(count)], backlog)
    world.turns.run_until((batches - 0.5) * 0.001)
    rows = served_rows(world)
    fair = [sum(rows) * weight / sum(WEIGHTS) for weight in WEIGHTS]
    # Nobody is further from its share than what one batch can shift, whatever keys the rows lie under.
    assert all(abs(got - wanted) <= POLICY.max_rows for got, wanted in zip(rows, fair, strict=True)), rows
    if keys == 1:
        assert all(abs(got - wanted) <= 1 for got, wanted in zip(rows, fair, strict=True)), rows


@settings(max_examples=120, deadline=None)
@given(
    waiting=st.sampled_from(RANKS),
    rows=st.integers(1, 6),
    others=st.lists(st.tuples(st.integers(1, 6), st.sampled_from(RANKS)), min_size=1, max_size=40),
    max_rows=st.sampled_from([6, 13, 32]),
)
def test_no_class_starves(waiting: Rank, rows: int, others: list[tuple[int, Rank]], max_rows: int) -> None:
    """A request at the head of its class leaves after a bounded number of other classes' rows, although these
    never stop coming."""
    world = World(BatchPolicy(max_rows=max_rows, max_queue_rows=100_000), 1, 0.001, 0.0)
    flood = [(size, rank) for size, rank in others if rank != waiting] or [(6, Rank((waiting + 1) % 3))]

    def pour() -> None:
        while world.batcher.queued_rows < 8 * max_rows:
            sizes, ranks = zip(*flood, strict=True)
            world.submit(list(sizes), [1e6] * len(flood), [0] * len(flood), list(ranks))

    pour()
    world.turns.run_until(0.0055)
    before = len(world.ran)
    mine = len(world.items)
    world.submit([rows], [1e6], [0], [waiting])
    for _ in range(2000):
        pour()
        world.turns.run_until(world.turns.now + 0.001)
        if world.answers[mine]:
            break
    overtaken = sum(item.rows for batch in world.ran[before:] for item in batch.items if item.rank != waiting)
    largest = 6
    weights = [WEIGHTS[rank] for rank in RANKS if rank != waiting]
    bound = sum((weight / WEIGHTS[waiting] + 1) * largest for weight in weights)
    assert world.answers[mine]
    # Batches that had left before, and the one that leaves beside it or was too full for it.
    assert overtaken <= bound + 2 * max_rows


@settings(max_examples=100, deadline=None)
@given(
    script=st.lists(st.tuples(st.integers(1, 12), st.sampled_from(RANKS)), min_size=1, max_size=120),
    most=st.integers(64, 200),
)
def test_low_never_fills_the_queue_and_high_is_refused_last(
    script: list[tuple[int, Rank]], most: int
) -> None:
    policy = BatchPolicy(max_rows=4, max_queue_rows=most)
    world = World(policy, 1, 1.0, 0.0)
    held = [0, 0, 0]
    for rows, rank in script:
        world.submit([rows], [1e6], [0], [rank])
        answers = world.answers[len(world.items) - 1]
        room = room_for(rank, held, most, policy.max_rows)
        if answers:
            ((_, refusal),) = answers
            assert isinstance(refusal, ResourceExhausted)
            assert refusal.retry_after_ms
            assert room < rows
            if rank == Rank.HIGH:
                # Of the others only who has not had its own part yet still finds room.
                for other in (Rank.NORMAL, Rank.LOW):
                    own = most * WEIGHTS[other] // 64
                    assert room_for(other, held, most, policy.max_rows) < rows or held[other] < own
        else:
            assert room >= rows
            held[rank] += rows
        assert sum(held) == world.batcher.queued_rows <= most
        assert held[Rank.LOW] <= most // 4
    world.turns.run_until(1e5)
    assert all(len(answers) == 1 for answers in world.answers.values())
    assert world.batcher.idle


@settings(max_examples=50, deadline=None)
@given(flood=st.sampled_from(RANKS), late=st.sampled_from(RANKS))
def test_a_flood_of_one_class_leaves_room_for_the_others(flood: Rank, late: Rank) -> None:
    world = World(BatchPolicy(max_rows=8, max_queue_rows=640), 1, 0.001, 0.0)
    world.submit([1] * 700, [1e6] * 700, [0] * 700, [flood] * 700)
    world.submit([1], [1e6], [0], [late])
    world.turns.run_until(60.0)
    ((_, answer),) = world.answers[700]
    assert isinstance(answer, PredictReply) == (late != flood)
