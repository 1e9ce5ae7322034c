"""Several gateways on one port: one of them may die under load or stand still, and all of them end with their
parent."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from headrace.v1.dataplane_pb2 import PredictRequest, RequestFrame

from deploy.embedded.server import free_port
from services.common.bus.snapshot import save_snapshot
from services.common.frames import FrameServer, Peer
from services.gateway.processes import gateway_processes
from services.gateway.settings import Settings
from tests.fixtures.gateway import ADMIN, TOKEN, FakeRouter, answer_like_a_worker, configs, default_keys
from tests.fixtures.waiting import PATIENCE_S, eventually, patience

REPOSITORY = Path(__file__).resolve().parents[2]
BODY = {"model": "cancer", "inputs": [[1, 2, 3]]}
HEADERS = {"authorization": f"Bearer {ADMIN}"}


@dataclass
class Group:
    """A running parent."""

    process: asyncio.subprocess.Process
    http: str
    ops: str

    def children(self) -> list[int]:
        """Their process ids."""
        pid = self.process.pid
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    async def until_ready(self, client: httpx.AsyncClient) -> None:
        """Wait until one of them takes requests."""

        async def ready() -> bool:
            try:
                return (await client.get(f"{self.ops}/health/ready")).status_code == 200
            except httpx.TransportError:
                return False

        await eventually(ready)

    async def until_draining(self, client: httpx.AsyncClient) -> None:
        """Wait until the parent says that it is: then it has told its children."""

        async def draining() -> bool:
            return "process" in (await client.get(f"{self.ops}/health/ready")).json()["reasons"]

        await eventually(draining)

    async def until(self, client: httpx.AsyncClient, *wanted: str) -> None:
        """Wait until the joint metrics have every line of `wanted`."""

        async def there() -> bool:
            try:
                lines = (await client.get(f"{self.ops}/metrics")).text.splitlines()
            except httpx.TransportError:
                return False
            return set(wanted) <= set(lines)

        await eventually(there, on=wanted)

    async def until_all_answer(self) -> None:
        """One that is ready is enough for the parent; wait for both."""
        async with patience("both processes to answer"):
            answered = 0
            while answered < 20:
                async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as one:
                    try:
                        answer = await one.post(f"{self.http}/v1/predict", json=BODY, headers=HEADERS)
                        answered = answered + 1 if answer.status_code == 200 else 0
                    except httpx.TransportError:
                        answered = 0


@dataclass
class HoldingRouter:
    """Keeps what it is asked until `answer_all`."""

    held: list[tuple[Peer, PredictRequest]] = field(default_factory=list)

    def handler(self, peer: Peer) -> Held:
        return Held(self, peer)

    def answer_all(self) -> None:
        for peer, request in self.held:
            reply = answer_like_a_worker(request)
            reply.id = request.id
            peer.reply(reply)
        self.held.clear()


@dataclass
class Held:
    """One gateway's requests."""

    router: HoldingRouter
    peer: Peer

    def on_request_frame(self, frame: RequestFrame) -> None:
        self.router.held.extend((self.peer, item) for item in frame.items)

    def on_closed(self) -> None:
        return


