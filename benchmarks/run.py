"""Runs a plan: every server alone, round after round, each round starting with another."""

from __future__ import annotations

import http.client
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

from benchmarks.beyond import drive_beyond, settle
from benchmarks.direct import measure_direct
from benchmarks.load.drive import closed_loop, generator_name, missing_generator
from benchmarks.load.requests import write_requests
from benchmarks.machine import load_average, machine
from benchmarks.plan import Payload, Plan
from benchmarks.process_tree import Unavailable, cpu_seconds, usage
from benchmarks.results import Memory, Point, Results
from benchmarks.targets.port import Front, Running, Target, check_answers
from benchmarks.workload import WORKLOADS, Workload

#: What may go wrong with one server; it is noted, and the run goes on.
FAILURES = (
    Unavailable,
    OSError,
    RuntimeError,
    ValueError,
    subprocess.SubprocessError,
    http.client.HTTPException,
    httpx.HTTPError,
)
WARM_UP_CONNECTIONS = 32
#: What driving one server beyond its capacity takes, start and stop included; the same with the slow model.
BEYOND_S = 120.0
OVERLOAD_S = 200.0
#: The same for a round of a further payload, and of the main fronts, per server.
PAYLOAD_S = 25.0
CORE_S = 20.0
#: Rounds of the main fronts before anything else is measured.
FIRST_ROUNDS = 3


