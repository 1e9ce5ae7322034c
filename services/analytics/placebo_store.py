"""Reads and writes of placebos. Every function works inside the caller's transaction."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import numpy as np
from sqlalchemy import delete, select, union
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services.analytics.placebo import Crossings
from services.analytics.tables import InboxRow, PlaceboRow, SegmentRow

#: Placebos with fewer units say nothing of how often a decision is false.
_FEWEST_UNITS = 200


@dataclass(frozen=True, slots=True)
class Placebo:
    """Halves of one control: how many salts there are, and how many of them ever crossed."""

    model: str
    name: str
    units: int
    looks: int
    salts: int
    crossed: int
    naive: int
    looked_at: datetime


async def add_look(
    session: AsyncSession, model: str, name: str, units: int, found: Crossings, now: datetime
) -> None:
    """Remember which salts crossed; those that ever did stay crossed."""
    place = {"model": model, "trial_id": name}
    none: list[int] = []
    empty = insert(PlaceboRow).values(
        **place, looks=0, units=0, crossed=none, naive=none, salts=found.decided.size, looked_at=now
    )
    await session.execute(empty.on_conflict_do_nothing())
    row = await session.get_one(PlaceboRow, place, with_for_update=True)
    row.looks += 1
    row.units = units
    row.crossed = sorted({*row.crossed, *np.flatnonzero(found.decided).tolist()})
    row.naive = sorted({*row.naive, *np.flatnonzero(found.naive).tolist()})
    row.looked_at = now
    await session.flush()


async def placebos(session: AsyncSession, model: str | None = None) -> list[Placebo]:
    """Those with enough units, the newest first."""
    statement = select(PlaceboRow).where(PlaceboRow.units >= _FEWEST_UNITS)
    if model is not None:
        statement = statement.where(PlaceboRow.model == model)
    rows = await session.scalars(statement.order_by(PlaceboRow.looked_at.desc()))
    return [
        Placebo(
            model=row.model,
            name=row.trial_id,
            units=row.units,
            looks=row.looks,
            salts=row.salts,
            crossed=len(row.crossed),
            naive=len(row.naive),
            looked_at=row.looked_at,
        )
        for row in rows
    ]


async def served_since(session: AsyncSession, since_us: int) -> list[str]:
    """Models that have answered since then."""
    stored = select(SegmentRow.model).where(
        SegmentRow.dropped_at.is_(None), SegmentRow.last_at_us >= since_us
    )
    found = await session.scalars(union(stored, select(InboxRow.model)))
    return sorted(found)


async def forget(session: AsyncSession, before: datetime) -> None:
    """Drop what was not looked at since then."""
    await session.execute(delete(PlaceboRow).where(PlaceboRow.looked_at < before))
