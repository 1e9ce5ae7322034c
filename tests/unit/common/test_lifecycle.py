from __future__ import annotations

import asyncio
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from textwrap import dedent
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.common.lifecycle import Fatal, Health, ops_app, serve_asgi, until_stopped
from services.common.listening import accept_last, listen
from tests.fixtures.waiting import PATIENCE_S, eventually, patience, until

_ROOT = Path(__file__).resolve().parents[3]


class Process:
    """A small service in a process of its own; `lines` are its log lines up to its end."""

    def __init__(self, main: str) -> None:
        program = (
            "import asyncio\n"
            "from services.common.lifecycle import Fatal, ProcessGroup, end_with_parent, run, until_stopped\n"
            "from services.common.telemetry import setup_logging\n"
            "import structlog\n"
            "log = structlog.get_logger('test')\n"
            "setup_logging('test')\n" + dedent(main)
        )
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.PIPE,  # the end of which is the parent's
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": f"{_ROOT}:{_ROOT / 'proto'}"},
            cwd=_ROOT,
        )

    def wait_for(self, event: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said: dict[str, Any] = json.loads(line)
            if said["event"] == event:
                return said
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


_SUPERVISED = """
    async def main():
        end_with_parent()
        log.info("serving")
        await until_stopped()
        log.info("draining")
        await asyncio.sleep({drain})
        log.info("closed")
    run(main, drain_s=60)
"""


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGINT),  # what came first may be delivered last
    ],
)
def test_a_child_takes_its_parents_signal_for_the_same_wish_as_its_groups(
    first: signal.Signals, second: signal.Signals
) -> None:
    process = Process(_SUPERVISED.format(drain=0.5))
    process.wait_for("serving")
    process.send(first)
    process.wait_for("draining")
    process.send(second)
    code, lines = process.end()  # closes its standard input, too: the parent is gone
    assert [line["event"] for line in lines] == ["parent_gone", "closed"]
    assert code == 0


def test_a_child_told_twice_by_a_person_ends_hard() -> None:
    process = Process(_SUPERVISED.format(drain=60))
    process.wait_for("serving")
    process.send(signal.SIGINT)
    process.wait_for("draining")
    process.send(signal.SIGINT)
    assert process.end()[0] == 128 + signal.SIGINT


@pytest.mark.parametrize("ended", ["by a second signal", "by its deadline"])
def test_who_ends_hard_takes_its_children_along(ended: str) -> None:
    """They would go on draining otherwise, and nobody would know that they do."""
    process = Process(
        f"""
        import signal, sys
        CHILD = (
            "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
            "print('{{\\"event\\": \\"child\\"}}', flush=True); time.sleep(600)"
        )
        async def main():
            group = ProcessGroup([sys.executable, "-c", CHILD], [{{}}], stop_s=600)
            async with group.running():
                await until_stopped()
                log.info("draining", child=group.pids[0])
        run(main, drain_s={600 if ended == "by a second signal" else 0.1})
        """
    )
    process.wait_for("child")
    process.send(signal.SIGINT)
    child = process.wait_for("draining")["child"]
    if ended == "by a second signal":
        process.send(signal.SIGINT)
    process.end()  # also of its output, which the child shares
    until(lambda: not Path(f"/proc/{child}").exists())


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


class Noting(list[Any]):
    """Samples; notes who collected them, and who reads them."""

    def __init__(self, samples: list[Any], readers: list[int]) -> None:
        super().__init__(samples)
        self._readers = readers

    def __iter__(self) -> Iterator[Any]:
        self._readers.append(threading.get_ident())
        return super().__iter__()


class Noted(Collector):
    def __init__(self) -> None:
        self.collected: list[int] = []
        self.read: list[int] = []

    def collect(self) -> Iterator[Metric]:
        self.collected.append(threading.get_ident())
        gauge = GaugeMetricFamily("served", "Requests", value=3.0)
        gauge.samples = Noting(gauge.samples, self.read)
        yield gauge

    def describe(self) -> Iterator[Metric]:
        return iter(())


