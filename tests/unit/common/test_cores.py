"""Event loops on cores of their own, and threads of pools that may go anywhere."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.common.lifecycle import cores_for, roam, stay_on

pytestmark = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are Linux's to choose")


@pytest.mark.parametrize(
    ("allowed", "processes", "cores"),
    [({0, 1}, 2, [0, 1]), ({6, 3}, 2, [3, 6]), ({0, 1, 2}, 2, None), ({0, 1}, 3, None), ({0}, 1, None)],
)
def test_only_as_many_as_there_are_cores_have_one_each(
    monkeypatch: pytest.MonkeyPatch, allowed: set[int], processes: int, cores: list[int] | None
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _thread: allowed)
    assert cores_for(processes) == cores


def test_a_thread_stays_and_what_its_pools_run_does_not() -> None:
    before = os.sched_getaffinity(0)
    core = max(before)

    def loop() -> tuple[set[int], set[int], set[int]]:
        stay_on(core)
        with ThreadPoolExecutor(1) as kept, ThreadPoolExecutor(1, initializer=roam) as roaming:
            return (
                os.sched_getaffinity(0),
                kept.submit(os.sched_getaffinity, 0).result(),
                roaming.submit(os.sched_getaffinity, 0).result(),
            )

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(loop).result() == ({core}, {core}, before)
    assert os.sched_getaffinity(0) == before


def test_a_core_that_is_not_there_changes_nothing() -> None:
    before = os.sched_getaffinity(0)
    stay_on(4095)
    assert os.sched_getaffinity(0) == before
