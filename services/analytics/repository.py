"""Reads and writes of the schema `analytics`. Every function works inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from itertools import accumulate

import asyncpg
from headrace.v1.events_pb2 import Outcome
from sqlalchemy import ColumnElement, and_, delete, func, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services.analytics.segments import Segment
from services.analytics.tables import ClaimRow, InboxRow, OutcomeRow, SegmentRow, SignatureRow

#: Longer than Kafka redelivers anything, or a spool waits for a broker.
KEPT_CLAIMS = timedelta(days=14)
#: Longer than any query reads objects that were joined meanwhile.
KEPT_DROPPED = timedelta(minutes=10)

#: What one transaction deletes, and what one object is joined of: each is bounded in time.
AT_ONCE = 100
MAX_JOINED = 1000

#: No outcome is observed before its request was answered, but for clocks that differ.
_EARLY_US = 600_000_000

_ADD_OUTCOMES = text(
    """
    INSERT INTO outcomes
        (event_id, request_id, model, metric, number, text, "row", observed_at_us, received_at)
    SELECT e, r, m, k, n, t, w, o, :now
    FROM unnest(CAST(:events AS bytea[]), CAST(:requests AS bytea[]), CAST(:models AS text[]),
                CAST(:metrics AS text[]), CAST(:numbers AS double precision[]), CAST(:texts AS text[]),
                CAST(:rows AS bigint[]), CAST(:times AS bigint[])) AS given (e, r, m, k, n, t, w, o)
    ON CONFLICT (event_id) DO UPDATE
        SET number = excluded.number, text = excluded.text, observed_at_us = excluded.observed_at_us
        WHERE excluded.observed_at_us > outcomes.observed_at_us
    RETURNING xmax = 0
    """
)
_OUTCOMES = """
    SELECT encode(event_id, 'hex'), encode(request_id, 'hex'), metric, number, text, "row", observed_at_us
    FROM outcomes
    WHERE model IN ($1, '') AND ($2::text IS NULL OR metric = $2::text) AND observed_at_us >= $3
"""
_CLAIM = text(
    """
    INSERT INTO claims (batch_id, claimed_at) SELECT b, :now FROM unnest(CAST(:ids AS bytea[])) AS given (b)
    ON CONFLICT DO NOTHING RETURNING batch_id
    """
)


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the inbox holds of one model version. `size` is in bytes."""

    model: str
    version: str
    records: int
    rows: int
    size: int
    oldest: datetime


@dataclass(frozen=True, slots=True)
class Small:
    """An object below both is worth joining; `size` is in bytes."""

    rows: int
    size: int


async def claimed(session: AsyncSession, batch_ids: Collection[bytes]) -> set[bytes]:
    """Those of `batch_ids` that were claimed before."""
    wanted = select(ClaimRow.batch_id).where(ClaimRow.batch_id.in_(set(batch_ids)))
    return set((await session.scalars(wanted)).all())


async def claim(session: AsyncSession, batch_ids: Collection[bytes], now: datetime) -> set[bytes]:
    """Those of `batch_ids` that were never claimed before; they are from now on."""
    # Sorted, so that two replicas never wait for each other's rows.
    found = await session.execute(_CLAIM, {"ids": sorted(set(batch_ids)), "now": now})
    return set(found.scalars())


async def add_to_inbox(session: AsyncSession, rows: Sequence[InboxRow]) -> None:
    """Keep records until they become Parquet."""
    session.add_all(rows)
    await session.flush()


async def waiting(session: AsyncSession) -> list[Waiting]:
    """The inbox by model version."""
    statement = select(
        InboxRow.model,
        InboxRow.version,
        func.count(),
        func.sum(InboxRow.rows),
        func.sum(func.octet_length(InboxRow.value)),
        func.min(InboxRow.received_at),
    ).group_by(InboxRow.model, InboxRow.version)
    return [
        Waiting(model, version, records, int(rows), int(size), oldest)
        for model, version, records, rows, size, oldest in await session.execute(statement)
    ]


