"""Queries of one transaction on rollouts. No rule of the domain lives here."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from services.registry.tables import RolloutEventRow, RolloutRow


class RolloutQueries:
    """The part of the repository that rollouts need."""

    _session: AsyncSession

    async def rollout(self, rollout_id: str, *, fresh: bool = False) -> RolloutRow | None:
        """With `fresh`, locked and as it is now. Lock the model first, as everybody does."""
        if "\0" in rollout_id:
            return None
        return await self._session.get(RolloutRow, rollout_id, populate_existing=fresh, with_for_update=fresh)

    async def unfinished_rollout(self, model: str) -> RolloutRow | None:
        """The one that moves the model's weights now."""
        statement = select(RolloutRow).where(RolloutRow.model == model, RolloutRow.finished_at.is_(None))
        return (await self._session.scalars(statement)).one_or_none()

    async def rollouts(
        self, model: str | None, status: str | None, after: str, limit: int
    ) -> Sequence[RolloutRow]:
        """By id, which grows with time; of `model` and with `status` where given, as callers know it:
        one that is paused is neither running nor baking."""
        statement = select(RolloutRow).where(RolloutRow.rollout_id > after)
        if model is not None:
            statement = statement.where(RolloutRow.model == model)
        if status == "paused":
            statement = statement.where(RolloutRow.paused_at.is_not(None))
        elif status is not None:
            statement = statement.where(RolloutRow.status == status, RolloutRow.paused_at.is_(None))
        return (await self._session.scalars(statement.order_by(RolloutRow.rollout_id).limit(limit))).all()

    async def open_rollouts(self) -> Sequence[RolloutRow]:
        """Those whose trial is not closed."""
        statement = select(RolloutRow).where(RolloutRow.closed_at.is_(None)).order_by(RolloutRow.rollout_id)
        return (await self._session.scalars(statement)).all()

    async def rollout_counts(self) -> dict[str, int]:
        """How many rollouts there are by status."""
        statement = select(RolloutRow.status, func.count()).group_by(RolloutRow.status)
        return {row[0]: row[1] for row in (await self._session.execute(statement)).all()}

    async def rollout_events(self, rollout_id: str, before: int, limit: int) -> Sequence[RolloutEventRow]:
        """Events below `before`, newest first."""
        statement = select(RolloutEventRow).where(
            RolloutEventRow.rollout_id == rollout_id, RolloutEventRow.id < before
        )
        statement = statement.order_by(RolloutEventRow.id.desc()).limit(limit)
        return (await self._session.scalars(statement)).all()

    async def prune_rollout_events(self, rollout_id: str, keep: int) -> None:
        """Delete all but the newest `keep` events."""
        old = select(RolloutEventRow.id).where(RolloutEventRow.rollout_id == rollout_id)
        old = old.order_by(RolloutEventRow.id.desc()).offset(keep)
        await self._session.execute(delete(RolloutEventRow).where(RolloutEventRow.id.in_(old)))
