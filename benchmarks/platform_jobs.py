"""Batch jobs on a platform of this machine: started, followed, and what else runs meanwhile."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx

from benchmarks.parts import processes
from benchmarks.process_tree import cpu_seconds, usage
from deploy.embedded.stack import Stack
from examples import cancer

SAMPLE_S = 0.2
#: Of whatever ends by itself.
WITHIN_S = 300.0
#: CPU seconds a second below which the platform is idle.
IDLE_CPU_S = 0.45
ENDED = {"completed", "failed", "cancelled", "expired"}


@contextmanager
def running(home: Path) -> Iterator[Stack]:
    """The embedded stack with one worker and the cancer model, as `make up` would have it."""
    home.mkdir()
    home.chmod(0o755)
    stack = Stack.on_free_ports(home, workers=1)
    stack.start()
    try:
        yield stack
    finally:
        stack.stop()


def warmed(stack: Stack, version: str, source: Path) -> None:
    """The model deployed, and a first job done."""
    headers = {"authorization": f"Bearer {stack.admin_key}"}
    with httpx.Client(base_url=stack.rest_url, headers=headers, timeout=60) as client:
        deploy(client, version, source.parent / "model" / "model.onnx")
        job_of(client, version, readable(stack, source))


def deploy(client: httpx.Client, version: str, model: Path) -> None:
    """The cancer model, serving."""
    client.post("/v1/models", json={"name": "cancer", "description": ""})
    with model.open("rb") as file:
        metadata = {"metadata": json.dumps({"version": version})}
        answer = client.post(
            "/v1/models/cancer/versions", data=metadata, files={"files": ("model.onnx", file)}
        )
    answer.raise_for_status()
    shares = {"versions": [{"version": version, "weight": 100}]}
    client.put("/v1/deployments/cancer", json=shares).raise_for_status()
    row = cancer.load().held_out_rows[0].tolist()
    deadline = time.monotonic() + WITHIN_S
    while client.post("/v1/predict", json={"model": "cancer", "inputs": [row]}).status_code != 200:
        if time.monotonic() > deadline:
            raise RuntimeError("the model does not serve")
        time.sleep(0.1)


def readable(stack: Stack, source: Path) -> str:
    """`source` where jobs may read it, without a copy."""
    folder = stack.home / "data"
    folder.mkdir(exist_ok=True)
    target = folder / source.name
    if not target.exists():
        target.hardlink_to(source)
    return target.as_uri()


def job_of(client: httpx.Client, version: str, uri: str) -> dict[str, Any]:
    """A job, once it has ended."""
    body = {"model": "cancer", "version": version, "input_uri": uri, "output_format": "parquet"}
    answer = client.post("/v1/batch", json=body)
    answer.raise_for_status()
    path = f"/v1/batch/{answer.json()['batch_id']}"
    deadline = time.monotonic() + WITHIN_S
    while True:
        job: dict[str, Any] = client.get(path).json()
        if job["status"] in ENDED:
            return job
        if time.monotonic() > deadline:
            raise RuntimeError(f"the job does not end: {job}")
        time.sleep(0.2)


def seconds_of(job: dict[str, Any]) -> float:
    """From acceptance to the end by the platform's own clock: asking often would be part of the load."""
    accepted, ended = (datetime.fromisoformat(job[name]) for name in ("created_at", "ended_at"))
    return (ended - accepted).total_seconds()


@contextmanager
def sampled(stack: Stack) -> Iterator[dict[str, list[float]]]:
    """Memory of every part while the block runs."""
    samples: dict[str, list[float]] = defaultdict(list)
    stop = threading.Event()
    trees = processes(stack)

    def look() -> None:
        while True:
            for name, pids in trees.items():
                samples[name].append(float(usage(pids).pss))
            if stop.wait(SAMPLE_S):
                return

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield samples
    finally:
        stop.set()
        thread.join()


def become_idle(stack: Stack) -> None:
    """Wait until what jobs left to be read is read: a window beside it would not be an idle one."""
    deadline = time.monotonic() + WITHIN_S
    trees = processes(stack).values()
    while time.monotonic() < deadline:
        before = sum(cpu_seconds(pids) for pids in trees)
        time.sleep(1.0)
        if sum(cpu_seconds(pids) for pids in trees) - before < IDLE_CPU_S:
            return
    raise RuntimeError("the platform does not become idle")


@contextmanager
def saturated(stack: Stack, version: str, uri: str, headers: dict[str, str]) -> Iterator[Callable[[], int]]:
    """Jobs one after another, two at a time, for as long as the block runs; gives the rows done so far."""
    stop = threading.Event()
    done = [0, 0]

    def run(place: int) -> None:
        with httpx.Client(base_url=stack.rest_url, headers=headers, timeout=60) as client:
            while not stop.is_set():
                body = {"model": "cancer", "version": version, "input_uri": uri, "output_format": "parquet"}
                answer = client.post("/v1/batch", json=body)
                answer.raise_for_status()
                path, before, job = f"/v1/batch/{answer.json()['batch_id']}", done[place], answer.json()
                while job["status"] not in ENDED:
                    if stop.wait(0.25):
                        client.delete(path)
                        return
                    job = client.get(path).json()
                    done[place] = before + job["counts"]["completed"]

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(done))]
    for thread in threads:
        thread.start()
    try:
        yield lambda: sum(done)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
