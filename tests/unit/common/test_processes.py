"""Several processes of one service: how they belong together. That they are replaced and end is in
tests/contract/test_gateway_processes.py and tests/integration/test_hung_processes.py."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.common.lifecycle import ProcessGroup
from tests.fixtures.frames import LOOPS, run_on
from tests.fixtures.waiting import PATIENCE_S, eventually

#: Writes what it was given and who it is, then waits for the end of its parent or of itself.
CHILD = """
import os, sys
with open(os.environ["SAYS"] + ".part", "w") as file:
    file.write(f"{os.getpid()} {os.getppid()} {os.getsid(0)} {os.getpgid(0)} {os.environ['COLOUR']}")
os.rename(os.environ["SAYS"] + ".part", os.environ["SAYS"])
sys.stdin.read()
"""


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("loop", LOOPS)
def test_they_share_the_parents_session_and_its_group_unless_a_terminal_would_signal_that(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    loop: Callable[[], asyncio.AbstractEventLoop],
    terminal: bool,
) -> None:
    """A terminal's signals go to a group; the processor is shared between sessions first; and who ends a
    group ends all of it."""
    monkeypatch.setattr("services.common.lifecycle.processes._has_terminal", lambda: terminal)

    async def play() -> None:
        said = [tmp_path / name for name in ("one", "two")]
        group = ProcessGroup(
            [sys.executable, "-c", CHILD],
            [{"SAYS": str(path), "COLOUR": path.name * 2} for path in said],
            stop_s=PATIENCE_S,
        )
        async with group.running():
            await eventually(lambda: all(path.exists() for path in said))
            told = [path.read_text().split() for path in said]
            pids = dict(group.pids)
            assert [int(words[0]) for words in told] == [pids[0], pids[1]]
            assert [words[4] for words in told] == ["oneone", "twotwo"]
            for words in told:
                pid, parent, session, own = (int(word) for word in words[:4])
                assert parent == os.getpid()
                assert session == os.getsid(0)
                assert own == (pid if terminal else os.getpgid(0))
        assert group.pids == {}
        assert group.restarts == 0
        for pid in pids.values():
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)

    run_on(loop, play())


#: Marks each of its starts. Told to end, it does when the file RIVAL tells of two, or in a second.
SLOW = """
import os, pathlib, signal, sys, time
starts, rival = (pathlib.Path(os.environ[name]) for name in ("STARTS", "RIVAL"))
def drain(*_):
    until = time.monotonic() + 1
    while time.monotonic() < until and rival.read_text() != "..":
        time.sleep(0.01)
    sys.exit()
signal.signal(signal.SIGTERM, drain)
with starts.open("a") as file:
    file.write(".")
sys.stdin.read()
"""


async def test_what_ended_is_not_started_again_while_the_others_drain(tmp_path: Path) -> None:
    starts = [tmp_path / name for name in ("one", "two")]
    group = ProcessGroup(
        [sys.executable, "-c", SLOW],
        [{"STARTS": str(path), "RIVAL": str(starts[0])} for path in starts],
        stop_s=PATIENCE_S,
    )
    async with group.running():
        await eventually(lambda: all(path.exists() and path.read_text() for path in starts))
        os.kill(group.pids[0], signal.SIGKILL)
        await eventually(lambda: 0 not in group.pids)
    assert [path.read_text() for path in starts] == [".", "."]


@pytest.mark.parametrize("hung_after_s", [0.0, 30.0])
async def test_nobody_is_asked_where_nobody_would_be_killed(hung_after_s: float) -> None:
    group = ProcessGroup(
        [sys.executable, "-c", "import sys; sys.stdin.read()"],
        [{}],
        stop_s=PATIENCE_S,
        hung_after_s=hung_after_s,
    )
    async with group.running():
        await eventually(lambda: group.pids)
        assert ("watchdog" in {task.get_name() for task in asyncio.all_tasks()}) == (hung_after_s > 0)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_start_that_fails_is_tried_again_and_ends_no_other(
    monkeypatch: pytest.MonkeyPatch, loop: Callable[[], asyncio.AbstractEventLoop]
) -> None:
    """As where the machine has no memory or no process to give just then."""
    start, starts = asyncio.create_subprocess_exec, 0

    async def scarce(*argv: str, **options: Any) -> asyncio.subprocess.Process:
        nonlocal starts
        starts += 1
        if starts == 3:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return await start(*argv, **options)

    async def play() -> None:
        monkeypatch.setattr(asyncio, "create_subprocess_exec", scarce)
        group = ProcessGroup(
            [sys.executable, "-c", "import sys; sys.stdin.read()"], [{}, {}], stop_s=PATIENCE_S
        )
        async with group.running():
            await eventually(lambda: len(group.pids) == 2)
            other = group.pids[1]
            os.kill(group.pids[0], signal.SIGKILL)
            await eventually(lambda: starts == 4 and len(group.pids) == 2)
            assert group.pids[1] == other

    run_on(loop, play())
