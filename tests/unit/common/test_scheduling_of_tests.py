"""A process of a test run that dies costs one test: that one has failed, all others are run, each once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.fixtures.waiting import PATIENCE_S

REPOSITORY = Path(__file__).resolve().parents[3]

CONFTEST = """
import os
import time
from pathlib import Path

import pytest

from tests.fixtures.scheduling import LongestFirst

HERE = Path(__file__).parent
PROCESS = os.environ.get("PYTEST_XDIST_WORKER")


def waits_for(process):
    while not (HERE / process).exists():
        time.sleep(0.005)


def pytest_xdist_make_scheduler(config, log):
    config.option.loadscopereorder = False
    return LongestFirst(config, log)


def pytest_collection():
    if PROCESS:
        (HERE / PROCESS).touch()
    if PROCESS == os.environ.get("WAITS", "none"):
        waits_for("gw3")


def pytest_collection_modifyitems(items):
    if PROCESS == os.environ.get("OVERLOOKS", "none"):
        items.pop()


@pytest.fixture(autouse=True)
def behave(request):
    name = request.node.name
    with (HERE / "ran").open("a") as ran:
        ran.write(name + "\\n")
    if "beside" in name:
        waits_for("gw2")
    if "dies" in name:
        os._exit(1)
"""


def run(project: Path, processes: int, *files: Sequence[str], **environment: str) -> tuple[int, str]:
    """Run test modules of these tests, which do what their names say: the exit code, and what was said."""
    (project / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib -q\n")
    (project / "conftest.py").write_text(CONFTEST)
    for number, names in enumerate(files):
        body = "".join(f"def test_{name}():\n    pass\n\n\n" for name in names)
        (project / f"test_{number}.py").write_text(body)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # importing them takes longer than the tests
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "pytest_rerunfailures", "-n", str(processes)],
        cwd=project,
        env=env | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    return done.returncode, done.stdout + done.stderr


def failed(said: str) -> list[str]:
    """Names of the tests that failed."""
    lines = [line.split() for line in said.splitlines()]
    return sorted(words[1].partition("::test_")[2] for words in lines if words[:1] == ["FAILED"])


def ran(project: Path) -> list[str]:
    return sorted(name.removeprefix("test_") for name in (project / "ran").read_text().split())


def test_a_test_that_ends_its_process_fails_and_the_others_are_run(tmp_path: Path) -> None:
    files = (
        ["passes_alone"],
        ["passes_before", "dies_between", "passes_behind"],
        ["passes_single"],
        ["dies_alone"],
        ["passes_late", "passes_last"],
    )
    code, said = run(tmp_path, 1, *files)
    assert failed(said) == ["dies_alone", "dies_between"], said
    assert ran(tmp_path) == sorted(name for names in files for name in names)
    assert "2 failed, 6 passed" in said
    assert code == 1


def test_a_process_may_die_while_another_is_replaced(tmp_path: Path) -> None:
    files = (["dies_first"], ["dies_beside"], ["passes_a"], ["passes_b"], ["passes_c"], ["passes_d"])
    code, said = run(tmp_path, 2, *files, WAITS="gw2")
    assert failed(said) == ["dies_beside", "dies_first"], said
    assert ran(tmp_path) == sorted(name for names in files for name in names)
    assert "2 failed, 4 passed" in said
    assert code == 1


def test_a_process_that_finds_other_tests_ends_the_run(tmp_path: Path) -> None:
    code, said = run(tmp_path, 1, ["dies"], ["passes_b"], ["passes_c"], OVERLOOKS="gw1")
    assert "found other tests" in said
    assert code == 3
