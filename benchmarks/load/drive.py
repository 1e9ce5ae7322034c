"""Runs a load generator as a process of its own and gives what it measured."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environments import REPOSITORY
from benchmarks.load.h2load import grpc_loop
from benchmarks.load.requests import Endpoint
from benchmarks.workload import Dialect
from deploy.embedded.blueprint import python_path

SCRIPT = Path(__file__).with_name("requests.lua")


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """What one closed-loop run showed. Times are µs; `errors` by kind, empty in a good run."""

    requests_per_s: float
    requests: int
    p50_us: float
    p90_us: float
    p99_us: float
    p999_us: float
    errors: dict[str, int]


@dataclass(frozen=True, slots=True)
class OpenLoop:
    """`rate` requests per second (None: a closed loop) over `connections`. An answer later than `patience_s`
    after its request was due is of no use; a request that finds no free connection for `wait_s` is given
    up."""

    rate: float | None
    connections: int
    seconds: float
    patience_s: float = 1.0
    wait_s: float = 1.0
    #: Under way before anything counts.
    warm_up_s: float = 0.5
    #: The generator runs before all else of this machine.
    ahead: bool = False
    #: A file that is made as the load begins.
    begun: Path | None = None


def missing_generator(endpoint: Endpoint) -> str | None:
    """Why `endpoint` cannot be loaded here."""
    if endpoint.dialect is Dialect.GRPC and shutil.which("h2load") is None:
        return "not measured: h2load is not installed (apt-get install nghttp2-client)"
    return None


def generator_name() -> str:
    """Which closed-loop generator is used."""
    return "wrk" if shutil.which("wrk") else "benchmarks.load.generator"


def closed_loop(
    endpoint: Endpoint, requests: Path, connections: int, seconds: float, answer_bytes: int = 0
) -> ClosedLoop:
    """Every connection sends its next request when it has its answer; wrk with one thread where it is
    installed, our own generator otherwise. gRPC: h2load with one thread, see `grpc_loop`."""
    if endpoint.dialect is Dialect.GRPC:
        return _grpc(endpoint, requests, connections, seconds, answer_bytes)
    if shutil.which("wrk") is None:
        return _own(endpoint, requests, connections, seconds)
    result = requests.with_suffix(".result.json")
    result.unlink(missing_ok=True)
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "10s"]
    done = subprocess.run(
        [*argv, "-s", str(SCRIPT), f"http://{endpoint.host}:{endpoint.port}/"],
        env={**os.environ, "BENCH_REQUESTS": str(requests), "BENCH_RESULT": str(result)},
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    if not result.exists():
        return ClosedLoop(0, 0, 0, 0, 0, 0, {f"wrk: {done.stderr.strip()[:200]}": 1})
    said = json.loads(result.read_text())
    errors = {kind: said[kind] for kind in ("status", "connect", "read", "write", "timeout") if said[kind]}
    answered = said["requests"] - said["status"]
    return ClosedLoop(
        answered / said["duration_us"] * 1e6,
        answered,
        said["p50_us"],
        said["p90_us"],
        said["p99_us"],
        said["p999_us"],
        errors,
    )


def _grpc(endpoint: Endpoint, frame: Path, connections: int, seconds: float, answer_bytes: int) -> ClosedLoop:
    said = grpc_loop(endpoint, frame, connections, seconds, answer_bytes)
    times = said["times_us"] or [0.0]
    p50, p90, p99, p999 = (times[min(len(times) - 1, int(q * len(times)))] for q in (0.5, 0.9, 0.99, 0.999))
    rate = said["answered"] / said["seconds"]
    return ClosedLoop(rate, said["answered"], p50, p90, p99, p999, said["errors"])


def _own(endpoint: Endpoint, requests: Path, connections: int, seconds: float) -> ClosedLoop:
    said = open_loop(endpoint, requests, OpenLoop(None, connections, seconds))
    errors = dict(said["other"])
    if said["refused"]:
        errors["refused"] = said["refused"]
    return ClosedLoop(
        said["goodput_per_s"],
        said["answered"],
        said["p50_us"] or 0.0,
        said["p90_us"] or 0.0,
        said["p99_us"] or 0.0,
        said["p999_us"] or 0.0,
        errors,
    )


def open_loop(endpoint: Endpoint, requests: Path, load: OpenLoop) -> dict[str, Any]:
    """The summary that our own generator prints."""
    argv = [sys.executable, "-m", "benchmarks.load.generator", "--requests", str(requests)]
    argv += ["--host", endpoint.host, "--port", str(endpoint.port), "--seconds", str(load.seconds)]
    argv += ["--connections", str(load.connections)]
    argv += ["--patience", str(load.patience_s), "--wait", str(load.wait_s)]
    argv += ["--warm-up", str(load.warm_up_s)]
    argv += ["--ahead"] if load.ahead else []
    argv += ["--begun", str(load.begun)] if load.begun is not None else []
    if load.rate is not None:
        argv += ["--rate", str(load.rate)]
    done = subprocess.run(
        argv,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=load.warm_up_s + load.seconds + load.patience_s + 60,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the load generator ended with {done.returncode}: {done.stderr[-500:]}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary
