"""Events that must not be lost: on disk before the reply leaves, in Kafka as soon as it takes them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from services.common.bus.delivery import Backoff
from services.common.bus.port import MAX_RECORD_BYTES, Bus, Record
from services.common.clock import Clock
from services.common.errors import InvalidArgument, ResourceExhausted, Unavailable
from services.common.eventlog.framing import Event, Headers, Steps, framed, frames
from services.common.eventlog.spool import Spool
from services.common.tasks import ended

log = logging.getLogger(__name__)

#: Largest event, bytes: what the broker takes, less what it adds to a record.
MAX_EVENT_BYTES = MAX_RECORD_BYTES - 4096
PUBLISH_BYTES = 1 << 20
PUBLISH_EVENTS = 2000
# What a publish needs is worked on so long at a time, seconds: a request that comes meanwhile waits for it.
# Longer by as much again for each PUBLISH_BYTES that wait: the log must not fill up because the loop is busy.
_SLICE_S, _LONGEST_SLICE_S = 0.000_15, 0.002


class Join(Protocol):
    """Makes of the events of one publish those that are published."""

    def steps(self, events: Sequence[Event]) -> Steps:
        """In steps, on the event loop. The same events give the same, after a crash too."""
        ...


@dataclass(slots=True)
class _Publish:
    """`events` in their order, and of the records made of them those that the broker does not have yet."""

    events: Sequence[Event]
    records: list[Record]


class EventLog:
    """Append here, and the event reaches `topic` at least once, in the order of the appends.

    `append` returns when the event is in a file: killing the process loses nothing, and the next process with
    the same directory publishes it before its own events. A loss of power may lose the last seconds, unless
    `fsync`, which costs a disk flush per event. Not more than `max_bytes` wait for the broker; the directory
    may hold `segment_bytes` more. `linger` is how long, in seconds, events are collected for one publish.
    `join` makes of the events of one publish those that are published.

    What is appended is kept in memory too, while that is not much, so that publishing reads no file. All of
    it is done on the event loop, in slices between which the loop does what else there is to do: in a thread,
    the same work would make every system call of the loop wait for the interpreter.

    All methods belong to one event loop. Counters for metrics: `appended`, `refused`, `published`, `replayed`
    (of those left by an earlier process), `publish_failures`, `set_aside` (refused by the broker for good),
    `dropped_bytes` (torn by a crash).
    """

    def __init__(  # noqa: PLR0913 - the options have defaults
        self,
        directory: Path,
        bus: Bus,
        topic: str,
        *,
        clock: Clock,
        max_bytes: int = 1 << 30,
        segment_bytes: int = 16 << 20,
        linger: float = 0.1,
        fsync: bool = False,
        join: Join | None = None,
    ) -> None:
        self._bus = bus
        self._topic = topic
        self._clock = clock
        self._max_bytes = max_bytes
        self._linger = linger
        self._join = join
        self._publish: _Publish | None = None
        self._spool = Spool(directory, segment_bytes=segment_bytes, fsync=fsync)
        self._wake = asyncio.Event()
        self._drained = asyncio.Event()
        self._closing = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._open = False
        self.appended = 0
        self.refused = 0
        self.published = 0
        self.replayed = 0
        self.publish_failures = 0
        self.set_aside = 0

    @property
    def pending_bytes(self) -> int:
        """Bytes that the broker has not acknowledged."""
        return self._spool.pending_bytes

    @property
    def pending_records(self) -> int:
        """Events that the broker has not acknowledged."""
        return self._spool.pending_events

    @property
    def dropped_bytes(self) -> int:
        """Bytes found torn at the end of a segment when the log was opened."""
        return self._spool.dropped_bytes

    @property
    def usable(self) -> bool:
        """False while appends are refused: not open, or full."""
        return self._open and self._spool.pending_bytes < self._max_bytes

    async def start(self) -> None:
        """Open the directory and begin to publish what is in it.

        Raises FailedPrecondition when another process has the directory.
        """
        await asyncio.to_thread(self._spool.open)
        self.replayed = self._spool.pending_events
        self._open = True
        self._wake.set()
        self._task = asyncio.create_task(self._run(), name=f"publish {self._topic}")

    def append(self, key: bytes, value: bytes, headers: Headers = ()) -> None:
        """Write one event; no await, one system call.

        Raises ResourceExhausted when `max_bytes` wait already or the disk does not take it, InvalidArgument
        when no broker would take so large an event, Unavailable outside of start and close. Then nothing was
        written.
        """
        self.append_many(key, (value,), headers)

    def append_many(self, key: bytes, values: Sequence[bytes], headers: Headers = ()) -> None:
        """The same for several events at once: all of them are written, or, where it raises, none."""
        if not self._open:
            raise Unavailable("the event log is closed")
        buffers, events, total = framed(key, values, tuple(headers), self._clock.unix_us() // 1000)
        if total > MAX_EVENT_BYTES:
            for event in events:
                if event.size > MAX_EVENT_BYTES:
                    raise InvalidArgument(f"an event of {event.size} bytes is larger than {MAX_EVENT_BYTES}")
        if self._spool.pending_bytes + total > self._max_bytes:
            self.refused += len(values)
            raise ResourceExhausted("too many events wait for the broker", retry_after_ms=1000)
        try:
            self._spool.append(buffers, total, events)
        except ResourceExhausted:
            self.refused += len(values)
            raise
        self.appended += len(values)
        if not self._wake.is_set():
            self._wake.set()

    async def close(self, deadline: float) -> None:
        """Refuse further events, publish the rest until `deadline` (on the clock's monotonic scale), let go.

        What is not published by then stays on disk for the next process.
        """
        self._open = False
        task, self._task = self._task, None
        async with AsyncExitStack() as last:
            last.push_async_callback(asyncio.to_thread, self._spool.close)
            if task is None:
                return
            last.push_async_callback(ended, task)
            self._closing.set()
            self._wake.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, deadline - self._clock.monotonic())):
                    await self._drained.wait()

    async def _run(self) -> None:
        backoff = Backoff(0.1, 5.0)
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._spool.pending_events:
                if not self._closing.is_set() and self._spool.pending_bytes < PUBLISH_BYTES:
                    # Also between publishes: under light load each would hold one event.
                    await self._pause(self._linger)
                try:
                    await self._publish_some()
                    backoff.reset()
                except Exception as error:  # whatever it was, giving up would lose events
                    self.publish_failures += 1
                    wait = backoff.next()
                    log.warning("%d events wait for the broker, again in %.1f s: %r",
                                self._spool.pending_events, wait, error)  # fmt: skip
                    await self._pause(wait)
            if self._closing.is_set():
                self._drained.set()

    async def _pause(self, seconds: float) -> None:
        """Wait, but not long once the log is closing."""
        if self._closing.is_set():
            await asyncio.sleep(min(seconds, 0.1))
            return
        with suppress(TimeoutError):
            # Not wait_for: before Python 3.12 it can lose the cancellation by a close at its deadline.
            async with asyncio.timeout(seconds):
                await self._closing.wait()

    async def _publish_some(self) -> None:
        """Publish the oldest events, then move the cursor: a crash in between repeats, never loses them."""
        publish = self._publish
        if publish is None:
            events = await self._next()
            joined = events if self._join is None else await self._in_slices(self._join.steps(events))
            self._spool.mark(events)
            publish = self._publish = _Publish(events, [self._record(event) for event in joined])
        try:
            await self._bus.publish(publish.records)
        except InvalidArgument:
            await self._publish_what_is_taken(publish.records)
        self._spool.advance(publish.events)
        self.published += len(publish.events)
        self._publish = None

    async def _next(self) -> list[Event]:
        """The oldest events, from memory or, where they are not there, from disk."""
        events = self._spool.recent(PUBLISH_BYTES, PUBLISH_EVENTS)
        extent = None if events else self._spool.extent(PUBLISH_BYTES, PUBLISH_EVENTS)
        if extent is not None:
            data = await asyncio.to_thread(extent.read)
            events = (await self._in_slices(_listed(frames(data))))[: extent.events]
        if not events:
            raise OSError("the spool's files do not hold what was written to them")
        return events

    async def _in_slices(self, steps: Steps) -> list[Event]:
        """The result of `steps`; whatever else the loop has to do is done between two slices."""
        slice_s = min(_LONGEST_SLICE_S, _SLICE_S * (1 + self._spool.pending_bytes / PUBLISH_BYTES))
        until = time.perf_counter() + slice_s
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: list[Event] = end.value
                return result
            if time.perf_counter() > until:
                await asyncio.sleep(0)
                until = time.perf_counter() + slice_s

    async def _publish_what_is_taken(self, records: list[Record]) -> None:
        """One by one, after the broker refused one of `records` for good; those that are done leave the list.

        What it refuses is kept in the file `refused` of the directory: waiting for it would hold up all that
        is behind it until the log is full and nothing can be served.
        """
        while records:
            record = records[0]
            try:
                await self._bus.publish([record])
            except InvalidArgument as error:
                self.set_aside += 1
                log.warning("the broker never takes a record of %d bytes: kept aside: %s",
                            len(record.value or b""), error)  # fmt: skip
                await asyncio.to_thread(self._spool.set_aside, record)
            del records[0]

    def _record(self, event: Event) -> Record:
        return Record(self._topic, event.key, event.value, event.headers, timestamp_ms=event.timestamp_ms)


def _listed(events: Iterable[Event]) -> Steps:
    listed = []
    for event in events:
        listed.append(event)
        yield
    return listed
