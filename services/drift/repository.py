"""Reads and writes of the schema `drift`. Every function works inside the caller's transaction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from headrace.v1.tensor_pb2 import Signature
from sqlalchemy import ARRAY, ColumnElement, Text, cast, delete, func, insert, or_, select, text, true, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute, aliased

from services.common.db import forget_claims
from services.common.errors import NotFound
from services.drift.draw import Draw
from services.drift.sample import HEAD_BYTES, Sample, rows_of
from services.drift.signatures import VersionKey
from services.drift.stream import Stream
from services.drift.tables import (
    AlertRow,
    DeliveryRow,
    SignalRow,
    SignatureRow,
    StreamRow,
    WebhookRow,
    WindowRow,
)

#: Windows kept per model version, at least.
KEPT_WINDOWS = 1000

#: Longer than Kafka redelivers anything.
KEPT_CLAIMS = timedelta(days=14)
KEPT_DONE = timedelta(days=30)
KEPT_ALERTS = timedelta(days=365)
#: After its last prediction, a version that is served no more: it may be rolled back to.
KEPT_GONE = timedelta(days=90)

#: Rows of each kind that one call of `forget_old` drops at most.
FORGOTTEN_AT_ONCE = 10_000

MAX_LISTED = 500

#: The longest that a delivery is put off after a failure, seconds; and what clocks of replicas may be apart,
#: or a delivery that is being posted is put off.
_LONGEST_S = 3600.0
_LEEWAY_S = 120.0

_GIVEN = "unnest(CAST(:models AS text[]), CAST(:versions AS text[])) AS given (model, version)"
#: In one order everywhere, so that two replicas never wait for each other's locks: all that is missing is
#: made before any row is locked.
_MAKE = text(
    f"""
    INSERT INTO streams (model, version, reference_source, learning, pane, panes, updated_at)
    SELECT given.model, given.version, 'stream', :learning, :pane, '{{}}', CAST(:now AS timestamptz)
    FROM {_GIVEN}
    WHERE NOT EXISTS (
        SELECT FROM streams WHERE streams.model = given.model AND streams.version = given.version
    )
    ORDER BY given.model COLLATE "C", given.version COLLATE "C"
    ON CONFLICT DO NOTHING
    """  # noqa: S608 - nothing of it comes from elsewhere
)
_LOCK = text(
    f"""
    SELECT streams.model, streams.version, streams.updated_at
    FROM streams JOIN {_GIVEN} USING (model, version)
    ORDER BY streams.model COLLATE "C", streams.version COLLATE "C"
    FOR UPDATE OF streams
    """  # noqa: S608
)
_FORGET_WINDOWS = text(
    f"""
    DELETE FROM windows USING (
        SELECT model, version, (
            SELECT id FROM windows AS newer
            WHERE newer.model = given.model AND newer.version = given.version
            ORDER BY id DESC OFFSET :kept LIMIT 1
        ) AS last FROM {_GIVEN}
    ) AS oldest
    WHERE windows.model = oldest.model AND windows.version = oldest.version AND windows.id <= oldest.last
    """  # noqa: S608
)


async def forget_old(session: AsyncSession, now: datetime) -> int:
    """Drop some claims that no redelivery can reach any more, deliveries long done and alerts long ended.

    Gives how many rows; called until that is none, so that no statement runs for long.
    """
    done = DeliveryRow.delivered_at < now - KEPT_DONE
    ended = AlertRow.resolved_at < now - KEPT_ALERTS
    counts = [
        await forget_claims(session, now - KEPT_CLAIMS, FORGOTTEN_AT_ONCE),
        await _delete_some(session, DeliveryRow.id, done),
        await _delete_some(session, AlertRow.alert_id, ended),
    ]
    return sum(counts)


async def forget_gone(
    session: AsyncSession, served: Set[VersionKey], now: datetime
) -> Sequence[AlertRow] | None:
    """Drop what is kept of one version that is not among `served` and of which nothing was heard for long;
    gives the open alerts, which end by it. None where there is no such version."""
    quiet = StreamRow.updated_at < now - KEPT_GONE
    for model, version in await session.execute(select(StreamRow.model, StreamRow.version).where(quiet)):
        if (model, version) not in served:
            # A prediction may have come since: then its row is no longer quiet once it is locked.
            stream = delete(StreamRow).where(StreamRow.model == model, StreamRow.version == version, quiet)
            if await session.scalar(stream.returning(StreamRow.version)) is not None:
                windows = delete(WindowRow).where(WindowRow.model == model, WindowRow.version == version)
                await session.execute(windows)
                return await forget_signals(session, model, version, now)
    return None


async def _delete_some(
    session: AsyncSession, key: InstrumentedAttribute[Any], old: ColumnElement[bool]
) -> int:
    some = select(key).where(old).limit(FORGOTTEN_AT_ONCE)
    dropped = await session.execute(delete(key.class_).where(key.in_(some)).returning(key))
    return len(dropped.all())


async def signatures(session: AsyncSession) -> Sequence[tuple[str, str, bytes]]:
    """Model, version and signature of everything that was ever served."""
    rows = await session.execute(select(SignatureRow.model, SignatureRow.version, SignatureRow.signature))
    return [(model, version, signature) for model, version, signature in rows]


async def store_signatures(session: AsyncSession, signatures: Mapping[tuple[str, str], Signature]) -> None:
    """Keep `signatures`; those that are kept already stay as they are."""
    rows = [
        {"model": model, "version": version, "signature": signature.SerializeToString()}
        for (model, version), signature in sorted(signatures.items(), key=lambda item: item[0])
    ]
    if rows:
        await session.execute(upsert(SignatureRow).values(rows).on_conflict_do_nothing())


def _given(keys: Collection[VersionKey]) -> dict[str, Any]:
    return {"models": [model for model, _ in keys], "versions": [version for _, version in keys]}


async def lock_versions(
    session: AsyncSession, keys: Collection[VersionKey], now: datetime
) -> dict[VersionKey, datetime]:
    """Lock the rows of model versions until the transaction ends, and make those that are missing; gives when
    each was written last. What they hold is not read: each may be a megabyte. Call it once."""
    given = _given(keys)
    fresh = {"learning": Sample().to_bytes(), "pane": Draw().to_bytes(), "now": now}
    found: dict[VersionKey, datetime] = {}
    while len(found) < len(keys):  # again where a row was dropped in between
        await session.execute(_MAKE, given | fresh)
        locked = await session.execute(_LOCK, given)
        found = {(model, version): at for model, version, at in locked}
    return found


async def lock_stream(session: AsyncSession, model: str, version: str, now: datetime) -> StreamRow:
    """The row of one model version, locked until the transaction ends; made where it is missing."""
    await lock_versions(session, [(model, version)], now)
    return await find_stream(session, model, version)


async def find_stream(session: AsyncSession, model: str, version: str) -> StreamRow:
    """Raises NotFound where nothing was ever seen of the version."""
    row = await session.get(StreamRow, (model, version))
    if row is None:
        raise _unseen(model, version)
    return row


async def check_seen(session: AsyncSession, model: str, version: str) -> None:
    """Raises NotFound where nothing was ever seen of the version."""
    seen = select(StreamRow.version).where(StreamRow.model == model, StreamRow.version == version)
    if await session.scalar(seen) is None:
        raise _unseen(model, version)


def _unseen(model: str, version: str) -> NotFound:
    return NotFound(f"Nothing has been seen of {model}/{version} yet.", field="version")


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a version is. `reference_rows` is None while the reference is learned, of which there are
    `learned_rows`; `open_alerts` are those that nobody has acknowledged."""

    version: str
    reference_source: str
    reference_rows: int | None
    learned_rows: int
    updated_at: datetime
    window: WindowRow | None
    open_alerts: int


