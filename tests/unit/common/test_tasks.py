"""Tasks that live as long as a block does."""

from __future__ import annotations

import asyncio

import pytest

from services.common.errors import Unavailable
from services.common.tasks import ended, running, stopped


async def _for_ever() -> None:
    await asyncio.Event().wait()


async def test_what_runs_beside_a_block_ends_with_it() -> None:
    async with running(_for_ever(), "beside") as task:
        await asyncio.sleep(0)
        assert not task.done()
        assert task.get_name() == "beside"
    assert task.cancelled()


async def test_a_failure_is_raised_when_the_block_is_left() -> None:
    async def fail() -> None:
        raise Unavailable("away")

    with pytest.raises(Unavailable, match="away"):
        async with running(fail(), "fails"):
            await asyncio.sleep(0)


async def test_a_cancellation_of_who_waits_is_not_lost() -> None:
    go, heard = asyncio.Event(), asyncio.Event()

    async def slow_to_end() -> None:
        try:
            await _for_ever()
        finally:
            heard.set()
            await go.wait()

    task = asyncio.create_task(slow_to_end())
    await asyncio.sleep(0)
    waiting = asyncio.create_task(ended(task))
    await heard.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    go.set()
    await asyncio.wait({task})
    assert task.cancelled()


async def test_a_task_that_loses_cancellations_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.common.tasks._AGAIN_S", 0.01)
    lost = 0

    async def deaf() -> None:
        nonlocal lost
        while True:
            try:
                await _for_ever()
            except asyncio.CancelledError:
                lost += 1
                if lost > 2:
                    raise

    async def fails() -> None:
        raise Unavailable("away")

    tasks = [asyncio.create_task(work()) for work in (deaf, fails, _for_ever)]
    await asyncio.sleep(0)
    await stopped(*tasks)
    assert lost == 3
    assert [task.done() for task in tasks] == [True] * 3
    assert isinstance(tasks[1].exception(), Unavailable)
