"""Processes that gateway and router share, and the quick models in them: what the death of one of them, of
their parent or of all workers costs. By default only machines with few cores have them, so it is said here
how many there are."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from open_inference.open_inference_pb2 import ModelInferRequest
from open_inference.open_inference_pb2_grpc import GRPCInferenceServiceStub

from deploy.embedded.stack import Stack
from examples import cancer
from tests.chaos.offered import (
    CONNECTIONS,
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
from tests.fixtures.waiting import PATIENCE_S, eventually

FRONTS = 2
pytestmark = pytest.mark.timeout(600)  # a whole platform is started
#: With so many rows a request is larger than what the router leaves to the process that it runs in.
LARGE_ROWS = 200
#: The router's process has its versions, and so has the only worker.
HERE_AND_THERE = 2.0


@pytest.fixture(scope="module")
def stack(stacks_directory: Path) -> Iterator[Stack]:
    """One worker, two processes with gateway and router. Every test leaves all parts running."""
    home = Path(tempfile.mkdtemp(dir=stacks_directory))
    home.chmod(0o755)
    chosen = {"HEADRACE_ROUTER": "inside", "HEADRACE_FRONTS": str(FRONTS)}
    started = Stack.on_free_ports(home, workers=1, environment=chosen)
    try:
        started.start()
        register_examples(started, MODEL)
        yield started
    finally:
        started.stop()
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def requests_file(tmp_path: Path, stack: Stack) -> Path:
    """Requests for `stack`."""
    return requests_of_users(tmp_path, stack)


def fronts(stack: Stack) -> list[psutil.Process]:
    """The processes that take requests."""
    children: list[psutil.Process] = psutil.Process(stack.pids()["gateway"]).children()
    return children


def cores_of_loops(stack: Stack) -> list[list[int]]:
    """Where the event loop of each front may run, in order."""
    return sorted(process.cpu_affinity() for process in fronts(stack))


def wanted_cores() -> list[list[int]]:
    """One each where there are as many, and otherwise all."""
    cores = sorted(os.sched_getaffinity(0))
    return [[core] for core in cores] if len(cores) == FRONTS else [cores] * FRONTS


def gone(process: psutil.Process) -> bool:
    """Whether it has ended, reaped or not."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


async def who_can_answer(stack: Stack, version: str) -> dict[str, float]:
    """Workers that each front offers `version` of the model to, by the front's number."""
    async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
        said = (await client.get(f"{stack.service_url('router')}/metrics")).text
    pattern = rf'^headrace_router_endpoints{{model="{MODEL}",process="(\d+)",version="{version}"}} ([0-9.]+)$'
    return {front: float(count) for front, count in re.findall(pattern, said, re.MULTILINE)}


async def all_is_there(stack: Stack, *versions: str) -> None:
    """Wait until every front serves `versions`, by itself and by the worker."""

    async def there() -> bool:
        wanted = {str(front): HERE_AND_THERE for front in range(FRONTS)}
        return all([await who_can_answer(stack, version) == wanted for version in versions])

    await eventually(there)


async def share(client: httpx.AsyncClient, *shares: tuple[str, int]) -> None:
    versions = [{"version": version, "weight": weight} for version, weight in shares]
    answer = await client.put(f"/v1/deployments/{MODEL}", json={"versions": versions})
    assert answer.status_code == 200, answer.text


async def test_a_killed_front_loses_only_what_was_on_its_connections(
    stack: Stack, requests_file: Path
) -> None:
    await all_is_there(stack, "1", "2")
    parent = stack.pids()["gateway"]
    killed, other = fronts(stack)
    async with caller(stack) as client:
        before = await settled(stack, client, MODEL)
        running = await load(stack, requests_file)
        await asyncio.sleep(SECONDS / 3)
        killed.kill()
        said = await running
        lost = said["other"].get("connection lost", 0)
        assert said["answered"] + lost == sent(said) == RATE * SECONDS, json.dumps(said)
        assert lost <= CONNECTIONS
        await all_is_there(stack, "1", "2")  # the new one publishes what the old one did not
        assert stack.pids()["gateway"] == parent
        assert {killed, other} & set(fronts(stack)) == {other}
        await eventually(lambda: cores_of_loops(stack) == wanted_cores())
    async with caller(stack) as client:
        counted = await counted_since(stack, client, before, said["answered"])
        assert said["answered"] <= counted <= said["answered"] + lost


