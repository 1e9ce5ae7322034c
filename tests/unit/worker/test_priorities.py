"""Which class a request is of, what each class may hold, and whose turn it is."""

from __future__ import annotations

import pytest
from headrace.v1.dataplane_pb2 import Origin, PredictRequest, Priority

from services.worker.priorities import RANKS, FairShare, Rank, most_of, rank_of, room_for, roomy


@pytest.mark.parametrize(
    ("request_", "rank"),
    [
        (PredictRequest(), Rank.NORMAL),
        (PredictRequest(priority=Priority.PRIORITY_HIGH), Rank.HIGH),
        (PredictRequest(priority=Priority.PRIORITY_HIGH, origin=Origin.ORIGIN_ONLINE), Rank.HIGH),
        (PredictRequest(priority=Priority.PRIORITY_LOW, origin=Origin.ORIGIN_ONLINE), Rank.LOW),
        (PredictRequest(priority=Priority.PRIORITY_HIGH, origin=Origin.ORIGIN_BATCH), Rank.LOW),
        (PredictRequest(priority=Priority.PRIORITY_HIGH, origin=Origin.ORIGIN_SHADOW), Rank.LOW),
        (PredictRequest(priority=9), Rank.NORMAL),  # type: ignore[arg-type]  # from a newer peer
    ],
)
def test_the_class_of_a_request(request_: PredictRequest, rank: Rank) -> None:
    assert rank_of(request_) == rank


def test_an_empty_queue_keeps_the_parts_of_the_others() -> None:
    assert [most_of(rank, 640) for rank in RANKS] == [640 - 40 - 10, 640 - 80 - 10, 160]
    assert [room_for(rank, [0, 0, 0], 640) for rank in RANKS] == [590, 550, 160]


def test_a_full_queue_has_only_the_parts_left() -> None:
    held = [0, 550, 0]
    assert [room_for(rank, held, 640) for rank in RANKS] == [80, 0, 10]


def test_what_low_holds_counts_towards_the_most_it_may_hold() -> None:
    assert [room_for(Rank.LOW, [0, 0, held], 640) for held in (100, 160)] == [60, 0]


def test_low_gets_at_least_one_batch_of_a_small_queue() -> None:
    assert most_of(Rank.LOW, 64) == 16
    assert most_of(Rank.LOW, 64, one_batch=32) == 32
    assert most_of(Rank.LOW, 64, one_batch=64) == 64 - 8 - 4  # never what the others have for themselves


@pytest.mark.parametrize("most", [1, 10, 64, 8192])
def test_below_the_roomy_mark_everybody_finds_room(most: int) -> None:
    mark = roomy(most)
    for holder in RANKS:
        held = [0, 0, 0]
        for size in range(1, mark + 1):
            held[holder] = mark - size
            assert all(room_for(rank, held, most) >= size for rank in RANKS)


def test_turns_follow_the_weights_and_absence_saves_nothing_up() -> None:
    shares = FairShare()
    for rank in (Rank.HIGH, Rank.NORMAL):
        shares.joins(rank)
    taken = []
    for _ in range(12):
        rank = shares.next([Rank.HIGH, Rank.NORMAL])
        shares.left(rank, 1)
        taken.append(rank)
    assert (taken.count(Rank.HIGH), taken.count(Rank.NORMAL)) == (8, 4)
    for _ in range(1000):
        shares.left(Rank.HIGH, 1)
    shares.joins(Rank.LOW)
    taken = []
    for _ in range(18):
        rank = shares.next([Rank.HIGH, Rank.LOW])
        shares.left(rank, 1)
        taken.append(rank)
    assert taken.count(Rank.LOW) in (2, 3)


def test_the_order_goes_by_turns_and_then_by_urgency() -> None:
    shares = FairShare()
    assert shares.order([Rank.LOW, Rank.HIGH]) == [Rank.HIGH, Rank.LOW]
    shares.left(Rank.HIGH, 8)
    assert shares.order([Rank.HIGH, Rank.LOW]) == [Rank.LOW, Rank.HIGH]


def test_who_comes_back_still_owes_what_it_took() -> None:
    """Else a class whose requests come one by one would have every turn."""
    shares = FairShare()
    shares.joins(Rank.NORMAL)
    shares.joins(Rank.LOW)
    shares.left(Rank.LOW, 4)
    shares.joins(Rank.LOW)
    taken = []
    for _ in range(18):
        rank = shares.next([Rank.NORMAL, Rank.LOW])
        shares.left(rank, 1)
        taken.append(rank)
    assert taken == [Rank.NORMAL] * 17 + [Rank.LOW]


def test_a_late_turn_of_one_class_gives_nothing_to_those_who_were_away() -> None:
    shares = FairShare()
    shares.joins(Rank.HIGH)
    shares.joins(Rank.NORMAL)
    for _ in range(2):
        shares.left(Rank.NORMAL, 40)  # HIGH still waits for company
    shares.left(Rank.HIGH, 8)
    shares.joins(Rank.LOW)
    taken = []
    while (rank := shares.next([Rank.NORMAL, Rank.LOW])) is Rank.LOW:
        shares.left(rank, 1)
        taken.append(rank)
    assert len(taken) == 10
