"""Jobs as one transaction sees them. Whoever changes a job or its chunks locks the job's row first; several
jobs are locked in the order of their ids. No rule of the domain lives here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, cast

from sqlalchemy import ColumnElement, CursorResult, and_, delete, func, insert, or_, select, tuple_, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import defer

from services.common.bus import Record
from services.common.db import enqueue
from services.gateway.jobs.tables import ChunkRow, FileRow, IdempotencyKeyRow, JobRow, Outbox

_UNDER_WAY = JobRow.ended_at.is_(None)
#: Rows that travel with a job are for whoever cuts it: many jobs are looked at, again and again.
_BARE = defer(JobRow.inline_input, raiseload=True)
#: A lease that would last so many times as long as one does was given before the clock was set back.
_LEASES_LAST = 4

#: Priority, age and id: the order in which jobs are looked at.
Place = tuple[int, datetime, str]


@dataclass(frozen=True, slots=True)
class Backlog:
    """Chunks of a pool that are open or with its workers, and the rows known so far that are not done."""

    open: int
    flying: int
    rows: int


class JobRepository:
    """The tables of jobs and chunks."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    # jobs

    async def insert(self, row: dict[str, Any]) -> bool:
        """False where there is a job of that id."""
        made = upsert(JobRow).values(**row).on_conflict_do_nothing().returning(JobRow.job_id)
        return (await self._session.execute(made)).scalar() is not None

    async def job(self, job_id: str, *, lock: bool = False) -> JobRow | None:
        """One job; with `lock`, as it is now and until the transaction ends."""
        if "\0" in job_id:
            return None
        return await self._session.get(JobRow, job_id, with_for_update=lock, populate_existing=lock)

    async def locked(self, job_ids: Collection[str]) -> dict[str, JobRow]:
        """Those jobs that exist, locked, without the rows that travel with them."""
        chosen = select(JobRow).where(JobRow.job_id.in_(job_ids)).order_by(JobRow.job_id).with_for_update()
        bare = chosen.options(_BARE).execution_options(populate_existing=True)
        return {row.job_id: row for row in await self._session.scalars(bare)}

    async def jobs(self, job_ids: Collection[str]) -> Sequence[JobRow]:
        """Those jobs that exist, without the rows that travel with them."""
        found = select(JobRow).where(JobRow.job_id.in_(job_ids)).options(_BARE)
        return (await self._session.scalars(found)).all()

    async def page(
        self,
        key_id: str | None,
        models: Collection[str],
        filters: Mapping[str, str],
        after: JobRow | None,
        limit: int,
    ) -> Sequence[JobRow]:
        """Up to `limit` jobs behind `after`, newest first; of one key unless `key_id` is None, of `models`
        where given, without the rows that travel with them. `filters` are columns and their values."""
        wanted: list[ColumnElement[bool]] = [
            getattr(JobRow, name) == value for name, value in filters.items()
        ]
        if key_id is not None:
            wanted.append(JobRow.key_id == key_id)
        if models:
            wanted.append(JobRow.model.in_(models))
        if after is not None:
            wanted.append(tuple_(JobRow.created_at, JobRow.job_id) < (after.created_at, after.job_id))
        newest_first = JobRow.created_at.desc(), JobRow.job_id.desc()
        found = select(JobRow).where(*wanted).order_by(*newest_first).limit(limit)
        return (await self._session.scalars(found.options(_BARE))).all()

    async def under_way(self, key_id: str) -> int:
        """How many jobs of a key have not ended."""
        return await self._count(select(func.count()).where(JobRow.key_id == key_id, _UNDER_WAY))

    async def claim(self, owner: str, now: datetime, lease: timedelta, limit: int) -> None:
        """Lease up to `limit` more jobs that have not ended to `owner`, those that nobody leases, by priority
        and age; and renew up to as many of its own whose lease is half over. What another transaction holds
        at this moment is left alone. A lease that would last far longer than `lease` is none: the clock was
        set back since it was given, and its owner may be gone."""
        is_own = JobRow.lease_owner == owner
        free = or_(
            JobRow.lease_until.is_(None),
            JobRow.lease_until < now,
            JobRow.lease_until > now + _LEASES_LAST * lease,
        )
        for wanted in (and_(is_own, JobRow.lease_until < now + lease / 2), free):
            chosen = (
                select(JobRow.job_id)
                .where(_UNDER_WAY, wanted)
                .order_by(JobRow.priority, JobRow.created_at)
                .limit(limit)
                .with_for_update(skip_locked=True)
            )
            leased = (
                update(JobRow)
                .where(JobRow.job_id.in_(chosen.scalar_subquery()))
                .values(lease_owner=owner, lease_until=now + lease)
                .execution_options(synchronize_session=False)
            )
            await self._session.execute(leased)

    async def leased(self, owner: str, after: Place | None, limit: int) -> Sequence[JobRow]:
        """Up to `limit` jobs that `owner` leases, behind `after`, by priority and age, without the rows that
        travel with them."""
        place = tuple_(JobRow.priority, JobRow.created_at, JobRow.job_id)
        wanted = [_UNDER_WAY, JobRow.lease_owner == owner, *([] if after is None else [place > after])]
        found = select(JobRow).where(*wanted).order_by(JobRow.priority, JobRow.created_at, JobRow.job_id)
        chosen = found.limit(limit).options(_BARE)
        return (await self._session.scalars(chosen)).all()

    async def release(self, owner: str) -> None:
        """Let others lease what `owner` had."""
        released = update(JobRow).where(JobRow.lease_owner == owner, _UNDER_WAY)
        await self._session.execute(released.values(lease_owner=None, lease_until=None))

    async def backlog(self) -> dict[str, Backlog]:
        """What is not done, by pool."""
        left = func.greatest(JobRow.rows - JobRow.completed - JobRow.failed, 0)
        counted = select(
            JobRow.pool, func.sum(JobRow.open_chunks), func.sum(JobRow.flying_chunks), func.sum(left)
        )
        rows = await self._session.execute(counted.where(_UNDER_WAY).group_by(JobRow.pool))
        return {pool: Backlog(int(o), int(f), int(n)) for pool, o, f, n in rows}

    async def states(self) -> dict[str, tuple[int, int, int, float]]:
        """Jobs under way by state: how many, their open and flying chunks, their rows per second."""
        counted = (
            select(
                JobRow.state,
                func.count(),
                func.sum(JobRow.open_chunks),
                func.sum(JobRow.flying_chunks),
                func.sum(func.coalesce(JobRow.rate, 0.0)),
            )
            .where(_UNDER_WAY)
            .group_by(JobRow.state)
        )
        rows = await self._session.execute(counted)
        return {state: (int(n), int(o), int(f), float(rate)) for state, n, o, f, rate in rows}

    async def to_forget(
        self, ended_before: datetime, limit: int, *, forgotten: bool = False
    ) -> Sequence[JobRow]:
        """Jobs that ended before, and are `forgotten` or not yet."""
        found = select(JobRow).where(JobRow.ended_at < ended_before, JobRow.is_forgotten.is_(forgotten))
        found = found.order_by(JobRow.ended_at).limit(limit).with_for_update(skip_locked=True)
        return (await self._session.scalars(found)).all()

    async def delete(self, job_ids: Collection[str]) -> None:
        """Remove jobs with everything that was known of them."""
        await self._session.execute(delete(JobRow).where(JobRow.job_id.in_(job_ids)))
        # Or the same request would be refused for as long as keys are kept.
        await self._session.execute(delete(IdempotencyKeyRow).where(IdempotencyKeyRow.job_id.in_(job_ids)))

    # chunks

    async def add_chunks(self, rows: Sequence[dict[str, Any]]) -> None:
        """Insert chunks of a job whose row is locked."""
        if rows:
            await self._session.execute(insert(ChunkRow), rows)

    async def open_chunks(self, job_id: str, limit: int) -> Sequence[ChunkRow]:
        """The first open chunks."""
        found = select(ChunkRow).where(ChunkRow.job_id == job_id, ChunkRow.state == "open")
        return (await self._session.scalars(found.order_by(ChunkRow.index).limit(limit))).all()

    async def chunks_at(self, at: Collection[tuple[str, int]]) -> dict[tuple[str, int], ChunkRow]:
        """Those chunks that exist, by job and index."""
        found = select(ChunkRow).where(tuple_(ChunkRow.job_id, ChunkRow.index).in_(list(at)))
        rows = await self._session.scalars(found.execution_options(populate_existing=True))
        return {(row.job_id, row.index): row for row in rows}

    async def chunks_from(self, job_id: str, index: int, limit: int) -> Sequence[ChunkRow]:
        """Chunks in order, without their inputs, from `index` on."""
        found = select(ChunkRow).where(ChunkRow.job_id == job_id, ChunkRow.index >= index)
        return (await self._session.scalars(found.order_by(ChunkRow.index).limit(limit))).all()

    async def mark_flying(self, job_id: str, attempts: Mapping[int, int], state: str, now: datetime) -> int:
        """Chunks in `state` that were published with these attempts are with the workers; how many were still
        in that state and had the attempt before."""
        if not attempts:
            return 0
        known = or_(
            *(
                and_(ChunkRow.attempt == attempt - 1, ChunkRow.index.in_(indices))
                for attempt, indices in _by_attempt(attempts).items()
            )
        )
        marked = update(ChunkRow).where(ChunkRow.job_id == job_id, ChunkRow.state == state, known)
        changed = await self._session.execute(
            marked.values(state="flying", attempt=ChunkRow.attempt + 1, published_at=now)
        )
        return cast("CursorResult[Any]", changed).rowcount

    async def drop(self, job_id: str, *states: str) -> None:
        """What is in these states will not be done any more."""
        dropped = update(ChunkRow).where(ChunkRow.job_id == job_id, ChunkRow.state.in_(states))
        await self._session.execute(dropped.values(state="dropped"))

    async def flying(self, pool: str) -> Sequence[tuple[str, int, int, datetime]]:
        """Chunks of a pool that are with the workers: job, index, attempt, when published."""
        found = (
            select(ChunkRow.job_id, ChunkRow.index, ChunkRow.attempt, ChunkRow.published_at)
            .join(JobRow, JobRow.job_id == ChunkRow.job_id)
            .where(_UNDER_WAY, JobRow.pool == pool, ChunkRow.state == "flying")
        )
        rows = await self._session.execute(found)
        return [(job, index, attempt, at) for job, index, attempt, at in rows if at is not None]

    # beside

    async def idempotent(
        self, key_id: str, key: str, digest: bytes, job_id: str, now: datetime
    ) -> tuple[bytes, str]:
        """Note what `key` is used for, unless it was used already; what it stands for."""
        made = upsert(IdempotencyKeyRow).values(
            key_id=key_id, idempotency_key=key, digest=digest, job_id=job_id, created_at=now
        )
        # Waits for a transaction that is inserting the same key.
        await self._session.execute(made.on_conflict_do_nothing())
        row = await self._session.get(IdempotencyKeyRow, (key_id, key))
        if row is None:
            return digest, job_id
        return row.digest, row.job_id

    async def noted(self, key_id: str, key: str) -> tuple[bytes, str] | None:
        """What `key` was used for: the digest of the request, and the job."""
        row = await self._session.get(IdempotencyKeyRow, (key_id, key))
        return None if row is None else (row.digest, row.job_id)

    async def forget_idempotency(self, before: datetime) -> None:
        """Remove keys that were used before."""
        await self._session.execute(delete(IdempotencyKeyRow).where(IdempotencyKeyRow.created_at < before))

    async def file(self, file_id: str) -> FileRow | None:
        """An uploaded file."""
        if "\0" in file_id:
            return None
        return await self._session.get(FileRow, file_id)

    async def publish(self, records: Sequence[Record]) -> None:
        """Publish with the commit. Call it last: whoever publishes takes turns from here on."""
        await enqueue(self._session, Outbox, records)

    async def flush(self) -> None:
        """Send what was changed."""
        await self._session.flush()

    async def _count(self, statement: Any) -> int:
        return int((await self._session.execute(statement)).scalar_one())


def _by_attempt(attempts: Mapping[int, int]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for index, attempt in attempts.items():
        found.setdefault(attempt, []).append(index)
    return found
