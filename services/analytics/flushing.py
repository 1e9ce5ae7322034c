"""From records to Parquet: at once where a delivery is large, through the inbox where it is small."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq
import structlog
from headrace.v1.events_pb2 import PredictionBatch
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from services.analytics import repository
from services.analytics.columns import CORE, layout, to_table, without_payload
from services.analytics.metrics import Metrics
from services.analytics.segments import Segment, SegmentFiles, encode
from services.analytics.signatures import Signatures
from services.analytics.tables import SegmentRow
from services.common.clock import Clock
from services.common.db import transaction
from services.common.errors import HeadraceError
from services.common.objects import ArtifactStore

log = structlog.get_logger(__name__)

_PERIOD_S = 2.0
_TAKEN_AT_ONCE = 5_000
#: How often in a period claims are pruned.
_TIMES = 20


@dataclass(frozen=True, slots=True)
class Sizes:
    """When records become Parquet, and which objects are joined. `*_rows` are requests, `*_bytes` those of
    records and of the objects joined into one: what is written at once is held in memory."""

    direct_rows: int = 2_000
    direct_bytes: int = 8 << 20
    flush_rows: int = 5_000
    flush_bytes: int = 64 << 20
    flush_after_s: float = 10.0
    #: So long the records of a version wait for its signature, which says where the answer stands.
    signature_wait_s: float = 600.0
    segment_rows: int = 200_000
    join_segments: int = 8
    join_bytes: int = 256 << 20


class SegmentWriter:
    """Writes objects. An object counts from the commit of the transaction that names it, so one whose
    transaction failed is never read."""

    def __init__(self, store: ArtifactStore, signatures: Signatures, clock: Clock, metrics: Metrics) -> None:
        self._store = store
        self._signatures = signatures
        self._clock = clock
        self._metrics = metrics

    def knows(self, model: str, version: str) -> bool:
        """Whether it is known which output of the version is the answer. Objects are never written again, so
        records of another version had better wait."""
        return self._signatures.knows(model, version)

    def core(self, batch: PredictionBatch) -> bytes:
        """The record without inputs, and without outputs other than the answer."""
        answer = self._signatures.prediction_output(batch.model, batch.version)
        slim = without_payload(batch, answer)
        return slim.SerializeToString()

    async def put(self, batches: Sequence[PredictionBatch]) -> list[Segment]:
        """Write one object for each model version and layout among the records, without answers where it is
        not known which output they are. None of them counts before it is named."""
        groups: dict[tuple[str, str, str], list[PredictionBatch]] = defaultdict(list)
        for batch in batches:
            groups[batch.model, batch.version, layout(batch)].append(batch)
        segments = []
        for (model, version, kind), members in groups.items():
            output = self._signatures.prediction_output(model, version)
            segment, data = await asyncio.to_thread(_encode_batches, members, version, kind, output)
            await self._store.put(segment.object, data)
            segments.append(segment)
        return segments

    async def name(self, session: AsyncSession, segments: Sequence[Segment], why: str) -> None:
        """From the commit on the objects count."""
        for segment in segments:
            await repository.add_segment(session, segment, self._clock.now())
            self._metrics.segments.labels(why).inc()

    async def write_joined(
        self, session: AsyncSession, rows: Sequence[SegmentRow], files: Sequence[str]
    ) -> None:
        """One object instead of several of the same version and layout."""
        segment, data = await asyncio.to_thread(_encode_joined, rows, files)
        await self._store.put(segment.object, data)
        await self.name(session, [segment], "joined")
        await repository.drop_segments(session, [row.id for row in rows], self._clock.now())


class Flusher:
    """Turns a full or old inbox into objects, joins small objects, forgets what nobody needs. Several
    replicas may run it: each passes over what another has locked."""

    def __init__(
        self,
        engine: AsyncEngine,
        writer: SegmentWriter,
        files: SegmentFiles,
        store: ArtifactStore,
        signatures: Signatures,
        sizes: Sizes,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._engine = engine
        self._signatures = signatures
        self._writer = writer
        self._files = files
        self._store = store
        self._sizes = sizes
        self._clock = clock
        self._metrics = metrics
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="flusher")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            for step in (self._save, self.flush_due, self.join_small, self.forget_claims, self.forget):
                await _tried(step)
            await asyncio.sleep(_PERIOD_S)

    async def _save(self) -> int:
        await self._signatures.save(self._engine)
        return 0

    async def flush_due(self) -> int:
        """Write what the inbox has held for long enough or enough of; how many objects' worth."""
        async with transaction(self._engine) as session:
            waiting = await repository.waiting(session)
        self._metrics.inbox_rows.set(sum(item.rows for item in waiting))
        due = self._clock.now() - timedelta(seconds=self._sizes.flush_after_s)
        unknown_due = self._clock.now() - timedelta(seconds=self._sizes.signature_wait_s)
        flushed = 0
        for item in waiting:
            if not self._signatures.knows(item.model, item.version):
                if item.oldest > unknown_due:
                    continue
                log.warning("answers_left_out", model=item.model, version=item.version, rows=item.rows)
            full = item.rows >= self._sizes.flush_rows or item.size >= self._sizes.flush_bytes
            if full or item.oldest <= due:
                flushed += await _tried(partial(self._flush, item.model, item.version))
        return flushed

    async def _flush(self, model: str, version: str) -> int:
        async with transaction(self._engine) as session:
            values = await repository.take_from_inbox(
                session, model, version, _TAKEN_AT_ONCE, self._sizes.flush_bytes
            )
            if not values:
                return 0
            batches = await asyncio.to_thread(lambda: [PredictionBatch.FromString(value) for value in values])
            await self._writer.name(session, await self._writer.put(batches), "flushed")
        return 1

    async def join_small(self) -> int:
        """Join crowds of small objects; how many crowds."""
        small = repository.Small(self._sizes.segment_rows // 2, self._sizes.join_bytes // 2)
        async with transaction(self._engine) as session:
            crowds = await repository.crowds(session, small, self._sizes.join_segments)
        return sum([await _tried(partial(self._join, *crowd, small)) for crowd in crowds])

    async def _join(self, model: str, version: str, layout: str, small: repository.Small) -> int:
        async with transaction(self._engine) as session:
            rows = await repository.small_segments(session, model, version, layout, small)
            chosen = _up_to(rows, self._sizes.segment_rows, self._sizes.join_bytes)
            if len(chosen) < 2:
                return 0
            async with self._files.held([row.object for row in chosen]) as files:
                await self._writer.write_joined(session, chosen, files)
        return 1

    async def forget_claims(self) -> int:
        """Drop claims that no redelivery can reach, some at a time; how many times."""
        for times in range(1, _TIMES + 1):
            async with transaction(self._engine) as session:
                if not await repository.forget_old_claims(session, self._clock.now()):
                    return times
        return _TIMES

    async def forget(self) -> int:
        """Delete some of the objects that were joined into others; how many. What is deleted and not
        forgotten, since the transaction failed, is deleted again."""
        async with transaction(self._engine) as session:
            gone = await repository.forgotten_segments(session, self._clock.now())
            for row in gone:
                await self._store.delete(row.object)
            if gone:
                await repository.forget_segments(session, [row.id for row in gone])
        return len(gone)


async def _tried(step: Callable[[], Awaitable[int]]) -> int:
    """What `step` returns, 0 where it fails: one that fails again and again must stop neither the others nor
    the service. Nothing is lost by it, the next period tries again."""
    try:
        return await step()
    except HeadraceError as error:
        log.info("flush_later", reason=error.message)
    except Exception:
        log.exception("flush_failed")
    return 0


def _up_to(segments: Sequence[SegmentRow], rows: int, size: int) -> list[SegmentRow]:
    chosen: list[SegmentRow] = []
    for segment in segments:
        rows, size = rows - segment.rows, size - segment.size
        if chosen and (rows < 0 or size < 0):
            break
        chosen.append(segment)
    return chosen


def _encode_batches(
    batches: Sequence[PredictionBatch], version: str, kind: str, output: str | None
) -> tuple[Segment, bytes]:
    return encode(to_table(batches, output), version, kind, [batch.batch_id for batch in batches])


def _encode_joined(rows: Sequence[SegmentRow], files: Sequence[str]) -> tuple[Segment, bytes]:
    tables = [pq.read_table(file, partitioning=None) for file in files]
    joined = pa.concat_tables(tables, promote_options="default").unify_dictionaries()
    core = [name for name in CORE.names if name in joined.column_names]
    rest = [name for name in joined.column_names if name not in core]
    return encode(
        joined.select(core + rest), rows[0].version, rows[0].layout, [r.object.encode() for r in rows]
    )
