"""Keeps one part running: prepares, launches, watches, and starts it again when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Awaitable, Callable
from typing import Protocol

from deploy.embedded.process import Child, EmbeddedError
from deploy.embedded.server import Server
from deploy.embedded.status import PartStatus, State

POLL_S = 0.1
HEALTH_EVERY_S = 1.0
#: A part that was ready this long starts its backoff anew.
STEADY_S = 30.0
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.2, 10.0
#: While the stack comes up, a part may end this often before the whole start is given up.
STARTS_BEFORE_GIVING_UP = 3
START_DEADLINE_S = 120.0
#: A part that was ready and leaves so many checks in a row without any answer, a second each, stands still.
#: They are counted, not seconds: a machine that slept checked nothing.
HUNG_CHECKS = 60


def backoff(failures: int) -> float:
    """Seconds to wait after the `failures`-th end in a row (from 1)."""
    return float(min(FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 16), MAX_BACKOFF_S))


class Surroundings(Protocol):
    """What a keeper needs from its supervisor."""

    def changed(self) -> None:
        """The part's status is different now."""

    def launched(self, server: Server) -> None:
        """A process group exists from now on."""

    def ended(self, pid: int) -> None:
        """It is gone and reaped."""

    def is_held(self, name: str) -> bool:
        """Whether somebody wants the part to stay down."""

    def note(self, message: str) -> None:
        """One line for the supervisor's log."""


class Keeper:
    """Owns one server. `came_up` is set at its first readiness and stays set.

    Another server may take over from it: `begin_beside` starts it, `take_over` makes it the one that is kept.
    """

    def __init__(
        self,
        server: Server,
        around: Surroundings,
        *,
        on_up: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`on_up` runs after every start, before the part counts as ready; EmbeddedError means "again"."""
        self.server = server
        self.status = PartStatus(server.name, ports=server.ports)
        self.came_up = asyncio.Event()
        self._around = around
        self._on_up = on_up
        self._failures = 0
        self._silences = 0
        self._next: Server | None = None

    async def run(self) -> None:
        """Until cancelled. Raises EmbeddedError where it never came up. Does not stop the server itself."""
        while True:
            began = time.monotonic()
            try:
                reason = await self._live_once()
            except (EmbeddedError, OSError, subprocess.SubprocessError) as error:
                # A disk that is full, a source that is being replaced: what else runs must go on.
                if not self.came_up.is_set():
                    raise
                reason = str(error)
            if self.came_up.is_set() and time.monotonic() - began > STEADY_S:
                self._failures = 0
            self._failures += 1
            if not self.came_up.is_set() and self._failures >= STARTS_BEFORE_GIVING_UP:
                raise EmbeddedError(f"{self.server.name} {reason}; see {self.server.log}.")
            pause = backoff(self._failures)
            self._around.note(f"{self.server.name} {reason}; starting it again in {pause:.1f} s")
            self.status.restarts += 1
            self._tell(State.RESTARTING, reason)
            await asyncio.sleep(pause)
            await self._while_held()

    async def _live_once(self) -> str:
        """One life of the process; returns why it ended."""
        if not self.server.alive:  # or it took over while the one before it was to be started again
            self._tell(State.PREPARING)
            await asyncio.to_thread(self.server.prepare)
            child = self.server.launch()  # in the main thread: see die_with_parent
            self._around.launched(self.server)
            self.status.started_at = child.started_at
            self._tell(State.STARTING)
        try:
            await self._watch()
        finally:
            # Also after a failed on_up: a half-started part is not left beside its successor.
            child = self._child()
            if not child.alive:
                child.kill()  # what it started and left behind
                self._around.ended(child.pid)
        code = child.exit_code or 0
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        last = child.last_words(lines=1) if code > 0 else ""
        return f"{ended} ({last[:300]})" if last else ended

    def _child(self) -> Child:
        """The process that is kept now: another one may have taken over."""
        if self.server.child is None:
            raise EmbeddedError(f"{self.server.name} was not started")
        return self.server.child

    async def begin_beside(self, server: Server) -> None:
        """Start `server` beside the one that runs, and return when it is ready. Raises EmbeddedError where it
        does not come up; then it is ended, and nothing is different."""
        await asyncio.to_thread(server.prepare)
        server.launch(beside=True)
        self._next = server
        self._around.launched(server)
        try:
            await _ready(server)
        except BaseException:
            await self.give_up(0.0)
            raise

    def check_begun(self) -> None:
        """Raises EmbeddedError where the server that was begun has ended since it was ready: nobody starts it
        again before it took over."""
        if self._next is not None and not self._next.alive:
            raise EmbeddedError(f"{self.server.name} ended beside the one that runs; see {self._next.log}")

    async def take_over(self, grace: float) -> None:
        """Keep the server that was begun, and end the one before it, cleanly if it can within `grace`
        seconds."""
        server = self._next
        if server is None:
            raise EmbeddedError(f"nothing was begun beside {self.server.name}")
        old, self.server, self._next = self.server, server, None
        self.status.started_at = server.child.started_at if server.child is not None else None
        self._tell(State.READY)
        await _end(old, self._around, grace)

    async def give_up(self, grace: float) -> None:
        """End the server that was begun; nothing where none was."""
        server, self._next = self._next, None
        if server is not None:
            await _end(server, self._around, grace)

    async def _watch(self) -> None:
        began = time.monotonic()
        next_check = 0.0
        while self.server.alive:
            now = time.monotonic()
            if now >= next_check:
                await self._check(now - began)
                settled = self.status.state is State.READY
                next_check = now + (HEALTH_EVERY_S if settled else POLL_S)
            await asyncio.sleep(POLL_S)

    async def _check(self, age: float) -> None:
        ready = await asyncio.to_thread(self.server.ready)
        self._silences = self._silences + 1 if self.server.silent else 0
        if ready and self.status.state is State.STARTING and self._on_up is not None:
            try:
                await self._on_up()
            except EmbeddedError as error:
                ready, self.server.detail = False, str(error)
        if ready:
            self.came_up.set()
            self._tell(State.READY)
        elif self.status.state in {State.READY, State.UNREADY}:
            self._tell(State.UNREADY, self.server.detail)
            self._end_if_hung()
        else:
            self._tell(State.STARTING, self.server.detail)
            if age > START_DEADLINE_S and not self.came_up.is_set():
                why = self.server.detail or "it gave no reason"
                name, deadline = self.server.name, f"{START_DEADLINE_S:.0f} s"
                raise EmbeddedError(f"{name} was not ready within {deadline}: {why}; see {self.server.log}.")

    def _end_if_hung(self) -> None:
        """End a part that stands still; it is started again as one that died. What it was about it writes to
        its log first."""
        if self._silences == HUNG_CHECKS - 1:
            self._child().show_stacks()
        elif self._silences >= HUNG_CHECKS:
            self._around.note(f"{self.server.name} has left {self._silences} checks without an answer")
            self._child().kill()

    async def _while_held(self) -> None:
        while self._around.is_held(self.server.name):
            self._tell(State.HELD)
            await asyncio.sleep(POLL_S)

    async def stop(self, grace: float) -> None:
        """End the process, cleanly if it can within `grace` seconds. Call after `run` has been cancelled."""
        self._tell(State.STOPPING)
        await self.give_up(0.0)
        await _end(self.server, self._around, grace)
        self._tell(State.STOPPED)

    def _tell(self, state: State, detail: str = "") -> None:
        before = (self.status.state, self.status.pid, self.status.detail)
        self.status.state, self.status.pid, self.status.detail = state, self.server.pid, detail
        if before != (state, self.status.pid, detail):
            with contextlib.suppress(OSError):  # a full disk must not end the supervisor
                self._around.changed()


async def _end(server: Server, around: Surroundings, grace: float) -> None:
    pid = server.pid
    await asyncio.to_thread(server.stop, grace)
    if pid is not None:
        around.ended(pid)


async def _ready(server: Server) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    while not await asyncio.to_thread(server.ready):
        if not server.alive or time.monotonic() > deadline:
            raise EmbeddedError(f"{server.name} did not come up beside the one that runs; see {server.log}")
        await asyncio.sleep(POLL_S)
