"""The image of a service, built from the Dockerfile without an engine, starts, answers, and drains."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from deploy import credentials
from deploy.embedded.server import free_port
from tests.fixtures.dockerfile import Stage, build
from tests.fixtures.waiting import PATIENCE_S

REPOSITORY = Path(__file__).resolve().parents[2]


def get(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def wait_for(port: int, path: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while get(port, path) != 200:
        assert process.poll() is None, log.read_text()[-4000:]
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("service", ["registry"])
def test_an_image_starts_answers_and_drains(
    service: str, tmp_path: Path, database_url: str, redis_url: str, kafka_bootstrap: str
) -> None:
    """The registry: it has migrations and a database, which a wheel could lack."""
    ports = {name: free_port() for name in ("HTTP_PORT", "GRPC_PORT", "OPS_PORT", "FRAMES_PORT")}
    health = ports["HTTP_PORT" if service in {"registry", "analytics", "drift"} else "OPS_PORT"]
    image = build(
        REPOSITORY / "deploy" / "Dockerfile",
        REPOSITORY,
        tmp_path / "image",
        SERVICE=service,
        HEALTH_PORT=str(health),
    )
    no_other_service(image, service)
    secrets = image.inside(image.environment["SECRETS_DIR"])
    credentials.write(tmp_path / "shared", secrets, tmp_path / "gateway-secrets")
    environment = image.container_environment(
        {
            "KAFKA_BOOTSTRAP_SERVERS": kafka_bootstrap,
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "ARTIFACT_STORE_URL": (tmp_path / "artifacts").as_uri(),
            "ROUTER_ADDRESSES": f"127.0.0.1:{free_port()}",
            **{name: str(port) for name, port in ports.items()},
        }
    )
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            image.command(image.entrypoint),
            cwd=image.inside("."),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(health, "/health/live", process, log)
        if service == "registry":  # it needs no other service to be ready
            wait_for(health, "/health/ready", process, log)
            subprocess.run(image.command(image.healthcheck), env=environment, check=True, timeout=PATIENCE_S)
        assert get(health, "/metrics") == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0, log.read_text()[-4000:]
    finally:
        process.kill()
        process.wait(10)
    for line in log.read_text().splitlines():
        json.loads(line)


def no_other_service(image: Stage, service: str) -> None:
    """An image holds its service, what services share, and nothing else of ours."""
    (installed,) = image.inside("/usr/local/lib").glob("python3*/site-packages/services")
    assert {folder.name for folder in installed.iterdir()} == {"common", service}
