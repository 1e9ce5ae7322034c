"""Queries of one transaction on experiments and verdicts. No rule of the domain lives here."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Final

from sqlalchemy import delete, func, select, text, union_all
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from services.registry.tables import ExperimentEventRow, ExperimentRow, RolloutRow, VerdictRow

#: Clocks of two machines differ by less.
_CLOCKS_DIFFER: Final = timedelta(seconds=60)
_FORGOTTEN_AT_ONCE: Final = 100


class TrialQueries:
    """The part of the repository that trials need."""

    _session: AsyncSession

    # experiments

    async def experiment(
        self, experiment_id: str, *, lock: bool = False, skip_locked: bool = False
    ) -> ExperimentRow | None:
        """With `lock`, as it is once no other transaction holds it; with `skip_locked` None where one does.

        Lock the model first, as everybody does: the other order makes deadlocks.
        """
        if "\0" in experiment_id:
            return None
        statement = select(ExperimentRow).where(ExperimentRow.experiment_id == experiment_id)
        if lock:
            statement = statement.with_for_update(skip_locked=skip_locked)
            statement = statement.execution_options(populate_existing=True)
        return (await self._session.scalars(statement)).one_or_none()

    async def experiments(
        self, model: str | None, statuses: Collection[str], after: str, limit: int
    ) -> Sequence[ExperimentRow]:
        """By id, which grows with time; of `model` and with one of `statuses` where given."""
        statement = select(ExperimentRow).where(ExperimentRow.experiment_id > after)
        if model is not None:
            statement = statement.where(ExperimentRow.model == model)
        if statuses:
            statement = statement.where(ExperimentRow.status.in_(statuses))
        statement = statement.order_by(ExperimentRow.experiment_id).limit(limit)
        return (await self._session.scalars(statement)).all()

    async def started_experiments(self, model: str) -> Sequence[ExperimentRow]:
        """Those of `model` that run, or wait for what they need to run."""
        statement = select(ExperimentRow).where(
            ExperimentRow.model == model,
            (ExperimentRow.status == "running")
            | ((ExperimentRow.status == "scheduled") & (ExperimentRow.waiting_for != "")),
        )
        return (await self._session.scalars(statement.order_by(ExperimentRow.experiment_id))).all()

    async def open_experiments(self) -> Sequence[tuple[ExperimentRow, bytes | None]]:
        """Everything that is scheduled, running or not closed after its stop, each with its last verdict."""
        statement = (
            select(ExperimentRow, VerdictRow.verdict)
            .outerjoin(VerdictRow, VerdictRow.trial_id == ExperimentRow.experiment_id)
            .where(ExperimentRow.closed_at.is_(None), ExperimentRow.status != "draft")
            .order_by(ExperimentRow.experiment_id)
        )
        return [(row[0], row[1]) for row in (await self._session.execute(statement)).all()]

    async def delete_experiment(self, experiment_id: str) -> None:
        """With its events and its verdict."""
        await self.delete_trial(experiment_id)

    async def experiment_counts(self) -> dict[str, int]:
        """How many experiments there are by status."""
        statement = select(ExperimentRow.status, func.count()).group_by(ExperimentRow.status)
        return {row[0]: row[1] for row in (await self._session.execute(statement)).all()}

    async def experiment_events(
        self, experiment_id: str, before: int, limit: int
    ) -> Sequence[ExperimentEventRow]:
        """Events below `before`, newest first."""
        statement = select(ExperimentEventRow).where(
            ExperimentEventRow.experiment_id == experiment_id, ExperimentEventRow.id < before
        )
        statement = statement.order_by(ExperimentEventRow.id.desc()).limit(limit)
        return (await self._session.scalars(statement)).all()

    async def prune_reweightings(self, experiment_id: str, keep: int) -> None:
        """Delete all changes of weight but the newest `keep`."""
        events = ExperimentEventRow
        old = select(events.id).where(events.experiment_id == experiment_id, events.kind == "reweighted")
        old = old.order_by(events.id.desc()).offset(keep)
        await self._session.execute(delete(events).where(events.id.in_(old)))

    # trials

    async def trials_of(self, model: str) -> Sequence[str]:
        """Experiments of `model`, which are all on the topic."""
        statement = select(ExperimentRow.experiment_id).where(ExperimentRow.model == model)
        return (await self._session.scalars(statement)).all()

    async def trial_revisions(self) -> dict[str, int]:
        """Trial id → revision of everything that is on the topic, drafts included."""
        experiments = await self._revisions(ExperimentRow.experiment_id, ExperimentRow.revision)
        return experiments | await self._revisions(RolloutRow.rollout_id, RolloutRow.revision)

    async def _revisions(
        self, key: InstrumentedAttribute[str], revision: InstrumentedAttribute[int]
    ) -> dict[str, int]:
        """Of a whole table, in one row: as many as there are would keep the event loop for seconds."""
        arrays = select(func.array_agg(key), func.array_agg(revision))
        keys, revisions = (await self._session.execute(arrays)).one()
        return dict(zip(keys or (), revisions or (), strict=True))

    async def trials_closed_before(self, before: datetime) -> Sequence[str]:
        """Experiments and rollouts on which nothing is counted since then: some that were closed first."""
        closed = [
            select(row_id, closed_at).where(closed_at < before)
            for row_id, closed_at in (
                (ExperimentRow.experiment_id, ExperimentRow.closed_at),
                (RolloutRow.rollout_id, RolloutRow.closed_at),
            )
        ]
        statement = union_all(*closed).order_by(text("2, 1")).limit(_FORGOTTEN_AT_ONCE)
        return (await self._session.scalars(statement)).all()

    async def delete_trial(self, trial_id: str) -> None:
        """An experiment or a rollout with its events and its verdict."""
        await self._session.execute(delete(ExperimentRow).where(ExperimentRow.experiment_id == trial_id))
        await self._session.execute(delete(RolloutRow).where(RolloutRow.rollout_id == trial_id))
        await self._session.execute(delete(VerdictRow).where(VerdictRow.trial_id == trial_id))

    async def put_verdict(
        self, trial_id: str, verdict: bytes, computed_at: datetime, received_at: datetime
    ) -> None:
        """One computed before the verdict that is there changes nothing; but one that claims to come from
        the future, of a clock that was set back since, gives way to every other."""
        values = {"verdict": verdict, "computed_at": computed_at, "received_at": received_at}
        statement = insert(VerdictRow).values(trial_id=trial_id, **values)
        new = statement.excluded
        ahead = (VerdictRow.computed_at > received_at + _CLOCKS_DIFFER) & (
            VerdictRow.computed_at != new.computed_at
        )
        await self._session.execute(
            statement.on_conflict_do_update(
                index_elements=["trial_id"],
                set_=values,
                where=(VerdictRow.computed_at < new.computed_at) | ahead,
            )
        )

    async def verdict(self, trial_id: str) -> VerdictRow | None:
        """The newest verdict on a trial."""
        if "\0" in trial_id:
            return None
        return await self._session.get(VerdictRow, trial_id)
