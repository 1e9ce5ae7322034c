"""What analytics says of trials: read from `analytics.verdicts.v1`, the newest on each trial kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime

from google.protobuf.message import DecodeError
from headrace.v1.trials_pb2 import Verdict

from services.common.bus import Bus, Malformed, Record
from services.common.topics import VERDICTS
from services.registry.edge import Edge

GROUP = "registry"


def verdicts_followed(
    edge: Edge, bus: Bus, on_change: Callable[[], None]
) -> AbstractAsyncContextManager[None]:
    """Store verdicts while the context is open, and call `on_change` after some were. Redelivered and
    overtaken ones change nothing, so nothing needs to be claimed."""

    async def on_verdicts(records: Sequence[Record]) -> None:
        newest: dict[str, Verdict] = {}
        for index, record in enumerate(records):
            verdict = parse(index, record)
            seen = newest.get(verdict.trial_id)
            if seen is None or seen.computed_at_us <= verdict.computed_at_us:
                newest[verdict.trial_id] = verdict
        async with edge.transaction() as tx:
            # Sorted, so that two replicas never wait for each other's rows
            for trial_id, verdict in sorted(newest.items()):
                computed_at = datetime.fromtimestamp(verdict.computed_at_us / 1e6, UTC)
                await tx.put_verdict(trial_id, verdict.SerializeToString(), computed_at, edge.clock.now())
        edge.metrics.verdicts.inc(len(records))
        on_change()

    return bus.consume(VERDICTS, GROUP, on_verdicts)


def parse(index: int, record: Record) -> Verdict:
    """The verdict in `record`. Raises Malformed."""
    try:
        verdict = Verdict.FromString(record.value or b"")
    except DecodeError as error:
        raise Malformed(index, "not a Verdict") from error
    if not verdict.trial_id or "\0" in verdict.trial_id:
        raise Malformed(index, "a verdict names its trial")
    # The last second that a datetime can hold is in the year 9999
    if not 0 < verdict.computed_at_us < 253_402_300_800_000_000:
        raise Malformed(index, "a verdict says when it was computed")
    return verdict
