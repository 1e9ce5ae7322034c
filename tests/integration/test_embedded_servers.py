"""The embedded servers themselves: they answer, keep their data over a crash, and die with their parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import asyncpg
import psutil
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from redis.asyncio import Redis

from deploy.embedded.apache_kafka import ApacheKafkaServer
from deploy.embedded.postgres import PostgresServer
from deploy.embedded.process import EmbeddedError
from deploy.embedded.tansu import TansuServer
from deploy.embedded.valkey import ValkeyServer
from tests.fixtures.waiting import PATIENCE_S

REPOSITORY = Path(__file__).resolve().parents[2]


async def _produce(bootstrap: str, topic: str, values: list[bytes]) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(topic, num_partitions=1, replication_factor=1)])
    finally:
        await admin.close()
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, acks="all") as producer:
        for value in values:
            await producer.send_and_wait(topic, value)


async def _consume(bootstrap: str, topic: str, count: int) -> list[bytes]:
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    async with consumer:
        found: list[bytes] = []
        deadline = time.monotonic() + PATIENCE_S
        while len(found) < count and time.monotonic() < deadline:
            for records in (await consumer.getmany(timeout_ms=500)).values():
                found.extend(record.value for record in records)
        return found


async def test_postgres_keeps_committed_rows_over_a_kill(new_postgres: Callable[[], PostgresServer]) -> None:
    server = new_postgres()
    url = server.url
    connection = await asyncpg.connect(url)
    await connection.execute("CREATE TABLE kept (n int)")
    await connection.execute("INSERT INTO kept VALUES (7)")
    server.kill()
    server.start(PATIENCE_S)
    assert server.url == url
    connection = await asyncpg.connect(url)
    assert await connection.fetchval("SELECT n FROM kept") == 7
    await connection.close()


async def test_postgres_refuses_a_wrong_password(postgres_url: str) -> None:
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(postgres_url, password="guess")


async def test_valkey_keeps_keys_over_a_clean_restart(new_valkey: Callable[[], ValkeyServer]) -> None:
    server = new_valkey()
    async with Redis.from_url(server.url) as redis:
        await redis.set("kept", "7")
    server.stop()
    server.start(PATIENCE_S)
    async with Redis.from_url(server.url) as redis:
        assert await redis.get("kept") == b"7"


async def test_tansu_carries_records_and_forgets_them_when_it_ends(
    new_tansu: Callable[[], TansuServer],
) -> None:
    server = new_tansu()
    await _produce(server.url, "facts", [b"1", b"2"])
    assert await _consume(server.url, "facts", 2) == [b"1", b"2"]
    server.kill()
    server.start(PATIENCE_S)
    await _produce(server.url, "facts", [b"3"])
    assert await _consume(server.url, "facts", 1) == [b"3"]


@pytest.mark.kafka
async def test_apache_kafka_keeps_acknowledged_records_over_a_kill(
    new_apache_kafka: Callable[[], ApacheKafkaServer],
) -> None:
    server = new_apache_kafka()
    await _produce(server.url, "facts", [b"1", b"2", b"3"])
    server.kill()
    server.start(PATIENCE_S)
    assert await _consume(server.url, "facts", 3) == [b"1", b"2", b"3"]


def test_a_port_in_use_is_one_clear_sentence(servers_directory: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = ValkeyServer(servers_directory / "valkey-taken", port)
        with pytest.raises(EmbeddedError, match=f"Port {port} for valkey is in use"):
            server.start()
        assert not server.alive


def test_a_folder_without_kafka_is_one_clear_sentence(servers_directory: Path) -> None:
    server = ApacheKafkaServer(servers_directory / "kafka-none", kafka_home=servers_directory)
    with pytest.raises(EmbeddedError, match="no unpacked Apache Kafka"):
        server.start()


def test_servers_end_when_their_parent_is_killed(servers_directory: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from deploy.embedded.postgres import PostgresServer\n"
        "from deploy.embedded.valkey import ValkeyServer\n"
        "from deploy.embedded.tansu import TansuServer\n"
        "home = Path(sys.argv[1])\n"
        "servers = [PostgresServer(home / 'p'), ValkeyServer(home / 'v'), TansuServer(home / 't')]\n"
        "for server in servers: server.start()\n"
        "print(*[server.pid for server in servers], flush=True)\n"
        "time.sleep(600)\n"
    )
    home = servers_directory / "orphans"
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(home)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 3
    family = [psutil.Process(pid) for pid in pids]
    family += [child for process in family for child in process.children(recursive=True)]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(timeout=PATIENCE_S)
    _, left = psutil.wait_procs([process for process in family if _runs(process)], timeout=PATIENCE_S)
    assert [process for process in left if _runs(process)] == []


def _runs(process: psutil.Process) -> bool:
    """A zombie that nobody reaps has ended, too."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
