"""What processes that are not there any more left in their prediction logs is published by a router."""

from __future__ import annotations

from pathlib import Path

import pytest
from headrace.v1.events_pb2 import PredictionBatch

from services.common.bus import MemoryBus
from services.common.clock import SystemClock
from services.common.eventlog import EventLog, publish_left
from services.common.topics import PREDICTIONS
from tests.fixtures.router_platform import platform
from tests.fixtures.waiting import eventually


async def test_a_router_publishes_the_logs_that_it_has_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish_left, "__kwdefaults__", {"join": None, "every_s": 0.01})
    folders = ["router-router-1", "worker-worker-1"]
    away, clock = MemoryBus(), SystemClock()
    away.away = True
    for folder in folders:
        old = EventLog(tmp_path / folder / "spool", away, PREDICTIONS.name, clock=clock)
        await old.start()
        old.append(b"cancer/1", PredictionBatch(source=folder).SerializeToString())
        await old.close(clock.monotonic())
    async with platform(tmp_path, adopted_logs=",".join(folders)) as p:
        published: list[str] = []

        async def all_there() -> bool:
            published.extend(record.source for record in await p.records())
            return len(published) >= len(folders)

        await eventually(all_there, on=published)
        assert sorted(published) == folders
