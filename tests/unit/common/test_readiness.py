"""Health follows what a service's parts say, for as long as it runs."""

from __future__ import annotations

import pytest

from services.common.errors import Unavailable
from services.common.lifecycle import Health, watch, watched
from tests.fixtures.waiting import eventually


async def test_a_check_that_breaks_says_not_ready_and_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_EVERY_S", 0.001)
    health = Health()
    errors: list[Exception] = []

    async def check() -> None:
        for error in errors:
            raise error

    async with watched(health, {"database": check}):
        assert health.ready
        for error in (Unavailable("away"), RuntimeError("a driver's own")):
            errors.append(error)
            await eventually(lambda: not health.ready)
            errors.clear()
            await eventually(lambda: health.ready)
