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


def make(room: Room, *, wait_s: float = 0.5, limit: int = 10) -> Waiting:
    waiting = Waiting(FakeDispatcher(), room.endpoints, wait_s=wait_s, limit=limit)  # type: ignore[arg-type]  # a part of it
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
    assert len(waiting) == 0
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


@pytest.mark.parametrize(
    ("loading", "ago", "deadline", "wait_s", "patience"),
    [
        (True, 0.0, 100.0, 20.0, 20.0),
        (True, 15.0, 100.0, 20.0, 5.0),  # it waits for the second time
        (True, 0.0, 10.0, 20.0, 10.0),
        (False, 0.0, 100.0, 20.0, 4.0),
        (False, 0.0, 100.0, 2.0, 2.0),
    ],
)
async def test_nobody_is_held_longer_than_makes_sense(
    monkeypatch: pytest.MonkeyPatch,
    loading: bool,
    ago: float,
    deadline: float,
    wait_s: float,
    patience: float,
) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 4.0)
    room = Room()
    waiting, call = make(room, wait_s=wait_s), FakeCall()
    if loading:
        room.beat(versions={KEY: LOADING})
    call.began_at -= ago
    call.deadline = call.began_at + ago + deadline
    assert waiting.add(call, KEY)  # type: ignore[arg-type]  # the part that is used
    (_, timer) = waiting._calls[call]  # type: ignore[index]
    left = timer.when() - asyncio.get_running_loop().time()
    assert patience - 0.9 < left <= patience
    waiting.withdraw(call)  # type: ignore[arg-type]
    assert timer.cancelled()
    assert len(waiting) == 0


async def test_who_waited_long_enough_and_who_finds_no_room_is_not_held(room: Room) -> None:
    waiting = make(room, limit=2)
    room.beat(versions={KEY: LOADING})
    late = FakeCall()
    late.began_at -= 0.5
    assert not waiting.add(late, KEY)  # type: ignore[arg-type]
    first = hold(waiting)
    assert first is not None
    assert hold(waiting) is not None
    assert hold(waiting) is None
    waiting.withdraw(first)  # type: ignore[arg-type]
    assert hold(waiting) is not None


async def test_who_waits_for_what_could_not_be_loaded_is_refused_after_the_grace(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_GRACE_S", 0.0)
    room = Room()
    waiting = make(room)
    room.beat(versions={KEY: LOADING})
    call = hold(waiting)
    assert call is not None
    room.beat(sequence=2, versions={})
    assert call.ends == ["refused"]
    assert len(waiting) == 0


async def test_a_version_that_was_missing_and_came_is_missed_anew(room: Room) -> None:
    waiting = make(room)
    other = ("digits", "1")
    waiting._missing_since = dict.fromkeys([KEY, other], time.monotonic() - 100)
    assert hold(waiting) is None
    room.beat(versions={KEY: LOADING})
    assert hold(waiting) is not None
    room.beat(sequence=2, versions={})
    assert hold(waiting) is not None
    room.beat(sequence=3)
    waiting._missing_since[KEY] = time.monotonic() - 100
    room.calls[0].set(usable=True)
    assert waiting._missing_since.keys() == {other}


async def test_at_the_end_of_its_patience_a_call_is_told_whose_it_was(room: Room) -> None:
    waiting = make(room)
    room.beat(versions={KEY: LOADING})
    late, patient, gone = (hold(waiting) for _ in range(3))
    assert late is not None
    assert gone is not None
    late.deadline = time.monotonic()
    waiting.withdraw(gone)  # type: ignore[arg-type]
    for call in (late, patient, gone):
        waiting._give_up(call)  # type: ignore[arg-type]
    assert [call.ends for call in (late, patient, gone) if call is not None] == [["late"], ["refused"], []]
