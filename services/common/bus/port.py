"""What the services know of Kafka: records, a bus that publishes and consumes them, tables that follow it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol

from services.common.errors import InvalidArgument
from services.common.topics import Topic

#: Largest record, bytes of key, value and headers; topics and producers are told the same.
MAX_RECORD_BYTES = 16 << 20
#: How old what a client knows of the brokers may get where nothing says that it is wrong: a lost connection,
#: a partition that is led by another and an unknown topic have it asked for at once.
METADATA_MAX_AGE_MS = 30_000
#: What the encoding adds to a record and to each of its headers, at most.
_OVERHEAD_BYTES, _HEADER_OVERHEAD_BYTES = 64, 16


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a topic. Key and value are not both None; in a compacted topic a None value deletes.

    `partition`, `offset` and `timestamp_ms` (Unix milliseconds) are set on records read, not on records to
    publish: the key decides the partition, the broker the offset.
    """

    topic: str
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    partition: int = -1
    offset: int = -1
    timestamp_ms: int = 0


def check_size(record: Record) -> None:
    """Raises InvalidArgument where no broker would ever take `record`."""
    size = _OVERHEAD_BYTES + len(record.key or b"") + len(record.value or b"")
    size += sum(_HEADER_OVERHEAD_BYTES + len(name.encode()) + len(value) for name, value in record.headers)
    if size > MAX_RECORD_BYTES:
        raise InvalidArgument(f"a record for {record.topic} is larger than {MAX_RECORD_BYTES} bytes")


class Malformed(InvalidArgument):
    """Raised by a handler: record number `index` of those it was given can never be handled, and why."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"record {index}: {reason}")
        self.index = index
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a group has come in a topic. `end`: records the topic was ever given; `lag`: those beyond what
    the group has committed."""

    end: int
    lag: int


Handler = Callable[[Sequence[Record]], Awaitable[None]]


class Table(Protocol):
    """A compacted topic being followed from its start."""

    @property
    def caught_up(self) -> bool:
        """True once everything has been applied that the topic held when it was first reached."""
        ...

    @property
    def readings(self) -> int:
        """How often the topic was read from its start, this time included. It grows in the same turn of the
        loop in which that reading's values are applied, before them: whoever counts what the broker still
        holds forgets everything when it changes."""
        ...

    async def ready(self, timeout: float) -> None:
        """Wait until `caught_up`. Raises Unavailable after `timeout` seconds; following goes on."""
        ...


class Bus(Protocol):
    """Publishing and consuming, at least once, in order per partition."""

    async def publish(self, records: Sequence[Record]) -> None:
        """Return once the broker has acknowledged every record.

        Records of one partition are kept in the order given. Raises Unavailable when the broker does not
        acknowledge within the bus's publish deadline; some of the records may have arrived by then, so a
        caller that tries again makes duplicates. Raises InvalidArgument for a record that is too large.
        """
        ...

    def consume(
        self, topic: Topic, group: str, handler: Handler, *, max_records: int = 500, collect_s: float = 0.0
    ) -> AbstractAsyncContextManager[None]:
        """Give `handler` the records of `topic` while the context is open, sharing partitions with the group.

        A batch holds 1 to `max_records` records, those of one partition in order; the next batch comes after
        the handler returned and its offsets were committed; after one that was not full, `collect_s` seconds
        later, for handlers to whom many records cost little more than one; over Kafka up to four times as
        long where handling takes more than an eighth of the time (`delivery.pause_s`). Malformed sends that
        one record to `<topic>.<group>.dlq` and hands over the rest again. Any other exception makes the same
        records come again after a backoff, for as long as it takes: nothing is skipped. Entering never waits
        for the broker; leaving waits for the running handler, for a bounded time.
        """
        ...

    def table(
        self, topic: Topic, apply: Callable[[bytes, bytes | None], None]
    ) -> AbstractAsyncContextManager[Table]:
        """Call `apply(key, value)` for the last value of every key, then for each change; None = deleted.

        Every process reads everything. While catching up, only the last value of a key is applied. A broker
        that comes back without its data is read again from the beginning; keys it no longer knows are kept,
        because serving goes on with the last known state. An exception from `apply` is logged and counted,
        and the next record is applied.
        """
        ...

    async def lag(self, topic: Topic, group: str) -> int:
        """Records of `topic` that `group` has not committed. Raises Unavailable when the broker is away or
        does not know the topic."""
        ...

    async def standings(self, wanted: Sequence[tuple[Topic, str]]) -> list[Standing | None]:
        """How far groups have come, in one asking for all of them: of each topic and group in `wanted`, None
        where the broker does not know the topic. Ends were read after commits: where nothing is left, all was
        done that was there by then. Raises Unavailable when the broker is away."""
        ...
