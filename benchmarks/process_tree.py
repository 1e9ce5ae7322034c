"""Servers as process trees, found by a mark in their environment: daemons count, and none is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MARK = "BENCH_TREE"
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0


class Unavailable(Exception):
    """A server cannot be measured here; the sentence says why."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a set of processes has used: CPU seconds since their start, memory bytes now.

    `pss` shares pages that several processes map among them; `rss` counts them for each."""

    cpu_s: float
    pss: int
    rss: int


def usage(pids: Iterable[int]) -> Usage:
    """Sum over the processes that are still there."""
    cpu = pss = rss = 0.0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue
        cpu += (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
        sizes = {line.split(":")[0]: int(line.split()[1]) for line in rollup.splitlines()[1:]}
        pss += sizes["Pss"] * 1024
        rss += sizes["Rss"] * 1024
    return Usage(cpu, int(pss), int(rss))


def cpu_seconds(pids: Iterable[int]) -> float:
    """CPU seconds of the processes that are still there; cheaper than `usage`."""
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / CLOCK_TICKS


def descendants(root: int) -> list[int]:
    """`root` and everything below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting.extend(children.get(pid, ()))
    return found


class ProcessTree:
    """One server process and all that it starts. Output goes to `log`."""

    def __init__(self, argv: Sequence[str], *, environment: Mapping[str, str], cwd: Path, log: Path) -> None:
        self._mark = uuid.uuid4().hex
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                list(argv),
                cwd=cwd,
                env={**environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Of the process that was started."""
        return self._process.pid

    def pids(self) -> list[int]:
        """Every process of the tree, also those that left our session, or wrote a title over the mark."""
        wanted = f"{MARK}={self._mark}".encode()
        found = set(descendants(self._process.pid))
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    session = int((entry / "stat").read_text().rpartition(")")[2].split()[3])
                    environment = (entry / "environ").read_bytes()
                except OSError:
                    continue
                if session == self._process.pid or wanted in environment.split(b"\0"):
                    found.add(int(entry.name))
        return sorted(found)

    def wait_until(self, ready: Callable[[], bool], timeout_s: float = START_TIMEOUT_S) -> None:
        """Return when `ready`. Raises Unavailable with the end of the log where it ends or takes too long."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            if self._process.poll() is not None:
                raise Unavailable(f"ended with code {self._process.returncode}: {self._tail()}")
            if time.monotonic() > deadline:
                raise Unavailable(f"was not ready within {timeout_s:.0f} s: {self._tail()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """SIGTERM, then SIGKILL for whatever of the tree is left."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait(STOP_TIMEOUT_S)

    def _tail(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return " | ".join(lines[-4:])[-600:]