class Benchmark:
    """One run of a plan. A server that cannot be measured is noted with the reason, and the run goes on."""

    def __init__(self, plan: Plan, targets: Mapping[str, Target]) -> None:
        self._plan = plan
        self._targets = dict(targets)
        self._folder = Path()
        self._began = time.monotonic()
        self._longest_core_s = CORE_S * len(targets)
        self.results = Results(
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            plan=plan.name,
            machine=machine(),
            generator=generator_name(),
            seconds=plan.seconds,
            rounds=0,
        )

    def run(self, extras: Mapping[str, tuple[float, Callable[[Results], None]]]) -> Results:
        """Everything of the plan, as far as its time goes. `extras` are further measurements by name, with
        the seconds that each may take; they write into the results."""
        plan = self._plan
        with TemporaryDirectory(prefix="headrace-bench-") as folder:
            self._folder = Path(folder)
            self.install()
            self._began = time.monotonic()
            main = self._workload(plan.main)
            self._round(main, 0)
            self.results.rounds = 1
            self._beyond(main, plan.curved, BEYOND_S)
            overload = self._workload(plan.overload)
            self._beyond(overload, plan.overloaded[:1], OVERLOAD_S)
            self._core_rounds(main, 1, min(plan.rounds, FIRST_ROUNDS))
            for payload in plan.payloads:
                if self._has_time(PAYLOAD_S * len(self._targets), payload.workload):
                    self._round(self._workload(payload.workload), 0, payload=payload)
            for name, (needed_s, measure) in extras.items():
                if self._has_time(needed_s, name):
                    measure(self.results)
            self._beyond(overload, plan.overloaded[1:], OVERLOAD_S)
            self._core_rounds(main, FIRST_ROUNDS, plan.rounds)
        return self.results

    def _core_rounds(self, main: Workload, first: int, after: int) -> None:
        """Rounds `first` … `after` - 1 of the main fronts, as long as there is time."""
        for number in range(first, after):
            if not self._has_time(self._longest_core_s, f"round {number + 1} of {main.title}"):
                return
            started = time.monotonic()
            self._round(main, number)
            self.results.rounds = number + 1
            self._longest_core_s = max(self._longest_core_s, time.monotonic() - started)

    def install(self) -> None:
        """Make every server's environment; those that cannot be made are left out."""
        for name, target in list(self._targets.items()):
            try:
                target.install()
                self.results.versions[name] = target.versions()
                self.results.setups[name] = target.setup
                self.results.titles[name] = target.title
            except Unavailable as error:
                self._leave_out(name, f"{target.title}: {error}")

    def _workload(self, name: str) -> Workload:
        workload = WORKLOADS[name](self._folder / name)
        self.results.direct[name] = {
            **asdict(measure_direct(workload, self._plan.direct_s)),
            "title": workload.title,
            "rows_per_request": workload.rows,
        }
        return workload

    def _has_time(self, seconds: float, what: str) -> bool:
        enough = time.monotonic() - self._began + seconds < self._plan.budget_s
        if not enough:
            print(f"no time for {what}", flush=True)
            self.results.left_out.append(what)
        return enough

    def _leave_out(self, name: str, reason: str) -> None:
        print(f"  {name}: {reason}", flush=True)
        self.results.absent[name] = reason

    def _round(
        self,
        workload: Workload,
        number: int,
        payload: Payload | None = None,
    ) -> None:
        self.results.load_before.append(round(load_average(), 2))
        names = [name for name in self._targets if name not in self.results.absent]
        # Whoever comes first finds a cooler machine: each round begins with another.
        names = names[number % len(names) :] + names[: number % len(names)] if names else []
        for name in names:
            print(f"{workload.name}, round {number + 1}: {name}", flush=True)
            try:
                with self._targets[name].running(workload) as running:
                    self._measure(name, running, workload, number, payload)
            except FAILURES as error:
                key = name if workload.name == self._plan.main else f"{name}, {workload.name}"
                self._leave_out(key, f"{self._targets[name].title}, {workload.title}: {error}")

    def _measure(
        self,
        name: str,
        running: Running,
        workload: Workload,
        number: int,
        payload: Payload | None,
    ) -> None:
        plan = self._plan
        for place, front in enumerate(running.fronts):
            if front.name in self.results.absent or (payload is not None and front.name in payload.without):
                continue
            if place and number:
                return  # further rounds are of the main fronts
            missing = missing_generator(front.endpoint)
            if missing:
                self._leave_out(front.name, f"{front.name}: {missing}")
                continue
            if front.prepare is not None:
                front.prepare()
            try:
                answer_bytes = check_answers(front, workload)
            except FAILURES as error:
                if not place:
                    raise
                self._leave_out(front.name, f"{front.name}, {workload.title}: {error}")
                continue
            requests = write_requests(self._folder / f"{name}.requests", front.endpoint, workload)
            if plan.warm_up_s:
                closed_loop(front.endpoint, requests, WARM_UP_CONNECTIONS, plan.warm_up_s, answer_bytes)
                settle(running.processes())
            for count in self._connections(place, number, payload):
                self._closed(name, front, running, workload, number, count, requests, answer_bytes)
            if workload.name == plan.main and not number and not place:
                self._weigh(name, running)

    def _connections(self, place: int, number: int, payload: Payload | None) -> tuple[int, ...]:
        if payload is not None:
            return payload.connections
        if number:
            return self._plan.core_connections
        return self._plan.side_connections if place else self._plan.connections

    def _weigh(self, name: str, running: Running) -> None:
        for part, pids in running.processes().items():
            used = usage(pids)
            serving = not running.serving_parts or part in running.serving_parts
            self.results.memory.append(Memory(name, part, used.pss, used.rss, serving))

    def _closed(
        self,
        name: str,
        front: Front,
        running: Running,
        workload: Workload,
        number: int,
        connections: int,
        requests: Path,
        answer_bytes: int,
    ) -> None:
        processes = running.processes()
        before = {part: cpu_seconds(pids) for part, pids in processes.items()}
        ran = running.batches() if running.batches is not None else None
        found = closed_loop(front.endpoint, requests, connections, self._plan.seconds, answer_bytes)
        rows_per_batch = None
        if running.batches is not None and ran is not None:
            rows, batches = (b - a for a, b in zip(ran, running.batches(), strict=True))
            rows_per_batch = rows / batches if batches else None
        # What is put off until after the answer (events, logs) is part of its cost.
        settle(processes)
        cpu = {part: max(0.0, cpu_seconds(pids) - before[part]) for part, pids in processes.items()}
        point = Point(
            target=name,
            front=front.name,
            workload=workload.name,
            connections=connections,
            round=number,
            requests_per_s=round(found.requests_per_s, 1),
            p50_us=found.p50_us,
            p90_us=found.p90_us,
            p99_us=found.p99_us,
            p999_us=found.p999_us,
            errors=found.errors,
            cpu_us={part: round(s / max(1, found.requests) * 1e6, 1) for part, s in cpu.items()},
            rows_per_batch=rows_per_batch,
        )
        self.results.points.append(point)
        failed = f"  FAILED {point.errors}" if point.failed else ""
        print(
            f"  {front.name:42} c={connections:<4} {point.requests_per_s:9,.0f}/s  "
            f"p50 {point.p50_us / 1000:8.2f} ms  p99 {point.p99_us / 1000:8.2f} ms{failed}",
            flush=True,
        )

    def _beyond(self, workload: Workload, names: tuple[str, ...], needed_s: float) -> None:
        """Each server started afresh."""
        for name in names:
            if name not in self._targets or name in self.results.absent:
                continue
            what = f"{self._targets[name].title} beyond its capacity, {workload.title}"
            if not self._has_time(needed_s, what):
                continue
            print(f"{workload.name}, open loop: {name}", flush=True)
            try:
                with self._targets[name].running(workload) as running:
                    check_answers(running.fronts[0], workload)
                    capacity, points = drive_beyond(name, running, workload, self._plan, self._folder)
            except FAILURES as error:
                self._leave_out(f"{name}, {workload.name}, open loop", f"{what}: {error}")
                continue
            self.results.curves += points
            self.results.capacities.setdefault(workload.name, {})[points[0].front] = capacity
