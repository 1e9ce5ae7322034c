"""Several processes of one service, which share its ports: started, replaced where one dies, stopped
together.

The parent takes no requests. It holds the ports (bound, not listening), so that a port that somebody else has
is told at once, and answers the ops port for all of them (`joint_ops`). A child whose parent is gone notices
by the end of its standard input, and drains. A child whose event loop stands still goes on being given
connections by the kernel, which nobody answers: it is replaced as one that died.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from services.common.errors import Fatal
from services.common.lifecycle.liveness import DUMP_SIGNAL, Line, Step, Watchdog, hear, tell
from services.common.lifecycle.run import ending_hard, told_by_parent, when_started

log = structlog.get_logger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
#: A process that lived so long did start: its end is no reason to wait longer before the next start.
_LIVED_S = 10.0
#: Starts of one child that failed in a row before the service gives up.
_GIVE_UP = 6
_CONFIGURATION = 2
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores() -> int:
    """Cores that this process may use, by affinity and by its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):
        quota, period = _QUOTA.read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))  # "max" is no number, and no quota
    return cores


def held_port(host: str, port: int) -> socket.socket:
    """`port` (0: any free one) for processes that share it by SO_REUSEPORT, for as long as the socket is
    open. Raises Fatal where it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    held = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host, port))
    except OSError as error:
        held.close()
        raise Fatal(f"Cannot listen on {host}:{port}: {error.strerror or error}.") from error
    return held


def end_with_parent() -> None:
    """In a child: ask this process to drain when the parent is gone. Who ended that may have told this one,
    and so may the parent: it is one wish, and takes nothing from what is in flight.

    Until then it answers the parent, once it has started: what a start loads may keep the loop for long. That
    it has it says without being asked, since it may stand still before it is."""
    told_by_parent()
    loop = asyncio.get_running_loop()
    parent = sys.stdin.fileno()
    answering = False

    def started() -> None:
        nonlocal answering
        answering = True
        tell(parent)

    def heard() -> None:
        if not hear(parent, answering=answering):
            loop.remove_reader(parent)
            log.warning("parent_gone")
            os.kill(os.getpid(), signal.SIGTERM)

    when_started(started)
    loop.add_reader(parent, heard)


@dataclass(slots=True)
class _Child:
    """The place of one process."""

    index: int
    process: asyncio.subprocess.Process | None = None
    line: Line | None = None
    restarts: int = 0


class ProcessGroup:
    """Children that run `argv`, each with the environment of this process and its own
    `environments[index]`.

    They stay in our process group, so that whoever ends that leaves no orphan, not even one that is frozen;
    except where a terminal's signals, which are to come by us, would reach them. They have no session of
    their own: Linux shares the processor between sessions first (autogroups), and a process that changed
    cores was then seen to wait for 12 to 70 ms."""

    def __init__(
        self,
        argv: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        *,
        stop_s: float,
        hung_after_s: float = 0.0,
    ) -> None:
        """`stop_s` is what the children have from SIGTERM to their end. One that calls `end_with_parent` is
        killed once its event loop stood still for `hung_after_s`; 0: never."""
        self._argv = list(argv)
        self._environments = environments
        self._stop_s = stop_s
        self._hung_after_s = hung_after_s
        self._children = [_Child(index) for index in range(len(environments))]
        self._stopping = False
        self._keeping: asyncio.Task[None]

    @property
    def pids(self) -> dict[int, int]:
        """Process ids by index, of those that run."""
        return {
            child.index: child.process.pid
            for child in self._children
            if child.process is not None and child.process.returncode is None
        }

    @property
    def restarts(self) -> int:
        """How often a child was replaced."""
        return sum(child.restarts for child in self._children)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Keep every child running while the block does; at the end, end them. They end hard where this
        process does."""
        self._keeping = asyncio.create_task(self._keep_all(), name="processes")
        with ending_hard(self._kill):
            try:
                yield
            finally:
                self._stopping = True
                await self._stop()
                self._keeping.cancel()
                await asyncio.wait({self._keeping})

    async def until_failed(self, stopped: Coroutine[Any, Any, None]) -> None:
        """Wait until `stopped` returns. Raises Fatal where the children cannot run."""
        waiting = asyncio.create_task(stopped)
        keeping = self._keeping
        await asyncio.wait({waiting, keeping}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            waiting.result()
            return
        waiting.cancel()
        keeping.result()

    async def _keep_all(self) -> None:
        async with asyncio.TaskGroup() as group:
            for child in self._children:
                group.create_task(self._keep(child), name=f"process-{child.index}")
            if self._hung_after_s:
                group.create_task(self._end_hung(Watchdog(self._hung_after_s)), name="watchdog")

    async def _keep(self, child: _Child) -> None:
        """Start the child's process, and again whenever it ends."""
        loop = asyncio.get_running_loop()
        pause_s, failures = _FIRST_PAUSE_S, 0
        while not self._stopping:  # one that began now would take requests, and nobody tell it to drain
            started = loop.time()
            process = await self._lived(child)
            if self._stopping:
                return
            lived_s = loop.time() - started
            code = None
            if process is not None:
                code = process.returncode
                log.error("process_ended", index=child.index, pid=process.pid, code=code, lived_s=lived_s)
            if code == _CONFIGURATION:
                raise _WrongConfiguration("The environment does not fit; the reason stands in the log above.")
            if lived_s >= _LIVED_S:
                pause_s, failures = _FIRST_PAUSE_S, 0
            failures += 1
            if failures >= _GIVE_UP:
                raise Fatal(f"Process {child.index} ended {failures} times in a row soon after its start.")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            child.restarts += 1

    async def _lived(self, child: _Child) -> asyncio.subprocess.Process | None:
        """A process of the child's, once it has ended; None where it could not be started."""
        try:
            with Line() as line:
                process = child.process = await asyncio.create_subprocess_exec(
                    *self._argv,
                    env={**os.environ, **self._environments[child.index]},
                    stdin=line.child_end.fileno(),
                    preexec_fn=os.setpgrp if _has_terminal() else None,  # uvloop knows no process_group
                )
                line.child_end.close()
                child.line = line
                await process.wait()
                child.line = None
                return process
        except OSError as error:  # for want of memory, processes or descriptors: the others live on
            log.warning("process_not_started", index=child.index, reason=str(error))
            return None

    async def _end_hung(self, watchdog: Watchdog) -> None:
        """Kill whose event loop stands still; `_keep` starts another."""
        while True:
            await asyncio.sleep(watchdog.every_s)
            if self._stopping:  # which has a deadline of its own
                return
            asked = [(child, child.line) for child in self._children if child.line is not None]
            for (child, line), step in zip(asked, watchdog.ask([line for _, line in asked]), strict=True):
                if step is not Step.NOTHING:
                    self._end_step(child, step, watchdog.silent_s(line))

    def _end_step(self, child: _Child, step: Step, silent_s: float) -> None:
        process = child.process
        if process is None:
            return
        about = {"index": child.index, "pid": process.pid, "silent_s": silent_s}
        with suppress(ProcessLookupError):
            if step is Step.DUMP:
                log.warning("process_silent", **about, stacks="in plain text, on standard error")
                process.send_signal(DUMP_SIGNAL)
            else:
                log.error("process_hung", **about, hung_after_s=self._hung_after_s)
                process.kill()

    async def _stop(self) -> None:
        running = [child.process for child in self._children if child.process is not None]
        for process in running:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        if not running:
            return
        ends = {asyncio.create_task(process.wait()) for process in running}
        _done, late = await asyncio.wait(ends, timeout=self._stop_s)
        if late:
            log.error("processes_killed", count=len(late), after_s=self._stop_s)
            self._kill()
            await asyncio.wait(late)

    def _kill(self) -> None:
        for child in self._children:
            if child.process is not None:
                with suppress(ProcessLookupError):
                    child.process.kill()


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True


class _WrongConfiguration(Fatal):
    exit_code = _CONFIGURATION
