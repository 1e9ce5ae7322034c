"""When trials of long ago are looked for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import cast

from services.registry.repository import Repository
from services.registry.retention import RetentionActor

KEEP = timedelta(days=365)
NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


class Trials:
    """Those that were closed, and how often they were looked for."""

    def __init__(self) -> None:
        self.closed: dict[str, datetime] = {}
        self.looks = 0

    async def trials_closed_before(self, before: datetime) -> list[str]:
        self.looks += 1
        return [trial for trial, at in self.closed.items() if at < before]


async def found(actor: RetentionActor, trials: Trials, now: datetime) -> list[str]:
    return list(await actor.candidates(cast(Repository, trials), now))


async def test_where_there_are_none_it_is_looked_again_after_a_minute() -> None:
    actor, trials = RetentionActor(KEEP), Trials()
    assert await found(actor, trials, NOW) == []
    trials.closed["old"] = NOW - KEEP - timedelta(days=1)
    assert await found(actor, trials, NOW + timedelta(seconds=59)) == []
    assert trials.looks == 1
    assert await found(actor, trials, NOW + timedelta(seconds=60)) == ["old"]


async def test_while_there_are_some_the_next_are_looked_for_at_once() -> None:
    actor, trials = RetentionActor(KEEP), Trials()
    trials.closed = {"old": NOW - KEEP - timedelta(days=1)}
    assert await found(actor, trials, NOW) == ["old"]
    trials.closed = {"next": NOW - KEEP - timedelta(days=1)}
    assert await found(actor, trials, NOW + timedelta(seconds=1)) == ["next"]


async def test_a_clock_that_was_set_back_does_not_hold_it_up() -> None:
    actor, trials = RetentionActor(KEEP), Trials()
    assert await found(actor, trials, NOW) == []
    trials.closed = {"old": NOW - timedelta(days=1) - KEEP - timedelta(days=1)}
    assert await found(actor, trials, NOW - timedelta(days=1)) == ["old"]