@asynccontextmanager
async def two_gateways(
    folder: Path, router: HoldingRouter | None = None, **environment: str
) -> AsyncIterator[Group]:
    """In a process group of their own."""
    save_snapshot(
        folder / "gateway" / "keys.table",
        {key.key_id.encode(): key.SerializeToString() for key in default_keys()},
    )
    save_snapshot(
        folder / "gateway" / "deployments.table",
        {config.model.encode(): config.SerializeToString() for config in configs()},
    )
    handler = router.handler if router is not None else FakeRouter().handler
    server = FrameServer(handler, credential=TOKEN, instance="router-1", role="router")
    http, ops = free_port(), free_port()
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG")}
    env = kept | {
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'proto'}",
        "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
        "REDIS_URL": "redis://127.0.0.1:1/0",
        "INTERNAL_TOKEN": TOKEN,
        "STATE_DIR": str(folder),
        "ROUTER_ADDRESS": f"127.0.0.1:{await server.start('127.0.0.1', 0)}",
        "DRAIN_NOTICE_S": "0.3",
        "DRAIN_S": "4",
        "GATEWAY_PROCESSES": "2",
        "HTTP_PORT": str(http),
        "GRPC_PORT": str(free_port()),
        "OPS_PORT": str(ops),
        **environment,
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.gateway", env=env, cwd=REPOSITORY, start_new_session=True
    )
    try:
        yield Group(process, f"http://127.0.0.1:{http}", f"http://127.0.0.1:{ops}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await server.close()


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc, and Linux for a fair share of connections")
async def test_a_process_that_dies_under_load_is_replaced(tmp_path: Path) -> None:
    async with (
        two_gateways(tmp_path) as group,
        httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
    ):
        await group.until(client, "headrace_processes_up 2.0")
        await group.until_all_answer()
        assert (await client.get(f"{group.ops}/health/ready")).status_code == 200
        statuses: list[int] = []
        broken = 0
        stop = asyncio.Event()

        async def load() -> None:
            nonlocal broken
            while not stop.is_set():
                try:
                    # A connection of its own for every request: the kernel chooses its process.
                    async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as one:
                        answer = await one.post(f"{group.http}/v1/predict", json=BODY, headers=HEADERS)
                    statuses.append(answer.status_code)
                except httpx.TransportError:
                    broken += 1

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(load())
            tasks.create_task(load())
            await asyncio.sleep(0.5)
            before = group.children()
            os.kill(before[0], signal.SIGKILL)
            await group.until(client, "headrace_process_restarts 1.0", "headrace_processes_up 2.0")
            stop.set()
        assert len(set(group.children()) - set(before)) == 1
        assert set(statuses) == {200}
        # Only what the kernel had given to the dead process, until it took its socket away.
        assert broken < len(statuses) / 4
        counted = (await client.get(f"{group.ops}/metrics")).text
        assert (
            'headrace_gateway_requests_total{model="cancer",process="1",route="predict",status="200"}'
            in counted
        )

        group.process.send_signal(signal.SIGTERM)
        async with patience("the end of the parent"):
            assert await group.process.wait() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc, and Linux for a fair share of connections")
async def test_a_process_that_stands_still_is_replaced_and_counted(tmp_path: Path) -> None:
    """The kernel gives it half of the connections until then."""
    async with (
        two_gateways(tmp_path, HUNG_AFTER_S="6") as group,
        httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
    ):
        await group.until(client, "headrace_processes_up 2.0")
        await group.until_all_answer()
        frozen, other = group.children()
        os.kill(frozen, signal.SIGSTOP)
        await group.until(client, "headrace_processes_up 1.0", "headrace_process_restarts 0.0")
        assert (await client.get(f"{group.ops}/health/ready")).status_code == 200
        assert set(group.children()) == {frozen, other}
        await group.until(client, "headrace_processes_up 2.0", "headrace_process_restarts 1.0")
        await group.until_all_answer()
        assert set(group.children()) & {frozen, other} == {other}


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
async def test_a_signal_to_the_whole_group_takes_nothing_from_what_is_in_flight(tmp_path: Path) -> None:
    """As a control group or a container's init sends it: each child hears it twice, once from its parent, and
    from that as SIGTERM. (Two of those that come at once are one to the kernel.)"""
    router = HoldingRouter()
    async with (
        two_gateways(tmp_path, router) as group,
        httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
    ):
        await group.until_ready(client)

        async def ask() -> int:
            # A connection of its own for every request: the kernel chooses its process.
            async with httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as one:
                return (await one.post(f"{group.http}/v1/predict", json=BODY, headers=HEADERS)).status_code

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        await eventually(lambda: len(router.held) == 8)
        children = group.children()
        os.killpg(group.process.pid, signal.SIGINT)
        await group.until_draining(client)
        router.answer_all()
        assert await asyncio.gather(*asking) == [200] * 8
        async with patience("the end of the parent"):
            assert await group.process.wait() == 0
        assert not any(Path(f"/proc/{pid}").exists() for pid in children)


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
async def test_a_second_signal_to_the_parent_ends_its_children_hard(tmp_path: Path) -> None:
    router = HoldingRouter()
    long = str(2 * PATIENCE_S)
    async with (
        two_gateways(tmp_path, router, DRAIN_S=long, DEFAULT_TIMEOUT_S=long) as group,
        httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
    ):
        await group.until_ready(client)
        asking = asyncio.create_task(client.post(f"{group.http}/v1/predict", json=BODY, headers=HEADERS))
        await eventually(lambda: len(router.held) == 1)
        children = group.children()
        group.process.send_signal(signal.SIGINT)
        await group.until_draining(client)
        group.process.send_signal(signal.SIGINT)
        with pytest.raises(httpx.TransportError):
            await asking
        async with patience("the end of the parent"):
            assert await group.process.wait() == 128 + signal.SIGINT
        await eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
async def test_no_process_outlives_its_parent(tmp_path: Path) -> None:
    async with (
        two_gateways(tmp_path) as group,
        httpx.AsyncClient(trust_env=False, timeout=PATIENCE_S) as client,
    ):
        await group.until(client, "headrace_processes_up 2.0")
        children = group.children()
        group.process.kill()
        await eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))


