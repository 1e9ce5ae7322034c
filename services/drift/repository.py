"""Reads and writes of the schema `drift`. Every function works inside the caller's transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from headrace.v1.tensor_pb2 import Signature
from sqlalchemy import ColumnElement, delete, func, or_, select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from services.common.db import forget_claims
from services.common.errors import NotFound
from services.drift.draw import Draw
from services.drift.sample import Sample
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

#: Windows kept per model version.
KEPT_WINDOWS = 1000

#: Longer than Kafka redelivers anything.
KEPT_CLAIMS = timedelta(days=14)
KEPT_DONE = timedelta(days=30)
KEPT_ALERTS = timedelta(days=365)

#: Rows of each kind that one call of `forget_old` drops at most.
FORGOTTEN_AT_ONCE = 10_000

MAX_LISTED = 500

#: The longest that a delivery is put off after a failure, seconds; and what clocks of replicas may be apart,
#: or a delivery that is being posted is put off.
_LONGEST_S = 3600.0
_LEEWAY_S = 120.0


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
        await session.execute(insert(SignatureRow).values(rows).on_conflict_do_nothing())


async def lock_version(session: AsyncSession, model: str, version: str, now: datetime) -> datetime:
    """Lock the row of one model version until the transaction ends, and make it where it is missing; gives
    when it was written last. What it holds is not read: it may be a megabyte."""
    found = select(StreamRow.updated_at).where(StreamRow.model == model, StreamRow.version == version)
    found = found.with_for_update()
    at = await session.scalar(found)
    if at is None:
        fresh = insert(StreamRow).values(
            model=model,
            version=version,
            reference_source="stream",
            learning=Sample().to_bytes(),
            pane=Draw().to_bytes(),
            panes=[],
            updated_at=now,
        )
        await session.execute(fresh.on_conflict_do_nothing())
        at = (await session.scalars(found)).one()
    return at


async def lock_stream(session: AsyncSession, model: str, version: str, now: datetime) -> StreamRow:
    """The row of one model version, locked until the transaction ends; made where it is missing."""
    await lock_version(session, model, version, now)
    return await find_stream(session, model, version)


async def find_stream(session: AsyncSession, model: str, version: str) -> StreamRow:
    """Raises NotFound where nothing was ever seen of the version."""
    row = await session.get(StreamRow, (model, version))
    if row is None:
        raise NotFound(f"Nothing has been seen of {model}/{version} yet.", field="version")
    return row


async def streams(session: AsyncSession, model: str) -> Sequence[StreamRow]:
    """Every version of `model` that was ever seen."""
    found = select(StreamRow).where(StreamRow.model == model).order_by(StreamRow.version)
    return (await session.scalars(found)).all()


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


async def write_stream(session: AsyncSession, model: str, version: str, columns: Mapping[str, Any]) -> None:
    """Write the `changes` of a stream."""
    row = update(StreamRow).where(StreamRow.model == model, StreamRow.version == version).values(**columns)
    await session.execute(row.execution_options(synchronize_session=False))


async def add_window(session: AsyncSession, row: WindowRow) -> None:
    """Keep one comparison, and the last 1,000 of its version."""
    session.add(row)
    await session.flush()
    same = (WindowRow.model == row.model, WindowRow.version == row.version)
    oldest = select(WindowRow.id).where(*same).order_by(WindowRow.id.desc()).offset(KEPT_WINDOWS).limit(1)
    await session.execute(delete(WindowRow).where(*same, WindowRow.id <= oldest.scalar_subquery()))


async def windows(session: AsyncSession, model: str, version: str, limit: int) -> Sequence[WindowRow]:
    """The newest comparisons of a version, newest first."""
    found = select(WindowRow).where(WindowRow.model == model, WindowRow.version == version)
    return (await session.scalars(found.order_by(WindowRow.id.desc()).limit(limit))).all()


async def signals(session: AsyncSession, model: str, version: str) -> dict[tuple[str, str], SignalRow]:
    """What is remembered of a version, by feature and detector."""
    found = select(SignalRow).where(SignalRow.model == model, SignalRow.version == version)
    return {(row.feature, row.detector): row for row in await session.scalars(found)}


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
