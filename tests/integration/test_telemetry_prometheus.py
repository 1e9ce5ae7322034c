"""A real Prometheus, where one is installed, scrapes a whole platform by our configuration: the dashboards'
queries give data, and no alert fires on a platform that is well."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from deploy.embedded.server import free_port
from deploy.embedded.stack import Stack
from tests.fixtures import promql
from tests.fixtures.waiting import PATIENCE_S
from tests.integration.test_telemetry import caller, deploy, metrics_url, predict

PROMETHEUS = shutil.which("prometheus")
#: Panels with lines that are missing as long as nothing goes wrong, and in the first half minute.
QUIET = {
    "Control records",
    "Parquet objects",
    "Ejections",
    "Left out of a version",
    "Failed by version and code",
    "Retries by reason",
    "Refused before the queue",
    "PSI of the newest window",
    "Windows compared, alerts delivered",
    "Calls of the registry",
    "Experiments and rollouts",
    "What the platform decided",
    "False positives of the placebos",
    "Looks",
    "Consumer lag",
    "Set aside",
    "Result cache",
    "Hedges",
    "Fallbacks",
    "Shadows",
    "Chunks not done",
    "Time of a chunk",
    "Chunks at the workers",
    "Processes of a service",
}


def configuration(stack: Stack, rules: Path) -> dict[str, Any]:
    """deploy/prometheus/prometheus.yml with the addresses of `stack`, and scraping faster."""
    config: dict[str, Any] = yaml.safe_load((promql.DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(rules)]
    services, workers = config["scrape_configs"]
    for entry in services["static_configs"]:
        entry["targets"] = [metrics_url(stack, entry["labels"]["service"]).removeprefix("http://")]
    del workers["dns_sd_configs"]
    workers["static_configs"] = [{"targets": [metrics_url(stack, "worker-0").removeprefix("http://")]}]
    return config


@contextmanager
def prometheus(config: dict[str, Any], folder: Path) -> Iterator[httpx.Client]:
    """Prometheus with `config`; gives a client of its API."""
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = [str(PROMETHEUS), f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address={address}"], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=PATIENCE_S) as client:
            yield client
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def query(client: httpx.Client, expression: str) -> list[dict[str, Any]]:
    answer = client.get("/api/v1/query", params={"query": expression})
    assert answer.status_code == 200, (expression, answer.text)
    result: list[dict[str, Any]] = answer.json()["data"]["result"]
    return result


def settled(client: httpx.Client, targets: int) -> bool:
    """Every target has answered for long enough to know rates."""
    try:
        steady = query(client, 'count(sum_over_time(up{job=~"headrace.*"}[30s]) > 8)')
    except httpx.TransportError:
        return False
    return bool(steady) and float(steady[0]["value"][1]) == targets


if PROMETHEUS is not None:

    def test_queries_give_data_and_nothing_fires_on_a_platform_that_is_well(tmp_path: Path) -> None:
        home = Path(tempfile.mkdtemp(prefix="headrace-prometheus-"))
        home.chmod(0o755)
        stack = Stack.on_free_ports(home, workers=1)
        try:
            stack.start()
            with (
                caller(stack) as client,
                prometheus(configuration(stack, promql.ALERTS), tmp_path) as server,
            ):
                deploy(client)
                deadline = time.monotonic() + PATIENCE_S
                while not settled(server, 6):
                    assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-4000:]
                    assert predict(client, 0)[0].status_code == 200
                    time.sleep(0.05)
                empty = {
                    panel["title"]
                    for dashboard in promql.dashboards().values()
                    for panel in promql.panels(dashboard)
                    if not all(
                        query(server, promql.filled(target["expr"])) for target in panel.get("targets", ())
                    )
                }
                assert empty <= QUIET
                firing = query(server, 'ALERTS{alertstate="firing"}')
                assert firing == []
        finally:
            stack.stop()
            shutil.rmtree(home, ignore_errors=True)
