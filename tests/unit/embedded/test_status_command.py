"""`make status` says what is, also where nobody is left to write it down."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deploy.embedded import commands, lock
from deploy.embedded.status import PartStatus, Phase, StackStatus, State


@contextmanager
def told(folder: Path, status: StackStatus) -> Iterator[None]:
    """The supervisor of the stack in `folder` has said `status`, and its lock is held."""
    status.write(folder / "status.json")
    descriptor = lock.acquire(folder / "lock")  # what a part that has not ended yet still holds
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize("killed", [False, True])
def test_a_supervisor_that_was_killed_is_not_told_as_ready(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], killed: bool
) -> None:
    environment = {**os.environ, "HEADRACE_HOME": str(tmp_path)}
    parts = [PartStatus("gateway", State.READY)]
    with told(tmp_path, StackStatus(dead_pid() if killed else os.getpid(), Phase.READY, parts=parts)):
        code = commands.status(environment)
    said = capsys.readouterr().out
    assert (code, "was killed" in said, "ready" in said) == ((1, True, False) if killed else (0, False, True))


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        ({"HEADRACE_ROUTER": "apart"}, None),
        ({"HEADRACE_ROUTER": "inside", "HEADRACE_FRONTS": "2"}, "as 2 processes .*; small models run there"),
        (
            {"HEADRACE_ROUTER": "inside", "HEADRACE_FRONTS": "1", "HEADRACE_GUESTS": "off"},
            "as one process .*; models run in workers only",
        ),
    ],
)
def test_parts_that_share_processes_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], chosen: dict[str, str], said: str | None
) -> None:
    environment = {**os.environ, "HEADRACE_HOME": str(tmp_path), **chosen}
    with told(tmp_path, StackStatus(os.getpid(), Phase.READY, parts=[PartStatus("gateway", State.READY)])):
        assert commands.status(environment) == 0
    found = re.search("Gateway and router run together, (.*)", capsys.readouterr().out)
    assert (found is None) if said is None else (found is not None and re.match(said, found[1]))


@pytest.mark.parametrize(("router", "shown"), [("inside", "gateway"), ("apart", "router")])
def test_the_log_of_a_router_is_found_where_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], router: str, shown: str
) -> None:
    environment = {**os.environ, "HEADRACE_HOME": str(tmp_path), "HEADRACE_ROUTER": router}
    (tmp_path / "logs").mkdir()
    for part in ("gateway", "router"):
        (tmp_path / "logs" / f"{part}.log").write_text(f"a line of {part}\n")
    assert commands.logs(environment, "router", follow=False) == 0
    assert f"a line of {shown}" in capsys.readouterr().out
