"""Comparisons with shadow versions: taken in once, kept as totals an hour, read over any time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from google.protobuf.message import DecodeError
from headrace.v1.events_pb2 import ShadowComparison
from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from services.analytics.columns import MODEL
from services.analytics.metrics import Metrics
from services.analytics.shadow_totals import ShadowTotals
from services.analytics.tables import ShadowRow
from services.common.bus.port import Malformed, Record
from services.common.clock import Clock
from services.common.db import claim, transaction

#: Model, version, shadow version and the hour in which they were compared.
Key = tuple[str, str, str, datetime]

_MAX_VERSION = 64
_LATEST_US = 253_402_300_799_000_000
_FORGOTTEN_AT_ONCE = 1000


class ShadowConsumer:
    """Handles inference.shadows.v1 for the group `analytics`."""

    def __init__(
        self,
        engine: AsyncEngine,
        clock: Clock,
        metrics: Metrics,
        seen: Callable[[str], None] = lambda _model: None,
    ) -> None:
        """`seen` is told which models there is something new of."""
        self._seen = seen
        self._engine = engine
        self._clock = clock
        self._metrics = metrics

    async def on_comparisons(self, records: Sequence[Record]) -> None:
        """Count every record once. Raises Malformed for one that cannot be read; anything else is retried."""
        given = await asyncio.to_thread(_read, records)
        async with transaction(self._engine) as session:
            repeated = await claim(session, list(given), self._clock.now())
            merged: dict[Key, ShadowTotals] = {}
            for batch_id, (key, totals) in given.items():
                if batch_id not in repeated:
                    merged.setdefault(key, ShadowTotals()).merge(totals)
            # In a fixed order, so that two replicas never wait for each other's rows.
            for key in sorted(merged):
                await _add(session, key, merged[key])
        for model in {key[0] for key in merged}:
            self._seen(model)
        self._metrics.records.labels("shadows").inc(len(records))
        self._metrics.repeated.labels("shadows").inc(len(records) - len(given) + len(repeated))


async def totals_of(
    engine: AsyncEngine,
    model: str,
    version: str | None,
    shadow_version: str | None,
    since: datetime,
    until: datetime | None,
) -> dict[tuple[str, str], ShadowTotals]:
    """By version and shadow version, over the hours that begin in that time."""
    statement = select(ShadowRow).where(ShadowRow.model == model, ShadowRow.hour >= _hour(since))
    if until is not None:
        statement = statement.where(ShadowRow.hour < until)
    if version is not None:
        statement = statement.where(ShadowRow.version == version)
    if shadow_version is not None:
        statement = statement.where(ShadowRow.shadow_version == shadow_version)
    async with transaction(engine) as session:
        rows = (await session.scalars(statement.order_by(ShadowRow.version, ShadowRow.shadow_version))).all()
    found: dict[tuple[str, str], ShadowTotals] = {}
    for row in rows:
        key = (row.version, row.shadow_version)
        found.setdefault(key, ShadowTotals()).merge(ShadowTotals.from_json(row.totals))
    return found


async def forget_old_shadows(session: AsyncSession, before: datetime) -> int:
    """Drop some hours before that time; how many."""
    key = (ShadowRow.model, ShadowRow.version, ShadowRow.shadow_version, ShadowRow.hour)
    old = select(*key).where(ShadowRow.hour < before).limit(_FORGOTTEN_AT_ONCE).subquery()
    dropped = delete(ShadowRow).where(
        ShadowRow.model == old.c.model,
        ShadowRow.version == old.c.version,
        ShadowRow.shadow_version == old.c.shadow_version,
        ShadowRow.hour == old.c.hour,
    )
    found = await session.execute(
        dropped.returning(ShadowRow.hour).execution_options(synchronize_session=False)
    )
    return len(found.all())


async def _add(session: AsyncSession, key: Key, totals: ShadowTotals) -> None:
    model, version, shadow_version, hour = key
    place = {"model": model, "version": version, "shadow_version": shadow_version, "hour": hour}
    empty = insert(ShadowRow).values(**place, totals=ShadowTotals().to_json())
    await session.execute(empty.on_conflict_do_nothing())
    row = await session.get_one(ShadowRow, place, with_for_update=True)
    held = ShadowTotals.from_json(row.totals)
    held.merge(totals)
    row.totals = held.to_json()


def _read(records: Sequence[Record]) -> dict[bytes, tuple[Key, ShadowTotals]]:
    found = {}
    for index, record in enumerate(records):
        try:
            comparison = ShadowComparison.FromString(record.value or b"")
            found[comparison.batch_id] = (_key(comparison), ShadowTotals.of(comparison))
        except (DecodeError, ValueError) as error:
            raise Malformed(index, str(error) or "not a ShadowComparison") from error
    return found


def _key(record: ShadowComparison) -> Key:
    """Raises ValueError where the record cannot be kept."""
    if len(record.batch_id) != 16 or not record.request_ids:
        raise ValueError("batch_id or request_ids are missing or cut")
    if not MODEL.fullmatch(record.model):
        raise ValueError("model is no name")
    for version in (record.version, record.shadow_version):
        if not 0 < len(version) <= _MAX_VERSION or "\0" in version:
            raise ValueError("version or shadow_version is no name")
    if any("\0" in output.name for output in record.outputs):
        raise ValueError("an output has no proper name")
    if not 0 < record.compared_at_us <= _LATEST_US:
        raise ValueError("compared_at_us is no time")
    at = datetime.fromtimestamp(record.compared_at_us / 1e6, UTC)
    return record.model, record.version, record.shadow_version, _hour(at)


def _hour(at: datetime) -> datetime:
    return at - timedelta(minutes=at.minute, seconds=at.second, microseconds=at.microsecond)
