"""The gateway as a process: it starts while Kafka is away, serves what it knew, and drains on SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from deploy.embedded.server import free_port
from services.common.bus.snapshot import save_snapshot
from services.common.frames import FrameServer
from tests.fixtures.gateway import ADMIN, TOKEN, FakeRouter, answer_like_a_worker, configs, default_keys
from tests.fixtures.waiting import PATIENCE_S, eventually, eventually_of, patience

REPOSITORY = Path(__file__).resolve().parents[2]
BODY = {"model": "cancer", "inputs": [[1, 2, 3]]}
HEADERS = {"authorization": f"Bearer {ADMIN}"}


def environment(state: Path, router: int, ports: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    return kept | ports | {
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'proto'}",
        "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "REDIS_URL": "redis://127.0.0.1:1/0",
        "INTERNAL_TOKEN": TOKEN,
        "STATE_DIR": str(state),
        "ROUTER_ADDRESS": f"127.0.0.1:{router}",
        "DRAIN_NOTICE_S": "0.3",
        "DRAIN_S": "8",
    }  # fmt: skip


@asynccontextmanager
async def started(env: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway", env=env, cwd=REPOSITORY, stdout=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def until_ready(client: httpx.AsyncClient) -> None:
    async def ready() -> bool:
        try:
            return (await client.get("/health/ready")).status_code == 200
        except httpx.TransportError:
            return False

    await eventually(ready)


async def test_serves_its_snapshot_and_drains(tmp_path: Path) -> None:
    save_snapshot(
        tmp_path / "gateway" / "keys.table",
        {key.key_id.encode(): key.SerializeToString() for key in default_keys()},
    )
    save_snapshot(
        tmp_path / "gateway" / "deployments.table",
        {config.model.encode(): config.SerializeToString() for config in configs()},
    )
    router = FakeRouter()
    server = FrameServer(router.handler, credential=TOKEN, instance="router-1", role="router")
    http = free_port()
    ports = {"HTTP_PORT": str(http), "GRPC_PORT": str(free_port()), "OPS_PORT": str(free_port())}
    env = environment(tmp_path, await server.start("127.0.0.1", 0), ports)
    base = f"http://127.0.0.1:{http}"
    async with (
        started(env) as process,
        httpx.AsyncClient(base_url=base, trust_env=False, timeout=PATIENCE_S) as client,
    ):
        await until_ready(client)
        answer = await client.post("/v1/predict", json=BODY, headers=HEADERS)
        assert answer.json()["prediction"] == ["benign"]
        router.answer = lambda _request: None
        waiting = asyncio.create_task(client.post("/v1/predict", json=BODY, headers=HEADERS))
        await eventually(lambda: len(router.requests) >= 2)
        process.send_signal(signal.SIGTERM)
        await eventually_of(lambda: client.get("/health/ready"), lambda said: said.status_code == 503)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ports['GRPC_PORT']}") as channel:
            said = await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service="inference.GRPCInferenceService"), timeout=PATIENCE_S
            )
        assert said.status == health_pb2.HealthCheckResponse.NOT_SERVING
        reply = answer_like_a_worker(router.requests[-1])
        router.peers[-1].reply(reply)
        late = await waiting
        assert (late.status_code, late.headers["connection"]) == (200, "close")
        async with patience("the end of the process"):
            assert await process.wait() == 0
    await server.close()


async def test_without_its_settings_it_says_which(tmp_path: Path) -> None:
    env = environment(tmp_path, 1, {})
    del env["INTERNAL_TOKEN"]
    async with started(env) as process:
        async with patience("the end of the process"):
            output, _ = await process.communicate()
        assert process.returncode == 2
    assert b"INTERNAL_TOKEN" in output
    assert b"Traceback" not in output
