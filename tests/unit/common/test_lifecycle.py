from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Counter

from services.common.lifecycle import Fatal, Health, ops_app, serve_asgi, until_stopped

_ROOT = Path(__file__).resolve().parents[3]


class Process:
    """A small service in a process of its own; `lines` are its log lines up to its end."""

    def __init__(self, main: str) -> None:
        program = (
            "import asyncio\n"
            "from services.common.lifecycle import Fatal, run, until_stopped\n"
            "from services.common.telemetry import setup_logging\n"
            "import structlog\n"
            "log = structlog.get_logger('test')\n"
            "setup_logging('test')\n" + dedent(main)
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": f"{_ROOT}:{_ROOT / 'proto'}"},
            cwd=_ROOT,
        )

    def wait_for(self, event: str) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if json.loads(line)["event"] == event:
                return
        raise AssertionError(f"the process ended without {event}")

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def end(self) -> tuple[int, list[dict[str, Any]]]:
        try:
            output, _ = self._process.communicate(timeout=20)
        finally:
            self._process.kill()
        return self._process.returncode, [json.loads(line) for line in output.splitlines()]


_SERVING = """
    async def main():
        try:
            log.info("serving")
            await until_stopped()
            log.info("draining")
            await asyncio.sleep({drain})
        finally:
            log.info("closed")
    run(main, drain_s={limit})
"""


def test_the_first_signal_drains_and_ends_well() -> None:
    process = Process(_SERVING.format(drain=0.01, limit=10))
    process.wait_for("serving")
    process.send(signal.SIGTERM)
    code, lines = process.end()
    assert code == 0
    assert [line["event"] for line in lines] == ["stopping", "draining", "closed"]


def test_the_second_signal_ends_hard() -> None:
    process = Process(_SERVING.format(drain=60, limit=60))
    process.wait_for("serving")
    process.send(signal.SIGINT)
    process.wait_for("draining")
    process.send(signal.SIGINT)
    code, lines = process.end()
    assert code == 128 + signal.SIGINT
    assert [line["event"] for line in lines] == ["ended_hard"]


def test_a_drain_has_a_deadline() -> None:
    process = Process(_SERVING.format(drain=60, limit=0.1))
    process.wait_for("serving")
    process.send(signal.SIGTERM)
    code, lines = process.end()
    assert code == 1
    assert lines[-1]["event"] == "ended_hard"


def test_a_signal_while_starting_cancels_the_start() -> None:
    process = Process(
        """
        async def main():
            try:
                log.info("starting")
                await asyncio.sleep(60)
            finally:
                log.info("closed")
        run(main)
        """
    )
    process.wait_for("starting")
    process.send(signal.SIGTERM)
    code, lines = process.end()
    assert code == 0
    assert lines[-1]["event"] == "closed"


def test_a_fatal_error_is_one_sentence_also_from_a_task_group() -> None:
    process = Process(
        """
        async def fail():
            raise Fatal("The port is taken.")
        async def main():
            async with asyncio.TaskGroup() as group:
                group.create_task(fail())
        run(main)
        """
    )
    code, lines = process.end()
    assert code == 1
    assert [(line["event"], line["reason"]) for line in lines] == [("fatal", "The port is taken.")]
    assert "exception" not in lines[0]


def test_missing_configuration_names_the_variable_and_ends_with_2() -> None:
    process = Process(
        """
        import os
        os.environ.pop("INTERNAL_TOKEN", None)
        os.environ["KAFKA_BOOTSTRAP_SERVERS"] = "h:1"
        from services.common.settings import ServiceSettings, load
        async def main():
            load(ServiceSettings)
        run(main)
        """
    )
    code, lines = process.end()
    assert code == 2
    assert "INTERNAL_TOKEN" in lines[0]["reason"]


