"""What experiments do by themselves, as an actor of the controller."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

import structlog
from google.protobuf.message import DecodeError
from headrace.v1.trials_pb2 import Verdict

from services.registry import experiments
from services.registry.counting import Counting
from services.registry.edge import Edge
from services.registry.experiment_running import Readiness, close
from services.registry.experiment_state import standing_of
from services.registry.experiment_steps import Action, Step, next_step
from services.registry.repository import Repository
from services.registry.tables import ExperimentRow

log = structlog.get_logger(__name__)

_STATUSES: Final = ("draft", "scheduled", "running", "stopped")


class ExperimentActor:
    """Decides without a lock whether an experiment has anything to do, and again under the model's lock
    before it is done: of several registries that come to the same decision one acts, and the others find it
    done."""

    kind = "experiment"
    actions = tuple(map(str, Action))

    def __init__(self, edge: Edge, ready: Readiness) -> None:
        self._edge = edge
        self._ready = ready
        self._counting = Counting(edge.clock)
        #: Whether one is scheduled or runs. One that was stopped is closed by and by.
        self.is_open = False

    async def candidates(self, tx: Repository, now: datetime) -> Sequence[str]:
        """Experiments that have something to do now."""
        counts = await self._counting.ask(tx.experiment_counts)
        if counts is not None:
            for status in _STATUSES:
                self._edge.metrics.experiments.labels(status).set(counts.get(status, 0))
        open_now = await tx.open_experiments()
        self.is_open = any(row.status != "stopped" for row, _ in open_now)
        return [row.experiment_id for row, verdict in open_now if self._step(row, verdict, now) is not None]

    async def act(self, tx: Repository, trial_id: str, now: datetime) -> str | None:
        """Decide and do, in one transaction."""
        row = await tx.experiment(trial_id)
        if row is None or await tx.model(row.model, lock=True, skip_locked=True) is None:
            return None
        row = await tx.experiment(trial_id, lock=True, skip_locked=True)
        if row is None:
            return None
        held = await tx.verdict(trial_id)
        step = self._step(row, None if held is None else held.verdict, now)
        if step is None:
            return None
        verdict = None if held is None else Verdict.FromString(held.verdict)
        return str(step.action) if await self._carry_out(tx, row, step, verdict) else None

    async def _carry_out(
        self, tx: Repository, row: ExperimentRow, step: Step, verdict: Verdict | None
    ) -> bool:
        clock = self._edge.clock
        if step.action is Action.START:
            return await experiments.start_scheduled(tx, row, step.reason, clock, self._ready)
        if step.action is Action.STOP:
            await experiments.finish(tx, row, step.reason, clock, verdict=verdict)
        elif step.action is Action.REWEIGHT:
            await experiments.reweight(tx, row, step.weights, step.reason, clock)
        else:
            close(tx, row, clock)
            experiments.note(tx, row, clock, "closed", step.reason)
        return True

    def _step(self, row: ExperimentRow, verdict: bytes | None, now: datetime) -> Step | None:
        """A row that cannot be read must not hold up the others."""
        try:
            said = None if verdict is None else Verdict.FromString(verdict)
            return next_step(standing_of(row), said, now)
        except (DecodeError, ValueError) as error:
            log.warning("experiment_not_read", trial=row.experiment_id, reason=str(error))
            return None
