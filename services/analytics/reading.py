"""What was logged, at one moment: the store's rows and objects brought together and asked."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import duckdb
import pyarrow as pa
import pyarrow.csv as pa_csv
import structlog
from headrace.v1.events_pb2 import PredictionBatch

from services.analytics import queries, repository
from services.analytics.chunks import unpack
from services.analytics.columns import CORE, Logged, layout, to_table
from services.analytics.metrics import Metrics
from services.analytics.queries import CLASSES, OUTCOMES, Snapshot
from services.analytics.segments import SegmentFiles
from services.analytics.signatures import Signatures
from services.analytics.tables import OutcomeRow
from services.common.db import transaction
from services.common.errors import DeadlineExceeded, NotFound, ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

_QUERY_S = 30.0
_AT_ONCE = 2
_AT_MOST = 32
_HEX = {"event_id": pa.string(), "request_id": pa.string()}

#: Told which connection works, so that it can be interrupted.
Hold = Callable[[duckdb.DuckDBPyConnection], None]
T = TypeVar("T")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Found:
    """One request: its rows, the caller's answer first, and what was said about it."""

    rows: list[dict[str, Any]]
    outcomes: list[OutcomeRow]


class Reader:
    """Answers questions about a model. At most two queries run at once, each for at most 30 s, and 32 are
    waited for; one more is refused with ResourceExhausted."""

    def __init__(
        self,
        engine: AsyncEngine,
        files: SegmentFiles,
        signatures: Signatures,
        metrics: Metrics,
        spill: Path,
    ) -> None:
        """`spill` is a folder for what a query cannot hold in memory."""
        self._engine = engine
        self._spill = str(spill)
        self._files = files
        self._signatures = signatures
        self._metrics = metrics
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._asking = 0

    async def ask(
        self,
        model: str,
        question: Callable[[duckdb.DuckDBPyConnection], T],
        *,
        metric: str | None = None,
        outcomes: bool = True,
        since_us: int | None = None,
        until_us: int | None = None,
    ) -> T:
        """Put `question` to what was logged of `model` in that time; with `metric`, only that one's outcomes
        are joined. Raises NotFound for a model never seen, DeadlineExceeded after 30 s."""

        async def attempt() -> T:
            async with self._one_moment() as session:
                segments = await repository.segments(session, model, since_us, until_us)
                values = await repository.inbox(session, model)
                if not segments and not values and not await repository.segments(session, model):
                    raise NotFound(f"No prediction of {model} has been seen yet.", field="model")
                said = (
                    await repository.outcomes_csv(session, model, metric, since_us or 0) if outcomes else b""
                )
            classes = [dict(zip(CLASSES.names, row, strict=True)) for row in self._signatures.classes(model)]

            def run(paths: Sequence[str], hold: Hold) -> T:
                tables = self._tables(values)
                inbox = None
                if tables:
                    core = [table.select(CORE.names) for table in tables]
                    inbox = pa.concat_tables(core).unify_dictionaries()
                snapshot = Snapshot(
                    files=paths,
                    inbox=inbox,
                    outcomes=outcomes_table(said),
                    classes=pa.Table.from_pylist(classes, CLASSES),
                    since_us=since_us or 0,
                    until_us=until_us if until_us is not None else (1 << 63) - 1,
                )
                with queries.open_snapshot(snapshot, self._spill) as connection:
                    hold(connection)
                    return question(connection)

            async with self._files.held([segment.object for segment in segments]) as paths:
                return await self._run(partial(run, paths))

        return await self._twice(attempt)

    async def recent(self, model: str, limit: int) -> list[dict[str, Any]]:
        """The newest requests of a model, of every origin, without payloads."""

        async def attempt() -> list[dict[str, Any]]:
            async with self._one_moment() as session:
                segments = await repository.newest_segments(session, model, limit)
                values = await repository.inbox(session, model)
            if not segments and not values:
                raise NotFound(f"No prediction of {model} has been seen yet.", field="model")

            def run(paths: Sequence[str], hold: Hold) -> list[dict[str, Any]]:
                core = [table.select(CORE.names) for table in self._tables(values)]
                inbox = pa.concat_tables(core).unify_dictionaries() if core else None
                with queries.open_snapshot(Snapshot(files=paths, inbox=inbox), self._spill) as connection:
                    hold(connection)
                    return queries.recent(connection, limit)

            async with self._files.held([segment.object for segment in segments]) as paths:
                return await self._run(partial(run, paths))

        return await self._twice(attempt)

    async def find(self, request_id: bytes, model: str | None = None) -> Found:
        """Everything about one request, of one model where it is given. Raises NotFound."""

        async def attempt() -> tuple[list[dict[str, Any]], list[OutcomeRow]]:
            async with self._one_moment() as session:
                segments = await repository.segments_of_request(session, request_id)
                values = await repository.inbox_of_request(session, request_id)
                outcomes = await repository.outcomes_of_request(session, request_id)
            async with self._files.held([segment.object for segment in segments]) as paths:
                rows = await self._run(
                    lambda _hold: queries.rows_of_request(paths, self._tables(values), request_id)
                )
            return rows, outcomes

        rows, outcomes = await self._twice(attempt)
        if model is not None:
            rows = [row for row in rows if row["model"] == model]
            outcomes = [outcome for outcome in outcomes if outcome.model in (model, "")]
        if not rows:
            raise NotFound("No prediction with this request id has been seen yet.", field="request_id")
        return Found(rows, outcomes)

    @asynccontextmanager
    async def _one_moment(self) -> AsyncIterator[AsyncSession]:
        """A transaction that sees one state, so that a record is either in the inbox or in an object."""
        async with transaction(self._engine) as session:
            await session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
            yield session

    def _tables(self, chunks: Sequence[bytes]) -> list[pa.Table]:
        groups: dict[tuple[str, str, str], list[Logged]] = defaultdict(list)
        for value in [value for chunk in chunks for value in unpack(chunk)]:
            batch = PredictionBatch.FromString(value)
            groups[batch.model, batch.version, layout(batch)].append(Logged.of(batch, value))
        return [
            to_table(
                [logged.batch for logged in records],
                self._signatures.prediction_output(model, version),
                [logged.value for logged in records],
            )
            for (model, version, _), records in groups.items()
        ]

    async def _twice(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """Look once more where an object is gone that was there a moment ago: it was joined into another."""
        async with self._slot():
            try:
                return await attempt()
            except (FileNotFoundError, duckdb.IOException) as error:
                log.warning("object_gone", reason=str(error))
                return await attempt()

    @asynccontextmanager
    async def _slot(self) -> AsyncIterator[None]:
        """Leave to ask. It is taken before anything is fetched, so what is held in memory is bounded, too."""
        if self._asking >= _AT_MOST:
            raise ResourceExhausted("Too many questions at once; ask again soon.", retry_after_ms=1000)
        self._asking += 1
        try:
            async with self._slots:
                yield
        finally:
            self._asking -= 1

    async def _run(self, run: Callable[[Hold], T]) -> T:
        held: list[duckdb.DuckDBPyConnection] = []

        def timed() -> T:
            with self._metrics.query_seconds.time():
                return run(held.append)

        work = asyncio.ensure_future(asyncio.to_thread(timed))
        try:
            async with asyncio.timeout(_QUERY_S):
                return await asyncio.shield(work)
        except TimeoutError:
            raise DeadlineExceeded(
                f"The question took longer than {_QUERY_S:g} s; ask about a shorter time.", field="since"
            ) from None
        finally:
            if not work.done():  # too late, or nobody waits any more: a thread ends only if its query does
                for connection in held:
                    connection.interrupt()
                await asyncio.wait({work}, timeout=_QUERY_S)
            if work.done() and not work.cancelled():
                work.exception()  # the interrupt, seen


def outcomes_table(csv: bytes) -> pa.Table:
    """Outcomes from `repository.outcomes_csv`."""
    if not csv:
        return OUTCOMES.empty_table()
    table = pa_csv.read_csv(
        pa.BufferReader(csv),
        pa_csv.ReadOptions(column_names=OUTCOMES.names),
        pa_csv.ParseOptions(newlines_in_values=True),
        pa_csv.ConvertOptions(
            column_types={**{name: OUTCOMES.field(name).type for name in OUTCOMES.names}, **_HEX},
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    ).combine_chunks()
    for place, name in enumerate(("event_id", "request_id")):
        table = table.set_column(place, name, _from_hex(table[name].combine_chunks()))
    return table.cast(OUTCOMES)


def _from_hex(texts: pa.Array) -> pa.Array:
    """Ids of 16 bytes from their 32 digits, which lie end to end in the array."""
    start, length = texts.offset * 32, len(texts) * 32
    digits = texts.buffers()[2].slice(start, length).to_pybytes().decode("ascii")
    return pa.Array.from_buffers(pa.binary(16), len(texts), [None, pa.py_buffer(bytes.fromhex(digits))])
