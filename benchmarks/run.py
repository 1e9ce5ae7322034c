"""The run: rounds over all servers in changing order, one server up at a time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.direct import measure_direct
from benchmarks.load.drive import closed_loop, generator_name, open_loop
from benchmarks.load.requests import write_requests
from benchmarks.machine import load_average, machine
from benchmarks.plan import Plan
from benchmarks.process_tree import Unavailable, cpu_seconds, usage
from benchmarks.results import CurvePoint, Memory, Point, Results
from benchmarks.targets.port import Front, Running, Target, check_answers
from benchmarks.workload import WORKLOADS, Workload

#: Between runs a server gets up to this long to finish what it put off.
SETTLE_S = 4.0
QUIET_WINDOW_S = 0.3
#: Share of a core below which it counts as having nothing to do.
QUIET_SHARE = 0.35
WARM_UP_CONNECTIONS = 32
#: What an open-loop curve of the short plan takes, start and stop included.
CURVE_S = 45.0


class Benchmark:
    """One run of a plan. A server that cannot be measured is noted with the reason, and the run goes on."""

    def __init__(self, plan: Plan, targets: Mapping[str, Target]) -> None:
        self._plan = plan
        self._targets = dict(targets)
        self._folder = Path()
        self._began = time.monotonic()
        self.results = Results(
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            plan=plan.name,
            machine=machine(),
            generator=generator_name(),
            seconds=plan.seconds,
            rounds=plan.rounds,
        )

    def run(self) -> Results:
        """Everything of the plan."""
        with TemporaryDirectory(prefix="headrace-bench-") as folder:
            self._folder = Path(folder)
            self.install()
            self._began = time.monotonic()
            for position, name in enumerate(self._plan.workloads):
                workload = WORKLOADS[name](self._folder / name)
                direct = measure_direct(workload, self._plan.direct_s)
                self.results.direct[name] = {
                    **asdict(direct),
                    "title": workload.title,
                    "rows_per_request": workload.rows,
                }
                rounds = self._plan.rounds if position == 0 else self._plan.further_rounds
                self._rounds(workload, rounds, first=position == 0)
                if position == 0:
                    self._curves(workload)
        return self.results

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

    def _leave_out(self, name: str, reason: str) -> None:
        print(f"  {name}: {reason}", flush=True)
        self.results.absent[name] = reason

    def _rounds(self, workload: Workload, rounds: int, *, first: bool) -> None:
        longest = 0.0
        for number in range(rounds):
            started = time.monotonic()
            left = self._plan.budget_s - (started - self._began) - (CURVE_S * len(self._plan.curved) * first)
            if number and left < longest:
                print(f"{workload.name}: no time for round {number + 1}", flush=True)
                return
            self._round(workload, number, first=first)
            if first:
                self.results.rounds = number + 1
            longest = max(longest, time.monotonic() - started)

    def _round(self, workload: Workload, number: int, *, first: bool) -> None:
        self.results.load_before.append(round(load_average(), 2))
        names = [name for name in self._targets if name not in self.results.absent]
        # Whoever comes first finds a cooler machine: each round begins with another.
        names = names[number % len(names) :] + names[: number % len(names)] if names else []
        for name in names:
            print(f"{workload.name}, round {number + 1}: {name}", flush=True)
            try:
                with self._targets[name].running(workload) as running:
                    self._measure(name, running, workload, number, first=first)
            except Unavailable as error:
                self._leave_out(name, f"{self._targets[name].title}: {error}")

    def _measure(self, name: str, running: Running, workload: Workload, number: int, *, first: bool) -> None:
        plan = self._plan
        for front in running.fronts:
            if plan.fronts and front.name not in plan.fronts:
                continue
            if front.prepare is not None:
                front.prepare()
            check_answers(front, workload)
            requests = write_requests(self._folder / f"{name}.requests", front.endpoint, workload)
            if plan.warm_up_s:
                closed_loop(front.endpoint, requests, WARM_UP_CONNECTIONS, plan.warm_up_s)
                settle(running.processes())
            for connections in plan.connections if first else plan.further_connections:
                self._closed(name, front, running, workload, number, connections, requests)
            if first and number == 0 and front is running.fronts[0]:
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
    ) -> None:
        processes = running.processes()
        before = {part: cpu_seconds(pids) for part, pids in processes.items()}
        ran = running.batches() if running.batches is not None else None
        found = closed_loop(front.endpoint, requests, connections, self._plan.seconds)
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

    def _curves(self, workload: Workload) -> None:
        """Offered loads relative to what the same generator gets out of the server in a closed loop, each
        server started afresh."""
        plan = self._plan
        for name in plan.curved:
            if name not in self._targets or name in self.results.absent:
                continue
            print(f"{workload.name}, open loop: {name}", flush=True)
            try:
                with self._targets[name].running(workload) as running:
                    self._curve(name, running, workload)
            except Unavailable as error:
                self._leave_out(name, f"{self._targets[name].title}, open loop: {error}")

    def _curve(self, name: str, running: Running, workload: Workload) -> None:
        plan, front = self._plan, running.fronts[0]
        requests = write_requests(self._folder / f"{name}.requests", front.endpoint, workload)
        for _ in range(2):  # the first is the warm-up
            closed = open_loop(front.endpoint, requests, None, 128, plan.curve_seconds)
        capacity = float(closed["goodput_per_s"])
        self.results.capacities[front.name] = capacity
        for fraction in plan.curve:
            settle(running.processes())
            rate = max(1.0, round(capacity * fraction))
            summary = open_loop(front.endpoint, requests, rate, plan.curve_connections, plan.curve_seconds)
            self.results.curves.append(CurvePoint(name, front.name, fraction, summary))
            print(
                f"  {front.name:42} offered {rate:9,.0f}/s  goodput {summary['goodput_per_s']:9,.0f}/s  "
                f"p99 {(summary['p99_us'] or 0) / 1000:8.2f} ms  refused {summary['refused']}",
                flush=True,
            )


def settle(processes: Mapping[str, Sequence[int]]) -> None:
    """Return when the processes have nothing left to do, or after SETTLE_S."""
    pids = [pid for part in processes.values() for pid in part]
    deadline = time.monotonic() + SETTLE_S
    before = cpu_seconds(pids)
    while time.monotonic() < deadline:
        time.sleep(QUIET_WINDOW_S)
        now = cpu_seconds(pids)
        if now - before < QUIET_SHARE * QUIET_WINDOW_S:
            return
        before = now
