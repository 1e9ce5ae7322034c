"""When a silent peer is asked whether it lives, and when it is given up; seconds are turned by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from headrace.v1.dataplane_pb2 import PredictRequest, RequestFrame

from services.common.frames import FrameServer, Limits
from services.common.frames.server_connection import ServerConnection
from services.common.frames.wire import PING, frame, settings
from tests.fixtures.frames import PREFACE, TOKEN, Echoes, Wire, message
from tests.fixtures.wires import Cable

LIMITS = Limits(ping_after_s=2.0, ping_timeout_s=5.0, unread_s=20.0)
PONG = frame(PING, 1, 0, b"headrace")


class Hands(asyncio.BaseEventLoop):
    """A loop whose time is told."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self._timers: list[asyncio.TimerHandle] = []

    def time(self) -> float:
        return self.now

    def call_at(  # type: ignore[override]  # without the variadic generics
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        self._timers.append(timer)
        return timer

    def call_later(  # type: ignore[override]  # the same
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        self._timers.remove(handle)

    @property
    def due(self) -> float | None:
        """When the next timer is."""
        return min((timer.when() for timer in self._timers), default=None)

    def turn(self, seconds: float) -> None:
        """Let time pass, every timer at its moment."""
        end = self.now + seconds
        while self.due is not None and self.due <= end:
            self.now = max(self.now, self.due)
            self._run()
        self.now = end

    def stand_still(self, seconds: float) -> None:
        """Let time pass while nothing runs; then the timers do, before anything is read, as uvloop has it."""
        self.now += seconds
        self._run()

    def _run(self) -> None:
        for timer in [timer for timer in self._timers if timer.when() <= self.now]:
            self._timers.remove(timer)
            timer._run()


class Silence:
    """A server's connection, its client having asked for one thing."""

    def __init__(self) -> None:
        self.hands, self.cable, self.echoes = Hands(), Cable(), Echoes()
        server = FrameServer(self.echoes, credential=TOKEN, instance="s", role="worker", limits=LIMITS)
        self.connection = ServerConnection(server, self.hands)
        self.connection.connection_made(self.cable)
        hello = frame(1, 4, 1, Wire.request_headers()) + frame(0, 0, 1, Wire.hello())
        self.hear(PREFACE + settings({}) + hello)

    def ask(self) -> None:
        self.hear(frame(0, 0, 1, message(RequestFrame(items=[PredictRequest(id=1, version="hold")]))))
        self.cable.take()

    def hear(self, data: bytes) -> None:
        self.connection.data_received(data)

    @property
    def pings(self) -> int:
        return bytes(self.cable.written).count(frame(PING, 0, 0, b"headrace"))


@pytest.fixture
async def silence() -> AsyncIterator[Silence]:
    made = Silence()
    yield made
    made.hands.close()


async def test_a_frozen_peer_is_given_up_after_seven_seconds(silence: Silence) -> None:
    silence.ask()
    silence.hands.turn(1.9)
    assert silence.pings == 0
    assert not silence.connection.silent
    silence.hands.turn(0.2)
    assert silence.pings == 1
    assert silence.connection.silent
    silence.hands.turn(4.8)
    assert not silence.cable.aborted
    silence.hands.turn(0.2)
    assert silence.cable.aborted
    assert "silent" in silence.connection.end_reason


async def test_a_peer_that_answers_in_time_may_be_slow_for_ever(silence: Silence) -> None:
    silence.ask()
    for count in range(1, 50):
        silence.hands.turn(2.0)
        assert silence.pings == count
        silence.hands.turn(4.5)
        silence.hear(PONG)
    assert not silence.cable.aborted


async def test_an_idle_connection_has_no_timer(silence: Silence) -> None:
    due = silence.hands.due
    assert due is None
    silence.ask()
    silence.echoes.made[0].release()
    await asyncio.sleep(0)  # for the answer to leave
    silence.hands.turn(100.0)
    assert silence.hands.due is due
    assert silence.pings == 0


async def test_a_stall_of_our_own_is_not_the_peers_silence(silence: Silence) -> None:
    silence.ask()
    silence.hands.turn(2.0)
    assert silence.pings == 1
    silence.hands.stand_still(60.0)  # the answer is in the socket, but timers come first
    assert not silence.cable.aborted
    silence.hear(PONG)
    silence.hands.turn(1.9)
    assert silence.pings == 1
    silence.hands.turn(8.0)
    assert silence.cable.aborted


async def test_a_peer_that_reads_slowly_is_not_asked_in_vain(silence: Silence) -> None:
    """What asks it waits behind megabytes that it is reading."""
    silence.ask()
    silence.connection.pause_writing()
    for left in range(30, 0, -1):
        silence.cable.unread = left << 20
        silence.hands.turn(0.6)
    assert not silence.cable.aborted
    silence.hands.turn(8.0)
    assert silence.cable.aborted


async def test_a_peer_that_takes_nothing_is_given_up_though_it_speaks(silence: Silence) -> None:
    silence.ask()
    silence.connection.pause_writing()
    silence.cable.unread = 1 << 20
    for _ in range(19):
        silence.hands.turn(1.0)
        silence.hear(PONG)
    assert not silence.cable.aborted
    silence.hands.turn(3.0)
    assert silence.cable.aborted
    assert "does not read" in silence.connection.end_reason
