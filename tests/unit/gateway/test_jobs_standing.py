"""When chunks count as gone: by what the broker says of the pool's topic."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from services.common.bus import Standing
from services.gateway.jobs.standing import IDLE, STUCK, STUCK_AT_MOST, PoolStanding

NOW = datetime(2026, 1, 1, tzinfo=UTC)
S = timedelta(seconds=1)
NOTHING_LEFT = Standing(0, 0)


def test_a_topic_with_fewer_records_than_chunks_on_their_way_was_lost() -> None:
    pool = PoolStanding()
    assert pool.gone_before(NOW, Standing(0, 0), NOTHING_LEFT, flying=16) == NOW
    # They were published again, and are waited for.
    assert pool.gone_before(NOW + S, Standing(16, 16), NOTHING_LEFT, flying=16) is None


def test_a_topic_that_has_become_shorter_was_lost() -> None:
    pool = PoolStanding()
    assert pool.gone_before(NOW, Standing(100, 2), NOTHING_LEFT, flying=2) is None
    assert pool.gone_before(NOW + S, Standing(3, 3), NOTHING_LEFT, flying=2) == NOW + S


def test_an_idle_group_has_finished_what_it_was_given() -> None:
    pool = PoolStanding()
    chunks = Standing(16, 0)
    assert pool.gone_before(NOW, chunks, NOTHING_LEFT, flying=2) is None
    assert pool.gone_before(NOW + IDLE, chunks, NOTHING_LEFT, flying=2) == NOW
    pool.published_again()
    assert pool.gone_before(NOW + 2 * IDLE, chunks, NOTHING_LEFT, flying=2) is None


def test_a_clock_that_is_set_back_is_timed_by_anew() -> None:
    pool = PoolStanding()
    chunks, back = Standing(16, 0), NOW - timedelta(hours=1)
    assert pool.gone_before(NOW, chunks, NOTHING_LEFT, flying=2) is None
    assert pool.gone_before(back, chunks, NOTHING_LEFT, flying=2) is None
    assert pool.gone_before(back + IDLE, chunks, NOTHING_LEFT, flying=2) == back
    stuck, chunks = PoolStanding(), Standing(16, 2)
    assert stuck.gone_before(NOW, chunks, NOTHING_LEFT, flying=2) is None
    assert stuck.gone_before(back, chunks, NOTHING_LEFT, flying=2) is None
    assert stuck.gone_before(back + STUCK, chunks, NOTHING_LEFT, flying=2) == back + STUCK


def test_results_that_nobody_took_may_be_those_of_the_chunks() -> None:
    pool = PoolStanding()
    for second in range(9):
        assert pool.gone_before(NOW + second * S, Standing(16, 0), Standing(14, 1), flying=2) is None
    assert pool.gone_before(NOW + 9 * S, Standing(16, 0), Standing(14, 0), flying=2) is None
    assert pool.gone_before(NOW + 9 * S + IDLE, Standing(16, 0), Standing(14, 0), flying=2) == NOW + 9 * S


def test_a_broker_that_does_not_say_makes_nobody_idle() -> None:
    pool = PoolStanding()
    pool.gone_before(NOW, Standing(16, 0), NOTHING_LEFT, flying=2)
    pool.unknown()
    assert pool.gone_before(NOW + IDLE, Standing(16, 0), NOTHING_LEFT, flying=2) is None


def test_a_group_that_does_not_read_what_is_there_is_stuck_and_tried_less_and_less_often() -> None:
    pool = PoolStanding()
    fired: list[datetime] = []
    for second in range(4000):
        at = NOW + second * S
        if pool.gone_before(at, Standing(16 + len(fired), 3 + len(fired)), NOTHING_LEFT, flying=3):
            fired.append(at)
    gaps = [after - before for before, after in zip([NOW, *fired], fired, strict=False)]
    assert gaps[:7] == [STUCK * 2**times for times in range(6)] + [STUCK * 2**6 - 40 * S]
    assert set(gaps[6:]) == {STUCK_AT_MOST}


def test_a_commit_or_a_result_is_progress() -> None:
    pool = PoolStanding()
    for second in range(100):
        at, done = NOW + second * S, second // 9
        assert pool.gone_before(at, Standing(40, 40 - done), NOTHING_LEFT, flying=3) is None
    for second in range(100, 200):
        at, done = NOW + second * S, second // 9
        assert pool.gone_before(at, Standing(40, 20), Standing(done, 0), flying=3) is None


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 9)), max_size=40))
def test_only_what_was_published_by_then_is_ever_gone(steps: list[tuple[int, int]]) -> None:
    pool, end, now = PoolStanding(), 0, NOW
    for more, lag in steps:
        end, now = end + more, now + S
        gone_before = pool.gone_before(now, Standing(end, min(lag, end)), NOTHING_LEFT, flying=min(3, end))
        assert gone_before is None or gone_before <= now
