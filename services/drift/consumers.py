"""Predictions become observations, observations windows, windows alerts: each record once."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from random import randrange
from typing import Any, Final

import structlog
from google.protobuf.message import DecodeError
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Signature
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from services.common.bus.port import Malformed, Record
from services.common.clock import Clock
from services.common.db import OutboxRelay, claim, transaction
from services.common.telemetry import Tracing, context_from_kafka
from services.drift import repository
from services.drift.alerting import Persistence
from services.drift.evaluation import Thresholds
from services.drift.metrics import Metrics
from services.drift.reading import Numbered, observe_all
from services.drift.recording import record_windows, tell
from services.drift.signatures import Signatures, VersionKey
from services.drift.stream import Cadence, Stream, Window
from services.drift.tables import AlertRow

log = structlog.get_logger(__name__)

#: For all records of one delivery together; far below the time after which Kafka takes partitions away.
_SIGNATURE_WAIT_S = 5.0
#: Streams of versions that nothing was heard of for so long are read from their rows again: each takes
#: megabytes, and versions come and go.
_REMEMBERED: Final = timedelta(minutes=10)
#: Versions that go on together, in one thread and one statement, with what is written of them in memory.
_AT_ONCE: Final = 50
#: Windows of a version between two times that its oldest are dropped.
_DROP_AFTER = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Limits:
    """When a window is full, what it must show, and for how long."""

    cadence: Cadence
    thresholds: Thresholds
    persistence: Persistence


class PredictionConsumer:
    """Handles inference.predictions.v1 for the group `drift`."""

    def __init__(
        self,
        engine: AsyncEngine,
        signatures: Signatures,
        relay: OutboxRelay,
        limits: Limits,
        clock: Clock,
        tracing: Tracing,
        metrics: Metrics,
    ) -> None:
        self._engine = engine
        self._signatures = signatures
        self._relay = relay
        self._limits = limits
        self._clock = clock
        self._tracing = tracing
        self._metrics = metrics
        #: Streams as they were committed last, with the time in their row; a row changed elsewhere is read.
        self._streams: dict[VersionKey, tuple[datetime, Stream]] = {}
        #: Windows since its oldest were dropped; begins anywhere, since all versions begin together.
        self._closed: dict[VersionKey, int] = {}

    async def on_predictions(self, records: Sequence[Record]) -> None:
        """Count every record once. Raises Malformed for one that cannot be read; anything else is retried."""
        started = self._clock.unix_us()
        by_version: dict[VersionKey, list[Numbered]] = defaultdict(list)
        for index, record in enumerate(records):
            batch = _parse(index, record)
            if batch.inputs and not batch.exclude_from_drift:
                by_version[batch.model, batch.version].append(Numbered(index, batch))
        signatures = await self._signatures_of(by_version)
        known = {key: items for key, items in by_version.items() if key in signatures}
        if known and await self._count(known, signatures):
            self._relay.wake()
        self._metrics.records.inc(len(records))
        self._trace(records, started)

    async def _signatures_of(
        self, by_version: Mapping[VersionKey, Sequence[Numbered]]
    ) -> dict[VersionKey, Signature]:
        """Signatures of all versions, waited for together; those that stay unknown are missing."""
        until = asyncio.get_running_loop().time() + _SIGNATURE_WAIT_S
        found = {}
        for (model, version), items in by_version.items():
            signature = await self._signatures.wait_for(model, version, until)
            if signature is None:
                self._metrics.unknown_versions.inc(len(items))
                log.warning("version_unknown", model=model, version=version, records=len(items))
            else:
                found[model, version] = signature
        return found

    async def _count(
        self, known: Mapping[VersionKey, Sequence[Numbered]], signatures: Mapping[VersionKey, Signature]
    ) -> list[AlertRow]:
        advanced: dict[VersionKey, tuple[datetime, Stream]] = {}
        now = self._clock.now()
        async with transaction(self._engine) as session:
            repeated = await claim(
                session, [item.batch.batch_id for items in known.values() for item in items], now
            )
            unseen: dict[VersionKey, list[Numbered]] = defaultdict(list)
            for key in sorted(known):
                for item in known[key]:
                    if item.batch.batch_id not in repeated:
                        repeated.add(item.batch.batch_id)  # it may come twice in one delivery
                        unseen[key].append(item)
            keys, closed = list(unseen), []
            written_at = await repository.lock_versions(session, keys, now)
            for begin in range(0, len(keys), _AT_ONCE):
                streams = await self._streams_of(session, keys[begin : begin + _AT_ONCE], written_at)
                closed += await self._feed(session, streams, unseen, signatures, now)
                advanced |= {key: (now, stream) for key, stream in streams.items()}
            changed = await self._record(session, closed, now)
            learned = dict(self._signatures.unsaved)
            await repository.store_signatures(session, learned)
            await tell(session, changed, now)
        for key in learned:
            self._signatures.unsaved.pop(key, None)
        self._streams.update(advanced)
        for key in [key for key, (at, _) in self._streams.items() if at < now - _REMEMBERED]:
            del self._streams[key]
            self._closed.pop(key, None)
        return changed

    async def _streams_of(
        self, session: AsyncSession, keys: Sequence[VersionKey], written_at: Mapping[VersionKey, datetime]
    ) -> dict[VersionKey, Stream]:
        """Taken out until the transaction has committed: what did not happen is read again from its row."""
        streams = {}
        for key in keys:
            at, stream = self._streams.pop(key, (None, None))
            if stream is None or at != written_at[key]:
                row = await repository.find_stream(session, *key)
                stream = await asyncio.to_thread(repository.to_stream, row)
            streams[key] = stream
        return streams

    async def _feed(
        self,
        session: AsyncSession,
        streams: Mapping[VersionKey, Stream],
        unseen: Mapping[VersionKey, Sequence[Numbered]],
        signatures: Mapping[VersionKey, Signature],
        now: datetime,
    ) -> list[tuple[VersionKey, Window]]:
        def advance() -> tuple[list[tuple[VersionKey, Window]], dict[VersionKey, dict[str, Any]]]:
            windows, columns = [], {}
            for key, stream in streams.items():
                written = repository.Written.of(stream)
                seen = observe_all(unseen[key], signatures[key])
                fed = stream.feed(seen, self._limits.cadence, self._limits.thresholds)
                windows += [(key, window) for window in fed]
                columns[key] = repository.changes(stream, written, now)
            return windows, columns

        windows, columns = await asyncio.to_thread(advance)
        await repository.write_streams(session, columns)
        return windows

    async def _record(
        self, session: AsyncSession, closed: Sequence[tuple[VersionKey, Window]], now: datetime
    ) -> list[AlertRow]:
        full = []
        for (model, version), window in closed:
            count = self._closed.get((model, version), randrange(_DROP_AFTER)) + 1
            self._closed[model, version] = count % _DROP_AFTER
            if count >= _DROP_AFTER:
                full.append((model, version))
            self._metrics.windows.labels(model).inc()
            if not self._signatures.is_gone(model, version):
                worst = max((report.psi.value for report in window.reports), default=0.0)
                self._metrics.show_psi(model, version, worst)
        limits = self._limits
        changed = await record_windows(session, closed, limits.thresholds, limits.persistence, now)
        await repository.forget_windows(session, full)
        for alert in changed:
            log.info(
                "alert",
                model=alert.model,
                version=alert.version,
                feature=alert.feature,
                message=alert.message,
            )
        return changed

    def _trace(self, records: Sequence[Record], started_us: int) -> None:
        """One span per record of a sampled trace, so that the trace reaches from request to here."""
        if not self._tracing.enabled:
            return
        for record in records:
            parent = context_from_kafka(record.headers)
            if parent is not None:
                self._tracing.record_span(
                    "drift.consume",
                    started_us * 1000,
                    self._clock.unix_us() * 1000,
                    parent,
                    attributes={"messaging.destination.name": record.topic},
                )


def _parse(index: int, record: Record) -> PredictionBatch:
    try:
        batch = PredictionBatch.FromString(record.value or b"")
    except DecodeError as error:
        raise Malformed(index, "not a PredictionBatch") from error
    if len(batch.batch_id) != 16:
        raise Malformed(index, "batch_id is missing")
    if not (_NAME.fullmatch(batch.model) and _NAME.fullmatch(batch.version)):
        raise Malformed(index, "model or version is no name")
    return batch
