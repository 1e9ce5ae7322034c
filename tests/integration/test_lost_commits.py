"""A commit whose answer is lost: nobody knows whether it was made."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from services.common.db import DatabaseUnavailable, engine, transaction


async def test_nobody_is_told_to_try_a_commit_again_that_may_have_been_made(database_url: str) -> None:
    """Callers that are told when do it by themselves: a key would be made twice."""
    server, deaf = make_url(database_url), False

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        while data := await reader.read(1 << 16):
            if answers and deaf:
                break
            writer.write(data)
        writer.close()

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner = await asyncio.open_connection(server.host, server.port)
        async with asyncio.TaskGroup() as both:
            both.create_task(pass_on(reader, inner[1], answers=False))
            both.create_task(pass_on(inner[0], writer, answers=True))

    async with await asyncio.start_server(between, "127.0.0.1", 0) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        lossy = engine(server.set(port=port).render_as_string(hide_password=False), "public")
        direct = engine(database_url, "public")

        async def insert(number: int) -> None:
            nonlocal deaf
            async with transaction(lossy) as session:
                await session.execute(text("INSERT INTO made VALUES (:number)"), {"number": number})
                deaf = True

        try:
            async with transaction(direct) as session:
                await session.execute(text("CREATE TABLE made (number int)"))
            with pytest.raises(DatabaseUnavailable) as lost:
                await insert(1)
            assert lost.value.retry_after_ms is None
            with pytest.raises(DatabaseUnavailable) as refused:
                await insert(2)
            assert refused.value.retry_after_ms
            async with transaction(direct) as session:
                assert (await session.execute(text("SELECT number FROM made"))).scalars().all() == [1]
        finally:
            await lossy.dispose()
            await direct.dispose()
