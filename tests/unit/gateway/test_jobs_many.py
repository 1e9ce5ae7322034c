"""Thousands of jobs under way: what a look costs grows with what it finds, not with its square."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from services.common.clock import ManualClock
from services.gateway.jobs import losses as losses_module
from services.gateway.jobs.controller import Controller
from services.gateway.jobs.decisions import CLOCKS_APART, Flying
from services.gateway.jobs.losses import Losses
from services.gateway.jobs.metrics import JobMetrics
from tests.fixtures.counted import Counted

MANY = 200
NOTHING: Any = None


class Repository:
    """Of chunks that were published long ago, one for each job."""

    jobs: Mapping[str, Any] = {}
    published_at: datetime

    def __init__(self, _session: object) -> None:
        pass

    async def flying(self, _pool: str) -> list[tuple[str, int, int, datetime]]:
        return [(job_id, 0, 1, self.published_at) for job_id in self.jobs]


@asynccontextmanager
async def no_transaction(_engine: object) -> AsyncIterator[None]:
    yield None


async def test_what_a_broker_lost_is_sorted_by_job_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    jobs = {
        job_id: SimpleNamespace(job_id=job_id, flying_chunks=1)
        for job_id in map(Counted, map(str, range(MANY)))
    }
    monkeypatch.setattr(Repository, "jobs", jobs)
    monkeypatch.setattr(Repository, "published_at", clock.now() - CLOCKS_APART, raising=False)
    monkeypatch.setattr(losses_module, "JobRepository", Repository)
    monkeypatch.setattr(losses_module, "transaction", no_transaction)
    publisher: Any = SimpleNamespace(doubt=lambda _pool: None)
    backend: Any = SimpleNamespace(engine=None)
    metrics = JobMetrics(CollectorRegistry())
    losses = Losses(backend, publisher, NOTHING, clock, metrics, lambda _job: None)
    found: list[tuple[str, list[int]]] = []

    async def gone_before(_pool: str, _flying: int) -> datetime:
        return clock.now()

    async def again(job: Any, lost: list[Flying]) -> int:
        found.append((job.job_id, [chunk.index for chunk in lost]))
        return len(lost)

    monkeypatch.setattr(losses, "_gone_before", gone_before)
    monkeypatch.setattr(losses, "_again", again)
    monkeypatch.setattr(Counted, "compared", 0)
    assert await losses._look_at("pool", jobs) == MANY  # type: ignore[arg-type]  # stand for rows
    assert Counted.compared < 2 * MANY
    assert [indices for _, indices in found] == [[0]] * MANY
    assert len({str(job_id) for job_id, _ in found}) == MANY


class Job:
    """Counts how often its key was looked at."""

    looked_at = 0

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id

    @property
    def key_id(self) -> str:
        Job.looked_at += 1
        return "key"


def test_whether_a_key_may_have_one_more_input_cut_is_asked_of_those_that_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = ManualClock()
    metrics = JobMetrics(CollectorRegistry())
    controller = Controller("me", NOTHING, NOTHING, NOTHING, clock, metrics, lambda _job: None)
    jobs: Any = {str(number): Job(str(number)) for number in range(MANY)}
    monkeypatch.setattr(controller, "_jobs", jobs)
    monkeypatch.setattr(controller, "_cutting", {"0": None, "1": None, "gone": None})
    monkeypatch.setattr(Job, "looked_at", 0)
    controller._cut(jobs["7"])
    assert controller.cutting == 3
    assert Job.looked_at <= 4
