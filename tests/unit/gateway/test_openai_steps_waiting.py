"""What OpenAI batches do while what they need is away: wait, and say so once."""

from __future__ import annotations

import asyncio
from typing import NoReturn, cast

import pytest
from structlog.testing import capture_logs

from services.common.clock import SystemClock
from services.common.errors import Unavailable
from services.gateway.catalogue import Catalogue
from services.gateway.jobs import openai_steps
from services.gateway.jobs.openai_files import Files
from services.gateway.jobs.openai_steps import OpenAISteps
from services.gateway.jobs.service import JobService
from services.gateway.keys import KeyRing
from tests.fixtures.waiting import eventually


class Away:
    """A database that is not there, and is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.reason = "The database is away."

    def __call__(self) -> NoReturn:
        self.asked += 1
        raise Unavailable(self.reason)


def steps(backend: Away) -> OpenAISteps:
    nobody = cast("Files", None), cast("JobService", None)
    clock = SystemClock()
    return OpenAISteps(
        backend=backend,
        files=nobody[0],
        jobs=nobody[1],
        catalogue=Catalogue(),
        keys=KeyRing(clock),
        clock=clock,
    )


async def test_why_nothing_can_be_done_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_steps, "_IDLE_S", 0.001)
    monkeypatch.setattr(openai_steps, "_AWAY_S", 0.004)
    away = Away()
    waiting = steps(away)
    with capture_logs() as logs:
        loops = [asyncio.create_task(waiting.running()) for _ in range(2)]
        await eventually(lambda: away.asked > 10)
        away.reason = "It is still away."
        seen = away.asked
        await eventually(lambda: away.asked > seen + 10)

        async def nothing_due() -> bool:
            return False

        monkeypatch.setattr(waiting, "step", nothing_due)
        await eventually(lambda: logs[-1]["event"] == "openai_batches_go_on")
        for loop in loops:
            loop.cancel()
        await asyncio.wait(loops)
    assert [(line["event"], line.get("reason")) for line in logs] == [
        ("openai_batches_wait", "The database is away."),
        ("openai_batches_wait", "It is still away."),
        ("openai_batches_go_on", None),
    ]


async def test_it_is_asked_less_and_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float | None] = []
    timeout = asyncio.timeout

    def noting(delay: float | None) -> asyncio.Timeout:
        slept.append(delay)
        return timeout(0.0)

    monkeypatch.setattr("services.gateway.jobs.openai_steps.asyncio.timeout", noting)
    task = asyncio.create_task(steps(Away()).running())
    for _ in range(200):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task})
    assert slept[:6] == [4.0, 8.0, 16.0, 30.0, 30.0, 30.0]
