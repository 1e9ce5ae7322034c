"""The actor of rollouts, and clocks that are set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from types import SimpleNamespace
from typing import cast

from services.common.clock import ManualClock
from services.registry.edge import Edge
from services.registry.metrics import Metrics
from services.registry.repository import Repository
from services.registry.rollout_control import RolloutActor
from services.registry.tables import RolloutRow
from services.registry.workers import Workers


class Open:
    """The part of a transaction that looking for candidates uses."""

    def __init__(self, *rows: RolloutRow) -> None:
        self.rows = rows

    async def open_rollouts(self) -> Sequence[RolloutRow]:
        return self.rows

    async def rollout_counts(self) -> Mapping[str, int]:
        return {}


class Looking(RolloutActor):
    """Asks nothing of a row but its times."""

    async def _is_due(self, *_: object) -> bool:
        return False


async def test_a_clock_that_is_set_forward_shortens_no_step() -> None:
    clock = ManualClock()
    edge = cast("Edge", SimpleNamespace(clock=clock, metrics=Metrics()))
    actor = Looking(edge, Workers(clock))
    began = clock.now()
    running = RolloutRow(rollout_id="running", clock_at=began, finished_at=None)
    waiting = RolloutRow(rollout_id="waiting", clock_at=None, finished_at=None)
    ended = RolloutRow(rollout_id="ended", clock_at=began, finished_at=began)
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
    assert ended.clock_at == began
