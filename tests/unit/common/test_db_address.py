"""What DATABASE_URL may say, besides where the server is."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from services.common.db import engine
from services.common.errors import Fatal

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


async def test_what_libpq_takes_is_taken(database_url: str) -> None:
    said = (
        "application_name=ours&connect_timeout=10&options=-c%20geqo%3Doff&target_session_attrs=read-write"
        "&channel_binding=prefer&gssencmode=disable&sslmode=disable&sslrootcert=/nowhere"
    )
    database = engine(f"{database_url}?{said}", "drift")
    async with database.connect() as connection:
        names = ("application_name", "geqo", "search_path")
        shown = [await connection.scalar(text(f"SHOW {name}")) for name in names]
    await database.dispose()
    assert shown == ["ours", "off", "drift"]


async def test_a_certificate_is_looked_for_where_the_address_says() -> None:
    address = "postgresql://me@127.0.0.1:1/mine?sslmode=verify-full&sslrootcert=/nowhere/root.crt"
    database = engine(address, "drift")
    with pytest.raises(FileNotFoundError):
        async with database.connect():
            pass
    await database.dispose()


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ("sslmode=require&channel_binding=require", "channel_binding"),
        ("keepalives_idle=3", "keepalives_idle"),
        ("sslrootcert=system", "sslrootcert"),
        ("connect_timeout=soon", "connect_timeout"),
    ],
)
def test_what_would_not_be_heeded_is_refused_by_its_name(parameters: str, named: str) -> None:
    with pytest.raises(Fatal, match=named):
        engine(f"postgresql://me:secret@127.0.0.1/mine?{parameters}", "drift")


def test_several_hosts_where_one_is_wanted_are_no_address() -> None:
    with pytest.raises(Fatal, match="DATABASE_URL is not of the form"):
        engine("postgresql://me@a:1,b:2/mine", "drift")
