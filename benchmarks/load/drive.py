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
from benchmarks.load.requests import Endpoint
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


def generator_name() -> str:
    """Which closed-loop generator is used."""
    return "wrk" if shutil.which("wrk") else "benchmarks.load.generator"


def closed_loop(endpoint: Endpoint, requests: Path, connections: int, seconds: float) -> ClosedLoop:
    """Every connection sends its next request when it has its answer; wrk with one thread where it is
    installed, our own generator otherwise."""
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


def _own(endpoint: Endpoint, requests: Path, connections: int, seconds: float) -> ClosedLoop:
    said = open_loop(endpoint, requests, None, connections, seconds)
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


def open_loop(
    endpoint: Endpoint, requests: Path, rate: float | None, connections: int, seconds: float
) -> dict[str, Any]:
    """The generator's summary of `rate` requests per second (closed loop where None)."""
    argv = [sys.executable, "-m", "benchmarks.load.generator", "--requests", str(requests)]
    argv += ["--host", endpoint.host, "--port", str(endpoint.port), "--seconds", str(seconds)]
    argv += ["--connections", str(connections)]
    if rate is not None:
        argv += ["--rate", str(rate)]
    done = subprocess.run(
        argv,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=seconds + 60,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the load generator ended with {done.returncode}: {done.stderr[-500:]}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary
