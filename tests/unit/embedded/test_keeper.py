"""The keeper over small processes of its own."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deploy.embedded import keeper as keeper_module
from deploy.embedded.keeper import FIRST_BACKOFF_S, MAX_BACKOFF_S, Keeper, backoff
from deploy.embedded.process import Command, EmbeddedError
from deploy.embedded.server import Server
from deploy.embedded.status import State
from tests.fixtures.waiting import PATIENCE_S, eventually

SLEEPS = "import time; time.sleep(600)"


class Small(Server):
    """A process that is ready as long as `answers` says so."""

    name = "small"

    def __init__(self, directory: Path, program: str = SLEEPS) -> None:
        super().__init__(directory)
        self.program = program
        self.answers = True
        self.prepared = 0

    @property
    def url(self) -> str:
        return ""

    def prepare(self) -> None:
        self.prepared += 1

    def command(self) -> Command:
        return Command([sys.executable, "-c", self.program])

    def ready(self) -> bool:
        return self.answers


class Around:
    """Keeps what a keeper tells."""

    def __init__(self) -> None:
        self.held = False
        self.notes: list[str] = []
        self.groups: list[int] = []

    def changed(self) -> None: ...

    def launched(self, server: Server) -> None:
        assert server.child is not None  # `server.pid` would be None where it has ended already
        self.groups.append(server.child.pid)

    def ended(self, pid: int) -> None:
        self.groups.remove(pid)

    def is_held(self, name: str) -> bool:
        return self.held

    def note(self, message: str) -> None:
        self.notes.append(message)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper_module, "POLL_S", 0.005)
    monkeypatch.setattr(keeper_module, "HEALTH_EVERY_S", 0.005)
    monkeypatch.setattr(keeper_module, "FIRST_BACKOFF_S", 0.01)


@asynccontextmanager
async def keeping(
    server: Server, around: Around, on_up: Callable[[], Awaitable[None]] | None = None
) -> AsyncIterator[Keeper]:
    keeper = Keeper(server, around, on_up=on_up)
    task = asyncio.create_task(keeper.run())
    try:
        async with asyncio.timeout(PATIENCE_S):
            yield keeper
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await keeper.stop(2.0)


def test_backoff_doubles_up_to_its_bound() -> None:
    assert [backoff(n) for n in (1, 2, 3)] == [keeper_module.FIRST_BACKOFF_S * factor for factor in (1, 2, 4)]
    assert backoff(1000) == MAX_BACKOFF_S
    assert FIRST_BACKOFF_S < MAX_BACKOFF_S


class Stiff(Small):
    """Takes questions and answers none, as long as `stiff` says so."""

    stiff = False

    def ready(self) -> bool:
        self.silent = self.stiff
        return self.answers and not self.stiff


SHOWS = """
import faulthandler, signal, sys, time
faulthandler.register(signal.SIGUSR1, file=sys.stderr)
print("begun", flush=True)
time.sleep(600)
"""


async def test_what_stands_still_shows_where_and_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "HUNG_CHECKS", 20)
    server, around = Stiff(tmp_path, SHOWS), Around()
    async with keeping(server, around) as keeper:
        await keeper.came_up.wait()
        await eventually(lambda: "begun" in server.log.read_text())
        first = server.pid
        server.stiff = True
        await eventually(lambda: bool(around.notes))
        assert around.notes[0] == "small has left 20 checks without an answer"
        server.stiff = False
        await eventually(lambda: keeper.status.state is State.READY and server.pid not in {None, first})
        assert around.notes[1:] == ["small was ended by signal 9; starting it again in 0.0 s"]
        assert "most recent call first" in server.log.read_text()


async def test_what_is_silent_now_and_then_or_says_no_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper_module, "HUNG_CHECKS", 3)
    asked = 0

    class Now(Small):
        def ready(self) -> bool:
            nonlocal asked
            if "begun" not in self.log.read_text():  # it would end when it is to show where it is
                return False
            asked += 1
            self.silent = asked % 3 != 0
            return asked < 3

    server, around = Now(tmp_path, SHOWS), Around()
    async with keeping(server, around) as keeper:
        await keeper.came_up.wait()
        first = server.pid
        await eventually(lambda: asked > 40)
        assert keeper.status.state is State.UNREADY
        assert server.pid == first
        assert not around.notes


async def test_what_dies_is_started_again_and_stopped_at_the_end(tmp_path: Path) -> None:
    server, around = Small(tmp_path), Around()
    async with keeping(server, around) as keeper:
        await keeper.came_up.wait()
        first = server.pid
        server.kill()
        await eventually(lambda: keeper.status.state is State.READY and server.pid not in {None, first})
        assert keeper.status.restarts == 1
        assert around.notes == ["small was ended by signal 9; starting it again in 0.0 s"]
        assert around.groups == [server.pid]
    assert not server.alive
    assert around.groups == []
    assert keeper.status.state is State.STOPPED


async def test_what_is_held_stays_down(tmp_path: Path) -> None:
    server, around = Small(tmp_path), Around()
    async with keeping(server, around) as keeper:
        await keeper.came_up.wait()
        around.held = True
        server.kill()
        await eventually(lambda: keeper.status.state is State.HELD)
        launches = server.prepared
        await asyncio.sleep(0.05)
        assert server.prepared == launches
        around.held = False
        await eventually(lambda: keeper.status.state is State.READY)


async def test_not_answering_is_told_and_does_not_restart(tmp_path: Path) -> None:
    server, around = Small(tmp_path), Around()
    async with keeping(server, around) as keeper:
        await keeper.came_up.wait()
        pid = server.pid
        server.answers, server.detail = False, "bus: away"
        await eventually(lambda: keeper.status.state is State.UNREADY)
        assert keeper.status.detail == "bus: away"
        server.answers = True
        await eventually(lambda: keeper.status.state is State.READY)
        assert server.pid == pid


class Hindered(Small):
    """Cannot be started for the second time."""

    def __init__(self, directory: Path, hindrance: Exception) -> None:
        super().__init__(directory)
        self.hindrance = hindrance

    def prepare(self) -> None:
        super().prepare()
        if self.prepared == 2:
            raise self.hindrance


@pytest.mark.parametrize(
    "hindrance",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), subprocess.TimeoutExpired(["java", "-version"], 30)],
)
async def test_what_cannot_be_started_again_for_now_is_tried_again(
    tmp_path: Path, hindrance: Exception
) -> None:
    """Its keeper's end would be the end of the whole stack."""
    server, around = Hindered(tmp_path, hindrance), Around()
    async with keeping(server, around) as keeper:
        await keeper.came_up.wait()
        first = server.pid
        server.kill()
        await eventually(lambda: keeper.status.state is State.READY and server.pid not in {None, first})
        assert server.prepared == 3
        assert around.notes[1].startswith(f"small {hindrance}; starting it again in")


