"""Records of inference.predictions.v1 for what the router answered without a worker: refusals, errors, and
what the result cache gave.

What a worker ran is in the worker's log. Requests for models that are not deployed are in no log: there is no
version that they would count for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import structlog
from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest
from headrace.v1.events_pb2 import PredictionBatch
from headrace.v1.tensor_pb2 import Code, Tensor

from services.common.clock import Clock
from services.common.errors import HeadraceError
from services.common.eventlog import EventLog
from services.common.ids import new_id
from services.router.routing_table import Target

if TYPE_CHECKING:
    from services.router.call import Call

log = structlog.get_logger(__name__)

_US_MAX: Final = (1 << 32) - 1
_ROWS_MAX: Final = (1 << 32) - 1
#: Requests in one record.
_RECORD_ITEMS: Final = 2000
#: As at the workers: larger requests are logged without their tensors, records are cut at about this size.
_REQUEST_BYTES: Final = 1 << 20
_RECORD_BYTES: Final = 4 << 20


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
        try:
            record = columns(self._source, self._clock, target, members, cached=False)
            self._events.append("/".join(target.key).encode(), record.SerializeToString())
        except HeadraceError as error:
            if not self.dropped:
                log.warning("refusals_not_logged", reason=error.message)
            self.dropped += len(members)
        except Exception:
            # One record that cannot be written must not take those behind it along.
            log.exception("refusals_not_logged")
            self.dropped += len(members)


class HitLog:
    """Appends what the cache answered, before it is answered."""

    def __init__(self, events: EventLog, source: str, clock: Clock) -> None:
        self._events = events
        self._source = source
        self._clock = clock

    def append(self, hits: Sequence[tuple[Call, PredictReply]]) -> bool:
        """Log `hits`; False where the log takes nothing more: then they must not be answered from the cache.
        What was appended before it was full may then be in the log twice, once as computed."""
        groups: dict[object, list[tuple[Call, PredictReply]]] = {}
        for index, (call, reply) in enumerate(hits):
            groups.setdefault(_layout(call, reply, index), []).append((call, reply))
        try:
            for members in groups.values():
                for part in _cut(members):
                    self._append(part)
        except HeadraceError:
            return False
        return True

    def _append(self, hits: Sequence[tuple[Call, PredictReply]]) -> None:
        call, reply = hits[0]
        target, route = call.target, call.route
        if target is None or route is None:
            raise RuntimeError("a hit of a request that was not routed")
        members = [(one, Code.CODE_OK) for one, _ in hits]
        record = columns(self._source, self._clock, target, members, cached=True)
        if route.log_payloads and _payload(call, reply) <= _REQUEST_BYTES:
            record.inputs.extend(_joined([one.request.inputs for one, _ in hits]))
            record.outputs.extend(_joined([given.outputs for _, given in hits]))
        self._events.append("/".join(target.key).encode(), record.SerializeToString())


def _layout(call: Call, reply: PredictReply, index: int) -> object:
    """Equal for hits whose tensors can stand one after the other in one record."""
    target, route = call.target, call.route
    if target is None or route is None or not route.log_payloads:
        return (target, route is None)
    size = _payload(call, reply)
    if not target.batched or size > _REQUEST_BYTES:
        return (target, index)
    tensors = (*call.request.inputs, *reply.outputs)
    return (target, len(reply.outputs), *((t.name, t.datatype, *t.shape[1:]) for t in tensors))


def _cut(hits: Sequence[tuple[Call, PredictReply]]) -> Iterator[Sequence[tuple[Call, PredictReply]]]:
    """Parts of at most so many requests and about so many bytes."""
    first = size = 0
    for index, hit in enumerate(hits):
        if index > first and (index - first >= _RECORD_ITEMS or size > _RECORD_BYTES):
            yield hits[first:index]
            first, size = index, 0
        size += _payload(*hit)
    yield hits[first:]


def _payload(call: Call, reply: PredictReply) -> int:
    return sum(len(t.data) for t in call.request.inputs) + sum(len(t.data) for t in reply.outputs)


def _joined(parts: Sequence[Sequence[Tensor]]) -> Iterator[Tensor]:
    """The tensors of several requests of one layout, concatenated along the first dimension."""
    if len(parts) == 1:
        yield from parts[0]
        return
    for tensors in zip(*parts, strict=True):
        first = tensors[0]
        yield Tensor(
            name=first.name,
            datatype=first.datatype,
            shape=[sum(tensor.shape[0] for tensor in tensors), *first.shape[1:]],
            data=b"".join(tensor.data for tensor in tensors),
        )


def columns(
    source: str, clock: Clock, target: Target, members: Sequence[tuple[Call, Code]], *, cached: bool
) -> PredictionBatch:
    """A record of `members`, all of `target`, without tensors."""
    now_us = clock.unix_us()
    now = clock.monotonic()
    requests = [call.request for call, _ in members]
    count = len(members)
    return PredictionBatch(
        batch_id=new_id(),
        source=source,
        writer=PredictionBatch.WRITER_ROUTER,
        model=target.key[0],
        version=target.version,
        artifact_digest=target.digest,
        answered_at_us=now_us,
        request_ids=b"".join(r.request_id if len(r.request_id) == 16 else bytes(16) for r in requests),
        unit_hashes=[call.unit_hash for call, _ in members],
        variants=[0] * count,
        variant_names=[target.variant],
        propensities=[call.propensity for call, _ in members],
        revisions=[call.route.revision if call.route else 0 for call, _ in members],
        codes=[code for _, code in members],
        origins=[r.origin for r in requests],
        attempts=[call.attempt for call, _ in members],
        cached=[cached] * count,
        latency_us=[
            _microseconds(now_us - r.received_at_us if r.received_at_us else (now - call.began_at) * 1e6)
            for r, (call, _) in zip(requests, members, strict=True)
        ],
        queue_us=[0] * count,
        compute_us=[0] * count,
        rows=[_rows(r) for r in requests],
        experiments=[1] * count if target.experiment else [],
        experiment_ids=[target.experiment] if target.experiment else [],
    )


def _rows(request: PredictRequest) -> int:
    """What the request says; nobody has checked it where it was refused."""
    claimed = request.inputs[0].shape[0] if request.inputs and request.inputs[0].shape else 0
    return min(max(0, claimed), _ROWS_MAX)


def _microseconds(value: float) -> int:
    return min(max(0, int(value)), _US_MAX)
