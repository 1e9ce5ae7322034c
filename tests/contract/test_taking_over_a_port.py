"""Processes that share a port by SO_REUSEPORT and take over from each other: what clients notice of it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from services.common.lifecycle import held_port
from tests.fixtures.waiting import patience

REPOSITORY = Path(__file__).resolve().parents[2]
#: Each closes its listener under the flood. Without care 2 to 5 connections were reset each time.
RENEWALS = 20
CLIENTS = 16

#: Serves again and again, each time anew; says so when it began.
SERVER = """
import asyncio, sys
import uvloop
from services.common.lifecycle import serve_asgi

async def app(scope, receive, send):
    assert scope["type"] == "http"
    headers = [(b"content-length", b"4"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"done"})

async def main():
    port, times, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    for turn in range(times):
        async with serve_asgi(app, "127.0.0.1", port, reuse_port=True):
            if turn == 0:
                print("serving", flush=True)
            await asyncio.sleep(seconds)

asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main())
"""


async def server(port: int, times: int, seconds: float) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SERVER, str(port), str(times), str(seconds),
        stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'proto'}"},
    )  # fmt: skip
    assert process.stdout is not None
    async with patience("the server to start"):
        assert await process.stdout.readline() == b"serving\n"
    return process


async def asked(port: int) -> str:
    """What became of one request over a connection of its own."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = await reader.read()
        finally:
            writer.close()
    except OSError as error:
        return type(error).__name__
    return "answered" if answer.startswith(b"HTTP/1.1 200") and answer.endswith(b"done") else repr(answer)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux spreads connections over those who listen")
async def test_no_connection_is_lost_where_a_listener_closes() -> None:
    said: Counter[str] = Counter()
    with held_port("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        stays = await server(port, 1, 3600.0)
        renewed = await server(port, RENEWALS, 0.05)

        async def ask() -> None:
            while renewed.returncode is None:
                said[await asked(port)] += 1

        try:
            async with patience("the last renewal"), asyncio.TaskGroup() as tasks:
                for _ in range(CLIENTS):
                    tasks.create_task(ask())
                await renewed.wait()
        finally:
            for process in (stays, renewed):
                if process.returncode is None:
                    process.kill()
                await process.wait()
    assert said["answered"] > RENEWALS * CLIENTS
    assert set(said) == {"answered"}, said
