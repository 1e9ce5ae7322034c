"""Records come in: parse, claim, write in one transaction; the bus commits the offsets after that."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence

from google.protobuf.message import DecodeError
from headrace.v1.events_pb2 import Outcome, OutcomeBatch
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from services.analytics import repository
from services.analytics.chunks import pack, split
from services.analytics.columns import MODEL, Logged, parse
from services.analytics.flushing import SegmentWriter, Sizes
from services.analytics.metrics import Metrics
from services.analytics.tables import InboxRow
from services.common.bus.port import Handler, Malformed, Record
from services.common.clock import Clock
from services.common.db import claim, claimed, is_refused, transaction
from services.common.errors import Aborted, InvalidArgument
from services.common.telemetry import Tracing, context_from_kafka

_MAX_METRIC = 128
_MAX_TEXT = 4096
#: The end of the year 9999.
_LATEST_US = 253_402_300_799_000_000


class _Repeated(Exception):
    """Records that were to be claimed were claimed before."""


class Consumers:
    """Handlers of inference.predictions.v1 and inference.outcomes.v1 for the group `analytics`."""

    def __init__(
        self,
        engine: AsyncEngine,
        writer: SegmentWriter,
        sizes: Sizes,
        clock: Clock,
        tracing: Tracing,
        metrics: Metrics,
        seen: Callable[[str], None] = lambda _model: None,
    ) -> None:
        """`seen` is told which models there is something new of; an empty name stands for any."""
        self._seen = seen
        self._engine = engine
        self._writer = writer
        self._sizes = sizes
        self._clock = clock
        self._tracing = tracing
        self._metrics = metrics

    async def on_predictions(self, records: Sequence[Record]) -> None:
        """Take in every record once, durably. Raises Malformed for one that cannot be read or that the
        database refuses; anything else is retried."""
        # A backlog of batch jobs brings millions of rows at once, which as columns would be a gigabyte.
        for run in split([len(record.value or b"") for record in records], self._sizes.taken_bytes):
            try:
                await _isolated(self._take_predictions, records[run])
            except Malformed as found:
                raise Malformed(run.start + found.index, found.reason) from found

    async def on_outcomes(self, records: Sequence[Record]) -> None:
        """Keep every outcome once; late and repeated ones are normal. Raises Malformed as above."""
        await _isolated(self._take_outcomes, records)

    async def _take_predictions(self, records: Sequence[Record]) -> None:
        started = self._clock.unix_us()
        new = _once(await asyncio.to_thread(_parse_all, records))
        # What comes again is rare enough to be asked for only where it has come: claiming tells.
        if not await self._keep(new):
            async with transaction(self._engine) as session:
                seen = await claimed(session, [logged.batch_id for logged in new])
            new = _once(
                [
                    logged
                    for logged in await asyncio.to_thread(_parse_all, records)
                    if logged.batch_id not in seen
                ]
            )
            if not await self._keep(new):
                raise Aborted("Another replica has taken some of these records in meanwhile.")
        self._count("predictions", len(records), len(records) - len(new))
        requests: Counter[str] = Counter()
        for logged in new:
            requests[logged.batch.model] += logged.requests
        for model, count in requests.items():
            self._metrics.requests.labels(model).inc(count)
            self._seen(model)
        self._trace("analytics.predictions", records, started)

    async def _take_outcomes(self, records: Sequence[Record]) -> None:
        started = self._clock.unix_us()
        outcomes: list[Outcome] = []
        for index, record in enumerate(records):
            outcomes += _outcomes(index, record)
        added = 0
        if outcomes:
            async with transaction(self._engine) as session:
                added = await repository.add_outcomes(session, outcomes, self._clock.now())
        self._metrics.outcomes.inc(added)
        for model in {outcome.model for outcome in outcomes}:
            self._seen(model)
        self._count("outcomes", len(records), 0)
        self._trace("analytics.outcomes", records, started)

    async def _keep(self, new: Sequence[Logged]) -> bool:
        """Take the records in. Large deliveries are written as objects first and only then claimed and named,
        so that no transaction waits for the object store. False where some were taken in before: nothing has
        changed then, and an object that nothing names is never read."""
        if not new:
            return True
        rows = sum([logged.requests for logged in new])
        size = sum([len(logged.value) for logged in new])
        large = rows >= self._sizes.direct_rows or size >= self._sizes.direct_bytes
        ids = [logged.batch_id for logged in new]
        versions: dict[tuple[str, str], list[Logged]] = {}
        for logged in new:
            versions.setdefault((logged.batch.model, logged.batch.version), []).append(logged)
        direct = [
            logged
            for (model, version), members in versions.items()
            if large and self._writer.knows(model, version)
            for logged in members
        ]
        written = await self._writer.put(direct)
        waiting = [
            members
            for (model, version), members in versions.items()
            if not (large and self._writer.knows(model, version))
        ]
        chunks = await asyncio.to_thread(self._chunks, waiting) if waiting else []
        try:
            async with transaction(self._engine) as session:
                await self._claim(session, ids)
                await self._writer.name(session, written, "direct")
                await repository.add_to_inbox(session, chunks)
        except _Repeated:
            return False
        return True

    async def _claim(self, session: AsyncSession, ids: Sequence[bytes]) -> None:
        if await claim(session, ids, self._clock.now()):
            raise _Repeated

    def _chunks(self, versions: Sequence[Sequence[Logged]]) -> list[InboxRow]:
        now, chunks = self._clock.now(), []
        for members in versions:
            for run in split([len(logged.value) for logged in members], self._sizes.flush_bytes):
                part = members[run]
                model, version = part[0].batch.model, part[0].batch.version
                ids = b"".join([logged.batch.request_ids for logged in part])
                chunks.append(
                    InboxRow(
                        model=model,
                        version=version,
                        records=len(part),
                        rows=len(ids) // 16,
                        received_at=now,
                        request_ids=ids,
                        value=pack([logged.value for logged in part]),
                        core=pack([self._writer.core(logged.batch) for logged in part]),
                    )
                )
        return chunks

    def _count(self, topic: str, records: int, repeated: int) -> None:
        self._metrics.records.labels(topic).inc(records)
        self._metrics.repeated.labels(topic).inc(repeated)

    def _trace(self, name: str, records: Sequence[Record], started_us: int) -> None:
        """One span per record of a sampled trace, so that the trace reaches from request to here."""
        if not self._tracing.enabled:
            return
        for record in records:
            parent = context_from_kafka(record.headers)
            if parent is not None:
                self._tracing.record_span(
                    name,
                    started_us * 1000,
                    self._clock.unix_us() * 1000,
                    parent,
                    attributes={"messaging.destination.name": record.topic},
                )


async def _isolated(take: Handler, records: Sequence[Record]) -> None:
    """`take` the records; where the database refuses their data, halve them until the one that it refuses is
    found, so that it does not hold up all others for ever. Raises Malformed for that one."""
    try:
        await take(records)
    except DBAPIError as error:
        if not is_refused(error):
            raise
        if len(records) == 1:
            raise Malformed(0, f"the database refuses it: {error.orig}") from error
        half = len(records) // 2
        await _isolated(take, records[:half])
        try:
            await _isolated(take, records[half:])
        except Malformed as found:
            raise Malformed(found.index + half, found.reason) from found


def _parse_all(records: Sequence[Record]) -> list[Logged]:
    parsed = []
    for index, record in enumerate(records):
        try:
            batch = parse(record.value)
        except InvalidArgument as error:
            raise Malformed(index, error.message) from error
        parsed.append(Logged.of(batch, record.value or b""))
    return parsed


def _once(parsed: Sequence[Logged]) -> list[Logged]:
    """Without those that come twice in one delivery."""
    return list({logged.batch_id: logged for logged in parsed}.values())


def _outcomes(index: int, record: Record) -> list[Outcome]:
    try:
        outcomes = list(OutcomeBatch.FromString(record.value or b"").outcomes)
    except DecodeError:
        raise Malformed(index, "not an OutcomeBatch") from None
    for place, outcome in enumerate(outcomes):
        if len(outcome.event_id) != 16 or len(outcome.request_id) != 16 or not outcome.metric:
            raise Malformed(index, f"outcome {place} lacks an id of 16 bytes or its metric")
        if len(outcome.metric) > _MAX_METRIC or (outcome.model and not MODEL.fullmatch(outcome.model)):
            raise Malformed(index, f"outcome {place} has a metric that is too long, or a model that is none")
        if outcome.WhichOneof("value") is None or len(outcome.text) > _MAX_TEXT:
            raise Malformed(index, f"outcome {place} has no value, or one that is too long")
        if not math.isfinite(outcome.number):
            raise Malformed(index, f"outcome {place} is no finite number")
        if outcome.observed_at_us > _LATEST_US:
            raise Malformed(index, f"outcome {place} was observed at no time")
        if "\0" in outcome.text or "\0" in outcome.metric:
            raise Malformed(index, f"outcome {place} holds a zero byte")
    return outcomes
