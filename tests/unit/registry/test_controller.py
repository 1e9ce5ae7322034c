"""The loop that acts on trials: one that fails holds up nobody, and a lost database ends nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, cast

from services.common.clock import ManualClock
from services.common.db import DatabaseUnavailable
from services.registry.controller import Controller
from services.registry.edge import Edge
from services.registry.experiment_control import ExperimentActor
from services.registry.metrics import Metrics
from services.registry.repository import Repository
from services.registry.retention import RetentionActor
from services.registry.rollout_control import RolloutActor
from tests.fixtures.waiting import eventually


class Database:
    """What the controller needs of an edge. `lost`: no transaction begins."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.metrics = Metrics()
        self.lost = False
        self.refused = 0

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Repository]:
        if self.lost:
            self.refused += 1
            raise DatabaseUnavailable("The database does not answer.")
        yield cast(Repository, None)


class Acting:
    """An actor whose trial `broken` fails."""

    actions = ("stop",)

    def __init__(self, *trials: str, kind: str = "experiment") -> None:
        self.kind = kind
        self.trials = list(trials)
        self.acted: list[str] = []
        self.is_open = bool(trials)
        self.looks = 0

    async def candidates(self, tx: Repository, now: datetime) -> Sequence[str]:
        self.looks += 1
        return list(self.trials)

    async def act(self, tx: Repository, trial_id: str, now: datetime) -> str | None:
        self.acted.append(trial_id)
        if trial_id == "broken":
            raise RuntimeError("a row that makes no sense")
        return "stop"


def controller(database: Database, *actors: Any, interval_s: float = 0.01) -> Controller:
    return Controller(cast(Edge, database), actors, interval_s)


def decisions(database: Database, action: str) -> float:
    labels = {"kind": "experiment", "action": action}
    return database.metrics.registry.get_sample_value("headrace_registry_decisions_total", labels) or 0.0


async def test_a_trial_that_fails_holds_up_nobody_and_is_tried_ever_less_often() -> None:
    database = Database()
    one, other = Acting("broken", "well"), Acting("later", kind="rollout")

    async def looked_at() -> None:
        """Every trial that need not wait was, twice more."""
        seen = one.acted.count("well"), other.acted.count("later")
        await eventually(lambda: one.acted.count("well") >= seen[0] + 2)
        await eventually(lambda: other.acted.count("later") >= seen[1] + 2)

    async with controller(database, one, other):
        tries = []
        for seconds in (0.0, 0.4, 0.2, 0.9, 0.2):
            database.clock.advance(seconds)
            await looked_at()
            tries.append(one.acted.count("broken"))
    assert tries == [1, 1, 2, 2, 3]
    assert decisions(database, "failed") == 3
    assert decisions(database, "stop") >= 10


def test_what_it_may_decide_is_counted_from_0() -> None:
    """Of a series that begins with 1, Prometheus does not see that it grew."""
    database = Database()
    controller(database, Acting())
    for action in ("stop", "failed"):
        labels = {"kind": "experiment", "action": action}
        assert database.metrics.registry.get_sample_value("headrace_registry_decisions_total", labels) == 0


def test_the_actors_name_all_that_they_may_decide() -> None:
    assert {"start", "stop", "reweight", "close"} == set(ExperimentActor.actions)
    assert {"enter", "complete", "roll_back", "abort", "close"} <= set(RolloutActor.actions)
    assert set(RetentionActor.actions) == {"forget"}


async def test_a_lost_database_ends_nothing() -> None:
    database = Database()
    database.lost = True
    actor = Acting("a")
    async with controller(database, actor):
        await eventually(lambda: database.refused >= 3)
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


async def test_what_is_open_is_looked_at_though_nothing_is_to_be_done() -> None:
    actor = Acting()
    actor.is_open = True
    async with controller(Database(), actor, interval_s=0.01):
        await eventually(lambda: actor.looks >= 5)


async def test_without_an_open_trial_it_looks_seldom_and_when_it_is_woken() -> None:
    actor = Acting()
    async with controller(Database(), actor, interval_s=500.0) as running:
        await eventually(lambda: actor.looks)
        assert running._pause_s(0, failed=False) == 5000.0
        assert running._pause_s(0, failed=True) == 1000.0
        actor.trials, actor.is_open = ["a"], True
        running.wake()
        await eventually(lambda: actor.acted)
        assert running._pause_s(0, failed=False) == 1000.0
        assert running._pause_s(1, failed=False) == 500.0
