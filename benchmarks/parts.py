"""The parts of an embedded stack as benchmarks name them, and where its runs of models are counted."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterable

from benchmarks.process_tree import descendants
from deploy.embedded.configuration import Configuration
from deploy.embedded.stack import Stack

#: What the part `gateway` is where it has more than the gateway in it.
GATEWAY_AND_ROUTER = "gateway and router"
WITH_GUESTS = "gateway, router and guests"
#: What a request runs through.
SERVING = frozenset({WITH_GUESTS, GATEWAY_AND_ROUTER, "gateway", "router", "worker-0"})
_RUNS = ("nv_inference_count", "nv_inference_exec_count")


def name_of(part: str, configuration: Configuration) -> str:
    """What a figure of `part` is a figure of."""
    if part != "gateway" or not configuration.joint:
        return part
    return WITH_GUESTS if configuration.guests else GATEWAY_AND_ROUTER


def processes(stack: Stack) -> dict[str, list[int]]:
    """Ids of all processes of each part."""
    return {name_of(part, stack.configuration): descendants(pid) for part, pid in stack.pids().items()}


def running_models(stack: Stack) -> list[str]:
    """The metrics of whoever runs models: the worker processes and, at the router's port, the guests."""
    configuration = stack.configuration
    parts = [f"worker-{index}" for index in range(configuration.workers)]
    if configuration.guests:
        parts.append("router")
    return [f"{stack.service_url(part)}/metrics" for part in parts]


def batches(urls: Iterable[str]) -> tuple[float, float]:
    """(rows, batches) that were run by all who tell of it at `urls`."""
    totals = dict.fromkeys(_RUNS, 0.0)
    for url in urls:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
        for line in text.splitlines():
            name = line.partition("{")[0]
            if name in totals:
                totals[name] += float(line.rpartition(" ")[2])
    rows, runs = (totals[name] for name in _RUNS)
    return rows, runs
