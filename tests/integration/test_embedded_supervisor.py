"""The supervisor over the real servers and stand-in services (tests/fixtures/small_stack.py)."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from aiokafka.admin import AIOKafkaAdminClient

from deploy.embedded.configuration import REPOSITORY, free_ports
from deploy.embedded.preflight import LEAST_FREE_BYTES
from deploy.embedded.process import EmbeddedError
from deploy.embedded.stack import AlreadyRuns, Stack
from deploy.embedded.status import Phase, State
from services.common.topics import all_topics
from tests.fixtures.servers import kafka_home
from tests.fixtures.waiting import PATIENCE_S, until

SMALL = "tests.fixtures.small_stack"
SERVICES = {"gateway", "router", "worker-0", "worker-1", "registry", "analytics", "drift"}


@pytest.fixture
def home() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="headrace-stack-"))
    directory.chmod(0o755)
    yield directory / "home"
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def stack(home: Path) -> Iterator[Stack]:
    stack = Stack.on_free_ports(home, supervisor=SMALL)
    yield stack
    stack.stop()


def _family(stack: Stack) -> list[psutil.Process]:
    """Supervisor, guard, servers, services, and everything these started."""
    status = stack.status()
    assert status is not None
    supervisor = psutil.Process(status.pid)
    return [supervisor, *supervisor.children(recursive=True)]


def _running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [process for process in processes if _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _wait_held(stack: Stack, part: str) -> None:
    until(lambda: stack.part(part).state is State.HELD)


async def _partition_counts(bootstrap: str) -> dict[str, int]:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        return {entry["topic"]: len(entry["partitions"]) for entry in await admin.describe_topics()}
    finally:
        await admin.close()


async def test_comes_up_restarts_what_dies_and_goes_down_with_its_data(stack: Stack) -> None:
    seen: list[Phase] = []
    stack.start(progress=lambda status: seen.append(status.phase))
    assert seen[0] is Phase.STARTING
    status = stack.status()
    assert status is not None
    assert status.healthy
    assert {part.name for part in status.parts} == SERVICES | {"postgres", "valkey", "tansu"}
    assert any("memory only" in warning for warning in status.warnings)
    for secret in (stack.configuration.admin_key_file, stack.home / "secrets"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    key = stack.admin_key
    assert key.startswith("hr_")

    wanted = {topic.name: topic.partitions for topic in all_topics()}
    assert wanted.items() <= (await _partition_counts(stack.kafka_bootstrap_servers)).items()
    old = stack.kill("tansu")
    assert stack.wait_ready("tansu", not_pid=old).restarts == 1
    assert wanted.items() <= (await _partition_counts(stack.kafka_bootstrap_servers)).items()

    family = _family(stack)
    left_behind = psutil.Process(stack.pids()["worker-1"]).children()
    assert left_behind
    old = stack.kill("worker-1", hold=True)
    _wait_held(stack, "worker-1")
    assert _running(left_behind) == []
    stack.release("worker-1")
    again = stack.wait_ready("worker-1", not_pid=old)
    assert again.ports == stack.part("worker-1").ports
    log = (stack.configuration.logs / "supervisor.log").read_text()
    assert "worker-1 was ended by signal 9; starting it again in" in log

    with pytest.raises(AlreadyRuns, match="runs already"):
        Stack(stack.environment, supervisor=SMALL).start()

    family += _family(stack)
    assert stack.stop()
    assert not stack.running
    assert _running(family) == []
    assert not stack.stop()
    assert stack.admin_key == key
    assert (stack.home / "postgres" / "data" / "PG_VERSION").exists()


def test_nothing_outlives_a_killed_supervisor_and_it_starts_again(stack: Stack) -> None:
    stack.start()
    family = _family(stack)
    assert len(family) > 2 * len(SERVICES)
    stack.kill("supervisor")
    until(lambda: not stack.running)
    assert _running(family) == []
    stack.start()
    status = stack.status()
    assert status is not None
    assert status.healthy


def test_a_stack_that_is_not_detached_ends_with_its_starter(home: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from deploy.embedded.stack import Stack\n"
        "stack = Stack.on_free_ports(Path(sys.argv[1]), workers=1, supervisor=sys.argv[2])\n"
        "stack.start(); print(stack.status().pid, flush=True); time.sleep(600)\n"
    )
    starter = subprocess.Popen(
        [sys.executable, "-c", script, str(home), SMALL], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    assert starter.stdout is not None
    supervisor = psutil.Process(int(starter.stdout.readline()))
    family = [supervisor, *supervisor.children(recursive=True)]
    starter.kill()
    starter.communicate(timeout=PATIENCE_S)
    psutil.wait_procs(_running(family), timeout=PATIENCE_S)
    assert _running(family) == []


def test_a_service_that_cannot_start_fails_the_start_with_its_last_words(home: Path) -> None:
    stack = Stack.on_free_ports(home, supervisor=SMALL, environment={"BROKEN_SERVICE": "drift"})
    with pytest.raises(
        EmbeddedError, match=r"drift ended with code 1 \(drift has no sense of purpose\)"
    ) as failure:
        stack.start()
    assert "drift.log" in str(failure.value)
    assert not stack.running


def test_a_port_in_use_is_refused_before_anything_starts(home: Path) -> None:
    ports = free_ports(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(ports["REGISTRY_HTTP_PORT"])))
        taken.listen()
        stack = Stack.on_free_ports(home, supervisor=SMALL, environment=ports)
        with pytest.raises(EmbeddedError, match=f"Port {ports['REGISTRY_HTTP_PORT']} for registry is in use"):
            stack.start()
    assert not stack.running
    assert not (home / "postgres").exists()


def test_a_full_disk_is_refused_before_anything_starts(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")._replace(free=LEAST_FREE_BYTES - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    stack = Stack.on_free_ports(home, supervisor=SMALL)
    with pytest.raises(EmbeddedError, match="Only 1024 MB are free on the disk of"):
        stack.start()
    assert not home.exists()


def test_addresses_replace_servers(
    home: Path, postgres_url: str, redis_url: str, kafka_bootstrap: str
) -> None:
    given = {"DATABASE_URL": postgres_url, "REDIS_URL": redis_url}
    given["KAFKA_BOOTSTRAP_SERVERS"] = kafka_bootstrap
    stack = Stack.on_free_ports(home, workers=1, supervisor=SMALL, environment=given)
    try:
        stack.start()
        assert set(stack.pids()) == SERVICES - {"worker-1"}
        states = {part.name: part.state for part in (stack.status() or pytest.fail("not running")).parts}
        assert states["postgres"] is states["valkey"] is states["kafka"] is State.EXTERNAL
        assert stack.database_url == postgres_url
    finally:
        stack.stop()


@pytest.mark.kafka
async def test_kafka_home_makes_the_broker_durable(home: Path) -> None:
    chosen = kafka_home()
    if chosen is None:
        pytest.skip("no Apache Kafka here: set KAFKA_HOME")
    stack = Stack.on_free_ports(home, workers=1, supervisor=SMALL, kafka_home=chosen)
    try:
        stack.start()
        status = stack.status()
        assert status is not None
        assert "kafka" in stack.pids()
        assert status.warnings == []
        counts = await _partition_counts(stack.kafka_bootstrap_servers)
        assert {topic.name for topic in all_topics()} <= counts.keys()
    finally:
        stack.stop()


def test_status_and_logs_of_the_command_line(stack: Stack) -> None:
    def command(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "deploy.embedded", *words],
            cwd=REPOSITORY,
            env={**os.environ, "COLUMNS": "200", "HEADRACE_HOME": str(stack.home)},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    stopped = command("status")
    assert (stopped.returncode, "not running" in stopped.stdout) == (1, True)
    stack.start()
    healthy = command("status")
    assert healthy.returncode == 0
    for name, pid in stack.pids().items():
        assert any(
            line.split()[0] == name and str(pid) in line for line in healthy.stdout.splitlines() if line
        )
    stack.kill("worker-0", hold=True)
    _wait_held(stack, "worker-0")
    assert command("status").returncode == 1
    logs = command("logs", "supervisor")
    assert "worker-0 was ended by signal 9" in logs.stdout
    unknown = command("logs", "turbine")
    assert (unknown.returncode, "No log of turbine" in unknown.stderr) == (1, True)
    assert command("down").returncode == 0
    assert not stack.running


def test_a_wrong_kafka_home_fails_up_with_one_sentence(home: Path) -> None:
    environment = Stack.on_free_ports(home).environment | {"KAFKA_HOME": str(home)}
    starting = subprocess.Popen(
        [sys.executable, "-m", "deploy.embedded", "up"],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    _, said = starting.communicate(timeout=PATIENCE_S)
    assert starting.returncode == 1
    assert said.count("\n") == 1
    assert "no unpacked Apache Kafka" in said
    assert not Stack(environment).running


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupting_up_stops_what_it_has_started(home: Path, number: signal.Signals) -> None:
    stack = Stack.on_free_ports(home)
    starting = subprocess.Popen(
        [sys.executable, "-m", "deploy.embedded", "up"],
        cwd=REPOSITORY,
        env=stack.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: "valkey" in stack.pids())
    family = _family(stack)
    starting.send_signal(number)
    assert starting.wait(timeout=PATIENCE_S) == 130
    assert not stack.running
    assert _running(family) == []
