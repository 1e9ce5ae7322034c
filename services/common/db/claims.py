"""Records that were taken in already: claimed by their id in the transaction of what they tell, so that one
that comes again, redelivered or published twice, changes nothing."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import DateTime, LargeBinary, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

# One statement for all: what comes back are the few that were claimed before, normally none.
_CLAIM = text(
    """
    WITH given AS (SELECT b FROM unnest(CAST(:ids AS bytea[])) AS ids (b)),
    fresh AS (
        INSERT INTO claims (batch_id, claimed_at) SELECT b, :now FROM given
        ON CONFLICT DO NOTHING RETURNING batch_id
    )
    SELECT b FROM given WHERE b NOT IN (SELECT batch_id FROM fresh)
    """
)
_CLAIMED = text("SELECT batch_id FROM claims WHERE batch_id = ANY(CAST(:ids AS bytea[]))")
_FORGET = text(
    """
    WITH dropped AS (
        DELETE FROM claims WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM claims WHERE claimed_at < :before LIMIT :most
        )) RETURNING 1
    )
    SELECT count(*) FROM dropped
    """
)


class ClaimRow:
    """Mixin for the table, which has an index on `claimed_at`: `class Claims(ClaimRow, Base): ...`."""

    __tablename__ = "claims"

    batch_id: Mapped[bytes] = mapped_column(LargeBinary, primary_key=True)
    claimed_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


async def claim(session: AsyncSession, ids: Collection[bytes], now: datetime) -> set[bytes]:
    """Claim all of `ids` when the transaction commits; gives those that somebody claimed before."""
    # Sorted, so that two replicas never wait for each other's rows.
    found = await session.execute(_CLAIM, {"ids": sorted(set(ids)), "now": now})
    return set(found.scalars())


async def claimed(session: AsyncSession, ids: Collection[bytes]) -> set[bytes]:
    """Those of `ids` that were claimed before; nothing changes."""
    return set((await session.execute(_CLAIMED, {"ids": sorted(set(ids))})).scalars())


async def forget_claims(session: AsyncSession, before: datetime, most: int) -> int:
    """Drop at most `most` claims of that time and older; how many."""
    found = await session.execute(_FORGET, {"before": before, "most": most})
    return int(found.scalar_one())
