"""Which requests wait and which leave together. Decides only; `batcher.py` acts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from headrace.v1.dataplane_pb2 import Origin, PredictRequest

from services.common.errors import DeadlineExceeded, HeadraceError, InvalidArgument, ResourceExhausted
from services.worker.input_layout import MergeKey
from services.worker.priorities import RANKS, WEIGHTS, FairShare, Rank, most_of, rank_of, room_for, roomy
from services.worker.run_time import RunTime

# A run may take this much longer than estimated, and timers fire up to a tick late.
_SAFETY = 1.25
_TICK_S = 0.001
_NORMAL = Rank.NORMAL
_ONLINE = Origin.ORIGIN_ONLINE

#: A PredictReply, serialised, or why there is none.
Answer = bytes | HeadraceError


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
        if not self.preferred_rows:
            return 0
        return max((rows for rows in self.preferred_rows if rows <= min(queued, self.max_rows)), default=0)


class Item:
    """One request on its way through the batcher. Settled exactly once, with a reply or an error, unless its
    caller cancelled it."""

    __slots__ = (
        "_settle",
        "data",
        "deadline",
        "done",
        "id",
        "key",
        "nbytes",
        "queue_us",
        "queued_at",
        "rank",
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
        self.id = request.id
        self.rows = rows
        self.key = key
        self.data = data
        self.nbytes = len(data[0]) if len(data) == 1 else sum(map(len, data))
        self.deadline = deadline
        self.rank = rank_of(request) if request.origin > _ONLINE or request.priority else _NORMAL
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
    """Requests that run together: one merge key, those of one priority class in order of arrival."""

    items: list[Item]
    rows: int
    reason: Release


@dataclass(slots=True)
class _Lane:
    """The waiting requests of one merge key: per class that has any, oldest first."""

    queues: dict[Rank, OrderedDict[Item, None]] = field(default_factory=dict)
    rows: int = 0
    # No later than any member's; not raised when that member leaves, so a batch may only leave early by it.
    deadline: float = inf

    def oldest(self) -> float:
        """When the first of them was queued."""
        return min([next(iter(queue)).queued_at for queue in self.queues.values()])


class BatchQueue:
    """Requests waiting for a run, bounded in rows and bytes.

    Where all that wait for one run fit into it, they leave together. Where they do not, the classes of
    `priorities.py` share the rows by their weights, merge keys take turns within a class, and within both the
    oldest leaves first. Times are seconds on the scale of the `now` arguments."""

    def __init__(self, policy: BatchPolicy, run_time: RunTime) -> None:
        self.policy = policy
        self.rows = 0
        self.nbytes = 0
        #: No later than the earliest deadline in the queue.
        self.earliest_deadline = inf
        self._run_time = run_time
        # What HIGH and LOW hold of `rows` and `nbytes`; the rest is NORMAL's, so counting costs it nothing.
        self._rows_beside = [0] * len(RANKS)
        self._nbytes_beside = [0] * len(RANKS)
        self._shares = FairShare()
        self._lanes: dict[MergeKey, _Lane] = {}
        # Per class the lanes where it has something, in the order of their turns.
        self._turns: tuple[OrderedDict[MergeKey, _Lane], ...] = tuple(OrderedDict() for _ in RANKS)
        # Those that have a lane.
        self._active: list[Rank] = []

    @property
    def policy(self) -> BatchPolicy:
        return self._policy

    @policy.setter
    def policy(self, policy: BatchPolicy) -> None:
        self._policy = policy
        self._roomy_rows = roomy(policy.max_queue_rows)
        self._roomy_bytes = roomy(policy.max_queue_bytes)

    @property
    def rows_of(self) -> list[int]:
        """Rows that wait, by class."""
        return _with_normal(self.rows, self._rows_beside)

    def __len__(self) -> int:
        return sum(len(queue) for lane in self._lanes.values() for queue in lane.queues.values())

    def offer(self, items: Sequence[Item], now: float, floor: float) -> list[tuple[Item, HeadraceError]]:
        """Take `items` in; gives those that are not taken, and why. Returned, not raised: under overload this
        is the common path."""
        refused: list[tuple[Item, HeadraceError]] = []
        soonest = now + floor
        key: MergeKey | None = None
        rank = _NORMAL
        lane = queue = None
        for item in items:
            rows, nbytes, deadline = item.rows, item.nbytes, item.deadline
            if (
                deadline <= soonest
                or self.rows + rows > self._roomy_rows
                or self.nbytes + nbytes > self._roomy_bytes
            ):
                refusal = self._refusal(item, now, floor)
                if refusal is not None:
                    refused.append((item, refusal))
                    continue
            if lane is None or queue is None or item.key is not key or item.rank is not rank:
                key, rank = item.key, item.rank
                lane = self._lanes.get(key)
                if lane is None:
                    lane = self._lanes[key] = _Lane()
                queue = lane.queues.get(rank)
                if queue is None:
                    queue = self._open(key, lane, rank)
            item.queued_at = now
            queue[item] = None
            lane.rows += rows
            self.rows += rows
            self.nbytes += nbytes
            if rank is not _NORMAL:
                self._rows_beside[rank] += rows
                self._nbytes_beside[rank] += nbytes
            lane.deadline = min(lane.deadline, deadline)
            self.earliest_deadline = min(self.earliest_deadline, deadline)
        return refused

    def remove(self, item: Item) -> bool:
        """Take `item` out wherever it waits; False where it does not wait (any more)."""
        lane = self._lanes.get(item.key)
        if lane is None or item not in lane.queues.get(item.rank, ()):
            return False
        self._take(lane, item)
        return True

    def release(self, now: float, *, drain: bool = False) -> tuple[Batch | None, list[Item]]:
        """The next batch that should run now, and the requests met on the way that cannot make their deadline
        any more. With `drain`, nothing waits for company."""
        late: list[Item] = []
        if len(self._lanes) == 1 and not self._policy.max_delay and not self._policy.preferred_rows:
            # By far the most common: all that waits may leave, and fits.
            ((key, lane),) = self._lanes.items()
            if lane.rows < self._policy.max_rows and lane.deadline > now + self._run_time.estimate(lane.rows):
                return self._take_all(key, lane, Release.TURN), late
        for rank in self._shares.order(self._active):
            turns = self._turns[rank]
            for key in list(turns):
                lane = turns[key]
                reason = self._ripe(lane, now, drain=drain)
                if reason is None:
                    continue
                turns.move_to_end(key)
                batch = self._fill(key, lane, now, reason, late)
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
            for queue in lane.queues.values():
                yield from queue

    def _refusal(self, item: Item, now: float, floor: float) -> HeadraceError | None:
        if item.deadline <= now + floor:
            return too_late()
        policy, rank = self.policy, item.rank
        nbytes_of = _with_normal(self.nbytes, self._nbytes_beside)
        for unit, size, held, most, one_batch in (
            ("rows", item.rows, self.rows_of, policy.max_queue_rows, policy.max_rows),
            ("bytes", item.nbytes, nbytes_of, policy.max_queue_bytes, 0),
        ):
            limit = most_of(rank, most, one_batch)
            if size > limit:
                return InvalidArgument(
                    f"the request has {size} {unit}, at most {limit} are taken at its priority",
                    field="inputs",
                )
            if size > room_for(rank, held, most, one_batch):
                return self._full(rank)
        return None

    def _full(self, rank: Rank) -> HeadraceError:
        """Come back when the rows of the class have left at its share, or all of them at once."""
        held = self.rows_of
        others = [other for other in RANKS if held[other] or other == rank]
        by_share = held[rank] * sum(WEIGHTS[other] for other in others) / WEIGHTS[rank]
        rows, most = min(self.rows, by_share), self.policy.max_rows
        wait = self._run_time.estimate(most) * rows / most
        return ResourceExhausted("the queue of the model is full", retry_after_ms=max(1, round(wait * 1e3)))

    def _leaves_at(self, lane: _Lane) -> float:
        if not self.policy.max_delay:
            return lane.oldest()
        run = self._run_time.estimate(min(lane.rows, self.policy.max_rows))
        return min(lane.oldest() + self.policy.max_delay, lane.deadline - run * _SAFETY - _TICK_S)

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
        if now >= lane.oldest() + policy.max_delay:
            return Release.DELAY
        return Release.DEADLINE if now >= self._leaves_at(lane) else None

    def _fill(
        self, key: MergeKey, lane: _Lane, now: float, reason: Release, late: list[Item]
    ) -> Batch | None:
        preferred = self.policy.preferred(lane.rows)
        limit = preferred or self.policy.max_rows
        if preferred:
            reason = Release.PREFERRED
        run_time = self._run_time
        if lane.rows <= limit and lane.deadline > now + run_time.estimate(lane.rows):
            return self._take_all(key, lane, reason)
        floor = run_time.floor(now)
        items: list[Item] = []
        rows, tightest = 0, inf
        while lane.queues and rows < limit:
            rank = self._shares.next(lane.queues)
            item = next(iter(lane.queues[rank]))
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
            self._shares.left(rank, item.rows)
            items.append(item)
            rows, tightest = grown, earliest
        if not items:
            return None
        return Batch(items, rows, Release.ALONE if rows > self.policy.max_rows else reason)

    def _open(self, key: MergeKey, lane: _Lane, rank: Rank) -> OrderedDict[Item, None]:
        turns = self._turns[rank]
        if not turns:
            self._active.append(rank)
            self._shares.joins(rank)
        turns[key] = lane
        queue = lane.queues[rank] = OrderedDict()
        return queue

    def _take_all(self, key: MergeKey, lane: _Lane, reason: Release) -> Batch:
        items: list[Item] = []
        left: list[tuple[Rank, int]] = []
        for rank in sorted(lane.queues) if len(lane.queues) > 1 else list(lane.queues):
            of_rank = list(lane.queues[rank])
            rows = lane.rows if len(lane.queues) == 1 else sum([item.rows for item in of_rank])
            self._left(rank, rows, sum([item.nbytes for item in of_rank]))
            self._close(key, rank)
            items += of_rank
            left.append((rank, rows))
        del self._lanes[key]
        if self.rows:  # else nobody pays for what nobody else wanted
            for rank, rows in left:
                self._shares.left(rank, rows)
        return Batch(items, lane.rows, reason)

    def _close(self, key: MergeKey, rank: Rank) -> None:
        turns = self._turns[rank]
        del turns[key]
        if not turns:
            self._active.remove(rank)

    def _take(self, lane: _Lane, item: Item) -> None:
        rank, queue = item.rank, lane.queues[item.rank]
        del queue[item]
        lane.rows -= item.rows
        self._left(rank, item.rows, item.nbytes)
        if not queue:
            del lane.queues[rank]
            self._close(item.key, rank)
            if not lane.queues:
                del self._lanes[item.key]

    def _left(self, rank: Rank, rows: int, nbytes: int) -> None:
        self.rows -= rows
        self.nbytes -= nbytes
        if rank != _NORMAL:
            self._rows_beside[rank] -= rows
            self._nbytes_beside[rank] -= nbytes
        if not self.rows:
            self.earliest_deadline = inf


def too_late() -> DeadlineExceeded:
    """What a request is told that cannot be answered in time."""
    return DeadlineExceeded("the deadline passed before the model could run")


def _with_normal(total: int, beside: list[int]) -> list[int]:
    held = list(beside)
    held[_NORMAL] = total - sum(beside)
    return held