async def standings(session: AsyncSession, model: str) -> list[Standing]:
    """Every version of `model` that was ever seen. Of samples no more is read than their number of rows."""
    newest = select(WindowRow).where(
        WindowRow.model == StreamRow.model, WindowRow.version == StreamRow.version
    )
    window = aliased(WindowRow, newest.order_by(WindowRow.id.desc()).limit(1).lateral())
    alerts = select(func.count()).where(
        AlertRow.model == StreamRow.model,
        AlertRow.version == StreamRow.version,
        AlertRow.resolved_at.is_(None),
        AlertRow.acknowledged_at.is_(None),
    )
    found = (
        select(
            StreamRow.version,
            StreamRow.reference_source,
            func.substring(StreamRow.reference, 1, HEAD_BYTES),
            func.substring(StreamRow.learning, 1, HEAD_BYTES),
            StreamRow.updated_at,
            window,
            alerts.scalar_subquery(),
        )
        .outerjoin_from(StreamRow, window, true())
        .where(StreamRow.model == model)
        .order_by(StreamRow.version)
    )
    return [
        Standing(version, source, rows_of(head) if head else None, rows_of(learned), at, last, alerts)
        for version, source, head, learned, at, last, alerts in await session.execute(found)
    ]


def to_stream(row: StreamRow) -> Stream:
    """What the row holds."""
    return Stream(
        reference=Sample.from_bytes(row.reference) if row.reference else None,
        learning=Sample.from_bytes(row.learning),
        pane=Draw.from_bytes(row.pane),
        panes=[Draw.from_bytes(data) for data in row.panes],
    )


