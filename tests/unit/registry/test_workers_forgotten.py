"""Records of workers that are gone for good leave the topic, and nobody else's."""

from __future__ import annotations

import pytest
from headrace.v1.control_pb2 import WorkerStatus

from services.common.bus import MemoryBus, Record
from services.common.clock import ManualClock
from services.common.topics import WORKERS
from services.registry import workers as workers_module
from services.registry.workers import FORGOTTEN_MINUTES, Workers, workers_followed
from tests.fixtures.followed import Followed
from tests.fixtures.waiting import eventually


class Heard:
    """Workers and their heartbeats, minute by minute."""

    def __init__(self) -> None:
        self.workers = Workers(ManualClock())
        self.workers.table = Followed()
        self._sequence = 0

    def say(self, worker_id: str) -> None:
        self._sequence += 1
        status = WorkerStatus(worker_id=worker_id, state=WorkerStatus.STATE_READY, sequence=self._sequence)
        self.workers.apply(worker_id.encode(), status.SerializeToString())

    def minutes(self, number: int, *speaking: str) -> list[str]:
        """Who is gone after so many minutes in which these have spoken."""
        gone: list[str] = []
        for _ in range(number):
            for worker_id in speaking:
                self.say(worker_id)
            gone = self.workers.gone()
        return gone


def test_who_was_silent_for_hours_while_others_spoke_is_gone() -> None:
    heard = Heard()
    heard.say("dead")
    assert heard.minutes(FORGOTTEN_MINUTES - 1, "alive") == []
    assert heard.minutes(1, "alive") == ["dead"]
    assert heard.minutes(1, "alive") == ["dead"]  # until the topic says so
    heard.workers.apply(b"dead", None)
    assert heard.minutes(FORGOTTEN_MINUTES, "alive") == []


def test_a_worker_that_speaks_again_is_not_gone() -> None:
    heard = Heard()
    heard.say("slow")
    heard.minutes(FORGOTTEN_MINUTES - 1, "alive")
    heard.say("slow")
    assert heard.minutes(FORGOTTEN_MINUTES - 1, "alive") == []
    heard.minutes(1, "alive")
    heard.say("slow")  # gone for whoever asked before
    assert heard.minutes(1, "alive") == []


def test_while_nobody_speaks_nobody_is_gone() -> None:
    """The broker was away, or all have ended: who is first heard of then speaks for nobody else."""
    heard = Heard()
    for worker_id in ("a", "b"):
        heard.say(worker_id)
    heard.minutes(1)
    assert heard.minutes(2 * FORGOTTEN_MINUTES) == []
    assert heard.minutes(1, "a") == []


def test_the_same_words_read_once_more_are_no_sign_of_life() -> None:
    heard = Heard()
    last = WorkerStatus(worker_id="dead", sequence=7).SerializeToString()
    heard.workers.apply(b"dead", last)
    heard.minutes(FORGOTTEN_MINUTES - 1, "alive")
    heard.workers.apply(b"dead", last)
    assert heard.minutes(1, "alive") == ["dead"]


async def test_the_record_of_who_is_gone_leaves_the_topic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "FORGOTTEN_MINUTES", 2)
    monkeypatch.setattr(workers_module, "_MINUTE_S", 0.02)
    bus, sequence = MemoryBus(), 0
    await bus.publish([Record(WORKERS.name, b"dead", WorkerStatus(worker_id="dead").SerializeToString())])

    async def is_forgotten() -> bool:
        nonlocal sequence
        sequence += 1
        status = WorkerStatus(worker_id="alive", sequence=sequence)
        await bus.publish([Record(WORKERS.name, b"alive", status.SerializeToString())])
        return any(record.value is None for record in bus.records(WORKERS.name))

    async with workers_followed(bus, ManualClock()):
        await eventually(is_forgotten)
    deleted = {record.key for record in bus.records(WORKERS.name) if record.value is None}
    assert deleted == {b"dead"}
