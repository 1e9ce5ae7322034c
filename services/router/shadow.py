"""Copies of answered requests for a version that is tried out, and what the two versions said side by side.

Nothing here stands in the way of production: a copy is sent after the answer has left, with low priority,
only while fewer than `limit` are under way and their bytes within a bound, and never retried; comparing
happens in a thread, one turn at a time. What finds no room is dropped and counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, MutableSequence, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import structlog
from headrace.v1.dataplane_pb2 import Origin, PredictReply, PredictRequest, Priority
from headrace.v1.events_pb2 import OutputComparison, ShadowComparison, ShadowVerdict
from headrace.v1.tensor_pb2 import Code

from services.common.bus import Bus, Record
from services.common.clock import Clock
from services.common.errors import HeadraceError
from services.common.frames import lost
from services.common.frames.detached import Buffer
from services.common.ids import new_id
from services.common.shared_memory import in_shared_memory
from services.common.targeting import Value, attribute
from services.common.topics import SHADOWS
from services.router.comparison import Comparison, Output, compare
from services.router.endpoints import Endpoints
from services.router.group import Endpoint, Group
from services.router.outliers import verdict
from services.router.routing_table import Route, Shadow, Target, VersionKey
from services.router.stats import Stats

log = structlog.get_logger(__name__)

#: A shadow that takes longer has failed, seconds.
_PATIENCE_S: Final = 10.0
_US_MAX: Final = (1 << 32) - 1
#: Values told apart in one record; the rest is `_OTHER`. And how much of a long one is kept.
_MOST_SLICES: Final = 20
_OTHER: Final = "other"
_SLICE_LENGTH: Final = 256
_NOTHING: Final = Output(OutputComparison.KIND_UNSPECIFIED, np.zeros(0, np.bool_))


@dataclass(slots=True, eq=False)
class Copy:
    """One request on its second way."""

    request: PredictRequest
    route: Route
    target: Target
    shadow: Shadow
    answered: PredictReply
    latency_s: float
    sent_at: float = 0.0
    reply: PredictReply | None = None
    shadow_latency_s: float = 0.0
    #: Of the request and of both answers, taking the shadow's to be as long as the other one.
    nbytes: int = 0
    #: The value of the attribute by which comparisons are told apart.
    slice: str = ""


class Mirror:
    """Takes answered requests, sends copies, compares."""

    def __init__(
        self,
        endpoints: Endpoints,
        bus: Bus,
        stats: Stats,
        clock: Clock,
        source: str,
        *,
        limit: int,
        limit_bytes: int = 64 << 20,
    ) -> None:
        """`limit` copies of `limit_bytes` in all are under way at most."""
        self._endpoints = endpoints
        self._bus = bus
        self._stats = stats
        self._clock = clock
        self._source = source
        self._limit = limit
        self._limit_bytes = limit_bytes
        self._waiting: list[tuple[Copy, Sequence[Buffer]]] = []
        self._answered: list[Copy] = []
        self._some = asyncio.Event()
        #: Copies that are waiting, sent, or being compared.
        self.under_way = 0
        #: Their requests and answers.
        self.nbytes = 0

    @staticmethod
    def chosen(shadow: Shadow, request: PredictRequest) -> bool:
        """Whether the request is of the share that is copied; by its id, so it can be told afterwards. None
        is whose inputs its caller may change once it has its answer."""
        chosen = int.from_bytes(request.request_id[-4:], "big") % 10_000 < shadow.share
        return chosen and not in_shared_memory(request)

    def offer(
        self, sent: Sequence[Buffer], route: Route, target: Target, reply: PredictReply, latency_s: float
    ) -> None:
        """What was `sent` to `target`, a serialized PredictRequest in pieces, was answered with `reply`,
        which is the mirror's from here on. Does next to nothing: the answer has not left yet."""
        shadow = route.shadow
        if shadow is None:
            return
        nbytes = sum(map(len, sent))
        if self.nbytes + nbytes <= self._limit_bytes:
            nbytes += 2 * reply.ByteSize()
        if self.under_way >= self._limit or self.nbytes + nbytes > self._limit_bytes:
            self._stats.shadowed(shadow.target.key, "dropped")
            return
        self.under_way += 1
        self.nbytes += nbytes
        copy = Copy(PredictRequest(), route, target, shadow, reply, latency_s, nbytes=nbytes)
        self._waiting.append((copy, sent))
        if len(self._waiting) == 1:
            # Behind the flush of this turn's replies.
            asyncio.get_running_loop().call_soon(self._send_all)

    def _send_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        now = time.monotonic()
        for copy, sent in waiting:
            try:
                self._read(copy, sent)
                self._send(copy, now)
            except Exception:
                log.exception("shadow_failed", model=copy.request.model)
                self._drop(copy)

    @staticmethod
    def _read(copy: Copy, sent: Sequence[Buffer]) -> None:
        request, slice_by = copy.request, copy.shadow.slice_by
        request.ParseFromString(b"".join(sent))
        copy.slice = _text(attribute(request, slice_by)) if slice_by else ""
        request.ClearField("attributes")

    def _send(self, copy: Copy, now: float) -> None:
        request, target = copy.request, copy.shadow.target
        group = self._endpoints.group(target.key)
        endpoint = group.pick(copy.route.balancing, request.unit_hash, now)
        if endpoint is None:
            self._drop(copy)
            return
        request.version, request.variant = target.version, target.variant
        request.experiment = ""
        request.origin, request.priority = Origin.ORIGIN_SHADOW, Priority.PRIORITY_LOW
        request.attempt, request.propensity, request.trace = 0, 1.0, b""
        copy.sent_at = now
        endpoint.take(now)
        endpoint.calls.submit(
            request,
            now + min(copy.route.timeout_s, _PATIENCE_S),
            lambda reply, _payload: self._on_reply(copy, group, endpoint, reply),
        )

    def _on_reply(self, copy: Copy, group: Group, endpoint: Endpoint, reply: PredictReply) -> None:
        endpoint.in_flight -= 1
        now = time.monotonic()
        gone = lost(reply)
        # Held for no time: behind production, a shadow that is late blames nobody.
        said = verdict(reply.code, lost=gone, held_s=0.0, expected_s=0.0)
        group.judge(endpoint, said, copy.sent_at, now)
        if gone:
            self._drop(copy)
            return
        copy.reply, copy.shadow_latency_s = reply, now - copy.sent_at
        self._answered.append(copy)
        self._some.set()

    def _drop(self, copy: Copy) -> None:
        self._over([copy])
        self._stats.shadowed(copy.shadow.target.key, "dropped")

    async def run(self) -> None:
        """Compare and publish what was answered, until cancelled. Kafka away: dropped, after its deadline."""
        while True:
            await self._some.wait()
            self._some.clear()
            answered, self._answered = self._answered, []
            try:
                records = await asyncio.to_thread(self._compare, answered)
                for copies, record in records:
                    for said in record.verdicts:
                        name = ShadowVerdict.Name(said).removeprefix("SHADOW_VERDICT_").lower()
                        self._stats.shadowed(copies[0].shadow.target.key, name)
                await self._bus.publish([_kafka(record) for _, record in records])
            except HeadraceError as error:
                log.warning("shadows_not_published", requests=len(answered), reason=error.message)
                self._stats.unpublished_shadows += len(answered)
            except Exception:
                log.exception("shadows_not_compared", requests=len(answered))
                self._stats.unpublished_shadows += len(answered)
            finally:
                self._over(answered)

    def _over(self, copies: Sequence[Copy]) -> None:
        """Nobody holds them any more."""
        self.under_way -= len(copies)
        self.nbytes -= sum(copy.nbytes for copy in copies)

    def _compare(self, copies: Sequence[Copy]) -> list[tuple[list[Copy], ShadowComparison]]:
        groups: dict[tuple[VersionKey, str, Shadow], list[Copy]] = {}
        for copy in copies:
            groups.setdefault((copy.target.key, copy.target.digest, copy.shadow), []).append(copy)
        now_us = self._clock.unix_us()
        return [(members, comparison_record(members, self._source, now_us)) for members in groups.values()]


