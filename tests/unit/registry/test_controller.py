"""The loop that acts on trials: one that fails holds up nobody, and a lost database ends nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, cast

from services.common.clock import SystemClock
from services.common.db import DatabaseUnavailable
from services.registry.controller import Controller
from services.registry.edge import Edge
from services.registry.metrics import Metrics
from services.registry.repository import Repository
from tests.fixtures.waiting import eventually


class Database:
    """What the controller needs of an edge. `lost`: no transaction begins."""

    def __init__(self) -> None:
        self.clock = SystemClock()
        self.metrics = Metrics()
        self.lost = False

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Repository]:
        if self.lost:
            raise DatabaseUnavailable("The database does not answer.")
        yield cast(Repository, None)


class Acting:
    """An actor whose trial `broken` fails in one way or another."""

    kind = "experiment"

    def __init__(self, *trials: str, error: Exception | None = None) -> None:
        self.trials = list(trials)
        self.acted: list[str] = []
        self.error = error

    async def candidates(self, tx: Repository, now: datetime) -> Sequence[str]:
        return list(self.trials)

    async def act(self, tx: Repository, trial_id: str, now: datetime) -> str | None:
        self.acted.append(trial_id)
        if trial_id == "broken" and self.error is not None:
            raise self.error
        return "stop"


def controller(database: Database, *actors: Any, interval_s: float = 0.01) -> Controller:
    return Controller(cast(Edge, database), actors, interval_s)


def decisions(database: Database, action: str) -> float:
    labels = {"kind": "experiment", "action": action}
    return database.metrics.registry.get_sample_value("headrace_registry_decisions_total", labels) or 0.0


async def test_a_trial_that_fails_holds_up_nobody_and_is_tried_ever_less_often() -> None:
    database = Database()
    one = Acting("broken", "well", error=RuntimeError("a row that makes no sense"))
    other = Acting("later")
    async with controller(database, one, other):
        await eventually(lambda: one.acted.count("well") >= 20 and other.acted.count("later") >= 20)
        assert one.acted.count("broken") < one.acted.count("well")
        await eventually(lambda: one.acted.count("broken") >= 2)
    assert decisions(database, "failed") >= 2
    assert decisions(database, "stop") >= 40


async def test_a_lost_database_ends_nothing() -> None:
    database = Database()
    database.lost = True
    actor = Acting("a")
    async with controller(database, actor):
        await asyncio.sleep(0.03)
        assert actor.acted == []
        database.lost = False
        await eventually(lambda: actor.acted)


async def test_a_verdict_wakes_it() -> None:
    actor = Acting("a")
    async with controller(Database(), actor, interval_s=3600.0) as running:
        await eventually(lambda: actor.acted)
        seen = len(actor.acted)
        running.wake()
        await eventually(lambda: len(actor.acted) > seen)