async def take_from_inbox(
    session: AsyncSession, model: str, version: str, records: int, size: int
) -> list[bytes]:
    """The oldest records of a version, removed when the transaction commits: at most so many, of at most
    `size` bytes together unless one alone is larger. Records that another replica is taking are passed
    over."""
    statement = (
        select(InboxRow.batch_id, func.octet_length(InboxRow.value))
        .where(InboxRow.model == model, InboxRow.version == version)
        .order_by(InboxRow.received_at, InboxRow.batch_id)
        .limit(records)
        .with_for_update(skip_locked=True)
    )
    found = (await session.execute(statement)).all()
    held = list(accumulate(int(row[1]) for row in found))
    taken = [row[0] for row, bytes_ in zip(found, held, strict=True) if bytes_ <= size]
    taken = taken or [row[0] for row in found[:1]]
    if not taken:
        return []
    removed = delete(InboxRow).where(InboxRow.batch_id.in_(taken)).returning(InboxRow.value)
    return list((await session.scalars(removed)).all())


async def inbox(session: AsyncSession, model: str) -> list[bytes]:
    """Every record of a model that is not in Parquet yet, without the tensors that no statistic needs."""
    statement = select(func.coalesce(InboxRow.core, InboxRow.value)).where(InboxRow.model == model)
    return list((await session.scalars(statement)).all())


async def inbox_of_request(session: AsyncSession, request_id: bytes) -> list[bytes]:
    """Records of the inbox that name the request."""
    # position() may also hit across two ids; the reader looks again.
    statement = select(InboxRow.value).where(
        text("position(CAST(:wanted AS bytea) IN request_ids) > 0").bindparams(wanted=request_id)
    )
    return list((await session.scalars(statement)).all())


async def add_segment(session: AsyncSession, segment: Segment, now: datetime) -> None:
    """From the commit on the object counts; one that is named already holds the same and counts once."""
    row = insert(SegmentRow).values(**asdict(segment), created_at=now)
    await session.execute(row.on_conflict_do_nothing(index_elements=[SegmentRow.object]))


async def segments(
    session: AsyncSession, model: str, since_us: int | None = None, until_us: int | None = None
) -> list[SegmentRow]:
    """Objects of a model that hold answers of that time."""
    statement = select(SegmentRow).where(SegmentRow.model == model, SegmentRow.dropped_at.is_(None))
    if since_us is not None:
        statement = statement.where(SegmentRow.last_at_us >= since_us)
    if until_us is not None:
        statement = statement.where(SegmentRow.first_at_us < until_us)
    return list((await session.scalars(statement.order_by(SegmentRow.id))).all())


async def segments_of_request(session: AsyncSession, request_id: bytes) -> list[SegmentRow]:
    """Objects that may hold the request."""
    statement = select(SegmentRow).where(
        SegmentRow.dropped_at.is_(None), SegmentRow.first_id <= request_id, SegmentRow.last_id >= request_id
    )
    return list((await session.scalars(statement.order_by(SegmentRow.id))).all())


async def newest_segments(session: AsyncSession, model: str, rows: int) -> list[SegmentRow]:
    """The newest objects of a model, enough for `rows` rows."""
    statement = (
        select(SegmentRow)
        .where(SegmentRow.model == model, SegmentRow.dropped_at.is_(None))
        .order_by(SegmentRow.last_at_us.desc())
        .limit(max(1, rows))
    )
    found, held = [], 0
    for row in await session.scalars(statement):
        found.append(row)
        held += row.rows
        # One more than needed: times of neighbours overlap.
        if held >= 2 * rows:
            break
    return found


async def crowds(session: AsyncSession, below: Small, at_least: int) -> list[tuple[str, str, str]]:
    """Model, version and layout of which there are at least `at_least` small objects."""
    kind = (SegmentRow.model, SegmentRow.version, SegmentRow.layout)
    statement = select(*kind).where(_is_small(below)).group_by(*kind).having(func.count() >= at_least)
    return [(model, version, layout) for model, version, layout in await session.execute(statement)]


async def small_segments(
    session: AsyncSession, model: str, version: str, layout: str, below: Small
) -> list[SegmentRow]:
    """The small objects of one kind, oldest first, locked until the transaction ends; those that another
    replica is joining are passed over."""
    statement = (
        select(SegmentRow)
        .where(
            _is_small(below),
            SegmentRow.model == model,
            SegmentRow.version == version,
            SegmentRow.layout == layout,
        )
        .order_by(SegmentRow.id)
        .limit(MAX_JOINED)
        .with_for_update(skip_locked=True)
    )
    return list((await session.scalars(statement)).all())


def _is_small(below: Small) -> ColumnElement[bool]:
    return and_(SegmentRow.dropped_at.is_(None), SegmentRow.rows < below.rows, SegmentRow.size < below.size)