def comparison_record(copies: Sequence[Copy], source: str, now_us: int) -> ShadowComparison:
    """The record of answered `copies`, all between the same two versions."""
    first = copies[0]
    replies = [copy.reply or PredictReply(code=Code.CODE_UNKNOWN) for copy in copies]
    compared = [
        compare(c.answered.code, c.answered.outputs, reply.code, reply.outputs, c.shadow.tolerance)
        for c, reply in zip(copies, replies, strict=True)
    ]
    requests = [copy.request for copy in copies]
    record = ShadowComparison(
        batch_id=new_id(),
        source=source,
        model=first.target.key[0],
        version=first.target.version,
        shadow_version=first.shadow.target.version,
        artifact_digest=first.target.digest,
        shadow_artifact_digest=first.shadow.target.digest,
        compared_at_us=now_us,
        tolerance=first.shadow.tolerance,
        request_ids=b"".join(r.request_id if len(r.request_id) == 16 else bytes(16) for r in requests),
        unit_hashes=[r.unit_hash for r in requests],
        revisions=[r.revision for r in requests],
        codes=[copy.answered.code for copy in copies],
        shadow_codes=[reply.code for reply in replies],
        latency_us=[_microseconds(copy.latency_s) for copy in copies],
        shadow_latency_us=[_microseconds(copy.shadow_latency_s) for copy in copies],
        verdicts=[one.verdict for one in compared],
        rows=[one.rows for one in compared],
        rows_equal=[one.rows_equal for one in compared],
        outputs=list(_outputs(compared)),
        slice_by=first.shadow.slice_by,
    )
    if first.shadow.slice_by:
        record.slices.extend(_slices([copy.slice for copy in copies], record.slice_names))
    return record


def _slices(values: Sequence[str], names: MutableSequence[str]) -> Iterator[int]:
    """The place of each value in `names`, which grows by them up to the bound."""
    places: dict[str, int] = {}
    for value in values:
        known = value if value in places or len(places) < _MOST_SLICES else _OTHER
        if known not in places:
            places[known] = len(places)
            names.append(known)
        yield places[known]


def _text(value: Value | None) -> str:
    """How an attribute is written in a record; truth values and whole numbers as in JSON."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value)[:_SLICE_LENGTH]


def _outputs(compared: Sequence[Comparison]) -> Sequence[OutputComparison]:
    kinds = {(name, output.kind): None for one in compared for name, output in one.outputs.items()}
    columns = []
    for name, kind in kinds:
        found = [one.outputs.get(name) for one in compared]
        column = [one if one is not None and one.kind == kind else _NOTHING for one in found]
        columns.append(
            OutputComparison(
                name=name,
                kind=kind,
                rows_equal=[int(one.same.sum()) for one in column],
                largest_difference=[one.largest for one in column],
                mean_difference=[one.mean for one in column],
                rows_same_top=[one.same_top for one in column],
                row_elements=[one.width for one in column],
                rows_same_top_five=[one.same_top_five for one in column],
            )
        )
    return columns


def _kafka(record: ShadowComparison) -> Record:
    key = f"{record.model}/{record.shadow_version}".encode()
    return Record(SHADOWS.name, key, record.SerializeToString())


def _microseconds(seconds: float) -> int:
    return min(max(0, int(seconds * 1e6)), _US_MAX)
