"""What each member of an executed batch is answered, and the bytes that say so in the prediction log. Free of
the event loop: what ran in a thread is decided and serialised there, so that large tensors hold up nobody."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from headrace.v1.tensor_pb2 import Code

from services.common.clock import Clock
from services.common.errors import Cancelled, DeadlineExceeded
from services.worker.execution import Execution
from services.worker.item import Batch, Item
from services.worker.prediction_log import Entry, Made, PayloadPolicy, PredictionRecords, entries_of
from services.worker.record_columns import Answered

_OK: Final = Code.CODE_OK


class Outcome:
    """`codes` is by the id() of the members that ran to their end; None: all are answered OK. `records` are
    those of the log, serialised; `omitted` counts requests answered OK whose tensors are not in them;
    `named`: variant and experiment, where all members have the same."""

    __slots__ = ("codes", "named", "omitted", "records", "times")

    def __init__(self, times: Answered, codes: dict[int, Code] | None, made: Made) -> None:
        self.times = times
        self.codes = codes
        self.records = made.records
        self.omitted = made.omitted
        self.named = made.named


def outcome_of(
    batch: Batch,
    execution: Execution,
    started: float,
    records: PredictionRecords,
    payloads: PayloadPolicy,
    clock: Clock,
) -> Outcome:
    """Decide now, once: what is logged is what is answered."""
    now = clock.monotonic()
    times = Answered(started, now, clock.unix_us(), max(1, round((now - started) * 1e6)))
    codes: dict[int, Code] | None = None
    if not execution.failures and len(execution.parts) == 1 and _in_time(batch.items, now):
        made = records.of_part(execution.parts[0], times, payloads)
    else:

        def code(item: Item) -> Code:
            if item.done:
                return Cancelled.code
            return _OK if item.deadline > now else DeadlineExceeded.code

        entries = [entry for part in execution.parts for entry in entries_of(part, code)]
        codes = {id(entry.item): entry.code for entry in entries}
        entries += [Entry(item, error.code) for item, error in execution.failures]
        made = records.of_entries(entries, times, payloads)
    return Outcome(times, codes, made)


def _in_time(items: Sequence[Item], now: float) -> bool:
    """Whether somebody waits for each of them."""
    for item in items:  # noqa: SIM110 - a generator costs more than what it goes through
        if item.done or item.deadline <= now:
            return False
    return True
