"""Predictions become observations, observations windows, windows alerts: each record once."""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from google.protobuf.message import DecodeError
from headrace.v1.events_pb2 import PredictionBatch
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from services.common.bus.port import Malformed, Record
from services.common.clock import Clock
from services.common.db import OutboxRelay, transaction
from services.common.errors import InvalidArgument
from services.common.telemetry import Tracing, context_from_kafka
from services.drift import repository
from services.drift.alerting import Persistence
from services.drift.evaluation import Thresholds
from services.drift.metrics import Metrics
from services.drift.observations import Observations, observe
from services.drift.recording import record_window, tell
from services.drift.signatures import Signatures
from services.drift.stream import Cadence, Stream, Window
from services.drift.tables import AlertRow

log = structlog.get_logger(__name__)

#: For all records of one delivery together; far below the time after which Kafka takes partitions away.
_SIGNATURE_WAIT_S = 5.0
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Limits:
    """When a window is full, what it must show, and for how long."""

    cadence: Cadence
    thresholds: Thresholds
    persistence: Persistence


@dataclass(frozen=True, slots=True)
class _Seen:
    batch_id: bytes
    model: str
    version: str
    at_us: int
    observations: Observations


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

    async def on_predictions(self, records: Sequence[Record]) -> None:
        """Count every record once. Raises Malformed for one that cannot be read; anything else is retried."""
        started = self._clock.unix_us()
        until = asyncio.get_running_loop().time() + _SIGNATURE_WAIT_S
        seen = [await self._read(index, record, until) for index, record in enumerate(records)]
        counted = [item for item in seen if item is not None]
        if counted:
            changed = await self._count(counted)
            if changed:
                self._relay.wake()
        self._metrics.records.inc(len(records))
        self._trace(records, started)

    async def _read(self, index: int, record: Record, until: float) -> _Seen | None:
        try:
            batch = PredictionBatch.FromString(record.value or b"")
        except DecodeError as error:
            raise Malformed(index, "not a PredictionBatch") from error
        if len(batch.batch_id) != 16:
            raise Malformed(index, "batch_id is missing")
        if not (_NAME.fullmatch(batch.model) and _NAME.fullmatch(batch.version)):
            raise Malformed(index, "model or version is no name")
        if not batch.inputs:
            return None
        signature = await self._signatures.wait_for(batch.model, batch.version, until)
        if signature is None:
            self._metrics.unknown_versions.inc()
            log.warning("version_unknown", model=batch.model, version=batch.version)
            return None
        try:
            observations = await asyncio.to_thread(observe, batch, signature)
            if any("\0" in name for name in (*observations.numeric, *observations.categorical)):
                raise Malformed(index, "a tensor's name holds a NUL")
        except (InvalidArgument, ValueError, IndexError) as error:
            raise Malformed(index, str(error)) from error
        return _Seen(batch.batch_id, batch.model, batch.version, batch.answered_at_us, observations)

    async def _count(self, items: list[_Seen]) -> list[AlertRow]:
        changed: list[AlertRow] = []
        now = self._clock.now()
        async with transaction(self._engine) as session:
            fresh = await repository.claim(session, [item.batch_id for item in items], now)
            by_version: dict[tuple[str, str], list[tuple[Observations, int]]] = defaultdict(list)
            for item in items:
                if item.batch_id in fresh:
                    fresh.discard(item.batch_id)  # the same record twice in one delivery
                    by_version[item.model, item.version].append((item.observations, item.at_us))
            # In a fixed order, so that two replicas never wait for each other's locks.
            for (model, version), observations in sorted(by_version.items(), key=lambda entry: entry[0]):
                changed += await self._feed(session, model, version, observations)
            learned = dict(self._signatures.unsaved)
            await repository.store_signatures(session, learned)
            await tell(session, changed, now)
        for key in learned:
            self._signatures.unsaved.pop(key, None)
        return changed

    async def _feed(
        self, session: AsyncSession, model: str, version: str, seen: list[tuple[Observations, int]]
    ) -> list[AlertRow]:
        now = self._clock.now()
        row = await repository.lock_stream(session, model, version, now)

        def advance() -> tuple[Stream, list[Window]]:
            stream = repository.to_stream(row)
            return stream, stream.feed(seen, self._limits.cadence, self._limits.thresholds)

        stream, windows = await asyncio.to_thread(advance)
        repository.store_stream(row, stream, now)
        changed = []
        for window in windows:
            self._metrics.windows.labels(model).inc()
            worst = max((report.psi.value for report in window.reports), default=0.0)
            self._metrics.psi.labels(model, version).set(worst)
            changed += await record_window(
                session, model, version, window, self._limits.thresholds, self._limits.persistence, now
            )
        for alert in changed:
            log.info("alert", model=model, version=version, feature=alert.feature, message=alert.message)
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
