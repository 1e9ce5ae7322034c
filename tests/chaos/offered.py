"""An open-loop load from a process of its own, for tests that kill parts meanwhile, and what became of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load.drive import OpenLoop, open_loop
from benchmarks.load.requests import Endpoint
from benchmarks.workload import Dialect
from deploy.embedded.stack import Stack
from examples import cancer
from tests.e2e.rest import settled, total
from tests.fixtures.asking import until
from tests.fixtures.waiting import eventually

RATE = 500.0
SECONDS = 6.0
CONNECTIONS = 128
MODEL = "cancer"
#: Requests that wait for a part to come back wait longer than usual on machines with one or two cores.
PATIENCE_S = 15.0


def requests_of_users(folder: Path, stack: Stack) -> Path:
    """Requests of different users, as the generator reads them."""
    path = folder / "requests"
    with path.open("wb") as file:
        for number, row in enumerate(cancer.load().held_out_rows[:100]):
            said = {"model": MODEL, "inputs": [row.tolist()], "user_id": f"user-{number}"}
            body = json.dumps(said).encode()
            head = (
                "POST /v1/predict HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
                f"Authorization: Bearer {stack.admin_key}\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            file.write(b"%d\n" % (len(head) + len(body)) + head.encode() + body)
    return path


async def load(stack: Stack, requests: Path) -> asyncio.Future[dict[str, Any]]:
    """RATE requests a second for SECONDS, whatever the answers, from a process of its own that has begun."""
    port = stack.configuration.ports["GATEWAY_HTTP_PORT"]
    endpoint = Endpoint("127.0.0.1", port, "/v1/predict", Dialect.NATIVE)
    begun = requests.with_name("begun")
    begun.unlink(missing_ok=True)
    offered = OpenLoop(RATE, CONNECTIONS, SECONDS, PATIENCE_S, PATIENCE_S, warm_up_s=0.0, begun=begun)
    running = asyncio.get_running_loop().run_in_executor(None, open_loop, endpoint, requests, offered)
    await eventually(lambda: begun.exists() or running.done())
    return running


def sent(said: dict[str, Any]) -> int:
    """Every request of the load, whatever became of it."""
    kinds = ("answered", "late", "refused", "unanswered", "abandoned")
    return sum(int(said[kind]) for kind in kinds) + sum(int(count) for count in said["other"].values())


async def counted_since(stack: Stack, client: httpx.AsyncClient, before: int, at_least: int) -> int:
    """Requests that analytics counted after `before`, once nothing is on its way any more."""
    await until(
        client,
        f"/v1/analytics/models/{MODEL}",
        lambda shown: total(shown) >= before + at_least,
    )
    return await settled(stack, client, MODEL) - before
