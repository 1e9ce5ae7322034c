"""Parts die while requests run: nothing fails that another part can answer, nothing served is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from deploy.embedded.stack import Stack
from examples import cancer
from tests.e2e.rest import caller, settled, total
from tests.fixtures.asking import until
from tests.fixtures.platform import register_examples
from tests.fixtures.servers import kafka_home

RATE = 100  # requests a second


async def load(client: httpx.AsyncClient, seconds: float) -> list[int]:
    """Requests at a steady rate for `seconds`, whatever the answers; gives their status codes, 0 for none."""
    rows = cancer.load().held_out_rows
    begun = time.monotonic()
    tasks: list[asyncio.Task[int]] = []

    async def one(number: int) -> int:
        row = rows[number % len(rows)]
        sent = {"model": "cancer", "inputs": [row.tolist()], "user_id": f"chaos-{number}"}
        try:
            return (await client.post("/v1/predict", json=sent)).status_code
        except httpx.HTTPError:
            return 0

    async with asyncio.TaskGroup() as group:
        for number in range(int(seconds * RATE)):
            await asyncio.sleep(max(0.0, begun + number / RATE - time.monotonic()))
            tasks.append(group.create_task(one(number)))
    return [task.result() for task in tasks]


@pytest.mark.kafka
async def test_a_broker_away_for_ten_seconds_loses_nothing(new_platform: Callable[..., Stack]) -> None:
    home = kafka_home()
    if home is None:
        pytest.skip("no Apache Kafka here: set KAFKA_HOME")
    stack = await asyncio.to_thread(new_platform, workers=1, kafka_home=Path(home))
    await asyncio.to_thread(register_examples, stack, "cancer")
    async with caller(stack, at_once=64) as client:
        before = await settled(stack, client, "cancer")
        running = asyncio.create_task(load(client, 15.0))
        await asyncio.sleep(2.0)
        await asyncio.to_thread(stack.kill, "kafka", hold=True)
        await asyncio.sleep(10.0)
        await asyncio.to_thread(stack.release, "kafka")
        codes = np.array(await running)
        assert (codes == 200).all(), np.unique(codes, return_counts=True)
        await until(
            client,
            "/v1/analytics/models/cancer",
            lambda shown: total(shown) >= before + len(codes),
        )
        assert await settled(stack, client, "cancer") == before + len(codes)