@dataclass(frozen=True, slots=True)
class Written:
    """The parts of a stream that its row holds already, apart from the open ends, which always change."""

    reference: Sample | None
    learning: Sample
    panes: Sequence[Draw]

    @classmethod
    def of(cls, stream: Stream) -> Written:
        return cls(stream.reference, stream.learning, stream.panes)


def changes(stream: Stream, written: Written, now: datetime) -> dict[str, Any]:
    """Columns of the row that are to be written after `stream` has gone on; a reference that was just learned
    is dated `now`."""
    columns: dict[str, Any] = {"updated_at": now}
    if stream.reference is not written.reference:
        assert stream.reference is not None  # noqa: S101 - a stream that goes on never forgets its reference
        columns |= {"reference": stream.reference.to_bytes(), "reference_at": now}
    if stream.reference is None or stream.learning is not written.learning:
        columns["learning"] = stream.learning.to_bytes()
    if stream.reference is not None:
        columns["pane"] = stream.pane.to_bytes()
    if stream.panes is not written.panes:
        columns["panes"] = [pane.to_bytes() for pane in stream.panes]
    return columns


async def write_streams(session: AsyncSession, changed: Mapping[VersionKey, Mapping[str, Any]]) -> None:
    """Write the `changes` of streams."""
    rows = [{"model": key[0], "version": key[1], **columns} for key, columns in changed.items()]
    if rows:
        # Those of the same columns are one statement.
        await session.execute(update(StreamRow), sorted(rows, key=sorted))


async def add_windows(session: AsyncSession, rows: Sequence[Mapping[str, Any]]) -> None:
    """Keep comparisons."""
    await session.execute(insert(WindowRow), rows)


async def forget_windows(session: AsyncSession, keys: Collection[VersionKey]) -> None:
    """Drop all but the last 1,000 comparisons of versions. It takes milliseconds for each of them."""
    if keys:
        await session.execute(_FORGET_WINDOWS, _given(keys) | {"kept": KEPT_WINDOWS})


async def windows(session: AsyncSession, model: str, version: str, limit: int) -> Sequence[WindowRow]:
    """The newest comparisons of a version, newest first."""
    found = select(WindowRow).where(WindowRow.model == model, WindowRow.version == version)
    return (await session.scalars(found.order_by(WindowRow.id.desc()).limit(limit))).all()


