"""From records to Parquet: at once where a delivery is large, through the inbox where it is small."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Self

import structlog
from headrace.v1.events_pb2 import PredictionBatch
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from services.analytics import repository
from services.analytics.chunks import unpack
from services.analytics.columns import Logged, drop_payload, layout, to_table
from services.analytics.joining import encode_joined
from services.analytics.metrics import Metrics
from services.analytics.segments import Segment, SegmentFiles, encode
from services.analytics.shadows import forget_old_shadows
from services.analytics.signatures import Signatures
from services.analytics.tables import SegmentRow
from services.common.clock import Clock, Leaps
from services.common.db import transaction
from services.common.errors import Aborted, HeadraceError
from services.common.ids import new_id
from services.common.objects import ArtifactStore
from services.common.tasks import ended

log = structlog.get_logger(__name__)

_PERIOD_S = 2.0
#: The same where nothing came for a while.
_QUIET_PERIOD_S, _QUIET_AFTER_S = 5.0, 30.0
_TAKEN_AT_ONCE = 5_000
#: How many times smaller the objects of the lower tier are.
_TIER = 8
#: How often in a row something is dropped that is dropped in pieces.
_TIMES = 20
#: What is seldom needed is done every so many periods.
_RARE = 10
#: So long a replica that vanished keeps the others waiting; meanwhile records wait in the inbox.
_LEASE = timedelta(seconds=30)
#: What clocks of replicas may be apart. Records that came later than this from now came before the clock was
#: set back.
_CLOCKS_APART = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class Sizes:
    """When records become Parquet, and which objects are joined. `*_rows` are requests, `*_bytes` those of
    records and of the objects joined into one: what is written at once is held in memory."""

    direct_rows: int = 2_000
    direct_bytes: int = 8 << 20
    #: What is taken in at a time.
    taken_bytes: int = 12 << 20
    flush_rows: int = 5_000
    flush_bytes: int = 64 << 20
    flush_after_s: float = 10.0
    #: So long the records of a version wait for its signature, which says where the answer stands.
    signature_wait_s: float = 600.0
    segment_rows: int = 200_000
    join_segments: int = 8
    join_bytes: int = 256 << 20

    def tiers(self) -> tuple[repository.Tier, ...]:
        """Objects are joined with others of their tier only: what is nearly large enough is not written again
        for every few small ones."""
        middle = self._joined_below()
        least = repository.Small(middle.rows // _TIER, middle.size // _TIER)
        return repository.Tier(least), repository.Tier(middle, least)

    def lasts(self, rows: int, size: int) -> bool:
        """Whether an object like this is joined with no other."""
        below = self._joined_below()
        return rows >= below.rows or size >= below.size

    def _joined_below(self) -> repository.Small:
        return repository.Small(self.segment_rows // 2, self.join_bytes // 2)


@dataclass(frozen=True, slots=True)
class Retention:
    """How long what was logged is kept: predictions by the time of their answer, and at most so many bytes of
    them, the oldest going first; outcomes, and comparisons with shadows, by the time at which they came."""

    predictions: timedelta = timedelta(days=90)
    prediction_bytes: int = 1 << 40
    outcomes: timedelta = timedelta(days=90)


class SegmentWriter:
    """Writes objects. An object counts from the commit of the transaction that names it, so one whose
    transaction failed is never read; it is noted before it is written, and so found and swept up later."""

    def __init__(
        self,
        engine: AsyncEngine,
        store: ArtifactStore,
        signatures: Signatures,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._engine = engine
        self._store = store
        self._signatures = signatures
        self._clock = clock
        self._metrics = metrics
        #: How many objects were named so far.
        self.named = 0

    def knows(self, model: str, version: str) -> bool:
        """Whether it is known which output of the version is the answer. Objects are never written again, so
        records of another version had better wait."""
        return self._signatures.knows(model, version)

    def core(self, batch: PredictionBatch) -> bytes:
        """The record without inputs, and without outputs other than the answer; `batch` itself is changed."""
        answer = self._signatures.prediction_output(batch.model, batch.version)
        return drop_payload(batch, answer).SerializeToString()

    async def put(self, records: Sequence[Logged]) -> list[Segment]:
        """Write one object for each model version and layout among the records, without answers where it is
        not known which output they are. None of them counts before it is named."""
        return await self._write(await asyncio.to_thread(self._encode, records)) if records else []

    def _encode(self, records: Sequence[Logged]) -> list[tuple[Segment, bytes]]:
        groups: dict[tuple[str, str, str], list[Logged]] = defaultdict(list)
        for logged in records:
            batch = logged.batch
            groups[batch.model, batch.version, layout(batch)].append(logged)
        return [
            _encode_records(members, version, kind, self._signatures.prediction_output(model, version))
            for (model, version, kind), members in groups.items()
        ]

    async def put_joined(
        self, rows: Sequence[SegmentRow], files: Sequence[str], *, lasting: bool
    ) -> list[Segment]:
        """Write one object instead of several of the same version and layout."""
        return await self._write([await asyncio.to_thread(encode_joined, rows, files, lasting=lasting)])

    async def _write(self, encoded: Sequence[tuple[Segment, bytes]]) -> list[Segment]:
        segments = [segment for segment, _ in encoded]
        if segments:
            async with transaction(self._engine) as session:
                names = [segment.object for segment in segments]
                await repository.note_written(session, names, self._clock.now())
        for segment, data in encoded:
            await self._store.put(segment.object, data)
        return segments

    async def delete(self, name: str) -> None:
        """Remove an object that does not count; that it is gone already is fine."""
        await self._store.delete(name)

    async def name(self, session: AsyncSession, segments: Sequence[Segment], why: str) -> None:
        """From the commit on the objects count. Raises Aborted where one was given up meanwhile."""
        if not segments:
            return
        if not await repository.settle_written(session, [segment.object for segment in segments]):
            raise Aborted("It took so long to name an object that it was given up.")
        for segment in segments:
            await repository.add_segment(session, segment, self._clock.now())
            self._metrics.segments.labels(why).inc()
        self.named += len(segments)


class Flusher:
    """Turns a full or old inbox into objects, joins small objects, forgets what nobody needs. Of several
    replicas one at a time does it; should two, one of them finds that the other was faster. No transaction is
    open while an object is read, written or deleted."""

    def __init__(
        self,
        engine: AsyncEngine,
        writer: SegmentWriter,
        files: SegmentFiles,
        signatures: Signatures,
        sizes: Sizes,
        clock: Clock,
        metrics: Metrics,
        retention: Retention | None = None,
    ) -> None:
        self._engine = engine
        self._signatures = signatures
        self._retention = retention or Retention()
        self._leaps = Leaps(clock, _CLOCKS_APART.total_seconds())
        self._holder = new_id()
        self._renew_at = float("-inf")
        self._had_work_at = clock.monotonic()
        self._writer = writer
        self._files = files
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
            await ended(self._task)
            await _tried(partial(self._hold, -_LEASE))

    async def _run(self) -> None:
        rare = (self.join_small, self.forget_claims, self.forget_old, self.forget, self.sweep)
        periods = looked_at = much = 0
        while True:
            await _tried(partial(self._signatures.save, self._engine))
            if await self._has_turn():
                await _tried(self.flush_due)
                if self._writer.named - looked_at >= self._sizes.join_segments:
                    looked_at = self._writer.named
                    await _tried(self.join_small)
                # What had much to do goes on soon: the more comes in, the more is to be forgotten.
                if periods % _RARE == 0 or much >= _TIMES:
                    much = max([await _tried(step) for step in rare])
                periods += 1
            quiet = self._clock.monotonic() - self._had_work_at >= _QUIET_AFTER_S
            await asyncio.sleep(_QUIET_PERIOD_S if quiet else _PERIOD_S)

    async def _has_turn(self) -> bool:
        """Whether it is this replica's turn, asked again when a third of the lease is over."""
        now = self._clock.monotonic()
        if now >= self._renew_at and await _tried(partial(self._hold, _LEASE)):
            self._renew_at = now + _LEASE.total_seconds() / 3
        return now < self._renew_at

    async def _hold(self, lease: timedelta) -> int:
        """1 where it is this replica's turn, for so long."""
        now = self._clock.now()
        async with transaction(self._engine) as session:
            held = await repository.hold(session, "flusher", self._holder, now, now + lease)
        if not held:
            self._leaps.forward()  # who has the turn allows for it
        return held

    async def flush_due(self) -> int:
        """Write what the inbox has held for long enough or enough of; how many objects' worth. Time that
        nobody saw pass, since a clock was set, does not count."""
        now = self._clock.now()
        async with transaction(self._engine) as session:
            waiting = await repository.waiting(session)
            # Asked once the database has answered: a machine that was asleep finds its connection gone.
            if leap := self._leaps.forward():
                await repository.put_off_inbox(session, leap, now)
                waiting = await repository.waiting(session)
            if any(item.newest > now + _CLOCKS_APART for item in waiting):
                await repository.restart_inbox(session, now, now + _CLOCKS_APART)
                waiting = await repository.waiting(session)
        if waiting:
            self._had_work_at = self._clock.monotonic()
        self._metrics.inbox_rows.set(sum(item.rows for item in waiting))
        due = now - timedelta(seconds=self._sizes.flush_after_s)
        unknown_due = now - timedelta(seconds=self._sizes.signature_wait_s)
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
            chunks = await repository.oldest_in_inbox(
                session, model, version, _TAKEN_AT_ONCE, self._sizes.flush_bytes
            )
        if not chunks:
            return 0
        records = await asyncio.to_thread(_records, [value for _, value in chunks])
        written = await self._writer.put(records)
        async with transaction(self._engine) as session:
            if await repository.remove_from_inbox(session, [id_ for id_, _ in chunks]) < len(chunks):
                raise Aborted("Another replica has written these records meanwhile.")
            await self._writer.name(session, written, "flushed")
        return 1

    async def join_small(self) -> int:
        """Join crowds of small objects; how many crowds."""
        joined = 0
        for tier in self._sizes.tiers():
            async with transaction(self._engine) as session:
                crowds = await repository.crowds(session, tier, self._sizes.join_segments)
            joined += sum([await _tried(partial(self._join, *crowd, tier)) for crowd in crowds])
        return joined

    async def _join(self, model: str, version: str, layout: str, tier: repository.Tier) -> int:
        async with transaction(self._engine) as session:
            rows = await repository.small_segments(session, model, version, layout, tier)
        chosen = _up_to(rows, self._sizes.segment_rows, self._sizes.join_bytes)
        if len(chosen) < 2:
            return 0
        async with self._files.held([row.object for row in chosen]) as files:
            lasting = self._sizes.lasts(sum(row.rows for row in chosen), sum(row.size for row in chosen))
            written = await self._writer.put_joined(chosen, files, lasting=lasting)
        async with transaction(self._engine) as session:
            ids = [row.id for row in chosen]
            if await repository.drop_segments(session, ids, self._clock.now()) < len(chosen):
                raise Aborted("Another replica has joined these objects meanwhile.")
            await self._writer.name(session, written, "joined")
        return 1

    async def forget_claims(self) -> int:
        """Drop claims that no redelivery can reach, some at a time; how many times."""
        for times in range(1, _TIMES + 1):
            async with transaction(self._engine) as session:
                if not await repository.forget_old_claims(session, self._clock.now()):
                    return times
        return _TIMES

    async def forget_old(self) -> int:
        """Drop some of what is kept no longer; how much. Objects count no more from then on, and are deleted
        later by `forget`."""
        now, dropped = self._clock.now(), 0
        for _ in range(_TIMES):
            async with transaction(self._engine) as session:
                old = await repository.old_segments(session, now - self._retention.predictions)
                old = old or await repository.segments_beyond(session, self._retention.prediction_bytes)
                count = await repository.drop_segments(session, old, now) if old else 0
                count += await repository.forget_old_outcomes(session, now - self._retention.outcomes)
                count += await forget_old_shadows(session, now - self._retention.outcomes)
            dropped += count
            if not count:
                break
        return dropped

    async def forget(self) -> int:
        """Delete some of the objects that were dropped, then what is known of them; how many. What is deleted
        and not forgotten, since the transaction failed, is deleted again."""
        async with transaction(self._engine) as session:
            gone = await repository.forgotten_segments(session, self._clock.now())
        for row in gone:
            await self._writer.delete(row.object)
        if gone:
            async with transaction(self._engine) as session:
                await repository.forget_segments(session, [row.id for row in gone])
        return len(gone)

    async def sweep(self) -> int:
        """Delete some of the objects that were written and never named, since who wrote them did not get so
        far; how many."""
        async with transaction(self._engine) as session:
            given_up = await repository.give_up_written(session, self._clock.now())
        for name in given_up:
            await self._writer.delete(name)
        if given_up:
            async with transaction(self._engine) as session:
                await repository.forget_written(session, given_up)
        return len(given_up)


async def _tried(step: Callable[[], Awaitable[int | None]]) -> int:
    """What `step` returns, 0 where that is nothing or it fails: one that fails again and again must stop
    neither the others nor the service. Nothing is lost by it, the next period tries again."""
    try:
        return await step() or 0
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


def _records(chunks: Sequence[bytes]) -> list[Logged]:
    values = [value for chunk in chunks for value in unpack(chunk)]
    return [Logged.of(PredictionBatch.FromString(value), value) for value in values]


def _encode_records(
    records: Sequence[Logged], version: str, kind: str, output: str | None
) -> tuple[Segment, bytes]:
    table = to_table([logged.batch for logged in records], output, [logged.value for logged in records])
    ids = [logged.batch_id for logged in records]
    return encode(table, version, kind, ids, lasting=False)  # objects of what came lately are joined soon
