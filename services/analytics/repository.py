"""Reads and writes of the schema `analytics`. Every function works inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta

import asyncpg
from headrace.v1.events_pb2 import Outcome
from sqlalchemy import ColumnElement, and_, delete, func, or_, select, text, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from services.analytics.segments import Segment
from services.analytics.tables import InboxRow, LeaseRow, OutcomeRow, SegmentRow, SignatureRow, WrittenRow
from services.common.db import forget_claims

#: Longer than Kafka redelivers anything, or a spool waits for a broker.
KEPT_CLAIMS = timedelta(days=14)
#: Longer than any query reads objects that were joined meanwhile.
KEPT_DROPPED = timedelta(minutes=10)
#: Far longer than anybody takes from writing an object to naming it.
KEPT_UNNAMED = timedelta(hours=1)

#: What one transaction deletes, and what one object is joined of: each is bounded in time.
AT_ONCE = 100
MAX_JOINED = 1000

#: No outcome is observed before its request was answered, but for clocks that differ.
_EARLY_US = 600_000_000
#: A lease that would last so many times as long as one does was given before the clock was set back.
_LEASES_LAST = 4
#: No row of the session is brought up to date with what a statement changed.
_UNSEEN = {"synchronize_session": False}

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


@dataclass(frozen=True, slots=True)
class Waiting:
    """What the inbox holds of one model version. `size` is in bytes."""

    model: str
    version: str
    records: int
    rows: int
    size: int
    oldest: datetime
    newest: datetime


@dataclass(frozen=True, slots=True)
class Small:
    """An object below both is worth joining; `size` is in bytes."""

    rows: int
    size: int


@dataclass(frozen=True, slots=True)
class Tier:
    """Objects that are small enough for `below`, and not for `least`."""

    below: Small
    least: Small | None = None


async def hold(session: AsyncSession, name: str, holder: bytes, now: datetime, until: datetime) -> bool:
    """Whether `holder` is the one who does `name` until then: nobody else is, or its time is over. So it is
    where it would last far longer than leases do: then the clock was set back since it was given."""
    lease = insert(LeaseRow).values(name=name, holder=holder, until=until)
    unbelievable = now + _LEASES_LAST * abs(until - now)
    taken = lease.on_conflict_do_update(
        index_elements=[LeaseRow.name],
        set_={"holder": holder, "until": until},
        where=or_(LeaseRow.holder == holder, LeaseRow.until < now, LeaseRow.until > unbelievable),
    )
    return (await session.scalar(taken.returning(LeaseRow.name))) is not None


async def add_to_inbox(session: AsyncSession, rows: Sequence[InboxRow]) -> None:
    """Keep records until they become Parquet."""
    session.add_all(rows)
    await session.flush()


async def waiting(session: AsyncSession) -> list[Waiting]:
    """The inbox by model version."""
    statement = select(
        InboxRow.model,
        InboxRow.version,
        func.sum(InboxRow.records),
        func.sum(InboxRow.rows),
        func.sum(func.octet_length(InboxRow.value)),
        func.min(InboxRow.received_at),
        func.max(InboxRow.received_at),
    ).group_by(InboxRow.model, InboxRow.version)
    return [
        Waiting(model, version, int(records), int(rows), int(size), oldest, newest)
        for model, version, records, rows, size, oldest, newest in await session.execute(statement)
    ]


async def put_off_inbox(session: AsyncSession, leap: timedelta, now: datetime) -> None:
    """The clock was set forward by `leap`: what came before waits as if it had come so much later, no later
    than now."""
    later = func.least(InboxRow.received_at + leap, now)
    await session.execute(update(InboxRow).values(received_at=later).execution_options(**_UNSEEN))


async def restart_inbox(session: AsyncSession, now: datetime, ahead: datetime) -> None:
    """What came later than `ahead`, by a clock that was set back since, has come now."""
    late = update(InboxRow).where(InboxRow.received_at > ahead).values(received_at=now)
    await session.execute(late.execution_options(**_UNSEEN))


async def oldest_in_inbox(
    session: AsyncSession, model: str, version: str, records: int, size: int
) -> list[tuple[int, bytes]]:
    """The oldest chunks of a version, with their ids: at most so many records, of at most `size` bytes
    together, unless one chunk alone is larger."""
    statement = (
        select(InboxRow.id, InboxRow.records, func.octet_length(InboxRow.value))
        .where(InboxRow.model == model, InboxRow.version == version)
        .order_by(InboxRow.id)
        .limit(records)
    )
    taken: list[int] = []
    for id_, held, bytes_ in await session.execute(statement):
        records, size = records - held, size - bytes_
        if taken and (records < 0 or size < 0):
            break
        taken.append(id_)
    values = select(InboxRow.id, InboxRow.value).where(InboxRow.id.in_(taken)).order_by(InboxRow.id)
    return [(id_, value) for id_, value in await session.execute(values)] if taken else []


async def remove_from_inbox(session: AsyncSession, ids: Sequence[int]) -> int:
    """Forget chunks; how many of them were there."""
    removed = delete(InboxRow).where(InboxRow.id.in_(ids)).returning(InboxRow.id)
    return len((await session.scalars(removed)).all())


async def inbox(session: AsyncSession, model: str) -> list[bytes]:
    """Every record of a model that is not in Parquet yet, without the tensors that no statistic needs, in
    chunks."""
    statement = select(func.coalesce(InboxRow.core, InboxRow.value)).where(InboxRow.model == model)
    return list((await session.scalars(statement)).all())


async def inbox_of_request(session: AsyncSession, request_id: bytes) -> list[bytes]:
    """Chunks of the inbox with a record that names the request."""
    # position() may also hit across two ids; the reader looks again.
    statement = select(InboxRow.value).where(
        text("position(CAST(:wanted AS bytea) IN request_ids) > 0").bindparams(wanted=request_id)
    )
    return list((await session.scalars(statement)).all())


async def note_written(session: AsyncSession, objects: Sequence[str], now: datetime) -> None:
    """These objects will be written: what is never named of them is swept up later."""
    session.add_all([WrittenRow(object=name, since=now) for name in objects])
    await session.flush()


async def settle_written(session: AsyncSession, objects: Sequence[str]) -> bool:
    """The objects are named in this transaction; False where one was given up meanwhile."""
    noted = delete(WrittenRow).where(WrittenRow.object.in_(objects), WrittenRow.given_up.is_(False))
    return len((await session.scalars(noted.returning(WrittenRow.object))).all()) == len(objects)


async def give_up_written(session: AsyncSession, now: datetime) -> list[str]:
    """Some objects that were written long ago and never named; from the commit on nobody names them."""
    old = select(WrittenRow.object).where(WrittenRow.since < now - KEPT_UNNAMED).limit(AT_ONCE)
    given_up = update(WrittenRow).where(WrittenRow.object.in_(old)).values(given_up=True)
    return list((await session.scalars(given_up.returning(WrittenRow.object))).all())


async def forget_written(session: AsyncSession, objects: Sequence[str]) -> None:
    """Remove what is known of objects that were given up and deleted."""
    await session.execute(
        delete(WrittenRow).where(WrittenRow.object.in_(objects), WrittenRow.given_up.is_(True))
    )


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
    found: list[SegmentRow] = []
    for row in await session.scalars(statement):
        # What is newer than all that is left; twice as many, since a request may be tried more than once.
        if sum([one.rows for one in found if one.first_at_us >= row.last_at_us]) >= 2 * rows:
            break
        found.append(row)
    return found


async def crowds(session: AsyncSession, tier: Tier, at_least: int) -> list[tuple[str, str, str]]:
    """Model, version and layout of which there are at least `at_least` objects of the tier."""
    kind = (SegmentRow.model, SegmentRow.version, SegmentRow.layout)
    statement = select(*kind).where(_is_of(tier)).group_by(*kind).having(func.count() >= at_least)
    return [(model, version, layout) for model, version, layout in await session.execute(statement)]


async def small_segments(
    session: AsyncSession, model: str, version: str, layout: str, tier: Tier
) -> list[SegmentRow]:
    """The objects of the tier of one kind, oldest first."""
    statement = (
        select(SegmentRow)
        .where(
            _is_of(tier),
            SegmentRow.model == model,
            SegmentRow.version == version,
            SegmentRow.layout == layout,
        )
        .order_by(SegmentRow.id)
        .limit(MAX_JOINED)
    )
    return list((await session.scalars(statement)).all())


def _is_of(tier: Tier) -> ColumnElement[bool]:
    below, least = tier.below, tier.least
    counts = and_(SegmentRow.dropped_at.is_(None), SegmentRow.rows < below.rows, SegmentRow.size < below.size)
    if least is None:
        return counts
    return and_(counts, or_(SegmentRow.rows >= least.rows, SegmentRow.size >= least.size))


async def drop_segments(session: AsyncSession, ids: Sequence[int], now: datetime) -> int:
    """From the commit on the objects do not count; running queries may still read them. How many of them did
    count."""
    dropped = update(SegmentRow).where(SegmentRow.id.in_(ids), SegmentRow.dropped_at.is_(None))
    dropped = dropped.values(dropped_at=now).execution_options(synchronize_session=False)
    return len((await session.scalars(dropped.returning(SegmentRow.id))).all())


async def old_segments(session: AsyncSession, before: datetime) -> list[int]:
    """Some objects that hold no answer of that time or later, whatever clocks that were ahead say."""
    before_us = round(before.timestamp() * 1e6)
    written = and_(SegmentRow.first_at_us < before_us, SegmentRow.created_at < before)
    is_old = or_(SegmentRow.last_at_us < before_us, written)
    statement = select(SegmentRow.id).where(SegmentRow.dropped_at.is_(None), is_old)
    return list((await session.scalars(statement.order_by(SegmentRow.last_at_us).limit(AT_ONCE))).all())


async def segments_beyond(session: AsyncSession, size: int) -> list[int]:
    """Some of the oldest objects: those without which all others take at most `size` bytes."""
    held = select(func.coalesce(func.sum(SegmentRow.size), 0)).where(SegmentRow.dropped_at.is_(None))
    excess = int((await session.scalar(held)) or 0) - size
    if excess <= 0:
        return []
    oldest = select(SegmentRow.id, SegmentRow.size).where(SegmentRow.dropped_at.is_(None))
    chosen: list[int] = []
    for id_, bytes_ in await session.execute(oldest.order_by(SegmentRow.last_at_us).limit(AT_ONCE)):
        if excess <= 0:
            break
        chosen.append(id_)
        excess -= bytes_
    return chosen


async def forget_old_outcomes(session: AsyncSession, before: datetime) -> int:
    """Drop some outcomes that came before that time; how many."""
    old = select(OutcomeRow.event_id).where(OutcomeRow.received_at < before).limit(10 * AT_ONCE)
    dropped = delete(OutcomeRow).where(OutcomeRow.event_id.in_(old)).returning(OutcomeRow.event_id)
    return len((await session.scalars(dropped)).all())


async def forgotten_segments(session: AsyncSession, now: datetime) -> list[SegmentRow]:
    """Some dropped objects that no query reads any more."""
    statement = select(SegmentRow).where(SegmentRow.dropped_at < now - KEPT_DROPPED).limit(5 * AT_ONCE)
    return list((await session.scalars(statement)).all())


async def forget_segments(session: AsyncSession, ids: Sequence[int]) -> None:
    """Remove what is known of deleted objects."""
    await session.execute(delete(SegmentRow).where(SegmentRow.id.in_(ids)))


async def forget_old_claims(session: AsyncSession, now: datetime) -> bool:
    """Drop some claims that no redelivery can reach any more; whether there may be more of them."""
    return await forget_claims(session, now - KEPT_CLAIMS, 10 * AT_ONCE) == 10 * AT_ONCE


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
