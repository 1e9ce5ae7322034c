"""`make status` says what is, also where nobody is left to write it down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.embedded import commands, lock
from deploy.embedded.status import PartStatus, Phase, StackStatus, State


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
    told = StackStatus(dead_pid() if killed else os.getpid(), Phase.READY, parts=parts)
    told.write(tmp_path / "status.json")
    descriptor = lock.acquire(tmp_path / "lock")  # what a part that has not ended yet still holds
    assert descriptor is not None
    try:
        code = commands.status(environment)
    finally:
        os.close(descriptor)
    said = capsys.readouterr().out
    assert (code, "was killed" in said, "ready" in said) == ((1, True, False) if killed else (0, False, True))
