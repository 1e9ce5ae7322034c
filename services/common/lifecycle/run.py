"""Runs a service on uvloop until it ends or is told to."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import structlog
import uvloop

from services.common.errors import Fatal
from services.common.lifecycle.liveness import DUMP_SIGNAL
from services.common.telemetry.logs import flush_logs

log = structlog.get_logger(__name__)

#: Of garbage collections; Python's own are 700, 10, 10.
_THRESHOLDS = (10_000, 20, 20)
# Seconds that the event loop waits at most while a thread computes in Python; Python's own are 0.005, which a
# request would pay in each process on its way.
_SWITCH_S = 0.0005
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run(service_main: Callable[[], Awaitable[None]], *, drain_s: float = 30.0) -> NoReturn:
    """Run `service_main` to its end, then end the process.

    The first SIGTERM or SIGINT asks it to drain: `until_stopped` returns, or, where nobody waits there (still
    starting), the main task is cancelled. A second signal (but see `told_by_parent`), or `drain_s` seconds,
    end the process hard.

    Exit codes: 0 ended or drained, 2 configuration, 1 any other failure or a drain that took too long, 128
    + signal number when ended hard by a second signal. `Fatal` is logged as one sentence, anything else
    with its traceback. On SIGUSR1 it writes to standard error where all of its threads are, whatever they do.
    """
    faulthandler.register(DUMP_SIGNAL, file=sys.stderr, all_threads=True)
    sys.setswitchinterval(_SWITCH_S)
    code = _run(service_main, drain_s)
    flush_logs()
    sys.exit(code)


async def until_stopped() -> None:
    """Wait for the first SIGTERM or SIGINT of the surrounding `run`, then return normally, so that the
    `async with` blocks around the call drain in order and without a pending cancellation.

    The service is started: what its start left behind is kept out of garbage collections from here on."""
    stop = _Stop.current
    if stop is None:
        raise RuntimeError("until_stopped works inside services.common.lifecycle.run only")
    _settle_memory()
    while stop.at_start:
        stop.at_start.pop()()
    stop.waiters += 1
    try:
        await stop.asked.wait()
    finally:
        stop.waiters -= 1


def when_started(call: Callable[[], None]) -> None:
    """Call it once the service of the surrounding `run` has come as far as `until_stopped`."""
    if _Stop.current is not None:
        _Stop.current.at_start.append(call)


def told_by_parent() -> None:
    """Take further signals for the same wish: where a whole process group gets one, a child gets its parent's
    as well, in any order. Only a second SIGINT, which no parent sends, ends the process hard."""
    if _Stop.current is not None:
        _Stop.current.patient = True


@contextmanager
def ending_hard(end: Callable[[], None]) -> Iterator[None]:
    """Call `end` where the surrounding `run`, if there is one, ends this process hard during the block."""
    stop = _Stop.current
    if stop is None:
        yield
        return
    stop.at_hard_end.append(end)
    try:
        yield
    finally:
        stop.at_hard_end.remove(end)


def _settle_memory() -> None:
    """What the start left lives as long as the process; collections need not walk it again and again. And
    what requests leave is freed by counting references: cycles are rare, and may wait."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


class _Stop:
    """What a signal does to the one service of this process."""

    current: _Stop | None = None

    def __init__(self, main: asyncio.Task[None], drain_s: float) -> None:
        self.asked = asyncio.Event()
        self.waiters = 0
        self.patient = False
        self._interrupts = 0
        self.at_start: list[Callable[[], None]] = []
        self.at_hard_end: list[Callable[[], None]] = []
        self._main = main
        self._drain_s = drain_s

    def on_signal(self, number: signal.Signals) -> None:
        self._interrupts += number == signal.SIGINT
        if self.asked.is_set():
            if self.patient and self._interrupts < 2:
                return
            log.error("ended_hard", signal=number.name, reason="a second signal")
            self._exit_now(128 + number)
        log.info("stopping", signal=number.name, drain_s=self._drain_s)
        self.asked.set()
        asyncio.get_running_loop().call_later(self._drain_s, self._too_late)
        if not self.waiters:
            self._main.cancel()

    def _too_late(self) -> None:
        log.error("ended_hard", reason=f"draining took longer than {self._drain_s:g} s")
        self._exit_now(1)

    def _exit_now(self, code: int) -> NoReturn:
        for end in self.at_hard_end:
            end()
        flush_logs()
        os._exit(code)


def _run(service_main: Callable[[], Awaitable[None]], drain_s: float) -> int:
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_supervised(service_main, drain_s))
    except Exception:
        log.critical("crashed", exc_info=True)
        return 1


async def _supervised(service_main: Callable[[], Awaitable[None]], drain_s: float) -> int:
    async def main() -> None:
        await service_main()

    loop = asyncio.get_running_loop()
    task = asyncio.create_task(main(), name="service")
    stop = _Stop.current = _Stop(task, drain_s)
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.on_signal, number)
    try:
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})
        return _exit_code(task, stop)
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
        _Stop.current = None


def _exit_code(task: asyncio.Task[None], stop: _Stop) -> int:
    if task.cancelled():
        return 0 if stop.asked.is_set() else 1
    error = task.exception()
    if error is None:
        return 0
    fatal = _fatal(error)
    if fatal is not None:
        log.critical("fatal", reason=str(fatal))
        return fatal.exit_code
    log.critical("crashed", exc_info=error)
    return 1


def _fatal(error: BaseException) -> Fatal | None:
    """The `Fatal` that ended the service, also where a task group wrapped it."""
    if isinstance(error, Fatal):
        return error
    if isinstance(error, BaseExceptionGroup):
        found = (_fatal(inner) for inner in error.exceptions)
        return next((inner for inner in found if inner is not None), None)
    return None
