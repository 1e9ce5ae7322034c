"""Parts of the data plane die, drain and change what they serve under an open-loop load: what was answered is
counted once, and nothing is refused that another part could answer."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from deploy.embedded.stack import Stack
from examples import cancer
from tests.chaos.offered import (
    MODEL,
    RATE,
    SECONDS,
    counted_since,
    load,
    requests_of_users,
    sent,
)
from tests.e2e.rest import caller, settled
from tests.fixtures.platform import register_examples
from tests.fixtures.waiting import eventually_of

pytestmark = pytest.mark.timeout(600)  # a whole platform is started


@pytest.fixture
def stack(platform: Stack) -> Stack:
    """Two workers, the examples deployed, the router inside the gateway. Every test leaves all parts
    running."""
    return platform


@pytest.fixture
def requests_file(tmp_path: Path, stack: Stack) -> Path:
    """Requests for `stack`."""
    return requests_of_users(tmp_path, stack)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_worker_that_dies_or_drains_costs_no_request(
    stack: Stack, requests_file: Path, number: signal.Signals
) -> None:
    async with caller(stack) as client:
        before = await settled(stack, client, MODEL)
        running = await load(stack, requests_file)
        await asyncio.sleep(SECONDS / 3)
        pid = await asyncio.to_thread(stack.kill, "worker-0", number)
        said = await running
        assert said["answered"] == sent(said) == RATE * SECONDS, json.dumps(said)
        assert await counted_since(stack, client, before, said["answered"]) == said["answered"]
        await asyncio.to_thread(stack.wait_ready, "worker-0", not_pid=pid)


async def test_a_killed_gateway_loses_only_what_was_on_its_connections(
    stack: Stack, requests_file: Path
) -> None:
    async with caller(stack) as client:
        before = await settled(stack, client, MODEL)
    running = await load(stack, requests_file)
    await asyncio.sleep(SECONDS / 3)
    pid = await asyncio.to_thread(stack.kill, "gateway")
    said = await running
    assert sent(said) == RATE * SECONDS, json.dumps(said)
    assert said["refused_without_retry_after"] == 0, json.dumps(said)
    # Nothing else than lost connections: no wrong answer, and none that was begun and never came.
    assert set(said["other"]) <= {"connection lost"}, json.dumps(said)
    assert said["unanswered"] == 0, json.dumps(said)
    await asyncio.to_thread(stack.wait_ready, "gateway", not_pid=pid)
    async with caller(stack) as client:
        assert (await client.get(f"/v2/models/{MODEL}/ready")).status_code == 200
        served = said["answered"] + said["late"]
        lost = said["other"].get("connection lost", 0)
        assert served <= await counted_since(stack, client, before, served) <= served + lost


async def test_versions_are_swapped_and_taken_away_under_load(stack: Stack, requests_file: Path) -> None:
    async def share(client: httpx.AsyncClient, *shares: tuple[str, int]) -> None:
        versions = [{"version": version, "weight": weight} for version, weight in shares]
        answer = await client.put(f"/v1/deployments/{MODEL}", json={"versions": versions})
        assert answer.status_code == 200, answer.text

    async with caller(stack) as client:
        before = await settled(stack, client, MODEL)
        running = await load(stack, requests_file)
        for shares in (
            [("1", 0), ("2", 100)],
            [("1", 100), ("2", 0)],
            [("2", 100)],
            [("1", 100)],
            [("1", 10), ("2", 90)],
        ):
            await asyncio.sleep(SECONDS / 7)
            await share(client, *shares)
        said = await running
        assert said["answered"] == sent(said) == RATE * SECONDS, json.dumps(said)
        assert await counted_since(stack, client, before, said["answered"]) == said["answered"]
        await share(client, ("2", 100))
        body = {"model": MODEL, "inputs": [cancer.load().held_out_rows[0].tolist()], "user_id": "last"}
        await eventually_of(
            lambda: client.post("/v1/predict", json=body), lambda answer: answer.json()["version"] == "2"
        )


async def test_a_killed_router_loses_and_doubles_nothing(
    new_platform: Callable[..., Stack], tmp_path: Path
) -> None:
    stack = await asyncio.to_thread(new_platform, workers=1, environment={"HEADRACE_ROUTER": "apart"})
    await asyncio.to_thread(register_examples, stack, MODEL)
    requests_file = requests_of_users(tmp_path, stack)
    async with caller(stack) as client:
        before = await settled(stack, client, MODEL)
        running = await load(stack, requests_file)
        await asyncio.sleep(SECONDS / 3)
        pid = await asyncio.to_thread(stack.kill, "router")
        said = await running
        # Where it is back within two seconds everything waits for it; on a slow machine some are refused.
        assert said["answered"] + said["late"] + said["refused"] == sent(said) == RATE * SECONDS, json.dumps(
            said
        )
        assert said["refused_without_retry_after"] == 0
        served = said["answered"] + said["late"]
        counted = await counted_since(stack, client, before, served)
        # What was served as its gateway gave up was answered with a refusal, and is counted all the same.
        assert served <= counted <= served + said["refused"]
        await asyncio.to_thread(stack.wait_ready, "router", not_pid=pid)
