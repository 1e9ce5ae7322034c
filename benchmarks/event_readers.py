"""What the readers of events cost: CPU of analytics, drift, PostgreSQL and the broker per record and per row,
through the embedded broker and database. `python -m benchmarks.event_readers [--only NAME,…]`

Each case starts everything anew, waits until it is ready, measures it idle, publishes records as workers
write them, and counts the CPU that every process took until all is in Parquet and in windows, less what it
takes idle. Two paces: as online traffic comes (so many records a second), and a backlog, as fast as it can be
read.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.logged import MODEL, deployment, record
from benchmarks.process_tree import cpu_seconds, descendants
from deploy.embedded.blueprint import python_path
from deploy.embedded.postgres import PostgresServer
from deploy.embedded.server import Server, free_port
from deploy.embedded.service import ServiceProcess
from deploy.embedded.tansu import TansuServer
from services.common.bus.admin import ensure_topics
from services.common.bus.kafka import KafkaBus
from services.common.bus.port import Record
from services.common.topics import DEPLOYMENTS, PREDICTIONS, all_topics

IDLE_S = 8.0
PATIENCE_S = 60.0
#: A worker's log publishes ten times a second.
PUBLISHES_A_SECOND = 10


@dataclass(frozen=True, slots=True)
class Case:
    """`records` of `rows` requests each; `a_second` 0: all at once."""

    name: str
    rows: int
    records: int
    a_second: int = 0


CASES = [
    Case("one", 1, 8_000, 1_000),
    Case("eight", 8, 8_000, 1_000),
    Case("sixty-four", 64, 2_000, 200),
    Case("backlog", 32, 6_000),
    Case("job", 4_096, 96),
]


class Readers:
    """PostgreSQL, the broker and both services in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.postgres = PostgresServer(folder / "postgres")
        self.broker = TansuServer(folder / "tansu")
        self.services = {name: self._service(name, folder) for name in ("analytics", "drift")}
        self._started: list[Server] = []

    def _service(self, name: str, folder: Path) -> ServiceProcess:
        port = free_port()
        return ServiceProcess(
            name,
            folder / name,
            module=f"services.{name}",
            ports=(port,),
            health_ports=(port,),
            environment=lambda: {
                **{key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ},
                "PYTHONPATH": python_path(),
                "HTTP_PORT": str(port),
                "KAFKA_BOOTSTRAP_SERVERS": self.broker.url,
                "DATABASE_URL": self.postgres.url,
                "INTERNAL_TOKEN": "only-for-this-measurement",
                "STATE_DIR": str(folder / "state"),
                "ARTIFACT_STORE_URL": f"file://{folder}/store",
                "ANALYTICS_FLUSH_AFTER_S": "5",
            },
        )

    def start(self, servers: Sequence[Server]) -> None:
        for server in servers:
            self._started.append(server)
            server.start(timeout=PATIENCE_S)

    def stop(self) -> None:
        for server in reversed(self._started):
            server.stop()

    def cpu_s(self) -> dict[str, float]:
        """CPU seconds of each part so far, its children included."""
        parts: dict[str, Server] = {**self.services, "postgres": self.postgres, "broker": self.broker}
        return {
            name: cpu_seconds(descendants(server.pid))
            for name, server in parts.items()
            if server.pid is not None
        }

    def metric(self, service: str, name: str) -> float:
        """The sum of a metric over its labels."""
        with urllib.request.urlopen(f"{self.services[service].url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return sum(
            float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].split(" ")[0] == name
        )


async def measure(case: Case) -> None:
    rng = np.random.default_rng(1)
    key = f"{MODEL}/1".encode()
    made = [record(rng, case.rows).SerializeToString() for _ in range(case.records)]
    warm = [record(rng, case.rows).SerializeToString() for _ in range(20)]
    with tempfile.TemporaryDirectory(prefix="headrace-readers-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # noqa: ASYNC240 - a benchmark waits
        readers = Readers(folder)
        try:
            readers.start([readers.postgres, readers.broker])
            await ensure_topics(readers.broker.url, all_topics())
            async with KafkaBus(readers.broker.url, "bench") as bus:
                await bus.publish(
                    [Record(DEPLOYMENTS.name, MODEL.encode(), deployment().SerializeToString())]
                )
                readers.start(list(readers.services.values()))
                before = readers.cpu_s()
                print(f"{case.name}: start {_parts(before, 1.0, 's')}", flush=True)
                await _publish(bus, key, warm, Case("", case.rows, len(warm)))
                await _read(readers, len(warm))  # what the first records cost once is not theirs alone
                begun, idle = time.monotonic(), readers.cpu_s()
                await asyncio.sleep(IDLE_S)
                rate = _less(readers.cpu_s(), idle, 0.0, {}, over=time.monotonic() - begun)
                begun, before = time.monotonic(), readers.cpu_s()
                await _publish(bus, key, made, case)
                await _read(readers, case.records + len(warm))
                took = time.monotonic() - begun
                used = _less(readers.cpu_s(), before, took, rate)
        finally:
            readers.stop()
    rows = case.records * case.rows
    print(f"  idle, ms a second: {_parts(rate, 1e3)}")
    print(f"  µs a record of {case.rows} rows: {_parts(used, 1e6 / case.records)}")
    print(f"  µs a row: {_parts(used, 1e6 / rows)}; {took:.1f} s until all was read")
    print(
        f"  rows a CPU second: {_parts({n: rows / max(s, 1e-9) for n, s in used.items()}, 1.0)}", flush=True
    )


async def _publish(bus: KafkaBus, key: bytes, values: Sequence[bytes], case: Case) -> None:
    at_once = case.a_second // PUBLISHES_A_SECOND or 100
    due = time.monotonic()
    for start in range(0, len(values), at_once):
        await bus.publish([Record(PREDICTIONS.name, key, v) for v in values[start : start + at_once]])
        if case.a_second:
            due += 1 / PUBLISHES_A_SECOND
            await asyncio.sleep(max(0.0, due - time.monotonic()))


async def _read(readers: Readers, records: int) -> None:
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        await asyncio.sleep(2.5)
        taken = readers.metric("analytics", "headrace_analytics_records_total")
        seen = readers.metric("drift", "headrace_drift_records_total")
        waiting = readers.metric("analytics", "headrace_analytics_inbox_rows")
        if min(taken, seen) >= records and not waiting:
            return
    raise SystemExit(f"not read within {PATIENCE_S:g} s: {taken}, {seen}, {waiting} waiting")


def _less(
    after: dict[str, float],
    before: dict[str, float],
    took: float,
    rate: dict[str, float],
    *,
    over: float = 1.0,
) -> dict[str, float]:
    return {name: (after[name] - before[name] - took * rate.get(name, 0.0)) / over for name in after}


def _parts(seconds: dict[str, float], factor: float, unit: str = "") -> str:
    return ", ".join(f"{name} {value * factor:,.1f}{unit}" for name, value in seconds.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(case.name for case in CASES))
    wanted = parser.parse_args().only.split(",")
    for case in CASES:
        if case.name in wanted:
            asyncio.run(measure(case))


if __name__ == "__main__":
    main()