async def test_quick_models_answer_while_no_worker_is_there(stack: Stack, requests_file: Path) -> None:
    await all_is_there(stack, "1", "2")
    row = cancer.load().held_out_rows[0].tolist()
    async with caller(stack) as client:
        before = await settled(stack, client, MODEL)
        running = await load(stack, requests_file)
        await asyncio.sleep(SECONDS / 3)
        pid = await asyncio.to_thread(stack.kill, "worker-0", signal.SIGKILL, hold=True)
        try:
            said = await running
            assert said["answered"] == sent(said) == RATE * SECONDS, json.dumps(said)
            # Nobody else has it: what is large is answered, too.
            asked = {"model": MODEL, "inputs": [row] * LARGE_ROWS, "user_id": "large"}
            large = await client.post("/v1/predict", json=asked)
            assert large.status_code == 200, large.text
        finally:
            stack.release("worker-0")
            await asyncio.to_thread(stack.wait_ready, "worker-0", not_pid=pid)
        assert await counted_since(stack, client, before, said["answered"] + 1) == said["answered"] + 1


async def test_fronts_take_versions_in_and_leave_them_under_load(stack: Stack, requests_file: Path) -> None:
    await all_is_there(stack, "1", "2")
    async with caller(stack) as client:
        before = await settled(stack, client, MODEL)
        running = await load(stack, requests_file)
        for shares in ([("2", 100)], [("1", 100)], [("2", 100)]):
            await asyncio.sleep(SECONDS / 5)
            await share(client, *shares)
        said = await running
        assert said["answered"] == sent(said) == RATE * SECONDS, json.dumps(said)
        await all_is_there(stack, "2")
        await eventually(lambda: _nobody(stack, "1"))
        assert await counted_since(stack, client, before, said["answered"]) == said["answered"]
        await share(client, ("1", 90), ("2", 10))
        await all_is_there(stack, "1", "2")


async def _nobody(stack: Stack, version: str) -> bool:
    return not any((await who_can_answer(stack, version)).values())


async def test_new_fronts_take_over_without_losing_a_request(stack: Stack) -> None:
    """As after the hot path was compiled behind a first start: routers go with their gateways, and workers
    are new, too. Each of the old ones closes a listener that the others share. Half of the clients make a
    connection for each request, and meet those that close."""
    await all_is_there(stack, "1", "2")
    row = cancer.load().held_out_rows[0].tolist()
    pids = stack.pids()
    old = [psutil.Process(pids["gateway"]), psutil.Process(pids["worker-0"]), *fronts(stack)]
    renewed = asyncio.Event()
    said: Counter[str] = Counter()

    async def ask(client: httpx.AsyncClient, user: int, headers: dict[str, str]) -> None:
        for number in itertools.count():
            asked = {"model": MODEL, "inputs": [row], "user_id": f"renewed-{user}-{number}"}
            answer = await client.post("/v1/predict", json=asked, headers=headers)
            said[f"REST {answer.status_code}"] += 1
            if renewed.is_set():
                return
            await asyncio.sleep(0.02)

    async def call() -> None:
        asked = ModelInferRequest(model_name=MODEL)
        features = asked.inputs.add(name="features", datatype="FP32", shape=[1, len(row)])
        features.contents.fp32_contents[:] = row
        key = [("authorization", f"Bearer {stack.admin_key}")]
        async with grpc.aio.insecure_channel(stack.grpc_address) as channel:
            stub = GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]
            while not renewed.is_set():
                await stub.ModelInfer(asked, metadata=key, timeout=PATIENCE_S)
                said["gRPC"] += 1
                await asyncio.sleep(0.02)

    async with caller(stack) as client:
        before = await settled(stack, client, MODEL)
        async with asyncio.TaskGroup() as asking:
            for user in range(8):
                asking.create_task(ask(client, user, {"connection": "close"} if user % 2 else {}))
            asking.create_task(call())
            await eventually(lambda: said["REST 200"] > 40 and said["gRPC"] > 5)
            assert await asyncio.to_thread(stack.renew)
            renewed.set()
        assert set(said) == {"REST 200", "gRPC"}, said
        assert all(gone(process) for process in old)
        assert len(fronts(stack)) == FRONTS
        await all_is_there(stack, "1", "2")
        assert await counted_since(stack, client, before, said.total()) == said.total()


async def test_fronts_end_with_their_parent_even_a_stopped_one(stack: Stack) -> None:
    orphans = fronts(stack)
    orphans[0].suspend()
    pid = await asyncio.to_thread(stack.kill, "gateway")
    await eventually(lambda: all(gone(process) for process in orphans))
    await asyncio.to_thread(stack.wait_ready, "gateway", not_pid=pid)
    await all_is_there(stack, "1", "2")
    assert len(fronts(stack)) == FRONTS
