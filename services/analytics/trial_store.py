"""Reads and writes of what outlives a look at a trial. Every function works inside the caller's
transaction."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from headrace.v1.trials_pb2 import Evidence
from sqlalchemy import delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services.analytics.tables import MaximumRow
from services.analytics.verdicts import Maxima

#: The statement that the split is as configured.
_SPLIT = ("", "")


async def forget_maxima(session: AsyncSession, trial_ids: Collection[str]) -> None:
    """Of trials that ended for good."""
    await session.execute(delete(MaximumRow).where(MaximumRow.trial_id.in_(trial_ids)))


async def raise_maxima(
    session: AsyncSession, trial_id: str, evidence: Sequence[Evidence], ratio_log_e: float
) -> tuple[dict[tuple[str, str], Maxima], float]:
    """Remember e-values where they are larger than ever; the largest ever seen of every statement, and of the
    split. The same look again changes nothing."""
    seen = {(one.metric, one.arm): (one.log_e_harm, one.log_e_safe, one.log_e_better) for one in evidence}
    seen[_SPLIT] = (ratio_log_e, 0.0, 0.0)
    rows = [
        {
            "trial_id": trial_id,
            "metric": metric,
            "arm": arm,
            "log_e_harm": harm,
            "log_e_safe": safe,
            "log_e_better": better,
        }
        # In a fixed order, so that two replicas never wait for each other's rows.
        for (metric, arm), (harm, safe, better) in sorted(seen.items())
    ]
    statement = insert(MaximumRow).values(rows)
    names = ("log_e_harm", "log_e_safe", "log_e_better")
    statement = statement.on_conflict_do_update(
        index_elements=[MaximumRow.trial_id, MaximumRow.metric, MaximumRow.arm],
        set_={name: func.greatest(getattr(MaximumRow, name), statement.excluded[name]) for name in names},
    )
    await session.execute(statement)
    found = await session.scalars(select(MaximumRow).where(MaximumRow.trial_id == trial_id))
    largest = {
        (row.metric, row.arm): Maxima(row.log_e_harm, row.log_e_safe, row.log_e_better) for row in found
    }
    split = largest.pop(_SPLIT, Maxima())
    return largest, split.harm
