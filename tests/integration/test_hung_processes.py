"""Processes of one service whose event loop stands still, under a parent that itself may. What counts as
standing still is in tests/unit/common/test_liveness.py, by simulated time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from tests.fixtures.waiting import PATIENCE_S

REPOSITORY = Path(__file__).resolve().parents[2]
#: What a busy machine keeps no idle process from running for.
LIMIT_S = 2.0

#: SIGUSR2 makes its loop stand still. By ROLE it takes longer than the limit to start, or to drain.
CHILD = """
import asyncio, os, signal, time
import structlog
from services.common.lifecycle import end_with_parent, run, until_stopped
from services.common.telemetry import setup_logging

setup_logging("test")
log = structlog.get_logger("test").bind(child=int(os.environ["INDEX"]), pid=os.getpid())

def stand_still():
    log.info("standing_still")
    while True:
        time.sleep(0.01)

async def main():
    end_with_parent()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, stand_still)
    if os.environ["ROLE"] == "starts":
        await asyncio.sleep({limit_s})  # it could answer what it is asked
        stand_still()
    asyncio.get_running_loop().call_soon(log.info, "serving")  # from where it waits
    await until_stopped()
    if os.environ["ROLE"] == "drains":
        log.info("draining")
        await asyncio.sleep(600)

run(main, drain_s=600)
"""

PARENT = """
import asyncio, json, os, sys
import structlog
from services.common.lifecycle import ProcessGroup, run, until_stopped
from services.common.telemetry import setup_logging

setup_logging("test")

async def main():
    roles = json.loads(os.environ["ROLES"])
    environments = [{{"INDEX": str(index), "ROLE": role}} for index, role in enumerate(roles)]
    argv = [sys.executable, "-c", os.environ["CHILD"]]
    group = ProcessGroup(argv, environments, stop_s=0.5, hung_after_s={limit_s})
    async with group.running():
        await group.until_failed(until_stopped())
        structlog.get_logger("test").info("ending", restarts=group.restarts)

run(main)
"""


class Parent:
    """A parent, and what it and its children log."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.pid = process.pid
        self.said: list[dict[str, Any]] = []
        self._process = process

    def wait_for(self, event: str, **wanted: object) -> dict[str, Any]:
        """The next line of this event that has what is `wanted`."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said: dict[str, Any] = json.loads(line)
            self.said.append(said)
            if said["event"] == event and wanted.items() <= said.items():
                return said
        raise AssertionError(f"ended without {event} {wanted}: {self.said}")

    def said_of(self, event: str) -> list[dict[str, Any]]:
        """All lines of this event so far."""
        return [line for line in self.said if line["event"] == event]

    def end(self) -> int:
        """Ask it to end; its exit code."""
        os.kill(self.pid, signal.SIGTERM)
        return self._process.wait(PATIENCE_S)


@contextmanager
def parent_of(folder: Path, *roles: str) -> Iterator[Parent]:
    """In a process group of its own, which ends with the block. What is written to standard error is in the
    file `errors`."""
    environment = os.environ | {
        "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'proto'}",
        "ROLES": json.dumps(roles),
        "CHILD": textwrap.dedent(CHILD).format(limit_s=LIMIT_S),
    }
    with (
        (folder / "errors").open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-c", PARENT.format(limit_s=LIMIT_S)],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            cwd=REPOSITORY,
            start_new_session=True,
        ) as process,
    ):
        impatience = Timer(PATIENCE_S, os.killpg, (process.pid, signal.SIGKILL))
        impatience.start()
        try:
            yield Parent(process)
        finally:
            impatience.cancel()
            with suppress(ProcessLookupError):  # all of them have ended
                os.killpg(process.pid, signal.SIGKILL)


def serving(parent: Parent, *children: int) -> dict[int, int]:
    """Wait until all of them serve; their process ids."""
    pids: dict[int, int] = {}
    while pids.keys() != set(children):
        line = parent.wait_for("serving")
        pids[line["child"]] = line["pid"]
    return pids


@pytest.mark.parametrize("how", [signal.SIGUSR2, signal.SIGSTOP])
def test_a_process_that_stands_still_is_replaced_and_shows_where_it_was(
    tmp_path: Path, how: signal.Signals
) -> None:
    """Those that do well are left alone meanwhile, and those that start or drain, which takes them longer."""
    with parent_of(tmp_path, "hangs", "well", "drains", "starts") as parent:
        pids = serving(parent, 0, 1, 2)
        if not [line for line in parent.said_of("standing_still") if line["child"] == 3]:
            parent.wait_for("standing_still", child=3)
        os.kill(pids[2], signal.SIGTERM)
        parent.wait_for("draining", child=2)
        os.kill(pids[0], how)
        silent = parent.wait_for("process_silent")
        hung = parent.wait_for("process_hung")
        ended = parent.wait_for("process_ended")
        replaced = parent.wait_for("serving")
        for line in (silent, hung, ended):
            assert (line["index"], line["pid"]) == (0, pids[0])
        assert LIMIT_S <= hung["silent_s"] < 2 * LIMIT_S
        assert ended["code"] == -signal.SIGKILL
        assert replaced["child"] == 0
        assert replaced["pid"] != pids[0]
        assert parent.end() == 0
        assert parent.wait_for("ending")["restarts"] == 1
        for event in ("process_silent", "process_hung", "process_ended"):
            assert len(parent.said_of(event)) == 1
    shown = (tmp_path / "errors").read_text()
    assert ("in stand_still" in shown) == (how is signal.SIGUSR2)


@pytest.mark.parametrize("stopped", ["the parent alone", "all of them"])
def test_a_parent_that_stood_still_itself_kills_nobody(tmp_path: Path, stopped: str) -> None:
    with parent_of(tmp_path, "hangs", "well") as parent:
        pids = serving(parent, 0, 1)
        stopping = [parent.pid, *(pids.values() if stopped == "all of them" else ())]
        for pid in stopping:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(2 * LIMIT_S)  # it is this time that must not count
        for pid in stopping:
            os.kill(pid, signal.SIGCONT)
        # The next that stands still is the first that is found so: all the others answered since.
        os.kill(pids[0], signal.SIGUSR2)
        assert parent.wait_for("process_hung")["pid"] == pids[0]
        assert parent.wait_for("serving")["child"] == 0
        assert [line["pid"] for line in parent.said_of("process_silent")] == [pids[0]]
        assert parent.end() == 0
        assert parent.wait_for("ending")["restarts"] == 1