async def signals(
    session: AsyncSession, keys: Collection[VersionKey]
) -> dict[VersionKey, dict[tuple[str, str], SignalRow]]:
    """What is remembered of versions, by feature and detector."""
    given = func.unnest(*(cast(part, ARRAY(Text)) for part in _given(keys).values()))
    asked = given.table_valued("model", "version").render_derived()
    joined = (SignalRow.model == asked.c.model) & (SignalRow.version == asked.c.version)
    found: dict[VersionKey, dict[tuple[str, str], SignalRow]] = defaultdict(dict)
    for row in await session.scalars(select(SignalRow).join(asked, joined)):
        found[row.model, row.version][row.feature, row.detector] = row
    return found


async def forget_signals(session: AsyncSession, model: str, version: str, now: datetime) -> list[AlertRow]:
    """With a new reference nothing that was remembered holds; gives the open alerts, which end by it."""
    await session.execute(delete(SignalRow).where(SignalRow.model == model, SignalRow.version == version))
    open_alerts = select(AlertRow).where(
        AlertRow.model == model, AlertRow.version == version, AlertRow.resolved_at.is_(None)
    )
    ended = list(await session.scalars(open_alerts))
    for alert in ended:
        alert.resolved_at = alert.updated_at = now
    return ended


async def alerts(
    session: AsyncSession, model: str | None, state: str | None, limit: int
) -> Sequence[AlertRow]:
    """The newest alerts first; `state` is "open", "acknowledged" or "resolved"."""
    found = select(AlertRow).order_by(AlertRow.opened_at.desc(), AlertRow.alert_id).limit(limit)
    if model is not None:
        found = found.where(AlertRow.model == model)
    if state == "resolved":
        found = found.where(AlertRow.resolved_at.is_not(None))
    elif state is not None:
        acknowledged = AlertRow.acknowledged_at
        wanted = acknowledged.is_not(None) if state == "acknowledged" else acknowledged.is_(None)
        found = found.where(AlertRow.resolved_at.is_(None), wanted)
    return (await session.scalars(found)).all()


async def find_alert(session: AsyncSession, alert_id: bytes) -> AlertRow:
    """Raises NotFound."""
    row = await session.get(AlertRow, alert_id)
    if row is None:
        raise NotFound("There is no alert of this id.", field="alert_id")
    return row


async def webhooks(session: AsyncSession, model: str | None = None) -> Sequence[WebhookRow]:
    """All of them, or those that want the alerts of `model`."""
    found = select(WebhookRow).order_by(WebhookRow.created_at)
    if model is not None:
        found = found.where(or_(WebhookRow.model.is_(None), WebhookRow.model == model))
    return (await session.scalars(found)).all()


async def due_deliveries(session: AsyncSession, now: datetime, limit: int) -> Sequence[DeliveryRow]:
    """Deliveries whose time has come, locked; those that another replica is at are left to it. One that would
    wait for far longer than it was put off was so before the clock was set back, and is due."""
    put_off_s = func.least(func.power(2, func.least(DeliveryRow.attempts, 16)), _LONGEST_S) + _LEEWAY_S
    due = or_(
        DeliveryRow.next_at <= now,
        DeliveryRow.next_at > now + func.make_interval(0, 0, 0, 0, 0, 0, put_off_s),
    )
    found = select(DeliveryRow).where(DeliveryRow.delivered_at.is_(None), due)
    found = found.order_by(DeliveryRow.next_at).limit(limit).with_for_update(skip_locked=True)
    return (await session.scalars(found)).all()


async def open_alert_count(session: AsyncSession) -> int:
    """Alerts that have not ended."""
    counted = select(func.count()).select_from(AlertRow).where(AlertRow.resolved_at.is_(None))
    return (await session.scalar(counted)) or 0
