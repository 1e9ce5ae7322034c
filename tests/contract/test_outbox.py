"""The outbox on a real PostgreSQL: what was committed is published, in order, at least once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from textwrap import dedent

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import DeclarativeBase

from services.common.bus.port import MAX_RECORD_BYTES, Record
from services.common.clock import SystemClock
from services.common.db import (
    DatabaseUnavailable,
    OutboxRelay,
    OutboxRow,
    check_database,
    engine,
    enqueue,
    migrate,
    transaction,
)
from services.common.errors import Fatal, InvalidArgument, Unavailable
from services.common.telemetry import context_from_kafka, setup_tracing
from tests.fixtures.servers import database_url, postgres_server, servers_directory
from tests.fixtures.waiting import eventually

__all__ = ["database_url", "postgres_server", "servers_directory"]

_FIRST = """
    import sqlalchemy as sa
    from alembic import op
    from services.common.db import outbox_columns

    revision = "0001"
    down_revision = None

    def upgrade():
        op.create_table("outbox", *outbox_columns())
        op.create_table("facts", sa.Column("id", sa.Integer, primary_key=True))
"""


class _Rows(DeclarativeBase):
    pass


class Outbox(OutboxRow, _Rows):
    pass


class RecordingBus:
    """The publishing half of a bus; fails the first `failures` times."""

    def __init__(
        self,
        failures: int = 0,
        *,
        lose_acknowledgement: bool = False,
        delay_s: float = 0.0,
        error: Exception | None = None,
    ) -> None:
        self.published: list[Record] = []
        self.failures = failures
        self.lose_acknowledgement = lose_acknowledgement
        self.delay_s = delay_s
        self.error = error or Unavailable("the event broker is away")

    async def publish(self, records: Sequence[Record]) -> None:
        await asyncio.sleep(self.delay_s)
        if self.failures:
            self.failures -= 1
            if self.lose_acknowledgement:
                self.published.extend(records)
            raise self.error
        self.published.extend(records)

    def keys(self) -> list[str]:
        return [(record.key or b"").decode() for record in self.published]


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    versions = tmp_path / "versions"
    versions.mkdir()
    (versions / "first.py").write_text(dedent(_FIRST))
    return tmp_path


@pytest.fixture
async def database(database_url: str, migrations: Path) -> AsyncIterator[AsyncEngine]:
    await migrate(database_url, "owner", migrations)
    pool = engine(database_url, "owner")
    yield pool
    await pool.dispose()


def _records(*keys: str) -> list[Record]:
    return [Record("control.test.v1", key.encode(), b"value of " + key.encode()) for key in keys]


def _relay(database: AsyncEngine, bus: RecordingBus, **options: float) -> OutboxRelay:
    settings = {"poll_s": 0.02} | options
    return OutboxRelay(
        database,
        Outbox,
        bus,  # type: ignore[arg-type]  # the relay publishes only
        SystemClock(),
        poll_s=settings["poll_s"],
        max_records=int(settings.get("max_records", 500)),
    )


async def _add(database: AsyncEngine, *keys: str) -> None:
    async with transaction(database) as session:
        await enqueue(session, Outbox, _records(*keys))


async def _pending(database: AsyncEngine) -> int:
    async with transaction(database) as session:
        return (await session.execute(select(func.count()).select_from(Outbox))).scalar_one()


async def _drained(database: AsyncEngine) -> None:
    async def empty() -> bool:
        return await _pending(database) == 0

    await eventually(empty)


async def test_committed_rows_are_published_as_they_were_and_then_gone(database: AsyncEngine) -> None:
    bus = RecordingBus()
    record = Record("t", b"\x00key", b"\xffvalue", (("name", b"\x00\xff"), ("other", b"x")))
    tombstone = Record("t", b"gone", None)
    async with transaction(database) as session:
        await enqueue(session, Outbox, [record, tombstone])
    assert await _relay(database, bus).publish_pending() == 2
    assert bus.published == [record, tombstone]
    assert await _pending(database) == 0


async def test_rows_of_a_rolled_back_transaction_are_never_published(database: AsyncEngine) -> None:
    bus = RecordingBus()

    async def change_of_mind() -> None:
        async with transaction(database) as session:
            await enqueue(session, Outbox, _records("never"))
            raise RuntimeError("changed my mind")

    with pytest.raises(RuntimeError, match="changed my mind"):
        await change_of_mind()
    await _add(database, "kept")
    await _relay(database, bus).publish_pending()
    assert bus.keys() == ["kept"]


async def test_rows_not_yet_committed_are_not_seen(database: AsyncEngine) -> None:
    bus = RecordingBus()
    relay = _relay(database, bus)
    async with transaction(database) as session:
        await enqueue(session, Outbox, _records("later"))
        await session.flush()
        assert await relay.publish_pending() == 0
    assert await relay.publish_pending() == 1


async def test_order_is_that_of_commits_even_between_overlapping_transactions(database: AsyncEngine) -> None:
    first_has_enqueued = asyncio.Event()

    async def slow() -> None:
        async with transaction(database) as session:
            await enqueue(session, Outbox, _records("first"))
            first_has_enqueued.set()
            await asyncio.sleep(0.1)

    async def quick() -> None:
        await first_has_enqueued.wait()
        await _add(database, "second")

    bus = RecordingBus()
    async with _relay(database, bus):
        await asyncio.gather(slow(), quick())
        await _drained(database)
    assert bus.keys() == ["first", "second"]


async def test_order_holds_over_many_batches(database: AsyncEngine) -> None:
    keys = [f"{number:03d}" for number in range(57)]
    for start in range(0, 57, 5):
        await _add(database, *keys[start : start + 5])
    bus = RecordingBus()
    async with _relay(database, bus, max_records=10):
        await _drained(database)
    assert bus.keys() == keys


async def test_a_crash_between_publishing_and_deleting_publishes_again(database: AsyncEngine) -> None:
    await _add(database, "a", "b")
    bus = RecordingBus(delay_s=0.05)

    class Crash(BaseException):
        pass

    async def publish_then_crash(records: Sequence[Record]) -> None:
        bus.published.extend(records)
        raise Crash

    relay = _relay(database, bus)
    bus.publish, publish = publish_then_crash, bus.publish  # type: ignore[method-assign]
    with pytest.raises(Crash):
        await relay.publish_pending()
    assert await _pending(database) == 2
    bus.publish = publish  # type: ignore[method-assign]
    await _relay(database, bus).publish_pending()
    assert bus.keys() == ["a", "b", "a", "b"]


async def test_a_lost_acknowledgement_publishes_again_and_loses_nothing(database: AsyncEngine) -> None:
    bus = RecordingBus(failures=2, lose_acknowledgement=True)
    await _add(database, "a", "b")
    relay = _relay(database, bus)
    async with relay:
        await _drained(database)
    assert bus.keys() == ["a", "b"] * 3


async def test_a_broker_that_is_away_is_waited_for_and_reported(database: AsyncEngine) -> None:
    bus = RecordingBus(failures=1_000_000)
    await _add(database, "a")
    relay = _relay(database, bus)

    async def reported() -> bool:
        return relay.failing is not None

    async def recovered() -> bool:
        return relay.failing is None

    async with relay:
        await eventually(reported)
        assert "broker" in (relay.failing or "")
        assert relay.oldest_pending_s > 0
        bus.failures = 0
        relay.wake()
        await _drained(database)
        await eventually(recovered)
    assert bus.keys() == ["a"]


async def test_a_failure_nobody_foresaw_is_survived_and_reported(database: AsyncEngine) -> None:
    bus = RecordingBus(failures=3, error=ValueError("a bug in the bus"))
    await _add(database, "a")
    relay = _relay(database, bus)

    async def reported() -> bool:
        return "a bug in the bus" in (relay.failing or "")

    async with relay:
        await eventually(reported)
        await _drained(database)
    assert bus.keys() == ["a"]


@pytest.mark.parametrize("where", ["value", "headers"])
async def test_a_record_no_broker_takes_is_refused_before_it_blocks_the_others(
    database: AsyncEngine, where: str
) -> None:
    too_much = bytes(MAX_RECORD_BYTES)
    value, headers = (too_much, ()) if where == "value" else (b"", (("big", too_much),))
    with pytest.raises(InvalidArgument, match="larger than"):
        async with transaction(database) as session:
            await enqueue(session, Outbox, [*_records("before"), Record("t", b"k", value, headers)])
    assert await _pending(database) == 0


async def test_two_relays_at_once_keep_the_order_and_publish_once(database: AsyncEngine) -> None:
    keys = [f"{number:03d}" for number in range(120)]
    bus = RecordingBus(delay_s=0.002)
    async with _relay(database, bus, max_records=7), _relay(database, bus, max_records=7):
        for start in range(0, 120, 10):
            await _add(database, *keys[start : start + 10])
        await _drained(database)
    assert bus.keys() == keys


async def test_wake_publishes_without_waiting_for_the_next_look(database: AsyncEngine) -> None:
    bus = RecordingBus()
    async with _relay(database, bus, poll_s=3600) as relay:
        await asyncio.sleep(0.1)
        await _add(database, "a")
        relay.wake()
        await _drained(database)
    assert bus.keys() == ["a"]


async def test_the_current_trace_travels_with_the_record(database: AsyncEngine) -> None:
    bus = RecordingBus()
    tracing = setup_tracing("test", None, 1.0, InMemorySpanExporter())
    with tracing.span("deploy") as context:
        await _add(database, "a")
    await tracing.close()
    await _relay(database, bus).publish_pending()
    found = context_from_kafka(bus.published[0].headers)
    assert context is not None
    assert found is not None
    assert (found.trace_id, found.span_id) == (context.trace_id, context.span_id)


async def test_replicas_that_migrate_together_take_turns(database_url: str, migrations: Path) -> None:
    await asyncio.gather(*(migrate(database_url, "together", migrations) for _ in range(4)))
    pool = engine(database_url, "together")
    async with transaction(pool) as session:
        revisions = (await session.execute(text("SELECT version_num FROM schema_version"))).scalars().all()
        tables = text("SELECT table_schema FROM information_schema.tables WHERE table_name = 'outbox'")
        schemas = (await session.execute(tables)).scalars().all()
    await pool.dispose()
    assert revisions == ["0001"]
    assert schemas == ["together"]


async def test_a_failing_migration_changes_nothing_and_says_so(database_url: str, migrations: Path) -> None:
    await migrate(database_url, "whole", migrations)
    second = (
        "from alembic import op\nrevision = '0002'\ndown_revision = '0001'\n"
        "def upgrade():\n    op.execute('DROP TABLE facts')\n    op.execute('SELECT 1/0')\n"
    )
    (migrations / "versions" / "second.py").write_text(second)
    with pytest.raises(Fatal, match=r"migration of the schema whole failed.*division by zero"):
        await migrate(database_url, "whole", migrations)
    pool = engine(database_url, "whole")
    async with transaction(pool) as session:
        assert (await session.execute(text("SELECT count(*) FROM facts"))).scalar_one() == 0
    await pool.dispose()


async def test_a_schema_newer_than_the_program_is_refused(database_url: str, migrations: Path) -> None:
    await migrate(database_url, "newer", migrations)
    pool = engine(database_url, "newer")
    async with transaction(pool) as session:
        await session.execute(text("UPDATE schema_version SET version_num = '0009'"))
    await pool.dispose()
    with pytest.raises(Fatal, match="newer does not fit this program's migrations"):
        await migrate(database_url, "newer", migrations)


async def test_wrong_credentials_end_at_once_with_a_sentence(database_url: str, migrations: Path) -> None:
    wrong = database_url.replace("@", "x@", 1)
    with pytest.raises(Fatal, match="refuses us"):
        await migrate(wrong, "owner", migrations)


async def test_a_database_that_is_not_there_is_unavailable(migrations: Path) -> None:
    nowhere = "postgresql://nobody:nothing@127.0.0.1:1/none"
    with pytest.raises(Fatal, match="not reached"):
        await migrate(nowhere, "owner", migrations, connect_within_s=0.1)
    pool = engine(nowhere, "owner")
    with pytest.raises(DatabaseUnavailable):
        await check_database(pool)
    with pytest.raises(DatabaseUnavailable):
        async with transaction(pool) as session:
            await session.execute(text("SELECT 1"))
    await pool.dispose()
