"""Where benchmarks find the processes of a stack, and the runs of its models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric, UntypedMetricFamily
from prometheus_client.registry import Collector

from benchmarks.parts import SERVING, batches, name_of, running_models
from deploy.embedded.configuration import Configuration
from deploy.embedded.stack import Stack
from services.common.lifecycle import Health, JointOps, ops_app, serve_asgi

LOOPBACK = "127.0.0.1"
#: Rows, batches.
GUESTS, WORKER = ((70.0, 7.0), (32.0, 4.0)), (300.0, 3.0)


def configured(home: Path, **environment: str) -> Configuration:
    return Configuration.read({"HEADRACE_HOME": str(home), **environment})


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        ({"HEADRACE_ROUTER": "apart"}, "gateway"),
        ({"HEADRACE_ROUTER": "inside", "HEADRACE_GUESTS": "off"}, "gateway and router"),
        ({"HEADRACE_ROUTER": "inside"}, "gateway, router and guests"),
    ],
)
def test_a_part_has_the_name_of_what_is_in_it(tmp_path: Path, environment: dict[str, str], name: str) -> None:
    configuration = configured(tmp_path, **environment)
    assert name_of("gateway", configuration) == name
    assert name in SERVING
    assert name_of("worker-0", configuration) == "worker-0"


@pytest.mark.parametrize(("guests", "parts"), [("auto", 3), ("off", 2)])
def test_runs_are_counted_where_models_run(tmp_path: Path, guests: str, parts: int) -> None:
    environment = {"HEADRACE_ROUTER": "inside", "HEADRACE_FRONTS": "2", "HEADRACE_GUESTS": guests}
    stack = Stack.on_free_ports(tmp_path, workers=2, environment=environment)
    ports = [stack.configuration.worker_port(index, "OPS") for index in (0, 1)]
    ports.append(stack.configuration.ports["ROUTER_OPS_PORT"])
    assert running_models(stack) == [f"http://{LOOPBACK}:{port}/metrics" for port in ports[:parts]]


@dataclass(frozen=True)
class Ran(Collector):
    """What whoever runs models exports."""

    rows: float
    runs: float

    def collect(self) -> Iterator[Metric]:
        for name, value in (("nv_inference_count", self.rows), ("nv_inference_exec_count", self.runs)):
            family = UntypedMetricFamily(name, "", labels=("model", "version"))
            family.add_metric(("m", "1"), value - 2)
            family.add_metric(("m", "2"), 2)
            yield family


@asynccontextmanager
async def exported(rows: float, runs: float) -> AsyncIterator[int]:
    registry = CollectorRegistry()
    registry.register(Ran(rows, runs))
    async with serve_asgi(ops_app(Health(), registry), LOOPBACK, 0) as port:
        yield port


async def test_runs_of_workers_and_of_every_guest_add_up() -> None:
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(exported(*WORKER))
        fronts = [await stack.enter_async_context(exported(*ran)) for ran in GUESTS]
        joint = JointOps(LOOPBACK, fronts, Health(), lambda: 0)
        router = await stack.enter_async_context(serve_asgi(joint, LOOPBACK, 0))
        urls = [f"http://{LOOPBACK}:{port}/metrics" for port in (worker, router)]
        assert await asyncio.to_thread(batches, urls) == (402.0, 14.0)
        assert await asyncio.to_thread(batches, urls[:1]) == WORKER
