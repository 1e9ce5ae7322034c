"""Which requests wait and which leave together. Decides only; `batcher.py` acts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from headrace.v1.dataplane_pb2 import PredictReply, PredictRequest

from services.common.errors import DeadlineExceeded, HeadraceError, InvalidArgument, ResourceExhausted
from services.worker.input_layout import MergeKey
from services.worker.run_time import RunTime

# A run may take this much longer than estimated, and timers fire up to a tick late.
_SAFETY = 1.25
_TICK_S = 0.001

Answer = PredictReply | HeadraceError


class Release(Enum):
    """Why a batch left the queue; the label of `headrace_worker_batches_total`."""

    FULL = "full"  # as many rows as fit
    PREFERRED = "preferred"  # a size that the deployment names was reached
    TURN = "turn"  # no delay is asked for: what was queued when the event loop turned
    DELAY = "delay"  # the longest wait was over
    DEADLINE = "deadline"  # more rows or more waiting would have made a member late
    ALONE = "alone"  # one request of more rows than a batch has
    DRAIN = "drain"  # the worker is leaving


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """How a model version is batched. Sizes are rows, not requests; `max_delay` is seconds, 0: never wait."""

    max_rows: int = 64
    max_delay: float = 0.0
    preferred_rows: tuple[int, ...] = ()
    max_queue_rows: int = 8192
    max_queue_bytes: int = 256 << 20

    def preferred(self, queued: int) -> int:
        """The largest preferred size that `queued` rows fill; 0 where there is none."""
        return max((rows for rows in self.preferred_rows if rows <= min(queued, self.max_rows)), default=0)


class Item:
    """One request on its way through the batcher. Settled exactly once, with a reply or an error, unless its
    caller cancelled it. The reply given to `settle` may be changed once `settle` has returned."""

    __slots__ = (
        "_settle",
        "data",
        "deadline",
        "done",
        "key",
        "nbytes",
        "queue_us",
        "queued_at",
        "request",
        "rows",
    )

    def __init__(
        self,
        request: PredictRequest,
        rows: int,
        key: MergeKey,
        data: tuple[bytes, ...],
        deadline: float,
        settle: Callable[[PredictRequest, Answer], None],
    ) -> None:
        self.request = request
        self.rows = rows
        self.key = key
        self.data = data
        self.nbytes = len(data[0]) if len(data) == 1 else sum(map(len, data))
        self.deadline = deadline
        self.queued_at = 0.0
        self.queue_us = 0
        self.done = False
        self._settle = settle

    def settle(self, answer: Answer) -> None:
        """Give the caller its answer; nothing happens where it has one or has gone."""
        if not self.done:
            self.done = True
            self._settle(self.request, answer)

    def abandon(self) -> None:
        """Its caller has gone: no answer will be delivered."""
        self.done = True


@dataclass(slots=True)
class Batch:
    """Requests that run together: one merge key, in order of arrival."""

    items: list[Item]
    rows: int
    reason: Release


@dataclass(slots=True)
class _Lane:
    """The waiting requests of one merge key, oldest first."""

    items: OrderedDict[Item, None] = field(default_factory=OrderedDict)
    rows: int = 0
    # No later than any member's; not raised when that member leaves, so a batch may only leave early by it.
    deadline: float = inf

    def first(self) -> Item:
        return next(iter(self.items))


class BatchQueue:
    """Requests waiting for a run, bounded in rows and bytes, oldest first within a merge key; keys take
    turns.

    Times are seconds on the scale of the `now` arguments."""

    def __init__(self, policy: BatchPolicy, run_time: RunTime) -> None:
        self.policy = policy
        self.rows = 0
        self.nbytes = 0
        #: No later than the earliest deadline in the queue.
        self.earliest_deadline = inf
        self._run_time = run_time
        self._lanes: OrderedDict[MergeKey, _Lane] = OrderedDict()

    def __len__(self) -> int:
        return sum(len(lane.items) for lane in self._lanes.values())

    def offer(self, item: Item, now: float, floor: float) -> HeadraceError | None:
        """Take `item` in, or say why not. Returned rather than raised: under overload this is the common
        path."""
        if (
            item.deadline <= now + floor
            or self.rows + item.rows > self.policy.max_queue_rows
            or self.nbytes + item.nbytes > self.policy.max_queue_bytes
        ):
            return self._refusal(item, now, floor)
        lane = self._lanes.get(item.key)
        if lane is None:
            lane = self._lanes[item.key] = _Lane()
        item.queued_at = now
        lane.items[item] = None
        lane.rows += item.rows
        self.rows += item.rows
        self.nbytes += item.nbytes
        lane.deadline = min(lane.deadline, item.deadline)
        self.earliest_deadline = min(self.earliest_deadline, item.deadline)
        return None

    def remove(self, item: Item) -> bool:
        """Take `item` out wherever it waits; False where it does not wait (any more)."""
        lane = self._lanes.get(item.key)
        if lane is None or item not in lane.items:
            return False
        self._take(lane, item)
        if not lane.items:
            del self._lanes[item.key]
        return True

    def release(self, now: float, *, drain: bool = False) -> tuple[Batch | None, list[Item]]:
        """The next batch that should run now, and the requests met on the way that cannot make their deadline
        any more. With `drain`, nothing waits for company."""
        late: list[Item] = []
        for key in list(self._lanes):
            lane = self._lanes[key]
            reason = self._ripe(lane, now, drain=drain)
            if reason is None:
                continue
            batch = self._fill(lane, now, reason, late)
            if lane.items:
                self._lanes.move_to_end(key)
            else:
                del self._lanes[key]
            if batch is not None:
                return batch, late
        return None, late

    def wake_at(self) -> float:
        """When `release` will next find a batch if nothing more arrives; infinity with an empty queue."""
        return min((self._leaves_at(lane) for lane in self._lanes.values()), default=inf)

    def expire(self, now: float) -> list[Item]:
        """Take out the requests whose deadline has passed."""
        expired = [item for item in self if item.deadline <= now]
        for item in expired:
            self.remove(item)
        self.earliest_deadline = min((item.deadline for item in self), default=inf)
        return expired

    def __iter__(self) -> Iterator[Item]:
        for lane in self._lanes.values():
            yield from lane.items

    def _refusal(self, item: Item, now: float, floor: float) -> HeadraceError:
        policy = self.policy
        if item.deadline <= now + floor:
            return too_late()
        if item.rows > policy.max_queue_rows:
            return InvalidArgument(
                f"the request has {item.rows} rows, at most {policy.max_queue_rows} are taken", field="inputs"
            )
        if item.nbytes > policy.max_queue_bytes:
            return InvalidArgument(
                f"the request has {item.nbytes} bytes, at most {policy.max_queue_bytes} are taken",
                field="inputs",
            )
        wait = self._run_time.estimate(policy.max_rows) * self.rows / policy.max_rows
        return ResourceExhausted("the queue of the model is full", retry_after_ms=max(1, round(wait * 1e3)))

    def _leaves_at(self, lane: _Lane) -> float:
        if not self.policy.max_delay:
            return lane.first().queued_at
        run = self._run_time.estimate(min(lane.rows, self.policy.max_rows))
        return min(lane.first().queued_at + self.policy.max_delay, lane.deadline - run * _SAFETY - _TICK_S)

    def _ripe(self, lane: _Lane, now: float, *, drain: bool) -> Release | None:
        policy = self.policy
        if lane.rows >= policy.max_rows:
            return Release.FULL
        if not policy.max_delay:
            return Release.TURN
        if policy.preferred(lane.rows):
            return Release.PREFERRED
        if drain:
            return Release.DRAIN
        if now >= lane.first().queued_at + policy.max_delay:
            return Release.DELAY
        return Release.DEADLINE if now >= self._leaves_at(lane) else None

    def _fill(self, lane: _Lane, now: float, reason: Release, late: list[Item]) -> Batch | None:
        preferred = self.policy.preferred(lane.rows)
        limit = preferred or self.policy.max_rows
        if preferred:
            reason = Release.PREFERRED
        run_time = self._run_time
        if lane.rows <= limit and lane.deadline > now + run_time.estimate(lane.rows):
            return self._take_all(lane, reason)
        floor = run_time.floor(now)
        items: list[Item] = []
        rows, tightest = 0, inf
        while lane.items and rows < limit:
            item = lane.first()
            if item.deadline <= now + floor:
                late.append(item)
                self._take(lane, item)
                continue
            grown, earliest = rows + item.rows, min(tightest, item.deadline)
            if items and grown > limit:
                break
            if items and now + run_time.estimate(grown) > earliest:
                reason = Release.DEADLINE
                break
            self._take(lane, item)
            items.append(item)
            rows, tightest = grown, earliest
        if not items:
            return None
        return Batch(items, rows, Release.ALONE if rows > self.policy.max_rows else reason)

    def _take_all(self, lane: _Lane, reason: Release) -> Batch:
        items, rows = list(lane.items), lane.rows
        lane.items.clear()
        lane.rows = 0
        self._left(rows, sum([item.nbytes for item in items]))
        return Batch(items, rows, reason)

    def _take(self, lane: _Lane, item: Item) -> None:
        del lane.items[item]
        lane.rows -= item.rows
        self._left(item.rows, item.nbytes)

    def _left(self, rows: int, nbytes: int) -> None:
        self.rows -= rows
        self.nbytes -= nbytes
        if not self.rows:
            self.earliest_deadline = inf


def too_late() -> DeadlineExceeded:
    """What a request is told that cannot be answered in time."""
    return DeadlineExceeded("the deadline passed before the model could run")
