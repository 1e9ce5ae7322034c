"""Callbacks reach receivers that fail, hang, drip and redirect, on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncEngine

from services.common.clock import ManualClock
from services.common.db import engine, migrate, transaction
from services.gateway.jobs import callbacks
from services.gateway.jobs.addresses import CallbackRules
from services.gateway.jobs.callbacks import CallbackSender
from services.gateway.jobs.metrics import JobMetrics
from services.gateway.jobs.tables import DeliveryRow
from tests.fixtures.gateway_jobs import SECRET, jobs
from tests.fixtures.waiting import eventually, eventually_of

MIGRATIONS = Path("services/gateway/migrations")


@dataclass
class Receiver:
    """Answers with `answers` in turn, the last one for ever; None: takes the request and says nothing."""

    answers: list[bytes | None]
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    port: int = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Receiver]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await reader.readexactly(int(headers["content-length"]))
        answer = self.answers[min(len(self.got), len(self.answers) - 1)]
        self.got.append((headers, body))
        if answer is not None:
            writer.write(answer)
            writer.close()
        else:
            await reader.read()
            writer.close()


OK = b"HTTP/1.1 204 No Content\r\n\r\n"
FAILED = b"HTTP/1.1 500 Oh\r\ncontent-length: 0\r\n\r\n"
HUGE = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n" + b"x" * 100_000


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[AsyncEngine]:
    await migrate(database_url, "gateway", MIGRATIONS)
    made = engine(database_url, "gateway")
    yield made
    await made.dispose()


@asynccontextmanager
async def sending(database: AsyncEngine, clock: ManualClock, *allow: str) -> AsyncIterator[CallbackSender]:
    rules = CallbackRules(allow or ("127.0.0.1",))
    metrics = JobMetrics(CollectorRegistry())
    async with CallbackSender(database, rules, SECRET, clock, metrics) as sender:
        yield sender


async def due(database: AsyncEngine, clock: ManualClock, url: str, name: str = "d1", host: str = "h") -> None:
    async with transaction(database) as session:
        session.add(
            DeliveryRow(
                delivery_id=name,
                job_id="j",
                url=url,
                host=host,
                body=b'{"batch_id":"j"}',
                attempts=0,
                due_at=clock.now(),
                created_at=clock.now(),
                last_error="",
            )
        )


async def rows(database: AsyncEngine) -> dict[str, DeliveryRow]:
    async with transaction(database) as session:
        return {row.delivery_id: row for row in await session.scalars(select(DeliveryRow))}


async def until_noted(database: AsyncEngine, name: str, wanted: str) -> DeliveryRow:
    """The delivery once its last error is `wanted`."""
    found = await eventually_of(lambda: rows(database), lambda known: known[name].last_error == wanted)
    return found[name]


async def until_gone(database: AsyncEngine, name: str) -> None:
    await eventually_of(lambda: rows(database), lambda known: name not in known)


async def test_a_clock_that_is_set_back_holds_up_no_callback(database: AsyncEngine) -> None:
    clock = ManualClock()
    async with Receiver([OK]).running() as receiver:
        await due(database, clock, f"http://127.0.0.1:{receiver.port}/hook")
        clock.advance(-3600)
        async with sending(database, clock):
            await until_gone(database, "d1")
        assert len(receiver.got) == 1


async def test_a_callback_is_tried_until_it_is_taken(database: AsyncEngine) -> None:
    clock = ManualClock()
    async with Receiver([FAILED, FAILED, OK]).running() as receiver:
        await due(database, clock, f"http://127.0.0.1:{receiver.port}/hook?a=b")
        async with sending(database, clock) as sender:
            row = await until_noted(database, "d1", "answered 500")
            assert timedelta(seconds=4) <= row.due_at - clock.now() <= timedelta(seconds=6)
            sender.wake()
            await asyncio.sleep(0.1)
            assert len(receiver.got) == 1  # not before its time
            clock.advance(7)
            sender.wake()
            await eventually(lambda: len(receiver.got) == 2)
            # The next try counts from when this one was noted, and until then it is put off for a minute.
            soon = clock.now() + timedelta(seconds=30)
            await eventually_of(lambda: rows(database), lambda known: known["d1"].due_at < soon)
            clock.advance(20)
            sender.wake()
            await eventually(lambda: len(receiver.got) == 3)
            await until_gone(database, "d1")
        headers, body = receiver.got[-1]
        unix_s = int(headers["x-headrace-signature"].split(",")[0].removeprefix("t="))
        signed = hmac.new(SECRET.encode(), f"{unix_s}.".encode() + body, "sha256").hexdigest()
        assert headers["x-headrace-signature"] == f"t={unix_s},v1={signed}"
        assert {sent["x-headrace-delivery"] for sent, _ in receiver.got} == {"d1"}
        assert headers["host"] == f"127.0.0.1:{receiver.port}"


async def test_receivers_that_hang_hold_up_nobody(
    database: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "_POST_S", 4.0)  # in which the other one is reached on any machine
    clock = ManualClock()
    async with Receiver([None]).running() as hanging, Receiver([OK]).running() as well:
        for number in range(50):
            await due(database, clock, f"http://127.0.0.1:{hanging.port}/", f"hang-{number:02d}", "hanging")
        await due(database, clock, f"http://127.0.0.1:{well.port}/", "well", "well")
        async with sending(database, clock):
            await until_gone(database, "well")
            assert len(hanging.got) <= 4  # two at once, and no more than another two since
            await until_noted(database, "hang-00", "TimeoutError")


async def test_redirects_are_not_followed_and_answers_are_not_read(database: AsyncEngine) -> None:
    clock = ManualClock()
    async with Receiver([OK]).running() as inside, Receiver([HUGE]).running() as large:
        moved = f"HTTP/1.1 307 Go\r\nlocation: http://127.0.0.1:{inside.port}/\r\ncontent-length: 0\r\n\r\n"
        async with Receiver([moved.encode()]).running() as redirecting:
            await due(database, clock, f"http://127.0.0.1:{redirecting.port}/", "moved", "a")
            await due(database, clock, f"http://127.0.0.1:{large.port}/", "large", "b")
            async with sending(database, clock):
                await until_noted(database, "moved", "answered 307")
                await until_gone(database, "large")
        assert inside.got == []


async def test_a_name_that_leads_inside_is_never_connected_to(database: AsyncEngine) -> None:
    clock = ManualClock()
    async with Receiver([OK]).running() as inside:
        await due(database, clock, f"http://localhost:{inside.port}/")
        async with sending(database, clock, "public"):
            await until_noted(database, "d1", "The name leads to an address that is not public.")
        assert inside.got == []


async def test_after_a_day_nobody_tries_any_more(database: AsyncEngine) -> None:
    clock = ManualClock()
    async with Receiver([FAILED]).running() as receiver:
        await due(database, clock, f"http://127.0.0.1:{receiver.port}/")
        clock.advance(24 * 3600)
        async with sending(database, clock):
            await until_gone(database, "d1")
        assert len(receiver.got) == 1


async def test_a_job_tells_that_it_has_ended(database_url: str, tmp_path: Path) -> None:
    async with Receiver([OK]).running() as receiver, jobs(database_url, tmp_path) as here:
        url = f"http://127.0.0.1:{receiver.port}/done"
        batch_id = await here.submitted(inputs=[{"x": 1}], callback_url=url, metadata={"order": "7"})
        await eventually(lambda: len(receiver.got) == 1)
        told = json.loads(receiver.got[0][1])
        assert (told["batch_id"], told["status"], told["metadata"]) == (batch_id, "completed", {"order": "7"})
        assert told["counts"] == {"total": 1, "completed": 1, "failed": 0}
