"""A load generator of our own, a process by itself: `python -m benchmarks.load.generator --help`.

Open loop (`--rate`): requests are due at a constant rate whatever the server does. A latency counts from the
moment when its request was due, not from when a connection was free to send it, so a stalled server cannot
hide its stall (no coordinated omission). Closed loop (no rate): every connection sends its next request as
soon as it has its answer.

Prints one JSON object. Goodput counts the answers of the window that came within `--patience` of the moment
when they were due; what came later is `late`, what was sent and never answered `unanswered`, what found no
free connection within `--wait` `abandoned`. `lag_p99_us` is how late the generator itself came to its own
schedule: where that is large, the generator was the bottleneck and the point says nothing about the server.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import re
import time
from array import array
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import uvloop

from benchmarks.load.requests import read_requests

#: uvloop rounds this to a millisecond: a request is up to that late, which its latency includes.
TICK_S = 0.001
RECONNECT_S = 0.05
REFUSED = (429, 503)
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked", re.IGNORECASE)
_RETRY_AFTER = re.compile(rb"\r\nretry-after:[ \t]*\d", re.IGNORECASE)


@dataclass(slots=True)
class Tally:
    """What came back. Latencies are seconds."""

    answered: array[float] = field(default_factory=lambda: array("d"))
    refused: array[float] = field(default_factory=lambda: array("d"))
    #: From the moment of sending, for refusals: what the server took, without the wait for a connection.
    refused_after_sending: array[float] = field(default_factory=lambda: array("d"))
    lag: array[float] = field(default_factory=lambda: array("d"))
    other: dict[str, int] = field(default_factory=dict)
    abandoned: int = 0
    #: Good answers that came within the window and within the patience.
    in_time: int = 0
    #: Sent and not answered when the run was over.
    unanswered: int = 0
    #: Answers that do not count because they came after the patience was over.
    late: int = 0
    refused_without_retry_after: int = 0
    #: Attempts to connect again, after a connection was lost, that failed.
    not_connected: int = 0
    #: Every response, also those outside the measured time.
    responses: int = 0

    def note(self, what: str) -> None:
        """Count something that is neither an answer nor a refusal."""
        self.other[what] = self.other.get(what, 0) + 1


class Load:
    """The schedule, the connections and what was measured between `opens` and `closes`: times of
    perf_counter, since uvloop's own clock has whole milliseconds and stands still while callbacks run."""

    def __init__(
        self,
        requests: Sequence[bytes],
        rate: float | None,
        patience_s: float,
        wait_s: float,
        address: tuple[str, int],
    ) -> None:
        self._requests = requests
        self._address = address
        self._connecting: set[asyncio.Task[None]] = set()
        self.connections: set[Connection] = set()
        self._rate = rate
        self._patience_s = patience_s
        self._wait_s = wait_s
        self._next = 0
        self._free: list[Connection] = []
        self._due: deque[float] = deque()
        self._scheduled = 0
        self.started = self.opens = self.closes = 0.0
        self.over = self._ticking = False
        self.tally = Tally()

    def begin(self, warm_up_s: float, seconds: float) -> None:
        """Start the schedule now."""
        self.started = time.perf_counter()
        self.opens = self.started + warm_up_s
        self.closes = self.opens + seconds
        if self._rate is not None:
            self._tick()
            return
        free, self._free = self._free, []
        for connection in free:
            self._send(connection, time.perf_counter())

    def counts(self, due: float) -> bool:
        """Whether a request that was due then belongs to the measurement."""
        return self.opens <= due < self.closes

    def ready(self, connection: Connection, now: float) -> None:
        """`connection` has no request under way."""
        if self._rate is None:
            if self.started and now < self.closes:
                self._send(connection, now)
            else:
                self._free.append(connection)
            return
        while self._due:
            due = self._due.popleft()
            if now - due <= self._wait_s:
                self._send(connection, due)
                return
            self._abandon(due)
        self._free.append(connection)

    async def connect(self) -> None:
        """One more connection."""
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: Connection(self), *self._address)

    def lost(self, connection: Connection) -> None:
        """`connection` is gone; another takes its place while the load goes on."""
        self.connections.discard(connection)
        if connection in self._free:
            self._free.remove(connection)
        loop = asyncio.get_running_loop()
        if self.started and time.perf_counter() < self.closes:
            task = loop.create_task(self._reconnect())
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _reconnect(self) -> None:
        while time.perf_counter() < self.closes + self._patience_s:
            try:
                await self.connect()
            except OSError:
                self.tally.not_connected += 1
                await asyncio.sleep(RECONNECT_S)
            else:
                return

    def give_up(self) -> None:
        """The run is over: what waits for a connection was never sent, what is under way not answered."""
        self.over = True
        while self._due:
            self._abandon(self._due.popleft())
        for connection in list(self.connections):
            connection.abort()

    @property
    def busy(self) -> bool:
        """Whether anything is not answered yet, or not even due."""
        return self._ticking or bool(self._due) or any(connection.waits for connection in self.connections)

    def in_time(self, due: float, now: float) -> bool:
        """Whether a good answer that came now is part of the goodput. Its moment must lie in the
        window: by the moment when it was due, a queue that fills up would count as capacity."""
        return self.counts(now) and not self.late(now - due)

    def late(self, took: float) -> bool:
        """Whether an answer that took `took` seconds from when it was due came too late to be of use."""
        return self._rate is not None and took > self._patience_s

    def _abandon(self, due: float) -> None:
        if self.counts(due):
            self.tally.abandoned += 1

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        now = time.perf_counter()
        rate = self._rate or 1.0
        # The first is due at once: counted without it, each would leave one interval late. The end has none.
        until = min(int((now - self.started) * rate) + 1, round((self.closes - self.started) * rate))
        while self._scheduled < until:
            due = self.started + self._scheduled / rate
            self._scheduled += 1
            if self.counts(due):
                self.tally.lag.append(now - due)
            if self._free:
                self._send(self._free.pop(), due)
            else:
                self._due.append(due)
        while self._due and now - self._due[0] > self._wait_s:
            self._abandon(self._due.popleft())
        self._ticking = now < self.closes
        if self._ticking:
            loop.call_later(TICK_S, self._tick)

    def _send(self, connection: Connection, due: float) -> None:
        self._next = (self._next + 1) % len(self._requests)
        connection.send(self._requests[self._next], due)


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request under way."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._buffer = b""
        self._due: float | None = None
        self._sent = 0.0
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclasses of asyncio's.
        self._transport = cast("asyncio.Transport", transport)
        self._load.connections.add(self)
        self._load.ready(self, time.perf_counter())

    def connection_lost(self, exc: Exception | None) -> None:
        if self._due is not None and self._load.counts(self._due):
            if self._load.over:
                self._load.tally.unanswered += 1
            else:
                self._load.tally.note("connection lost")
        self._load.lost(self)

    @property
    def waits(self) -> bool:
        """Whether a request is under way."""
        return self._due is not None

    def abort(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.abort()

    def send(self, request: bytes, due: float) -> None:
        """Send `request`, which was due at `due`."""
        self._due, self._sent = due, time.perf_counter()
        if self._transport is not None:
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer + data if self._buffer else data
        if not _complete(buffer):
            self._buffer = buffer
            return
        self._buffer = b""
        now, due, self._due = time.perf_counter(), self._due, None
        self._load.tally.responses += 1
        if due is not None and buffer[9:10] == b"2" and self._load.in_time(due, now):
            self._load.tally.in_time += 1
        if due is not None and self._load.counts(due):
            self._count(buffer, now, due)
        self._load.ready(self, now)

    def _count(self, response: bytes, now: float, due: float) -> None:
        tally, status = self._load.tally, int(response[9:12])
        if status in REFUSED:
            tally.refused.append(now - due)
            tally.refused_after_sending.append(now - self._sent)
            if _RETRY_AFTER.search(response[: response.find(b"\r\n\r\n")]) is None:
                tally.refused_without_retry_after += 1
        elif not 200 <= status < 300:
            tally.note(f"HTTP {status}")
        elif self._load.late(now - due):
            tally.late += 1
        else:
            tally.answered.append(now - due)


def _complete(response: bytes) -> bool:
    end = response.find(b"\r\n\r\n")
    if end < 0:
        return False
    head = response[:end]
    length = _LENGTH.search(head)
    if length is not None:
        return len(response) >= end + 4 + int(length[1])
    return _CHUNKED.search(head) is None or response.endswith(b"\r\n0\r\n\r\n")


def _quantile_us(values: Sequence[float], q: float) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(q * len(ordered)))] * 1e6, 1)


