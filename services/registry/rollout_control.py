"""What rollouts do by themselves, as an actor of the controller."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

import structlog
from google.protobuf.message import DecodeError

from services.common.clock import Leaps
from services.registry.counting import Counting
from services.registry.edge import Edge
from services.registry.repository import Repository
from services.registry.rollout_plan import Action, Status
from services.registry.rollout_state import rollout_of, trial_of
from services.registry.rollout_steps import CLOCK_SLACK, next_step
from services.registry.rollouts import carry_out, facts_of, is_news, waits_for_workers
from services.registry.tables import RolloutRow
from services.registry.trials import publish_trial
from services.registry.workers import Workers

log = structlog.get_logger(__name__)

#: Evidence of a finished rollout goes on being counted so long: outcomes come late.
CLOSED_AFTER: Final = timedelta(days=1)
_CLOSE: Final = "close"


class RolloutActor:
    """Decides without a lock whether a rollout has anything to do, and again under the model's lock before it
    is done: of several registries that come to the same decision one acts, and the others find it done."""

    kind = "rollout"
    actions = (*(str(action) for action in Action if action is not Action.WAIT), _CLOSE)

    def __init__(self, edge: Edge, workers: Workers) -> None:
        self._edge = edge
        self._workers = workers
        self._leaps = Leaps(edge.clock, CLOCK_SLACK.total_seconds())
        self._counting = Counting(edge.clock)
        self._looked = False
        #: Whether one is under way. One that has finished is closed by and by.
        self.is_open = False

    async def candidates(self, tx: Repository, now: datetime) -> Sequence[str]:
        """Rollouts that have something to do or to say now.

        Where the clock was set forward, so is when their steps and waiting began: nobody saw that time pass.
        (Of a step one that was set back shows by itself, see `next_step`.) Nor did anybody see what passed
        before this registry looked first, and workers may have begun with it: they are waited for anew."""
        found = []
        rows = await tx.open_rollouts()
        # Asked once the rows are there: what is not told to them is lost, and a machine that was asleep finds
        # its connection to the database gone.
        leap = self._leaps.forward()
        looked, self._looked = self._looked, True
        self.is_open = any(row.finished_at is None for row in rows)
        for row in rows:
            if row.finished_at is None:
                _allow_for_clock(row, leap, now)
                if not looked and waits_for_workers(row):
                    row.waiting_since = now
            try:
                due = await self._is_due(tx, row, now)
            except (DecodeError, ValueError) as error:
                # One that cannot be read must not hold up the others.
                log.warning("rollout_not_read", trial=row.rollout_id, reason=str(error))
                continue
            if due:
                found.append(row.rollout_id)
        counts = await self._counting.ask(tx.rollout_counts)
        if counts is not None:
            for status in Status:
                self._edge.metrics.rollouts.labels(status).set(counts.get(status, 0))
        return found

    async def act(self, tx: Repository, trial_id: str, now: datetime) -> str | None:
        """Decide and do, in one transaction."""
        row = await tx.rollout(trial_id)
        if row is None:
            return None
        # A model that is gone has no lock to take; then the rollout's own is enough.
        if await tx.model(row.model, lock=True, skip_locked=True) is None and await tx.model(row.model):
            return None
        row = await tx.rollout(trial_id, fresh=True)
        if row is None or row.closed_at is not None:
            return None
        if row.finished_at is not None:
            return self._close(tx, row, now)
        facts = await facts_of(tx, row, self._workers)
        step = next_step(rollout_of(row), facts, now)
        if not is_news(row, step):
            return None
        await carry_out(tx, row, step, facts.verdict, self._edge.clock)
        return None if step.action is Action.WAIT else str(step.action)

    async def _is_due(self, tx: Repository, row: RolloutRow, now: datetime) -> bool:
        if row.finished_at is not None:
            return row.finished_at + CLOSED_AFTER <= now
        return is_news(row, next_step(rollout_of(row), await facts_of(tx, row, self._workers), now))

    def _close(self, tx: Repository, row: RolloutRow, now: datetime) -> str | None:
        if row.finished_at is None or row.finished_at + CLOSED_AFTER > now:
            return None
        row.closed_at, row.revision = now, row.revision + 1
        publish_trial(tx, trial_of(row))
        return _CLOSE


def _allow_for_clock(row: RolloutRow, leap: timedelta, now: datetime) -> None:
    """Let what `row` is timed by be what somebody saw pass."""
    if leap:
        log.warning("clock_set_forward", trial=row.rollout_id, seconds=leap.total_seconds())
        if row.clock_at is not None:
            row.clock_at += leap
        if row.paused_at is not None:
            row.paused_at += leap
        if row.waiting_since is not None:
            row.waiting_since += leap
    # Lacking where an older release decided; ahead where the clock was set back since.
    if waits_for_workers(row) and (row.waiting_since is None or row.waiting_since > now + CLOCK_SLACK):
        row.waiting_since = now
