"""A bus in memory with the semantics of the real one, for tests of services."""

from __future__ import annotations

import asyncio
import logging
import time
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

from services.common.bus.delivery import Backoff, dead_letter, deliver
from services.common.bus.port import Handler, Record, Standing, Table, check_size
from services.common.errors import Unavailable
from services.common.tasks import ended
from services.common.topics import Topic, all_topics

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Group:
    """Offsets of one group in one topic, and which member is working on which partition."""

    committed: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    members: list[object] = field(default_factory=list)
    held: set[int] = field(default_factory=set)
    buried: set[tuple[int, int]] = field(default_factory=set)


class MemoryBus:
    """Bus within one process. `away = True` makes publishing fail as if the broker were down."""

    def __init__(self, topics: Iterable[Topic] = ()) -> None:
        self.away = False
        self._counts = {topic.name: topic.partitions for topic in (*all_topics(), *topics)}
        self._logs: dict[str, list[list[Record]]] = {}
        self._groups: dict[tuple[str, str], _Group] = {}
        self._changed = asyncio.Event()
        self._epoch = 0

    async def publish(self, records: Sequence[Record]) -> None:
        """See Bus."""
        for record in records:
            check_size(record)
        if self.away:
            raise Unavailable("the event broker is away")
        for record in records:
            log_ = self._log(record.topic)
            partition = zlib.crc32(record.key or b"") % len(log_)
            kept = replace(
                record,
                partition=partition,
                offset=len(log_[partition]),
                timestamp_ms=record.timestamp_ms or time.time_ns() // 1_000_000,
            )
            log_[partition].append(kept)
        self._wake()
        await asyncio.sleep(0)  # a real broker never answers within the same turn of the loop

    @asynccontextmanager
    async def consume(
        self, topic: Topic, group: str, handler: Handler, *, max_records: int = 500, collect_s: float = 0.0
    ) -> AsyncIterator[None]:
        """See Bus."""
        state = self._groups.setdefault((topic.name, group), _Group())
        member = object()
        state.members.append(member)
        stopping = asyncio.Event()
        task = asyncio.create_task(
            self._consume(topic, group, member, handler, max_records, collect_s, stopping)
        )
        try:
            yield
        finally:
            stopping.set()
            self._wake()
            with suppress(TimeoutError):
                await asyncio.wait_for(task, 5.0)
            state.members.remove(member)
            self._wake()

    @asynccontextmanager
    async def table(self, topic: Topic, apply: Callable[[bytes, bytes | None], None]) -> AsyncIterator[Table]:
        """See Bus."""
        follower = _MemoryTable(apply)
        task = asyncio.create_task(self._follow(topic, follower))
        try:
            yield follower
        finally:
            await ended(task)

    async def lag(self, topic: Topic, group: str) -> int:
        """See Bus."""
        return self._standing(topic, group).lag

    async def standings(self, wanted: Sequence[tuple[Topic, str]]) -> list[Standing | None]:
        """See Bus. Every topic that is asked for is there."""
        return [self._standing(topic, group) for topic, group in wanted]

    def _standing(self, topic: Topic, group: str) -> Standing:
        state, log = self._groups.get((topic.name, group), _Group()), self._log(topic.name)
        lag = sum(len(part) - state.committed[i] for i, part in enumerate(log))
        return Standing(sum(map(len, log)), lag)

    def records(self, topic: str) -> list[Record]:
        """Everything published to `topic`, partition by partition."""
        return [record for partition in self._logs.get(topic, []) for record in partition]

    def lose_everything(self) -> None:
        """Become the broker that came back without its data: no records, no offsets."""
        self._logs.clear()
        for group in self._groups.values():
            group.committed.clear()
            group.buried.clear()
        self._epoch += 1
        self._wake()

    def _log(self, topic: str) -> list[list[Record]]:
        if topic not in self._logs:
            self._logs[topic] = [[] for _ in range(self._counts.get(topic, Topic(topic).partitions))]
        return self._logs[topic]

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _consume(
        self,
        topic: Topic,
        group: str,
        member: object,
        handler: Handler,
        most: int,
        collect_s: float,
        stopping: asyncio.Event,
    ) -> None:
        self._counts.setdefault(topic.name, topic.partitions)
        state = self._groups[topic.name, group]
        backoff = Backoff(0.005, 0.1)

        async def bury(record: Record, reason: str) -> None:
            await self.publish([dead_letter(record, topic, group, reason)])
            state.buried.add((record.partition, record.offset))

        while not stopping.is_set():
            changed = self._changed
            batch = self._take(topic, state, member, most)
            if not batch:
                await changed.wait()
                continue
            epoch, partitions = self._epoch, {record.partition for record in batch}
            state.held |= partitions
            try:
                fresh = [r for r in batch if (r.partition, r.offset) not in state.buried]
                await deliver(fresh, handler, bury)
            except Exception as error:
                log.warning("handler of %s failed, trying again: %r", topic.name, error)
                with suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), backoff.next())
            else:
                backoff.reset()
                if epoch == self._epoch:
                    state.committed.update({record.partition: record.offset + 1 for record in batch})
                    state.buried -= {(record.partition, record.offset) for record in batch}
            finally:
                state.held -= partitions
                self._wake()
            if collect_s and len(batch) < most:
                with suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), collect_s)

    def _take(self, topic: Topic, state: _Group, member: object, most: int) -> list[Record]:
        rank = state.members.index(member)
        batch: list[Record] = []
        for number, partition in enumerate(self._log(topic.name)):
            if number % len(state.members) == rank and number not in state.held:
                start = state.committed[number]
                batch += partition[start : start + most - len(batch)]
        return batch

    async def _follow(self, topic: Topic, follower: _MemoryTable) -> None:
        self._counts.setdefault(topic.name, topic.partitions)
        epoch = -1
        while True:
            changed = self._changed
            if epoch != self._epoch:
                epoch, positions = self._epoch, [0] * len(self._log(topic.name))
                first = True
            fresh = [r for i, part in enumerate(self._log(topic.name)) for r in part[positions[i] :]]
            for record in fresh:
                positions[record.partition] = record.offset + 1
            if first:
                last = {record.key: record for record in fresh}
                fresh, first = list(last.values()), False
                follower.readings += 1
            for record in fresh:
                follower.apply(record)
            follower.mark_caught_up()
            await changed.wait()


class _MemoryTable:
    """Table over MemoryBus."""

    def __init__(self, apply: Callable[[bytes, bytes | None], None]) -> None:
        self._apply = apply
        self._caught_up = asyncio.Event()
        self.readings = 0

    @property
    def caught_up(self) -> bool:
        return self._caught_up.is_set()

    async def ready(self, timeout: float) -> None:
        try:
            await asyncio.wait_for(self._caught_up.wait(), timeout)
        except TimeoutError:
            raise Unavailable("the topic is still being read") from None

    def apply(self, record: Record) -> None:
        if record.key is None:
            return
        try:
            self._apply(record.key, record.value)
        except Exception:
            log.exception("record of %s at offset %d was refused", record.topic, record.offset)

    def mark_caught_up(self) -> None:
        self._caught_up.set()
