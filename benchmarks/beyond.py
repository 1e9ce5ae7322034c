"""Servers beyond their capacity, under an open loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.capacity import search
from benchmarks.load.drive import OpenLoop, closed_loop, open_loop
from benchmarks.load.requests import write_requests
from benchmarks.plan import Plan
from benchmarks.process_tree import cpu_seconds
from benchmarks.results import CurvePoint
from benchmarks.targets.port import Front, Running
from benchmarks.workload import Workload

#: Between runs a server gets up to this long to finish what it put off, or what an overload left queued.
SETTLE_S = 4.0
SETTLE_OVERLOAD_S = 25.0
QUIET_WINDOW_S = 0.3
#: Share of a core below which it counts as having nothing to do.
QUIET_SHARE = 0.35
#: Of the rate that a closed loop gets, where the search begins.
FIRST_SHARE = 0.5
CLOSED_CONNECTIONS = 128
#: Connections of the fleet that offers the tiny model's load, and how long a request waits for one of them.
POOL = 1024
POOL_WAIT_S = 0.1


def drive_beyond(
    name: str, running: Running, workload: Workload, plan: Plan, folder: Path
) -> tuple[float, list[CurvePoint]]:
    """The capacity that the open loop finds, and what was offered on the way there and beyond.

    The tiny model's load comes from a fleet with a bounded pool of connections, as services have one: beyond
    the capacity of the machine, what the generator itself takes of it would grow without end otherwise. The
    slow model's load finds a connection whenever it is due."""
    front, slow = running.fronts[0], workload.name == plan.overload
    requests = write_requests(folder / f"{name}.requests", front.endpoint, workload)
    closed = closed_loop(front.endpoint, requests, CLOSED_CONNECTIONS, plan.curve_seconds)
    offer = _offering(front, running, requests, plan, slow=slow)
    found = search(offer, FIRST_SHARE * closed.requests_per_s)
    capacity = found.per_s or 1.0
    points = [
        CurvePoint(name, front.name, workload.name, rate / capacity, summary) for rate, summary in found.steps
    ]
    fractions = plan.overload_fractions if slow else plan.beyond
    for fraction in plan.beyond_rounds * fractions:
        summary = offer(max(1.0, round(capacity * fraction)))
        points.append(CurvePoint(name, front.name, workload.name, fraction, summary))
    return capacity, points


def _offering(
    front: Front, running: Running, requests: Path, plan: Plan, *, slow: bool
) -> Callable[[float], dict[str, Any]]:
    connections = plan.curve_connections if slow else min(POOL, plan.curve_connections)
    patience_s = plan.overload_patience_s if slow else plan.patience_s
    wait_s = patience_s if slow else POOL_WAIT_S

    def offer(rate: float) -> dict[str, Any]:
        settle(running.processes(), SETTLE_OVERLOAD_S if slow else SETTLE_S)
        load = OpenLoop(rate, connections, plan.curve_seconds, patience_s, wait_s)
        summary = open_loop(front.endpoint, requests, load)
        print(
            f"  {front.name:42} offered {rate:9,.0f}/s  goodput {summary['goodput_per_s']:9,.0f}/s  "
            f"p99 {(summary['p99_us'] or 0) / 1000:8.2f} ms  refused {summary['refused']}",
            flush=True,
        )
        return summary

    return offer


def settle(processes: Mapping[str, Sequence[int]], most_s: float = SETTLE_S) -> None:
    """Return when the processes have nothing left to do, or after `most_s`."""
    pids = [pid for part in processes.values() for pid in part]
    deadline = time.monotonic() + most_s
    before = cpu_seconds(pids)
    while time.monotonic() < deadline:
        time.sleep(QUIET_WINDOW_S)
        now = cpu_seconds(pids)
        if now - before < QUIET_SHARE * QUIET_WINDOW_S:
            return
        before = now
