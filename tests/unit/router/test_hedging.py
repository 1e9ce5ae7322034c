"""When a request is late enough to be asked a second time: what is usual, and who is looked after."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from services.router import hedging
from services.router.hedging import Hedges, Usual
from services.router.routing_table import Hedging
from tests.fixtures.waiting import eventually

#: Of `hedging.py`: what is looked after at once.
MOST = 16_384
interpreted = pytest.mark.skipif(
    not (hedging.__file__ or "").endswith(".py"), reason="what is compiled takes no calls but real ones"
)


class FakeCall:
    def __init__(self) -> None:
        self.done = False
        self.hedged = 0

    def hedge(self, now: float) -> None:
        self.hedged += 1


def hedges_of(usual_s: float) -> Hedges:
    made = Hedges()
    for _ in range(64):
        made.usual.observe(usual_s)
    return made


def watch(hedges: Hedges, ago: float = 0.0, policy: Hedging | None = None) -> FakeCall:
    call: Any = FakeCall()
    hedges.watch(call, policy or Hedging(0.95, 0.0), time.monotonic() - ago)
    made: FakeCall = call
    return made


def test_nothing_is_usual_before_enough_answers() -> None:
    usual = Usual()
    for number in range(63):
        usual.observe(float(number))
    assert usual.quantile(0.5) is None
    usual.observe(63.0)
    assert [usual.quantile(share) for share in (0.0, 0.5, 0.95, 1.0)] == [0.0, 32.0, 60.0, 63.0]


def test_what_is_usual_follows_the_recent_answers() -> None:
    usual = Usual()
    for _ in range(256):
        usual.observe(1.0)
    for _ in range(63):
        usual.observe(9.0)
    assert usual.quantile(1.0) == 1.0
    usual.observe(9.0)
    assert [usual.quantile(share) for share in (0.7, 1.0)] == [1.0, 9.0]
    for _ in range(192):
        usual.observe(9.0)
    assert usual.quantile(0.0) == 9.0


@interpreted
async def test_who_is_late_is_asked_once_more_and_nobody_else() -> None:
    hedges = hedges_of(0.02)
    late, later, answered, quick = (watch(hedges, ago) for ago in (60.0, 59.0, -500.0, -1000.0))
    answered.done = True
    await eventually(lambda: later.hedged)
    assert [call.hedged for call in (late, later, answered, quick)] == [1, 1, 0, 0]
    assert len(hedges) == 1  # who is answered is forgotten, and the last is waited for
    hedges.close()


@interpreted
async def test_only_those_are_asked_once_more_whose_time_is_over() -> None:
    hedges = hedges_of(30.0)
    late, quick = watch(hedges, 31.0), watch(hedges, 20.0)
    hedges._look()
    assert (late.hedged, quick.hedged, len(hedges)) == (1, 0, 1)
    hedges.close()
    late = watch(hedges, 31.0)
    hedges._look()
    assert (late.hedged, len(hedges), hedges._timer) == (1, 0, None)


@interpreted
async def test_the_timer_waits_for_the_next_one_that_nobody_answered() -> None:
    hedges = hedges_of(0.02)
    first, second = watch(hedges), watch(hedges, -0.05)
    await eventually(lambda: second.hedged)
    assert (first.hedged, second.hedged, len(hedges)) == (1, 1, 0)
    third = watch(hedges)
    await eventually(lambda: third.hedged)
    hedges.close()


@interpreted
@pytest.mark.parametrize(("usual_s", "least_s", "delay_s"), [(30.0, 5.0, 30.0), (5.0, 30.0, 30.0)])
async def test_late_is_what_is_unusual_and_never_less_than_asked_for(
    usual_s: float, least_s: float, delay_s: float
) -> None:
    hedges = hedges_of(usual_s)
    watch(hedges, policy=Hedging(0.95, least_s))
    assert hedges._timer is not None
    left = hedges._timer.when() - asyncio.get_running_loop().time()
    assert delay_s - 2 < left <= delay_s
    timer = hedges._timer
    hedges.close()
    assert timer.cancelled()
    assert len(hedges) == 0
    watch(hedges)  # as good as new
    assert hedges._timer is not timer
    hedges.close()


@interpreted
async def test_where_nothing_is_usual_yet_nobody_is_looked_after() -> None:
    hedges = Hedges()
    call = watch(hedges, 1000.0)
    assert (len(hedges), hedges._timer, call.hedged) == (0, None, 0)


@interpreted
async def test_no_more_are_looked_after_than_there_is_room_for() -> None:
    hedges = hedges_of(30.0)
    for _ in range(MOST + 1):
        watch(hedges)
    assert len(hedges) == MOST
    hedges.close()
