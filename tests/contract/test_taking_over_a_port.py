"""Processes that share a port by SO_REUSEPORT and take over from each other: what clients notice of it.
`test_last_connections.py` says what becomes of a single connection."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from services.common.lifecycle import held_port
from tests.fixtures.rpc import CheckCall
from tests.fixtures.waiting import patience

REPOSITORY = Path(__file__).resolve().parents[2]
#: Each closes its listener under the flood. Without care 2 to 5 connections were reset each time.
RENEWALS = 20
CLIENTS = 16

#: Each serves again and again, each time anew; says so when it began.
HTTP = """
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
GRPC = """
import asyncio, sys
import uvloop
from tests.fixtures.rpc import Front, health_methods

async def main():
    port, times, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    methods = await health_methods()
    for turn in range(times):
        server = Front(methods=methods).server
        await server.start("127.0.0.1", port, reuse_port=True)
        if turn == 0:
            print("serving", flush=True)
        await asyncio.sleep(seconds)
        await server.stop(10.0)

asyncio.Runner(loop_factory=uvloop.new_event_loop).run(main())
"""


async def server(program: str, port: int, times: int, seconds: float) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(port), str(times), str(seconds),
        stdout=asyncio.subprocess.PIPE, cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'proto'}"},
    )  # fmt: skip
    assert process.stdout is not None
    async with patience("the server to start"):
        assert await process.stdout.readline() == b"serving\n"
    return process


async def asked_by_http(port: int) -> str:
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


async def asked_by_grpc(port: int) -> str:
    """The same. A client sends elsewhere what it hears was not taken."""
    call = CheckCall()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(call.asks)
            while not call.outcome:
                said = await reader.read(65536)
                if not said:
                    return "nothing"
                call.heard(said)
        finally:
            writer.close()
    except OSError as error:
        return type(error).__name__
    return call.outcome


@pytest.mark.skipif(sys.platform != "linux", reason="Linux spreads connections over those who listen")
@pytest.mark.parametrize(
    ("program", "asked"), [(HTTP, asked_by_http), (GRPC, asked_by_grpc)], ids=("http", "grpc")
)
async def test_no_connection_is_lost_where_a_listener_closes(
    program: str, asked: Callable[[int], Awaitable[str]]
) -> None:
    said: Counter[str] = Counter()
    with held_port("127.0.0.1", 0) as held:
        port = held.getsockname()[1]
        stays = await server(program, port, 1, 3600.0)
        renewed = await server(program, port, RENEWALS, 0.05)

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
    assert set(said) <= {"answered", "sent on"}, said
