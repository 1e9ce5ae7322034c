"""The gateway's bounds at their edges: a key's bucket, bodies under way, requests in flight."""

from __future__ import annotations

import asyncio
from typing import cast

import pytest
from redis.asyncio import Redis
from starlette.requests import Request
from starlette.types import Message

from services.common.clock import ManualClock
from services.common.errors import ResourceExhausted, Unavailable
from services.gateway.admission import Admission
from services.gateway.errors import RequestTimeout
from services.gateway.leases import Leases
from services.gateway.limiter import Bucket
from services.gateway.reading import BodyBudget, BodyReaders, Holder
from services.gateway.rest.door import bounded_body
from tests.fixtures.spending import spent_in
from tests.fixtures.waiting import eventually


def test_without_a_burst_of_its_own_a_key_may_save_up_one_second() -> None:
    assert Bucket("k", 10.0, 0).burst == 10
    assert Bucket("k", 0.5, 0).burst == 1
    assert Bucket("k", 10.0, 3).burst == 3


@pytest.mark.parametrize(("later", "wait_ms"), [(0.0, 200), (0.05, 150), (0.199, 1)])
def test_a_refusal_says_when_there_is_a_token(later: float, wait_ms: int) -> None:
    bucket = Bucket("k", 5.0, 1)
    bucket.admit(100.0)
    with pytest.raises(ResourceExhausted) as refused:
        bucket.admit(100.0 + later)
    assert refused.value.retry_after_ms == pytest.approx(wait_ms, abs=1)
    bucket.admit(100.0 + later + wait_ms / 1000 + 0.001)


def test_a_grant_sets_the_share_and_stays_when_redis_is_gone() -> None:
    bucket = Bucket("k", 100.0, 10)
    bucket.granted(0.0, 4, 1000.0)
    assert spent_in(bucket, 1.0, 1000.0) == pytest.approx(25, abs=1)
    bucket.granted(0.0, 2, 2000.0)
    bucket.alone(10)
    spent = bucket.spent
    assert spent_in(bucket, 1.0, 2000.0) == pytest.approx(50 - spent, abs=1)


async def test_what_is_wrong_with_settling_is_not_tried_again_at_once_and_limits_are_shared() -> None:
    clock, tries = ManualClock(), 0
    leases, bucket = Leases(cast("Redis", object()), clock, "gateway", sharers=4), Bucket("k", 40.0, 8)
    bucket.admit(clock.monotonic())

    def buckets() -> list[Bucket]:
        nonlocal tries
        tries += 1
        return [bucket]

    task = asyncio.create_task(leases.run(buckets))
    await eventually(lambda: tries > 0)
    for _ in range(100):
        await asyncio.sleep(0)
    assert tries == 1
    task.cancel()
    await asyncio.wait({task})
    assert spent_in(bucket, 1.0, clock.monotonic() + 100) == pytest.approx(12, abs=2)


def test_bodies_may_take_all_there_is_and_not_a_byte_more() -> None:
    budget, one, other = BodyBudget(10, 5), Holder(), Holder()
    budget.take(5, one)
    budget.take(5, other)
    with pytest.raises(Unavailable):
        budget.take(1, one)
    assert budget.held == 10
    budget.give(4, one)
    budget.take(4, one)


def test_one_key_leaves_room_for_the_bodies_of_others() -> None:
    budget, one, other = BodyBudget(256, 32), Holder(), Holder()
    for _ in range(6):
        budget.take(32, one)
    with pytest.raises(ResourceExhausted):
        budget.take(1, one)
    budget.take(32, other)
    budget.take(16, other)
    with pytest.raises(ResourceExhausted):
        budget.take(1, other)
    budget.take(16, budget.strangers)
    assert budget.held == 256
    for holder, size in ((one, 192), (other, 48), (budget.strangers, 16)):
        budget.give(size, holder)
        assert holder.held == 0
    assert budget.held == 0


async def test_a_body_that_never_ends_is_not_held_for_ever() -> None:
    budget, trickle = BodyBudget(10, 10), asyncio.Event()

    async def receive() -> Message:
        if budget.held:
            await trickle.wait()
        return {"type": "http.request", "body": b"123", "more_body": True}

    with pytest.raises(RequestTimeout):
        await bounded_body(Request({"type": "http"}, receive), 10, budget, within_s=0.01)
    assert budget.held == 0


async def test_a_body_given_up_just_as_it_was_read_is_nobodys() -> None:
    readers, told = BodyReaders(threads=1, waiting=1), list[BaseException | None]()
    reading = readers.read(lambda: None, told.append)
    while not reading._future.done():  # noqa: ASYNC110 - its callbacks run in the next turn
        await asyncio.sleep(0)
    reading.cancel(0)
    for _ in range(3):
        await asyncio.sleep(0)
    assert told == []
    assert readers.room == 1
    readers.close()


class Windows:
    """Windows of 100 ms with `answers` that came `delay_s` late, one after the other."""

    def __init__(self) -> None:
        self.admission = Admission(0.5, least=256, most=16_000)
        self.now = 100.0
        self.admission.observe(0.0, 0, self.now)

    def next(self, delay_s: float, answers: int, in_flight: int) -> int:
        self.now += 0.11
        for number in range(answers):
            self.admission.observe(delay_s, in_flight, self.now - (0.05 if number + 1 < answers else 0.0))
        return self.admission.limit


def test_the_limit_is_cut_from_what_is_in_flight_and_never_raised_by_it() -> None:
    windows = Windows()
    assert windows.next(5.0, 32, 10_000) == 16_000  # one late window may be chance
    assert windows.next(5.0, 32, 10_000) == 8_000
    assert windows.next(5.0, 32, 20_000) == 6_400
    assert windows.next(5.0, 32, 100) == 256


def test_a_delay_of_the_target_is_late_and_one_good_window_grows_the_limit() -> None:
    windows = Windows()
    for _ in range(2):
        windows.next(0.5, 32, 1_000)
    assert windows.admission.limit == 800
    assert windows.next(0.499, 1, 1_000) == 1_000
    assert windows.next(0.5, 32, 500) == 1_000
    assert windows.next(0.5, 32, 500) == 400


def test_few_late_answers_say_nothing() -> None:
    windows = Windows()
    for _ in range(5):
        assert windows.next(5.0, 31, 1_000) == 16_000