async def offer(given: argparse.Namespace) -> dict[str, object]:
    """Run the load that the arguments describe; gives the summary."""
    load = Load(
        read_requests(given.requests), given.rate, given.patience, given.wait, (given.host, given.port)
    )
    for _ in range(given.connections):
        await load.connect()
    gc.freeze()
    gc.disable()
    if given.begun is not None:
        given.begun.touch()
    cpu = time.process_time()
    load.begin(given.warm_up, given.seconds)
    await asyncio.sleep(given.warm_up + given.seconds)
    # Answers to requests that were due in the window still count when they come a little later.
    until = time.perf_counter() + given.patience
    while load.busy and time.perf_counter() < until:  # noqa: ASYNC110 - an event would cost every answer
        await asyncio.sleep(0.02)
    load.give_up()
    cpu = time.process_time() - cpu
    await asyncio.sleep(0.01)  # for the connections' ends
    tally = load.tally
    return {
        "offered_per_s": given.rate,
        "seconds": given.seconds,
        "connections": given.connections,
        "answered": len(tally.answered),
        "goodput_per_s": round(tally.in_time / given.seconds, 1),
        "refused": len(tally.refused),
        "refused_without_retry_after": tally.refused_without_retry_after,
        "late": tally.late,
        "unanswered": tally.unanswered,
        "abandoned": tally.abandoned,
        "not_connected": tally.not_connected,
        "responses": tally.responses,
        "other": tally.other,
        "p50_us": _quantile_us(tally.answered, 0.5),
        "p90_us": _quantile_us(tally.answered, 0.9),
        "p99_us": _quantile_us(tally.answered, 0.99),
        "p999_us": _quantile_us(tally.answered, 0.999),
        "refused_p99_us": _quantile_us(tally.refused_after_sending, 0.99),
        "refused_max_us": _quantile_us(tally.refused_after_sending, 1.0),
        "lag_p99_us": _quantile_us(tally.lag, 0.99),
        "generator_cpu_s": round(cpu, 3),
    }


def step_ahead() -> None:
    """Run before everything else of this machine, as far as we may: clients are elsewhere mostly, and where
    the server takes all processors a generator that waits for one measures its own wait."""
    with suppress(OSError):
        os.setsid()  # a group of its own for the scheduler
    with suppress(OSError):
        Path("/proc/self/autogroup").write_text("-20")
    with suppress(OSError):
        os.nice(-20)


def main() -> None:
    """Offer the load and print the summary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=Path, required=True)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=128)
    parser.add_argument("--rate", type=float, help="requests per second; closed loop where absent")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--warm-up", type=float, default=0.5)
    parser.add_argument("--patience", type=float, default=1.0, help="seconds after which an answer is late")
    parser.add_argument(
        "--wait", type=float, default=1.0, help="seconds that a request waits for a free connection"
    )
    parser.add_argument("--ahead", action="store_true", help="run before all else of this machine")
    parser.add_argument("--begun", type=Path, help="a file that is made as the load begins")
    given = parser.parse_args()
    if given.ahead:
        step_ahead()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(offer(given))))


if __name__ == "__main__":
    main()
