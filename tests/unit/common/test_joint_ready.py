"""Whether several processes are ready, where one of them says nothing; and what they measured, together."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from services.common.lifecycle import Health, JointOps, ops_app, serve_asgi


async def said(ops: JointOps) -> tuple[int, dict[str, Any]]:
    """What /health/ready answers."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing to receive")

    await ops({"type": "http", "method": "GET", "path": "/health/ready", "headers": []}, receive, send)
    return int(sent[0]["status"]), json.loads(sent[1]["body"])


async def asked(ops: JointOps) -> int:
    """The status alone."""
    return (await said(ops))[0]


async def test_one_that_is_ready_need_not_wait_for_one_that_is_frozen() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def ready(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 200 OK\r\n\r\n{}")
        writer.close()

    async with (
        await asyncio.start_server(silent, "127.0.0.1", 0) as frozen,
        await asyncio.start_server(ready, "127.0.0.1", 0) as well,
    ):
        ports = [server.sockets[0].getsockname()[1] for server in (frozen, well)]
        began = time.monotonic()
        assert await asked(JointOps("127.0.0.1", ports, Health(), lambda: 0)) == 200
        assert time.monotonic() - began < 1.5  # the frozen one is waited for by 2 s where nobody is ready
        assert await asked(JointOps("127.0.0.1", ports[:1], Health(), lambda: 0)) == 503


async def test_where_nobody_is_ready_each_is_asked_once_and_says_why() -> None:
    times = 0

    async def unready(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal times
        times += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.0 503 Service Unavailable\r\n\r\n{"reasons": {"bus": "starting"}}')
        writer.close()

    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.0 500 Internal Server Error\r\n\r\nno JSON")
        writer.close()

    async with (
        await asyncio.start_server(unready, "127.0.0.1", 0) as first,
        await asyncio.start_server(odd, "127.0.0.1", 0) as second,
    ):
        ports = [server.sockets[0].getsockname()[1] for server in (first, second)]
        third = await asyncio.start_server(odd, "127.0.0.1", 0)
        gone = third.sockets[0].getsockname()[1]
        third.close()
        status, body = await said(JointOps("127.0.0.1", [*ports, gone], Health(), lambda: 0))
        assert status == 503
        assert body["reasons"] == {
            "process-0": {"bus": "starting"},
            "process-1": "answers 500",
            "process-2": "does not answer",
        }
        assert times == 1


async def test_metrics_of_all_are_what_openmetrics_allows() -> None:
    """A family `x_created` beside the counter `x` is refused by who reads it to the letter."""
    registry = CollectorRegistry()
    Counter("rows", "Rows.", ["outcome"], registry=registry).labels("done").inc(3)
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("nothing to receive")

    async with serve_asgi(ops_app(Health(), registry), "127.0.0.1", 0) as port:
        accept = [(b"accept", b"application/openmetrics-text;version=1.0.0")]
        asked_for = {"type": "http", "method": "GET", "path": "/metrics", "headers": accept}
        await JointOps("127.0.0.1", [port, port], Health(), lambda: 0)(asked_for, receive, send)
    body = sent[1]["body"].decode()
    families = {
        family.name: family
        for family in text_string_to_metric_families(body)  # type: ignore[no-untyped-call]
    }
    rows = [(sample.labels["process"], sample.value) for sample in families["rows"].samples]
    assert rows == [("0", 3.0), ("1", 3.0)]
