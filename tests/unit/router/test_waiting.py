"""Requests for what no worker has yet, on the real clock with short times."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from headrace.v1.control_pb2 import LoadedVersion

from services.common.errors import HeadraceError, Unavailable
from services.router import waiting as module
from services.router.waiting import Waiting
from tests.unit.router.test_endpoints import KEY, Room

GRACE_S = 0.1
LOADING, UNLOADING = LoadedVersion.STATE_LOADING, LoadedVersion.STATE_UNLOADING


class FakeCall:
    def __init__(self) -> None:
        self.began_at = time.monotonic()
        self.deadline = self.began_at + 10
        self.ends: list[str] = []

    def resume(self) -> None:
        self.ends.append("sent")

    def give_up(self, error: HeadraceError) -> None:
        self.ends.append("refused")

    def refuse(self, error: HeadraceError) -> None:
        self.ends.append("late")


class FakeDispatcher:
    def no_endpoint(self, call: Any) -> HeadraceError:
        return Unavailable("nobody")


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Room:
    monkeypatch.setattr(module, "_GRACE_S", GRACE_S)
    return Room()


def make(room: Room) -> Waiting:
    waiting = Waiting(FakeDispatcher(), room.endpoints, wait_s=0.5, limit=10)  # type: ignore[arg-type]  # a part of it
    room.endpoints.group(KEY)
    room.endpoints._on_change = waiting.wake
    return waiting


def hold(waiting: Waiting) -> FakeCall | None:
    call = FakeCall()
    return call if waiting.add(call, KEY) else None  # type: ignore[arg-type]  # the part that is used


async def test_a_version_that_nobody_has_heard_of_is_waited_for_once(room: Room) -> None:
    waiting = make(room)
    first = hold(waiting)
    assert first is not None
    await asyncio.sleep(GRACE_S * 1.5)
    assert first.ends == ["refused"]
    assert hold(waiting) is None


async def test_a_worker_that_begins_to_load_and_has_it_is_sent_what_waited(room: Room) -> None:
    waiting = make(room)
    call = hold(waiting)
    assert call is not None
    room.beat(versions={KEY: LOADING})
    assert call.ends == []
    room.beat(sequence=2)
    room.calls[0].set(usable=True)
    assert call.ends == ["sent"]
    # What is lost later is waited for anew.
    room.beat(sequence=3, versions={})
    assert hold(waiting) is not None


async def test_news_of_others_ends_no_grace(room: Room) -> None:
    waiting = make(room)
    call = hold(waiting)
    assert call is not None
    room.beat("w2", "h:2", versions={("digits", "1"): LOADING})
    assert call.ends == []
    waiting.withdraw(call)  # type: ignore[arg-type]  # the part that is used


async def test_who_is_not_rid_of_a_version_yet_answers_where_nobody_else_has_it(room: Room) -> None:
    room.beat(versions={KEY: UNLOADING})
    room.calls[0].set(usable=True)
    assert room.ready == ["w1"]
    room.beat("w2", "h:2")
    room.calls[1].set(usable=True)
    assert room.ready == ["w2"]


async def test_what_is_not_routed_to_any_more_is_forgotten(room: Room) -> None:
    waiting = make(room)
    held = hold(waiting)
    assert held is not None
    assert waiting._missing_since.keys() == {KEY}
    waiting.forget_all_but({KEY})
    assert waiting._missing_since.keys() == {KEY}
    waiting.forget_all_but(set())
    assert not waiting._missing_since
