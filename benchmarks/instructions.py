"""Instructions per request of each process on its way: a figure that hardly depends on the machine or on what
else runs there, so that it can be compared across both.

Counted by valgrind's callgrind. The stack runs as always; one process after another is replaced by itself
under callgrind, on the same ports with the same environment, and counted while load goes through; what it
executes without load in the same time is taken off. `perf stat` would do where a machine counts instructions
for its guests; many do not.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.load.drive import OpenLoop, open_loop
from benchmarks.load.requests import Endpoint, write_requests
from benchmarks.process_tree import ProcessTree, Unavailable
from benchmarks.tables import table
from benchmarks.targets.headrace import HeadraceTarget
from benchmarks.targets.port import ask
from benchmarks.workload import Workload, mlp_workload
from deploy.embedded.stack import Stack

#: The numbers that a run is compared with, on whatever machine.
KEPT = Path(__file__).with_name("instructions.json")
CONNECTIONS = (1, 32)
#: The processes on a request's way, each counted alone: gateway and router are apart for it and no router has
#: a guest, on any machine.
PARTS = ("gateway", "router", "worker-0")
IDLE_S = 4.0
LOAD_S = 6.0
START_TIMEOUT_S = 240.0
_TOTALS = re.compile(r"^(?:summary|totals): (\d+)", re.MULTILINE)
HOW = (
    "User-mode instructions per request of each process on its way, by callgrind, with requests from 1 and "
    "from 32 connections (what travels in one frame shares its cost); background work taken off. Gateway, "
    "router and worker are processes of their own for it, also where cores are few."
)


@dataclass(frozen=True, slots=True)
class Callgrind:
    """One process under callgrind, asked through vgdb."""

    pid: int
    folder: Path
    #: vgdb and valgrind find each other by names made of some of its variables.
    environment: dict[str, str]

    def command(self, *words: str) -> None:
        """One monitor command. Raises Unavailable."""
        done = subprocess.run(
            ["vgdb", f"--pid={self.pid}", *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        if done.returncode != 0:
            raise Unavailable(f"vgdb {' '.join(words)}: {done.stderr.strip()[-200:]}")

    def count(self) -> int:
        """Instructions since the last call."""
        known = set(self.folder.glob("callgrind.*"))
        self.command("dump")
        self.command("zero")
        new = [path for path in self.folder.glob("callgrind.*") if path not in known]
        totals = [int(found) for path in new for found in _TOTALS.findall(path.read_text())]
        if not totals:
            raise Unavailable("callgrind wrote no totals")
        return max(totals)


def count_instructions() -> dict[str, Any]:
    """Per part and connections, or why they cannot be counted: a part of `Results`."""
    missing = [name for name in ("valgrind", "vgdb") if shutil.which(name) is None]
    if missing:
        return {"absent": f"{' and '.join(missing)} not installed."}
    workload = mlp_workload()
    parts: dict[str, dict[str, float]] = {}
    try:
        target = HeadraceTarget(environment={"HEADRACE_ROUTER": "apart"})
        with target.running(workload) as running, TemporaryDirectory(prefix="headrace-bench-") as name:
            folder = Path(name)
            endpoint = running.fronts[0].endpoint
            requests = write_requests(folder / "requests", endpoint, workload)
            stack = target.stack
            for part in PARTS:
                print(f"counting instructions: {part}", flush=True)
                with _under_callgrind(stack, part, endpoint, workload, folder / part) as callgrind:
                    parts[part] = _per_request(callgrind, endpoint, requests)
                    print(f"  {part}: {parts[part]}", flush=True)
    except Unavailable as error:
        return {"absent": str(error), "parts": parts}
    return {"how": HOW, "parts": parts}


def keep(said: dict[str, Any]) -> str:
    """Make `said` the numbers that later runs are compared with; gives them as text. Raises Unavailable where
    nothing was counted."""
    if "absent" in said:
        raise Unavailable(said["absent"])
    text = json.dumps({"parts": said["parts"], "python": platform.python_version()}, indent=1)
    KEPT.write_text(text + "\n")
    return text


def difference(said: dict[str, Any]) -> dict[str, float] | None:
    """By connections, how much all processes together grew against the kept numbers (0.1: a tenth); None
    where nothing was counted or kept."""
    if "absent" in said or not said or not KEPT.exists():
        return None
    now, then = _together(said["parts"]), _together(json.loads(KEPT.read_text())["parts"])
    return {count: now[count] / then[count] - 1 for count in now if then.get(count)}


def instructions_table(said: dict[str, Any]) -> list[str]:
    """A section of the report, its heading included; nothing where nothing was counted."""
    if not said:
        return []
    lines = ["## Instructions per request", ""]
    if "absent" in said:
        return [*lines, f"Not counted: {said['absent']}", ""]
    parts = said["parts"]
    kept = json.loads(KEPT.read_text())["parts"] if KEPT.exists() else {}
    rows = []
    for name, part in [*parts.items(), ("together", _together(parts))]:
        before = _together(kept) if name == "together" else kept.get(name, {})
        rows.append([name, *[_compared(number, before.get(count)) for count, number in part.items()]])
    header = ["", *[f"c = {count}" for count in _together(parts)]]
    return [*lines, said["how"], "", *table(header, rows), ""]


def _together(parts: dict[str, dict[str, float]]) -> dict[str, float]:
    counts = list(dict.fromkeys(count for part in parts.values() for count in part))
    return {count: sum(part[count] for part in parts.values()) for count in counts}


def _compared(now: float, then: float | None) -> str:
    return f"{now:,.0f}" if not then else f"{now:,.0f} ({now / then - 1:+.1%} to what is kept)"


def _per_request(callgrind: Callgrind, endpoint: Endpoint, requests: Path) -> dict[str, float]:
    found = {}
    open_loop(endpoint, requests, OpenLoop(None, max(CONNECTIONS), LOAD_S / 2))
    time.sleep(1)
    callgrind.count()
    time.sleep(IDLE_S)
    idle_per_s = callgrind.count() / IDLE_S
    for connections in CONNECTIONS:
        callgrind.count()
        started = time.monotonic()
        said = open_loop(endpoint, requests, OpenLoop(None, connections, LOAD_S))
        # What follows the last answer, such as publishing the log.
        time.sleep(1)
        counted = callgrind.count() - idle_per_s * (time.monotonic() - started)
        if not said["responses"]:
            raise Unavailable("no answers while instructions were counted")
        found[str(connections)] = round(counted / said["responses"])
    return found


@contextmanager
def _under_callgrind(
    stack: Stack, part: str, endpoint: Endpoint, workload: Workload, folder: Path
) -> Iterator[Callgrind]:
    """`part` of the stack as a process under callgrind while the block runs, then as before."""
    folder.mkdir()
    pid = stack.pids()[part]
    environment = dict(
        pair.split("=", 1) for pair in Path(f"/proc/{pid}/environ").read_text().split("\0") if "=" in pair
    )
    module = f"services.{part.partition('-')[0]}"
    code = Path(f"/proc/{pid}/cwd").readlink()  # the repository, or the copy with compiled modules
    stack.kill(part, signal.SIGTERM, hold=True)
    deadline = time.monotonic() + START_TIMEOUT_S
    while part in stack.pids() and time.monotonic() < deadline:
        time.sleep(0.1)
    argv = ["valgrind", "--tool=callgrind", "--instr-atstart=no", "--vgdb-poll=20000000"]
    argv += [f"--callgrind-out-file={folder}/callgrind.out", sys.executable, "-m", module]
    tree = ProcessTree(argv, environment=environment, cwd=code, log=folder / "log")
    try:
        tree.wait_until(lambda: _served(endpoint, workload), START_TIMEOUT_S)
        callgrind = Callgrind(tree.pid, folder, environment)
        callgrind.command("instrumentation", "on")
        yield callgrind
    finally:
        tree.stop()
        stack.release(part)
        stack.wait_ready(part)


def _served(endpoint: Endpoint, workload: Workload) -> bool:
    try:
        return ask(endpoint, workload, 0)[0] == 200
    except OSError:
        return False
