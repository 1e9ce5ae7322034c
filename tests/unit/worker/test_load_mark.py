"""What is on disk while a version is loaded, and what the next process makes of it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from services.worker.backends.port import LeftToOthers
from services.worker.load_mark import LoadMark

ONE, OTHER = "sha256:1", "sha256:2"


def test_what_a_process_ended_with_is_left_to_others_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "loading"
    path.write_text(ONE)
    mark = LoadMark(path)
    with pytest.raises(LeftToOthers, match="a process ended while it was loaded"):
        mark.check(ONE)
    mark.check(OTHER)
    # Loading others changes nothing about it.
    with mark.on(OTHER):
        pass
    with pytest.raises(LeftToOthers):
        mark.check(ONE)


def test_the_process_after_the_next_may_try_again(tmp_path: Path) -> None:
    path = tmp_path / "loading"
    path.write_text(ONE)
    LoadMark(path)
    LoadMark(path).check(ONE)  # the one before did not end because of it


def test_it_stands_while_the_block_runs(tmp_path: Path) -> None:
    path = tmp_path / "loading"
    mark = LoadMark(path)
    mark.check(ONE)
    with mark.on(ONE):
        assert path.read_text() == ONE
        mark.check(ONE)  # by this process
    assert not path.exists()

    def fail() -> None:
        with mark.on(ONE):
            assert path.exists()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not path.exists()


async def test_a_cancelled_load_is_no_reason_to_leave_it(tmp_path: Path) -> None:
    path = tmp_path / "loading"
    mark, entered = LoadMark(path), asyncio.Event()

    async def load() -> None:
        with mark.on(ONE):
            entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(load())
    await entered.wait()
    assert path.read_text() == ONE
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    LoadMark(path).check(ONE)


def test_where_nothing_can_be_written_loading_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    for path in (tmp_path / "absent" / "loading", tmp_path / "file" / "loading", tmp_path):
        mark, ran = LoadMark(path), False
        with mark.on(ONE):
            ran = True
        assert ran
        mark.check(ONE)
