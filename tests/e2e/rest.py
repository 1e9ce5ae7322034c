"""Requests against a running platform, as an application would send them."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from deploy.embedded.stack import Stack
from services.common.bus.admin import lag
from services.common.errors import Unavailable
from services.common.topics import PREDICTIONS
from tests.fixtures.waiting import PATIENCE_S, patience

Json = dict[str, Any]
#: What a part is doing between two of its figures is in neither.
QUIET_S = 1.0


@asynccontextmanager
async def caller(stack: Stack, key: str | None = None, at_once: int = 32) -> AsyncIterator[httpx.AsyncClient]:
    """A client with `key`, by default the admin key."""
    headers = {"authorization": f"Bearer {key or stack.admin_key}"}
    limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
    async with httpx.AsyncClient(
        base_url=stack.rest_url, headers=headers, timeout=PATIENCE_S, limits=limits
    ) as client:
        yield client


async def predict_all(
    client: httpx.AsyncClient, model: str, rows: Iterable[NDArray[np.float32]], users: Sequence[str]
) -> list[Json]:
    """One request per row, many at once, answers in the order of the rows. Fails on any that is not 200."""
    # The client's pool looks through all that wait for a connection whenever one gets it: a thousand would
    # keep it busy for half a minute.
    turns = asyncio.Semaphore(32)

    async def one(row: NDArray[np.float32], user: str) -> Json:
        body = {"model": model, "inputs": [row.tolist()], "user_id": user}
        async with turns:
            answer = await client.post("/v1/predict", json=body)
        assert answer.status_code == 200, answer.text
        found: Json = answer.json()
        return found

    return await asyncio.gather(*(one(row, user) for row, user in zip(rows, users, strict=True)))


async def counted(client: httpx.AsyncClient, model: str) -> int:
    """Requests of `model` that analytics has counted."""
    answer = await client.get(f"/v1/analytics/models/{model}")
    if answer.status_code == 404:
        return 0
    assert answer.status_code == 200, answer.text
    return total(answer.json())


async def settled(stack: Stack, client: httpx.AsyncClient, model: str) -> int:
    """The count once nothing is on its way to analytics any more, and it has stood still for QUIET_S."""
    last, since = -1, time.monotonic()
    async with patience(f"the requests of {model} to be counted"):
        while time.monotonic() - since < QUIET_S or not await nothing_waits(stack):
            await asyncio.sleep(0.2)
            now = await counted(client, model)
            if now != last:
                last, since = now, time.monotonic()
    return last


async def nothing_waits(stack: Stack) -> bool:
    """Whether all that was logged is in Kafka, and analytics has read all of that. False while a part that
    would tell is away."""
    parts = ["router", *(f"worker-{index}" for index in range(stack.configuration.workers))]
    try:
        async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
            for part in parts:
                said = (await client.get(f"{stack.service_url(part)}/metrics")).text
                waiting = re.findall(
                    r"^headrace_[a-z]+_log_pending_records(?:{[^}]*})? ([0-9.]+)$", said, re.MULTILINE
                )
                if not waiting or any(float(records) for records in waiting):
                    return False
        return await lag(stack.kafka_bootstrap_servers, PREDICTIONS, "analytics", timeout=PATIENCE_S) == 0
    except (httpx.TransportError, Unavailable):
        return False


def total(shown: Json) -> int:
    """Requests over all versions of what analytics shows of a model."""
    return sum(int(version["requests"]) for version in shown["versions"])