async def drop_segments(session: AsyncSession, ids: Sequence[int], now: datetime) -> None:
    """From the commit on the objects do not count; running queries may still read them."""
    await session.execute(update(SegmentRow).where(SegmentRow.id.in_(ids)).values(dropped_at=now))


async def forgotten_segments(session: AsyncSession, now: datetime) -> list[SegmentRow]:
    """Some dropped objects that no query reads any more, locked until the transaction ends; those that
    another replica is deleting are passed over."""
    statement = (
        select(SegmentRow)
        .where(SegmentRow.dropped_at < now - KEPT_DROPPED)
        .limit(AT_ONCE)
        .with_for_update(skip_locked=True)
    )
    return list((await session.scalars(statement)).all())


async def forget_segments(session: AsyncSession, ids: Sequence[int]) -> None:
    """Remove what is known of deleted objects."""
    await session.execute(delete(SegmentRow).where(SegmentRow.id.in_(ids)))


async def forget_old_claims(session: AsyncSession, now: datetime) -> bool:
    """Drop some claims that no redelivery can reach any more; whether there may be more of them."""
    old = select(ClaimRow.batch_id).where(ClaimRow.claimed_at < now - KEPT_CLAIMS).limit(10 * AT_ONCE)
    dropped = delete(ClaimRow).where(ClaimRow.batch_id.in_(old)).returning(ClaimRow.batch_id)
    return len((await session.scalars(dropped)).all()) == 10 * AT_ONCE


async def signatures(session: AsyncSession) -> list[SignatureRow]:
    """Of every version that was ever served."""
    return list((await session.scalars(select(SignatureRow))).all())


async def keep_signature(session: AsyncSession, model: str, version: str, signature: bytes) -> None:
    """Replaces the one that was kept before."""
    row = insert(SignatureRow).values(model=model, version=version, signature=signature)
    await session.execute(
        row.on_conflict_do_update(
            index_elements=[SignatureRow.model, SignatureRow.version], set_={"signature": signature}
        )
    )


async def add_outcomes(session: AsyncSession, outcomes: Sequence[Outcome], now: datetime) -> int:
    """Keep outcomes; how many were not seen before. One that is said again was observed when it was said
    last, so 1, then 0, then 1 again ends as 1, in whatever order they come."""
    last: dict[bytes, Outcome] = {}
    for outcome in outcomes:
        known = last.get(outcome.event_id)
        if known is None or outcome.observed_at_us > known.observed_at_us:
            last[outcome.event_id] = outcome
    # Sorted, so that two replicas never wait for each other's rows.
    ordered = sorted(last.values(), key=lambda outcome: outcome.event_id)
    kinds = [outcome.WhichOneof("value") for outcome in ordered]
    result = await session.execute(
        _ADD_OUTCOMES,
        {
            "events": [outcome.event_id for outcome in ordered],
            "requests": [outcome.request_id for outcome in ordered],
            "models": [outcome.model for outcome in ordered],
            "metrics": [outcome.metric for outcome in ordered],
            "numbers": [
                o.number if kind == "number" else None for o, kind in zip(ordered, kinds, strict=True)
            ],
            "texts": [o.text if kind == "text" else None for o, kind in zip(ordered, kinds, strict=True)],
            "rows": [outcome.row for outcome in ordered],
            "times": [outcome.observed_at_us for outcome in ordered],
            "now": now,
        },
    )
    return sum(result.scalars())


async def outcomes_csv(
    session: AsyncSession, model: str, metric: str | None = None, since_us: int = 0
) -> bytes:
    """A model's outcomes, of one metric or of all, about requests answered since then: event id and request
    id in hex, metric, number, text, row, observed at. As CSV, which the server makes and a thread reads: a
    million rows would stop the loop."""
    connection = await (await session.connection()).get_raw_connection()
    driver: asyncpg.Connection = connection.driver_connection
    collected = bytearray()

    async def collect(data: bytes) -> None:
        collected.extend(data)

    await driver.copy_from_query(_OUTCOMES, model, metric, since_us - _EARLY_US, output=collect, format="csv")
    return bytes(collected)


async def outcomes_of_request(session: AsyncSession, request_id: bytes) -> list[OutcomeRow]:
    """Everything that was said about one request, oldest first."""
    statement = select(OutcomeRow).where(OutcomeRow.request_id == request_id)
    return list(
        (await session.scalars(statement.order_by(OutcomeRow.observed_at_us, OutcomeRow.event_id))).all()
    )