async def test_what_never_comes_up_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    server, around = Small(tmp_path, "import sys; sys.exit('no reason to live')"), Around()
    server.answers = False
    with pytest.raises(EmbeddedError, match=r"small ended with code 1 \(no reason to live\)"):
        async with asyncio.timeout(PATIENCE_S):
            await Keeper(server, around).run()
    assert server.prepared == keeper_module.STARTS_BEFORE_GIVING_UP
    assert around.groups == []


async def test_readiness_waits_for_on_up_at_every_start(tmp_path: Path) -> None:
    server, around = Small(tmp_path), Around()
    calls: list[str] = []

    async def on_up() -> None:
        calls.append("")
        if len(calls) == 1:
            raise EmbeddedError("not yet")

    async with keeping(server, around, on_up) as keeper:
        await keeper.came_up.wait()
        assert len(calls) == 2
        server.kill()
        await eventually(lambda: len(calls) == 3 and keeper.status.state is State.READY)


async def test_what_a_dead_part_left_behind_is_ended_too(tmp_path: Path) -> None:
    leaves = "import os, sys, time\nif os.fork() == 0: time.sleep(600)\ntime.sleep(600)"
    server, around = Small(tmp_path, leaves), Around()
    async with keeping(server, around) as keeper:
        await keeper.came_up.wait()
        group = server.pid
        assert group is not None
        members = Path("/proc") / str(group) / "task" / str(group) / "children"
        await eventually(lambda: bool(members.read_text().split()))
        left = Path("/proc") / members.read_text().split()[0]
        assert server.child is not None
        server.child._process.kill()
        await eventually(lambda: not left.exists() or ") Z " in (left / "stat").read_text())


async def test_another_takes_over_and_is_what_is_kept_from_then_on(tmp_path: Path) -> None:
    old, new, around = Small(tmp_path / "old"), Small(tmp_path / "new"), Around()
    async with keeping(old, around) as keeper:
        await keeper.came_up.wait()
        await keeper.begin_beside(new)
        assert old.alive
        assert around.groups == [old.pid, new.pid]
        await keeper.take_over(2.0)
        assert not old.alive
        assert around.groups == [new.pid]
        assert keeper.status.pid == new.pid
        first = new.pid
        new.kill()
        await eventually(lambda: keeper.status.state is State.READY and new.pid not in {None, first})
        assert old.prepared == 1
    assert around.groups == []


async def test_one_that_does_not_come_up_changes_nothing(tmp_path: Path) -> None:
    old, new, around = Small(tmp_path / "old"), Small(tmp_path / "new", "raise SystemExit(3)"), Around()
    new.answers = False
    async with keeping(old, around) as keeper:
        await keeper.came_up.wait()
        first = old.pid
        with pytest.raises(EmbeddedError, match="did not come up beside the one that runs"):
            await keeper.begin_beside(new)
        assert keeper.server is old
        assert old.pid == first
        assert not new.alive


async def test_what_died_while_another_came_up_is_not_started_again_once_that_took_over(
    tmp_path: Path,
) -> None:
    old, new, around = Small(tmp_path / "old"), Small(tmp_path / "new"), Around()
    async with keeping(old, around) as keeper:
        await keeper.came_up.wait()
        await keeper.begin_beside(new)
        around.held = True  # so that nothing starts it again meanwhile
        old.kill()
        await eventually(lambda: keeper.status.state is State.HELD)
        await keeper.take_over(2.0)
        around.held = False
        first = new.pid
        await eventually(lambda: keeper.status.state is State.READY and keeper.status.pid == first)
        await asyncio.sleep(0.02)
        assert new.pid == first
        assert old.prepared == 1
