"""The actor of rollouts, and clocks that are set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import cast

import pytest

from services.common.clock import ManualClock
from services.common.db import DatabaseUnavailable
from services.registry.edge import Edge
from services.registry.metrics import Metrics
from services.registry.repository import Repository
from services.registry.rollout_control import RolloutActor
from services.registry.rollout_plan import Action, Cause, Status, Step
from services.registry.rollout_schemas import RolloutIn
from services.registry.rollouts import carry_out, pause, resume
from services.registry.tables import RolloutRow
from services.registry.workers import Workers

IN_ITS_STEP = "running/0/wait/duration/"
LOADING = "running/0/wait/loading/"


class Open:
    """The part of a transaction that looking for candidates uses."""

    def __init__(self, *rows: RolloutRow) -> None:
        self.rows = rows
        self.is_lost = False
        self.counts: dict[str, int] = {}

    async def open_rollouts(self) -> Sequence[RolloutRow]:
        if self.is_lost:
            raise DatabaseUnavailable("The database does not answer.")
        return self.rows

    async def rollout_counts(self) -> Mapping[str, int]:
        return self.counts


class Looking(RolloutActor):
    """Asks nothing of a row but its times."""

    async def _is_due(self, *_: object) -> bool:
        return False


def looking(clock: ManualClock, metrics: Metrics | None = None) -> Looking:
    edge = cast("Edge", SimpleNamespace(clock=clock, metrics=metrics or Metrics()))
    return Looking(edge, Workers(clock))


async def test_a_clock_that_is_set_forward_shortens_no_step() -> None:
    clock = ManualClock()
    actor = looking(clock)
    began = clock.now()
    running = RolloutRow(rollout_id="running", clock_at=began, finished_at=None, decided=IN_ITS_STEP)
    waiting = RolloutRow(rollout_id="waiting", clock_at=None, finished_at=None, decided="")
    ended = RolloutRow(rollout_id="ended", clock_at=began, finished_at=began, decided="")
    tx = cast("Repository", Open(running, waiting, ended))
    for seconds, shifted in ((600, 0), (0, 3600), (60, 0), (0, 3), (0, -3600), (0, 7200)):
        before = running.clock_at
        assert before is not None
        if shifted:
            clock.set(shifted)
        else:
            clock.advance(seconds)
        await actor.candidates(tx, clock.now())
        leap = shifted if shifted > 5 else 0
        assert running.clock_at == before + timedelta(seconds=leap), (seconds, shifted)
    assert waiting.clock_at is None
    assert waiting.waiting_since is None
    assert ended.clock_at == began


async def test_only_time_that_passed_is_given_a_version_to_load() -> None:
    clock = ManualClock()
    actor = looking(clock)
    row = RolloutRow(rollout_id="r", clock_at=None, finished_at=None, decided=LOADING)
    tx = cast("Repository", Open(row))
    await actor.candidates(tx, clock.now())
    assert row.waiting_since == clock.now(), "an older release did not say since when"
    waited = 0.0
    for passed, was_set in ((60, 0), (1, 3600), (60, 0), (1, 86400)):
        clock.advance(passed)
        waited += passed
        clock.set(was_set)
        await actor.candidates(tx, clock.now())
        assert clock.now() - row.waiting_since == timedelta(seconds=waited), (passed, was_set)
    clock.set(-86400)
    await actor.candidates(tx, clock.now())
    assert row.waiting_since == clock.now(), "how long it had waited nobody can tell: it waits anew"


async def test_a_machine_that_slept_is_allowed_for_though_its_connection_is_gone() -> None:
    clock = ManualClock()
    actor = looking(clock)
    began = clock.now()
    row = RolloutRow(rollout_id="r", clock_at=began, finished_at=None, decided=IN_ITS_STEP)
    tx = Open(row)
    await actor.candidates(cast("Repository", tx), clock.now())
    clock.set(3600)
    tx.is_lost = True
    with pytest.raises(DatabaseUnavailable):
        await actor.candidates(cast("Repository", tx), clock.now())
    tx.is_lost = False
    await actor.candidates(cast("Repository", tx), clock.now())
    assert row.clock_at == began + timedelta(seconds=3600)


async def test_the_time_without_a_registry_is_not_given_a_version_to_load() -> None:
    """Else one that comes back after it goes back at once, before any worker was heard of."""
    clock = ManualClock()
    began = clock.now()
    clock.advance(86_400)
    actor = looking(clock)
    row = RolloutRow(rollout_id="r", clock_at=None, finished_at=None, decided=LOADING, waiting_since=began)
    tx = cast("Repository", Open(row))
    await actor.candidates(tx, clock.now())
    assert row.waiting_since == clock.now()
    clock.advance(60)
    await actor.candidates(tx, clock.now())
    assert row.waiting_since == clock.now() - timedelta(seconds=60)


async def test_a_status_that_no_rollout_has_any_more_counts_none() -> None:
    clock, metrics, tx = ManualClock(), Metrics(), Open()
    actor = looking(clock, metrics)
    for counts in ({"running": 2}, {"running": 1, "completed": 1}, {"completed": 2}):
        tx.counts = counts
        await actor.candidates(cast("Repository", tx), clock.now())
        seen = {
            status: metrics.registry.get_sample_value("headrace_registry_rollouts", {"status": status})
            for status in ("running", "completed")
        }
        assert seen == {"running": counts.get("running", 0), "completed": counts.get("completed", 0)}


class Noting:
    """The part of a transaction that keeps a decision."""

    def add(self, _row: object) -> None:
        return

    async def flush(self) -> None:
        return

    async def prune_rollout_events(self, _rollout_id: str, _keep: int) -> None:
        return


def running_row(clock: ManualClock) -> RolloutRow:
    """Of version 2 of m, before its first step."""
    spec = RolloutIn(model="m", version="2")
    return RolloutRow(
        rollout_id="r", model="m", version="2", previous_version="1", status=Status.RUNNING, step=0,
        spec=spec.model_dump(mode="json"), entered_at=None, clock_at=None, paused_at=None, promoted=False,
        revision=1, started_at=clock.now(), decided="",
    )  # fmt: skip


class Steered(Open, Noting):
    """The part of a transaction that people's decisions use, on one rollout."""

    async def rollout(self, _rollout_id: str, *, fresh: bool = False) -> RolloutRow:
        return self.rows[0]

    async def model(self, _name: str, *, lock: bool) -> object:
        return lock


async def test_a_machine_that_slept_takes_nothing_from_the_step_of_a_paused_rollout() -> None:
    clock = ManualClock()
    actor = looking(clock)
    row = running_row(clock)
    row.entered_at = row.clock_at = clock.now()
    tx = cast("Repository", Steered(row))
    clock.advance(100)
    await pause(tx, "r", "", clock)
    clock.advance(50)
    clock.set(3600)
    await actor.candidates(tx, clock.now())
    clock.advance(50)
    await resume(tx, "r", "", clock)
    assert clock.now() - row.clock_at == timedelta(seconds=100)


async def test_waiting_is_timed_from_the_first_decision_to_wait_for_workers() -> None:
    clock, tx = ManualClock(), cast("Repository", Noting())
    row = running_row(clock)
    seen = []
    for cause in (Cause.LOADING, Cause.LOADING, Cause.PAUSED, Cause.LOADING, Cause.WORKERS, Cause.DURATION):
        clock.advance(10)
        await carry_out(tx, row, Step(Action.WAIT, cause, "why", 0), None, clock)
        seen.append(None if row.waiting_since is None else (clock.now() - row.waiting_since).total_seconds())
    assert seen == [0, 10, None, 0, 10, None]
