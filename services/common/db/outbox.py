"""Rows that become Kafka records: written in the transaction of what they tell about, published
afterwards."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from types import TracebackType
from typing import Any, Self

import structlog
from sqlalchemy import BigInteger, Column, DateTime, Identity, LargeBinary, Text, delete, func, insert, select
from sqlalchemy import text as sql
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from services.common.bus.port import Bus, Record, check_size
from services.common.clock import Clock
from services.common.db.transaction import transaction
from services.common.errors import HeadraceError
from services.common.telemetry.propagation import kafka_headers
from services.common.telemetry.tracing import current_context

log = structlog.get_logger(__name__)

_FIRST_BACKOFF_S = 0.1
_MAX_BACKOFF_S = 5.0
_CLOSE_S = 5.0

# Locks of one outbox: who may add rows until it commits, and who may publish.
_LOCK_NAME = "hashtextextended('headrace:outbox:' || current_schema() || '.' || :table || :use, 0)"
_WRITE_LOCK = sql(f"SELECT pg_advisory_xact_lock({_LOCK_NAME})")
_RELAY_LOCK = sql(f"SELECT pg_try_advisory_xact_lock({_LOCK_NAME})")


class OutboxRow:
    """Mixin for the table: `class Outbox(OutboxRow, Base): ...`. Rows are deleted once the broker has
    them."""

    __tablename__ = "outbox"

    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    topic: Mapped[str] = mapped_column(Text)
    key: Mapped[bytes | None] = mapped_column(LargeBinary)
    value: Mapped[bytes | None] = mapped_column(LargeBinary)
    #: `[[name, value in hex], …]`
    headers: Mapped[list[list[str]]] = mapped_column(JSONB)
    created_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=func.clock_timestamp()
    )


def outbox_columns() -> list[Column[Any]]:
    """The same columns for a migration: `op.create_table("outbox", *outbox_columns())`."""
    return [
        Column("id", BigInteger, Identity(always=True), primary_key=True),
        Column("topic", Text, nullable=False),
        Column("key", LargeBinary),
        Column("value", LargeBinary),
        Column("headers", JSONB, nullable=False),
        Column("created_at", DateTime(timezone=True), server_default=func.clock_timestamp(), nullable=False),
    ]


async def enqueue(session: AsyncSession, table: type[OutboxRow], records: Sequence[Record]) -> None:
    """Publish `records` if and when the transaction of `session` commits, in the order given, after
    everything that was enqueued by transactions that committed before. The current trace goes with them.

    Transactions that enqueue take turns from here to their commit (otherwise row ids would not follow the
    order of commits), so call it last. Wake the relay after the commit. Raises InvalidArgument for a record
    that no broker would take: in the outbox it would hold up everything behind it for ever.
    """
    if not records:
        return
    trace = kafka_headers(current_context())
    traced = [replace(record, headers=record.headers or tuple(trace)) for record in records]
    for record in traced:
        check_size(record)
    await session.execute(_WRITE_LOCK, {"table": table.__tablename__, "use": ":write"})
    # One statement per row: a multi-row INSERT does not promise in which order ids are given.
    for record in traced:
        headers = _to_json(record.headers)
        row = {"topic": record.topic, "key": record.key, "value": record.value, "headers": headers}
        await session.execute(insert(table).values(row))


class OutboxRelay:
    """Publishes the rows of one outbox in id order and deletes them: each at least once, none that was
    rolled back.

    Any number of replicas may run one; an advisory lock lets one at a time publish. It looks at once after
    `wake`, and every `poll_s` for what a replica that was killed has left. While the broker or the database
    is away, or anything else fails, it tries again with backoff and `failing` says why.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        table: type[OutboxRow],
        bus: Bus,
        clock: Clock,
        *,
        poll_s: float = 5.0,
        max_records: int = 500,
    ) -> None:
        self.failing: str | None = None
        #: Age of the oldest row that waited when the last batch was read, in seconds; 0: none waited.
        self.oldest_pending_s = 0.0
        self._engine = engine
        self._table = table
        self._bus = bus
        self._clock = clock
        self._poll_s = poll_s
        self._max_records = max_records
        self._wake = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="outbox-relay")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping = True
        self._wake.set()
        if self._task is not None:
            _done, late = await asyncio.wait({self._task}, timeout=_CLOSE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def wake(self) -> None:
        """Rows were committed; do not wait for the next look."""
        self._wake.set()

    async def publish_pending(self) -> int:
        """Publish one batch and return its size; 0 where nothing waits or another replica is at it.

        The lock is held until the rows are deleted, so order holds between replicas. Ended in between
        (crash, lost connection), the same rows are published again.
        """
        async with transaction(self._engine) as session:
            lock = {"table": self._table.__tablename__, "use": ":relay"}
            if not (await session.execute(_RELAY_LOCK, lock)).scalar_one():
                return 0
            found = select(self._table).order_by(self._table.id).limit(self._max_records)
            rows = (await session.execute(found)).scalars().all()
            self.oldest_pending_s = self._age_s(rows[0].created_at) if rows else 0.0
            if not rows:
                return 0
            await self._bus.publish([_record(row) for row in rows])
            await session.execute(delete(self._table).where(self._table.id.in_([row.id for row in rows])))
        return len(rows)

    async def _run(self) -> None:
        backoff_s = _FIRST_BACKOFF_S
        while not self._stopping:
            self._wake.clear()
            try:
                while await self.publish_pending() == self._max_records:
                    pass
            except (HeadraceError, SQLAlchemyError, OSError) as error:
                self.failing = str(error)
                log.warning("outbox_not_published", table=self._table.__tablename__, reason=str(error))
            except Exception as error:
                # A relay that ended would hold back every change until somebody restarts the service.
                self.failing = repr(error)
                log.exception("outbox_not_published", table=self._table.__tablename__)
            else:
                self.failing = None
                backoff_s = _FIRST_BACKOFF_S
                await self._pause(self._poll_s)
                continue
            # Jitter keeps replicas from trying in step.
            await self._pause(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(backoff_s * 2, _MAX_BACKOFF_S)

    async def _pause(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._wake.wait()
        except TimeoutError:
            return

    def _age_s(self, created_at: datetime) -> float:
        return max(0.0, (self._clock.now() - created_at).total_seconds())


def _record(row: OutboxRow) -> Record:
    headers = tuple((name, bytes.fromhex(value)) for name, value in row.headers)
    return Record(row.topic, row.key, row.value, headers)


def _to_json(headers: Sequence[tuple[str, bytes]]) -> list[list[str]]:
    return [[name, value.hex()] for name, value in headers]
