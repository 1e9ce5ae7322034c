"""A test of servers that fails once is run again and named; one of a unit is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

CONFTEST = """
from tests.fixtures import reruns


def pytest_collection_modifyitems(config, items):
    reruns.allow(config, items)


def pytest_terminal_summary(terminalreporter):
    reruns.summary(terminalreporter)
"""
FAILS_ONCE = """
import pytest

runs = []


@pytest.mark.parametrize("number", range({count}))
def test_of_{kind}(number):
    runs.append(number)
    assert runs.count(number) > 1, f"number {{number}} fails once"
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -q\n")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    for kind, count in (("integration", 5), ("unit", 1)):
        folder = tmp_path / "tests" / kind
        folder.mkdir(parents=True)
        (folder / f"test_{kind}.py").write_text(FAILS_ONCE.format(count=count, kind=kind))
    return tmp_path


def run(project: Path, *options: str, **environment: str) -> list[str]:
    """What a run of `project` says, as lines."""
    env = os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment
    for inherited in [name for name in env if name.startswith(("PYTEST_", "HEADRACE_RERUNS"))]:
        if inherited not in environment:
            del env[inherited]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=project,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout.splitlines()


def named(lines: list[str], start: str) -> list[str]:
    return sorted(line.split()[len(start.split())] for line in lines if line.startswith(start))


def test_three_of_a_run_are_run_again_and_named_over_all_processes(project: Path) -> None:
    lines = run(project, "-n", "2")
    again = named(lines, "passed only when run again:")
    failed = named(lines, "FAILED")
    assert len(again) == 3
    assert len(failed) == 3
    assert not [line for line in lines if line.startswith("ERROR")]
    assert all(name.startswith("tests/integration/") for name in again)
    assert "tests/unit/test_unit.py::test_of_unit[0]" in failed
    assert not set(again) & set(failed)
    assert any("fails once" in line for line in lines if line.startswith("    E "))


def test_nothing_is_run_again_where_that_is_turned_off(project: Path) -> None:
    lines = run(project, "-p", "no:xdist", HEADRACE_RERUNS="0")
    assert named(lines, "passed only when run again:") == []
    assert len(named(lines, "FAILED")) == 6