@pytest.mark.parametrize("accept", ["text/plain", "application/openmetrics-text; version=1.0.0"])
async def test_metrics_are_collected_on_the_loop_and_written_down_in_a_thread(accept: str) -> None:
    noted, registry = Noted(), CollectorRegistry()
    registry.register(noted)
    async with (
        serve_asgi(ops_app(Health(), registry), "127.0.0.1", 0) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
    ):
        assert "served 3.0" in (await client.get("/metrics", headers={"accept": accept})).text
    loop = threading.get_ident()
    assert noted.collected == [loop]
    assert noted.read
    assert loop not in noted.read


async def test_a_taken_port_is_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Fatal, match=f"Cannot listen on 127.0.0.1:{port}: Address already in use"):
            async with serve_asgi(ops_app(Health(), CollectorRegistry()), "127.0.0.1", port):
                pass


async def test_an_application_that_fails_to_start_is_one_sentence() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (scope["type"], (await receive())["type"]) == ("lifespan", "lifespan.startup")
        await send({"type": "lifespan.startup.failed", "message": "no model"})

    with pytest.raises(Fatal, match="The HTTP application failed to start"):
        async with serve_asgi(app, "127.0.0.1", 0):
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


async def test_a_connection_made_just_before_the_end_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.lifecycle.serving._ASK_S", PATIENCE_S)
    leave = asyncio.Event()
    bound: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def serve() -> None:
        async with serve_asgi(ops_app(Health(), CollectorRegistry()), "127.0.0.1", 0) as port:
            bound.set_result(port)
            await leave.wait()

    async def refused() -> bool:
        try:
            _, another = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return True
        another.close()
        return False

    serving = asyncio.create_task(serve())
    port = await bound
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    leave.set()
    await eventually(refused)
    writer.write(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    async with patience("the answer"):
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
    writer.close()
    await serving


async def test_a_connection_that_asks_nothing_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.lifecycle.serving._ASK_S", 0.05)
    async with patience("the end"):
        async with serve_asgi(ops_app(Health(), CollectorRegistry()), "127.0.0.1", 0) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert await reader.read() == b""
    writer.close()


async def test_a_server_that_nobody_asks_turns_once_a_date_and_ends_without_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dates = 0
    ticked = uvicorn.Server.on_tick

    async def counted(server: uvicorn.Server, counter: int) -> bool:
        nonlocal dates
        dates += 1
        return await ticked(server, counter)

    monkeypatch.setattr(uvicorn.Server, "on_tick", counted)
    monkeypatch.setattr("services.common.lifecycle.serving._DATE_S", 0.02)
    async with serve_asgi(ops_app(Health(), CollectorRegistry()), "127.0.0.1", 0):
        await eventually(lambda: dates > 3)  # the date goes on
        monkeypatch.setattr("services.common.lifecycle.serving._DATE_S", 2 * PATIENCE_S)
        before = dates
        await asyncio.sleep(0.3)
        assert dates - before <= 1
        ending = asyncio.get_running_loop().time()
    assert asyncio.get_running_loop().time() - ending < PATIENCE_S


@pytest.mark.parametrize("shared", [True, False])
def test_what_the_kernel_has_accepted_is_taken_before_the_listener_closes(shared: bool) -> None:
    listener = listen("127.0.0.1", 0, reuse_port=True, backlog=16)
    clients = [socket.create_connection(listener.getsockname()) for _ in range(5)]
    for number, client in enumerate(clients):
        client.sendall(b"%d" % number)
    taken = accept_last(listener, shared=shared)
    listener.close()
    assert sorted(one.recv(10) for one in taken) == [b"%d" % number for number in range(5)]
    for one in taken:  # both ways: nothing of it was reset
        one.sendall(b"heard")
        one.close()
    assert [client.recv(10) for client in clients] == [b"heard"] * 5
    for client in clients:
        client.close()


@pytest.mark.skipif(sys.platform != "linux", reason="others have no such filter")
def test_who_comes_in_between_finds_another_process_that_listens() -> None:
    """The kernel answers nothing for a listener that is to close; a moment later TCP tries again."""
    ending = listen("127.0.0.1", 0, reuse_port=True, backlog=16)
    port = ending.getsockname()[1]
    accept_last(ending, shared=True)
    client = socket.socket()
    client.setblocking(False)
    assert client.connect_ex(("127.0.0.1", port)) == errno.EINPROGRESS
    with listen("127.0.0.1", port, reuse_port=True, backlog=16) as another:
        ending.close()
        assert select.select([another], [], [], PATIENCE_S)[0]
        another.accept()[0].close()
    client.close()


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