def test_anything_else_is_logged_with_its_traceback_in_one_line() -> None:
    process = Process(
        """
        async def main():
            raise KeyError("surprise")
        run(main)
        """
    )
    code, lines = process.end()
    assert code == 1
    assert [line["event"] for line in lines] == ["crashed"]
    assert "KeyError: 'surprise'" in lines[0]["exception"]


async def test_until_stopped_belongs_to_run() -> None:
    with pytest.raises(RuntimeError, match="inside"):
        await until_stopped()


def test_health_gives_reasons() -> None:
    health = Health("bus", "models")
    assert health.reasons() == {"bus": "starting", "models": "starting"}
    health.set_ready("bus")
    health.set_ready("models")
    assert health.ready
    reason: list[str | None] = ["full"]
    health.add_check("spool", lambda: reason[0])
    health.set_unready("bus", "away")
    assert health.reasons() == {"bus": "away", "spool": "full"}
    reason[0] = None
    health.set_ready("bus")
    assert health.ready
    assert health.parts() == ["bus", "models", "spool"]
    health.start_draining()
    assert health.reasons() == {"process": "draining"}


async def test_ops_endpoints_over_http() -> None:
    registry = CollectorRegistry()
    Counter("served", "Requests", registry=registry).inc(3)
    health = Health("bus")
    async with (
        serve_asgi(ops_app(health, registry), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        assert (await client.get("/health/live")).json() == {"live": True}
        unready = await client.get("/health/ready")
        assert unready.status_code == 503
        assert unready.json() == {"ready": False, "reasons": {"bus": "starting"}}
        health.set_ready("bus")
        assert (await client.get("/health/ready")).json() == {"ready": True, "reasons": {}}
        assert "served_total 3.0" in (await client.get("/metrics")).text
        openmetrics = await client.get("/metrics", headers={"accept": "application/openmetrics-text"})
        assert openmetrics.text.endswith("# EOF\n")
        assert (await client.get("/other")).status_code == 404
        assert (await client.post("/metrics")).status_code == 405
        assert (await client.head("/health/live")).content == b""


@pytest.mark.parametrize("guest", [False, True])
async def test_of_two_services_in_one_process_one_says_what_it_uses(guest: bool) -> None:
    registry = CollectorRegistry()
    Counter("served", "Requests", registry=registry).inc()
    said: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        said.append(message)

    async def receive() -> MutableMapping[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    asked = {"type": "http", "method": "GET", "path": "/metrics", "headers": []}
    await ops_app(Health(), registry, guest=guest)(asked, receive, send)
    body = said[1]["body"]
    assert b"served_total 1.0" in body
    assert (b"process_cpu_seconds_total" in body) is not guest


async def test_a_taken_port_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Fatal, match=f"Cannot listen on 127.0.0.1:{port}: Address already in use"):
            async with serve_asgi(ops_app(Health(), CollectorRegistry()), "127.0.0.1", port):
                pass


async def test_leaving_lets_a_running_request_finish() -> None:
    entered = asyncio.Event()
    release = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http", "no lifespan here"
        entered.set()
        await release.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        await send({"type": "http.response.body", "body": b"done"})

    async with httpx.AsyncClient() as client:
        async with serve_asgi(app, "127.0.0.1", 0, drain_s=10) as port:
            request = asyncio.create_task(client.get(f"http://127.0.0.1:{port}/"))
            await entered.wait()
            asyncio.get_running_loop().call_later(0.2, release.set)
        assert (await request).text == "done"


async def test_a_request_that_outlives_the_drain_is_ended() -> None:
    entered = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http", "no lifespan here"
        entered.set()
        await asyncio.sleep(3600)

    async with httpx.AsyncClient() as client:
        async with serve_asgi(app, "127.0.0.1", 0, drain_s=0.1) as port:
            request = asyncio.create_task(client.get(f"http://127.0.0.1:{port}/"))
            await entered.wait()
        result = (await asyncio.gather(request, return_exceptions=True))[0]
    assert not isinstance(result, httpx.Response) or result.status_code == 500
