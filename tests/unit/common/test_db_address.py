"""What DATABASE_URL may say, besides where the server is."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy.exc import DBAPIError

from services.common.db import engine

_SSL_REQUEST = bytes.fromhex("0000000804d2162f")


@pytest.mark.parametrize(("mode", "encrypted"), [("require", True), ("disable", False)])
async def test_sslmode_is_taken_as_everywhere_else(mode: str, encrypted: bool) -> None:
    """Addresses of databases that one rents end in it."""
    asked: list[bytes] = []

    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readexactly(8))
        writer.close()

    async with await asyncio.start_server(server, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        database = engine(f"postgresql://me:secret@127.0.0.1:{port}/mine?sslmode={mode}", "drift")
        with pytest.raises((OSError, DBAPIError)):
            async with database.connect():
                pass
        await database.dispose()
    assert [first == _SSL_REQUEST for first in asked] == [encrypted]
