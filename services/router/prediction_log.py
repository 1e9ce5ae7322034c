"""Records of inference.predictions.v1 for what the router answered without a worker: refusals and errors.

What a worker ran is in the worker's log. Requests for models that are not deployed are in no log: there is no
version that they would count for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import structlog
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code

from services.common.clock import Clock
from services.common.errors import HeadraceError
from services.common.eventlog import EventLog
from services.common.ids import new_id
from services.router.routing_table import Target

if TYPE_CHECKING:
    from services.router.call import Call

log = structlog.get_logger(__name__)

_US_MAX: Final = (1 << 32) - 1
#: Requests in one record.
_RECORD_ITEMS: Final = 2000


class RefusalLog:
    """Collects what one loop turn brings and appends it as one record per version.

    Nobody is refused for a full log here, since that would make more to log; what is lost is counted in
    `dropped`.
    """

    def __init__(self, events: EventLog, source: str, clock: Clock) -> None:
        self._events = events
        self._source = source
        self._clock = clock
        self._noted: list[tuple[Call, Code]] = []
        self.dropped = 0

    def note(self, call: Call, code: Code) -> None:
        """`call` is answered with `code`."""
        if call.target is None:
            return
        self._noted.append((call, code))
        if len(self._noted) == 1:
            asyncio.get_running_loop().call_soon(self.flush)

    def flush(self) -> None:
        """Append what was noted."""
        noted, self._noted = self._noted, []
        groups: dict[Target, list[tuple[Call, Code]]] = {}
        for call, code in noted:
            if call.target is not None:
                groups.setdefault(call.target, []).append((call, code))
        for target, members in groups.items():
            for first in range(0, len(members), _RECORD_ITEMS):
                self._append(target, members[first : first + _RECORD_ITEMS])

    def _append(self, target: Target, members: Sequence[tuple[Call, Code]]) -> None:
        record = self._record(target, members)
        try:
            self._events.append("/".join(target.key).encode(), record.SerializeToString())
        except HeadraceError as error:
            if not self.dropped:
                log.warning("refusals_not_logged", reason=error.message)
            self.dropped += len(members)

    def _record(self, target: Target, members: Sequence[tuple[Call, Code]]) -> PredictionBatch:
        now_us = self._clock.unix_us()
        now = self._clock.monotonic()
        requests = [call.request for call, _ in members]
        count = len(members)
        return PredictionBatch(
            batch_id=new_id(),
            source=self._source,
            writer=PredictionBatch.WRITER_ROUTER,
            model=target.key[0],
            version=target.version,
            artifact_digest=target.digest,
            answered_at_us=now_us,
            request_ids=b"".join(r.request_id if len(r.request_id) == 16 else bytes(16) for r in requests),
            unit_hashes=[call.unit_hash for call, _ in members],
            variants=[0] * count,
            variant_names=[target.variant],
            propensities=[r.propensity for r in requests],
            revisions=[r.revision for r in requests],
            codes=[code for _, code in members],
            origins=[r.origin for r in requests],
            attempts=[call.attempt for call, _ in members],
            cached=[False] * count,
            latency_us=[
                _microseconds(now_us - r.received_at_us if r.received_at_us else (now - call.began_at) * 1e6)
                for r, (call, _) in zip(requests, members, strict=True)
            ],
            queue_us=[0] * count,
            compute_us=[0] * count,
            rows=[r.inputs[0].shape[0] if r.inputs and r.inputs[0].shape else 0 for r in requests],
        )


def _microseconds(value: float) -> int:
    return min(max(0, int(value)), _US_MAX)
