"""What the registry does when it, the broker or its database goes away."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from headrace.v1.control_pb2 import ApiKey, ServingConfig

from deploy.embedded.postgres import PostgresServer
from deploy.embedded.server import free_port
from deploy.embedded.tansu import TansuServer
from services.common.bus import KafkaBus, Record
from services.common.bus.admin import ensure_topics
from services.common.errors import Fatal
from services.common.topics import DEPLOYMENTS, KEYS
from services.registry import deployments
from services.registry.schemas import DeployIn
from tests.fixtures.onnx_files import linear
from tests.fixtures.registry import (
    TOKEN,
    Running,
    following,
    registry_settings,
    running_registry,
)
from tests.fixtures.waiting import PATIENCE_S, eventually, eventually_of, patience

REPOSITORY = Path(__file__).resolve().parents[2]
ADMIN_KEY = "hr_abcdefgh2345_" + "A" * 43


def revision(known: dict[str, bytes | None], model: str) -> int:
    return ServingConfig.FromString(known.get(model) or b"").revision


async def test_a_change_that_rolls_back_is_never_published(
    database_url: str, kafka_bootstrap: str, tmp_path: Path
) -> None:
    await ensure_topics(kafka_bootstrap, [DEPLOYMENTS, KEYS])
    async with running_registry(registry_settings(database_url, kafka_bootstrap, tmp_path)) as running:
        await running.make("rolled", linear(weight=1), linear(weight=2))
        edge = running.registry.edge
        wanted = DeployIn.model_validate({"versions": [{"version": "1", "weight": 100}]})

        async def deploy_and_fail() -> None:
            async with edge.transaction() as tx:
                await deployments.deploy(tx, "rolled", wanted, edge.clock)
                raise RuntimeError("before the commit")

        with pytest.raises(RuntimeError, match="before the commit"):
            await deploy_and_fail()
        assert (await running.rest.get("/v1/deployments/rolled")).status_code == 404
        await running.deploy("rolled", {"2": 100})
        async with following(kafka_bootstrap, DEPLOYMENTS) as known:
            await eventually(lambda: known.get("rolled"))
            config = ServingConfig.FromString(known["rolled"] or b"")
        assert [served.version for served in config.versions] == ["2"]
        assert config.revision == 1  # the one that rolled back was never seen by anybody


async def test_what_was_committed_before_a_crash_is_published_after_it(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> None:
    broker = new_tansu()
    await ensure_topics(broker.url, [DEPLOYMENTS, KEYS])
    with process(database_url, broker.url, tmp_path) as first:
        await first.ready()
        await first.make("churn", linear())
        broker.kill()  # committed from here on, not published
        deployed = await first.put("/v1/deployments/churn", {"versions": [{"version": "1", "weight": 100}]})
        assert deployed.status_code == 200, deployed.text
        first.kill()
    broker.start(timeout=PATIENCE_S)
    await ensure_topics(broker.url, [DEPLOYMENTS, KEYS])
    with process(database_url, broker.url, tmp_path) as second:
        await second.ready()
        async with following(broker.url, DEPLOYMENTS) as known:
            await eventually(lambda: revision(known, "churn") == deployed.json()["revision"])
        assert second.stop() == 0


async def test_a_broker_that_lost_everything_gets_it_again(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> None:
    broker = new_tansu()
    await ensure_topics(broker.url, [DEPLOYMENTS, KEYS])
    cfg = registry_settings(database_url, broker.url, tmp_path, bootstrap_admin_key=ADMIN_KEY)
    async with running_registry(cfg) as running:
        await running.make("stays", linear())
        await running.make("went", linear())
        await running.deploy("stays", {"1": 100})
        await running.deploy("went", {"1": 100})
        revoked = (await running.rest.post("/v1/keys", json={"name": "old"})).json()["key_id"]
        await running.rest.delete(f"/v1/keys/{revoked}")
        async with following(broker.url, DEPLOYMENTS) as known:
            await eventually(lambda: known.get("stays") and known.get("went"))
        broker.kill()
        assert (await running.rest.delete("/v1/deployments/went")).status_code == 204
        broker.start(timeout=PATIENCE_S)
        await ensure_topics(broker.url, [DEPLOYMENTS, KEYS])
        async with following(broker.url, DEPLOYMENTS) as known, following(broker.url, KEYS) as keys:
            await eventually(lambda: revision(known, "stays") == 1)
            await eventually(lambda: revoked in keys and "abcdefgh2345" in keys)
            assert known.get("went") is None
            assert ApiKey.FromString(keys[revoked] or b"").revoked
            assert list(ApiKey.FromString(keys["abcdefgh2345"] or b"").scopes) == ["admin"]


async def test_the_topics_are_mended_where_they_differ(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> None:
    broker = new_tansu()
    await ensure_topics(broker.url, [DEPLOYMENTS, KEYS])
    stranger = ServingConfig(model="stranger", revision=3).SerializeToString()
    ahead = ServingConfig(model="churn", revision=41).SerializeToString()
    ghost = ServingConfig(model="ghost", revision=1).SerializeToString()
    async with running_registry(registry_settings(database_url, broker.url, tmp_path)) as running:
        for model in ("churn", "ghost"):
            await running.make(model, linear())
            await running.deploy(model, {"1": 100})
        await running.rest.delete("/v1/deployments/ghost")
        async with following(broker.url, DEPLOYMENTS) as known, KafkaBus(broker.url, "test") as bus:
            await eventually(lambda: known.get("churn") and known.get("ghost", b"") is None)
            await bus.publish(
                [
                    Record(DEPLOYMENTS.name, b"churn", ahead),  # a database restored from an older copy
                    Record(DEPLOYMENTS.name, b"ghost", ghost),
                    Record(DEPLOYMENTS.name, b"stranger", stranger),
                ]
            )
            await eventually(lambda: revision(known, "churn") > 41 and known.get("ghost", b"") is None)
            assert known["stranger"] == stranger  # not this registry's: nothing is switched off by mistake
        assert (await running.rest.get("/v1/deployments/churn")).json()["revision"] >= 42
        # Whoever looks before the registry itself has read what it published finds it missing once more.
        await eventually_of(running.registry.republisher.check, lambda missing: missing == 0)


async def test_it_starts_and_deploys_without_a_broker(
    database_url: str, new_tansu: Callable[[], TansuServer], tmp_path: Path
) -> None:
    broker = new_tansu()
    broker.kill()
    async with running_registry(registry_settings(database_url, broker.url, tmp_path)) as running:
        await running.make("churn", linear())
        assert (await running.deploy("churn", {"1": 100})).status_code == 200
        assert (await running.rest.get("/health/ready")).status_code == 200
        broker.start(timeout=PATIENCE_S)
        await ensure_topics(broker.url, [DEPLOYMENTS, KEYS])
        async with following(broker.url, DEPLOYMENTS) as known:
            await eventually(lambda: revision(known, "churn") == 1)


async def test_the_bootstrap_key_is_let_in_once_and_stays_revoked(
    database_url: str, kafka_bootstrap: str, tmp_path: Path
) -> None:
    await ensure_topics(kafka_bootstrap, [DEPLOYMENTS, KEYS])
    cfg = registry_settings(database_url, kafka_bootstrap, tmp_path, bootstrap_admin_key=ADMIN_KEY)
    for _start in range(2):
        async with running_registry(cfg) as running:
            (key,) = (await running.rest.get("/v1/keys")).json()["keys"]
            assert (key["key_id"], key["scopes"], key["revoked"]) == ("abcdefgh2345", ["admin"], False)
    async with running_registry(cfg) as running:
        await running.rest.delete("/v1/keys/abcdefgh2345")
    async with running_registry(cfg) as running:
        assert (await running.rest.get("/v1/keys")).json()["keys"][0]["revoked"] is True
    # With a line break behind it, it would open nothing for whoever sends it without.
    for text in ("secret", f"{ADMIN_KEY}\n"):
        wrong = registry_settings(database_url, kafka_bootstrap, tmp_path, bootstrap_admin_key=text)
        with pytest.raises(Fatal, match="BOOTSTRAP_ADMIN_KEY"):
            async with running_registry(wrong):
                pass


class Process:
    """`python -m services.registry` as it runs in production."""

    def __init__(self, environment: dict[str, str], port: int, log: Path) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        with log.open("ab") as output:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "services.registry"],
                cwd=REPOSITORY, env=environment, stdout=output, stderr=output,
            )  # fmt: skip

    async def ready(self) -> None:
        async with patience("the registry to be ready"), httpx.AsyncClient(timeout=PATIENCE_S) as client:
            while True:
                assert self._child.poll() is None, self._log.read_text()
                try:
                    if (await client.get(f"{self.url}/health/ready")).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.05)

    async def make(self, model: str, content: bytes) -> None:
        async with self._client() as client:
            assert (await client.post("/v1/models", json={"name": model})).status_code == 201
            answer = await client.post(
                f"/v1/models/{model}/versions", files=[("files", ("model.onnx", content))]
            )
            assert answer.status_code == 201, answer.text

    async def put(self, path: str, body: dict[str, Any]) -> httpx.Response:
        async with self._client() as client:
            return await client.put(path, json=body)

    def peak_bytes(self) -> int:
        """The most memory that the process ever held resident."""
        status = Path(f"/proc/{self._child.pid}/status").read_text()
        return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) << 10

    def kill(self) -> None:
        self._child.kill()
        self._child.wait(10)

    def stop(self) -> int:
        """The exit code after SIGTERM."""
        self._child.send_signal(signal.SIGTERM)
        return self._child.wait(PATIENCE_S)

    def _client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.url, headers={"authorization": f"Bearer {TOKEN}"}, timeout=PATIENCE_S
        )


@contextmanager
def process(database_url: str, kafka: str, directory: Path) -> Iterator[Process]:
    port, grpc_port = free_port(), free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "proto")]),
        "DATABASE_URL": database_url,
        "KAFKA_BOOTSTRAP_SERVERS": kafka,
        "ARTIFACT_STORE_URL": f"file://{directory}/artifacts",
        "INTERNAL_TOKEN": TOKEN,
        "STATE_DIR": str(directory / "state"),
        "HTTP_PORT": str(port),
        "GRPC_PORT": str(grpc_port),
        "REPUBLISH_CHECK_S": "0.5",
    }
    child = Process(environment, port, directory / "registry.log")
    try:
        yield child
    finally:
        child.kill()


async def test_without_its_database_it_is_not_ready_and_says_so(
    new_postgres: Callable[[], PostgresServer], kafka_bootstrap: str, tmp_path: Path
) -> None:
    await ensure_topics(kafka_bootstrap, [DEPLOYMENTS, KEYS])
    database = new_postgres()
    async with running_registry(registry_settings(database.url, kafka_bootstrap, tmp_path)) as running:
        await running.make("churn", linear())
        database.kill()
        answer = await running.rest.get("/v1/models/churn")
        assert (answer.status_code, answer.json()["code"]) == (503, "UNAVAILABLE")
        await status_of_readiness(running, 503)
        assert "database" in (await running.rest.get("/health/ready")).json()["reasons"]
        assert (await running.rest.get("/health/live")).status_code == 200
        database.start(timeout=PATIENCE_S)
        await status_of_readiness(running, 200)
        assert (await running.rest.get("/v1/models/churn")).status_code == 200


async def status_of_readiness(running: Running, status: int) -> None:
    """Return when readiness is answered with `status`."""
    await eventually_of(lambda: running.rest.get("/health/ready"), lambda said: said.status_code == status)


async def test_an_upload_does_not_sit_in_memory(
    database_url: str, kafka_bootstrap: str, tmp_path: Path
) -> None:
    """Measured on the process itself: its peak grows by far less than the 96 MB that it receives."""
    await ensure_topics(kafka_bootstrap, [DEPLOYMENTS, KEYS])
    with process(database_url, kafka_bootstrap, tmp_path) as registry:
        await registry.ready()
        await registry.make("small", linear())
        before = registry.peak_bytes()
        await registry.make("large", linear(features=24 << 20))
        assert registry.peak_bytes() - before < 48 << 20
