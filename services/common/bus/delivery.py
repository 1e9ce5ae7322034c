"""One batch and its handler: malformed records leave for the dead-letter queue, the rest is tried again."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace

from services.common.bus.port import MAX_RECORD_BYTES, Handler, Malformed, Record, check_size
from services.common.errors import InvalidArgument
from services.common.topics import Topic, dead_letters

DeadLetter = Callable[[Record, str], Awaitable[None]]

#: How many times as long as handling a reader rests, and how many times as long as asked for at most.
_RESTS, _MOST_COLLECTING = 8.0, 4.0

#: Of a record that is too large for its queue: what is kept of its key, and what is left to key and headers.
_MOST_KEY, _BESIDE_VALUE = 64 << 10, 128 << 10


async def deliver(records: Sequence[Record], handler: Handler, bury: DeadLetter) -> None:
    """Return when `handler` has accepted every record of `records` that it did not call malformed.

    Each malformed record is passed to `bury(record, reason)` before the rest is handed over again, at most
    once per record. Every other exception of the handler or of `bury` is the caller's.
    """
    rest = list(records)
    while rest:
        try:
            await handler(rest)
        except Malformed as error:
            if not 0 <= error.index < len(rest):
                raise IndexError(f"handler named record {error.index} of {len(rest)}") from error
            await bury(rest[error.index], error.reason)
            del rest[error.index]
        else:
            return


def dead_letter(record: Record, topic: Topic, group: str, reason: str) -> Record:
    """`record` for the dead-letter queue: unchanged, its headers saying where it came from and why.

    Whatever a broker has taken from somebody else's producer has to fit there, or it would hold up everything
    behind it for ever: a header that is null is empty there, and a record larger than ours may be is cut.
    """
    letter = Record(
        topic=dead_letters(topic, group).name,
        key=record.key,
        value=record.value if record.value is not None or record.key is not None else b"",
        headers=(
            *[(name, value if value is not None else b"") for name, value in record.headers],
            *_marks(record, reason),
        ),
    )
    try:
        check_size(letter)
    except InvalidArgument:
        return _cut(record, letter, reason)
    return letter


def _marks(record: Record, reason: str) -> tuple[tuple[str, bytes], ...]:
    return (
        ("dlq-topic", record.topic.encode()),
        ("dlq-partition", str(record.partition).encode()),
        ("dlq-offset", str(record.offset).encode()),
        ("dlq-reason", reason.encode()[:1000]),
    )


def _cut(record: Record, letter: Record, reason: str) -> Record:
    """The beginning of a record that is too large, without its own headers."""
    key, value = record.key, record.value
    return replace(
        letter,
        key=key[:_MOST_KEY] if key is not None else None,
        value=value[: MAX_RECORD_BYTES - _BESIDE_VALUE] if value is not None else letter.value,
        headers=_marks(record, f"cut, since it is too large: {reason}"),
    )


def pause_s(collect_s: float, took_s: float, *, taken: int, left: int) -> float:
    """Seconds to collect records before the next batch, after one of `taken` records took `took_s`.

    At least `collect_s`; up to four times that where handling takes more than an eighth of the time, since
    larger batches cost less a record, and whoever answers requests may need the processor. Never longer than
    `collect_s` for a reader that is behind: more records were `left` than it has just taken.
    """
    if left > taken:
        return collect_s
    return max(collect_s, min(_MOST_COLLECTING * collect_s, _RESTS * took_s))


class Backoff:
    """Seconds to wait after failures in a row: `first` doubled each time up to `cap`, then ±50 % jitter."""

    def __init__(self, first: float, cap: float) -> None:
        self._first = first
        self._cap = cap
        self._failures = 0

    def next(self) -> float:
        """The wait after one more failure."""
        wait = min(self._cap, self._first * 2.0 ** min(self._failures, 30))
        self._failures += 1
        return wait * random.uniform(0.5, 1.5)

    def reset(self) -> None:
        """Forget the failures: something succeeded."""
        self._failures = 0