#: Says what it was given, and ends when it is told to.
OTHER = """
import json, os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
names = ("OPS_PORT", "GATEWAY_PROCESSES", "SUPERVISED", "REUSE_PORT", "HTTP_PORT", "LIMIT_SHARERS", "COLOUR")
path = os.path.join(os.environ["SAYS"], os.environ.get("COLOUR", "plain") + "-" + str(os.getpid()))
with open(path + ".part", "w") as file:
    json.dump({name: os.environ.get(name) for name in names}, file)
os.rename(path + ".part", path)
while True:
    signal.pause()
"""


@pytest.mark.parametrize("own", [(), ({"COLOUR": "red"}, {"COLOUR": "blue", "OPS_PORT": "7"})])
async def test_another_module_runs_with_what_is_its_own_beside_what_all_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: tuple[dict[str, str], ...]
) -> None:
    said = tmp_path / "said"
    said.mkdir()
    (tmp_path / "another_front.py").write_text(OTHER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("SAYS", str(said))
    cfg = Settings(
        kafka_bootstrap_servers="127.0.0.1:1", internal_token=TOKEN, redis_url="redis://127.0.0.1:1/0",
        router_address="127.0.0.1:1", state_dir=tmp_path, http_port=0, grpc_port=0, ops_port=0,
        limit_sharers=3,
    )  # fmt: skip
    async with gateway_processes(cfg, 2, module="another_front", own=own) as group:
        await eventually(lambda: len([path for path in said.iterdir() if not path.suffix]) == 2)
        assert set(group.pids) == {0, 1}
        told = {path.name: json.loads(path.read_text()) for path in said.iterdir()}
        names = {f"{own[index]['COLOUR'] if own else 'plain'}-{pid}" for index, pid in group.pids.items()}
        assert told.keys() == names
    shared = {
        "GATEWAY_PROCESSES": "1",
        "SUPERVISED": "true",
        "REUSE_PORT": "true",
        "LIMIT_SHARERS": "6",
    }
    for one in told.values():
        assert shared.items() <= one.items()
    assert len({one["HTTP_PORT"] for one in told.values()}) == 1
    assert len({one["OPS_PORT"] for one in told.values()}) == 2
    if own:  # what is its own counts
        assert [one["OPS_PORT"] for one in told.values() if one["COLOUR"] == "blue"] == ["7"]
