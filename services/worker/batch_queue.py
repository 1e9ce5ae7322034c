"""Which requests wait and which leave together. Decides only; `batcher.py` acts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf
from typing import Final

from services.common.errors import DeadlineExceeded, HeadraceError, InvalidArgument, ResourceExhausted
from services.worker.input_layout import MergeKey
from services.worker.item import Batch, Item, Release
from services.worker.priorities import RANKS, WEIGHTS, FairShare, Rank, most_of, room_for, roomy
from services.worker.run_time import Pace, RunTime

# A run may take this much longer than estimated, and timers fire up to a tick late.
_SAFETY = 1.25
_TICK_S = 0.001
_NORMAL: Final = Rank.NORMAL


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """How a model version is batched. Sizes are rows, not requests; times are seconds. `max_delay` 0: never
    wait for company. `max_queue`: who would wait longer is refused at once, unless the next run has room.
    `grows`: nobody asked for `max_rows`, and a version that runs more in no time may take more. `apart`: each
    request leaves by itself, since to join them costs more than it saves."""

    max_rows: int = 64
    max_delay: float = 0.0
    preferred_rows: tuple[int, ...] = ()
    max_queue_rows: int = 8192
    max_queue_bytes: int = 256 << 20
    max_queue: float = inf
    grows: bool = False
    apart: bool = False

    def preferred(self, queued: int) -> int:
        """The largest preferred size that `queued` rows fill; 0 where there is none."""
        if not self.preferred_rows:
            return 0
        return max((rows for rows in self.preferred_rows if rows <= min(queued, self.max_rows)), default=0)

    def grown(self, rows: int) -> BatchPolicy:
        """The same for a version that runs so many rows in no time."""
        if not self.grows or rows <= self.max_rows:
            return self
        return replace(self, max_rows=rows, max_queue_rows=max(self.max_queue_rows, rows))

    def parted(self) -> BatchPolicy:
        """The same for a version whose requests are better not joined, unless somebody asked for batches."""
        return self if self.max_delay or self.preferred_rows else replace(self, apart=True)


class _Lane:
    """The waiting requests of one merge key: per class that has any, oldest first."""

    __slots__ = ("deadline", "queues", "rows")

    def __init__(self) -> None:
        self.queues: dict[Rank, OrderedDict[Item, None]] = {}
        self.rows = 0
        # No later than any member's; not raised when that one leaves: a batch may only leave early by it.
        self.deadline = inf

    def oldest(self) -> float:
        """When the first of them was queued."""
        return min([next(iter(queue)).queued_at for queue in self.queues.values()])


class BatchQueue:
    """Requests waiting for a run, bounded in rows and bytes.

    Where all that wait for one run fit into it, they leave together. Where they do not, the classes of
    `priorities.py` share the rows by their weights, merge keys take turns within a class, and within both the
    oldest leaves first. Times are seconds on the scale of the `now` arguments."""

    def __init__(self, policy: BatchPolicy, run_time: RunTime, slots: int = 1) -> None:
        self.policy = policy
        self.rows = 0
        self.nbytes = 0
        #: No later than the earliest deadline in the queue.
        self.earliest_deadline = inf
        self._run_time = run_time
        self._slots = slots
        self._pace = Pace()
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
        #: The rows with which a run is whole: whoever comes after them waits for another.
        self.whole = 1 if policy.apart else policy.max_rows
        self._roomy_rows = roomy(policy.max_queue_rows)
        self._roomy_bytes = roomy(policy.max_queue_bytes)

    @property
    def rows_of(self) -> list[int]:
        """Rows that wait, by class."""
        return _with_normal(self.rows, self._rows_beside)

    @property
    def full(self) -> bool:
        """Whether a whole batch waits: waiting longer would not make it larger."""
        return self.rows >= self.whole and any(lane.rows >= self.whole for lane in self._lanes.values())

    def __len__(self) -> int:
        return sum(len(queue) for lane in self._lanes.values() for queue in lane.queues.values())

    def offer(self, items: Sequence[Item], now: float, floor: float) -> list[tuple[Item, HeadraceError]]:
        """Take `items` in; gives those that are not taken, and why. Returned, not raised: under overload this
        is the common path."""
        refused: list[tuple[Item, HeadraceError]] = []
        soonest = now + floor
        pace = self._per_row(now)
        roomy_rows = min(self._roomy_rows, self._rows_in_time(pace))
        key: MergeKey = ((), ())
        rank = _NORMAL
        lane = queue = None
        for item in items:
            rows, nbytes, deadline = item.rows, item.nbytes, item.deadline
            if (
                deadline <= soonest + self.rows * pace
                or self.rows + rows > roomy_rows
                or self.nbytes + nbytes > self._roomy_bytes
            ):
                refusal = self._refusal(item, now, floor, pace)
                if refusal is not None:
                    refused.append((item, refusal))
                    continue
            if lane is None or queue is None or item.key != key or item.rank is not rank:
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
        if self.rows < self._policy.max_rows:
            self._pace.interrupted()
        return True

    def release(
        self, now: float, *, ahead: float = 0.0, drain: bool = False
    ) -> tuple[Batch | None, list[Item]]:
        """The next batch that should run, `ahead` seconds from now, and the requests met on the way that
        cannot make their deadline any more. With `drain`, nothing waits for company."""
        batch, late = self._release(now + ahead, drain=drain)
        if batch is not None:
            backlog = self.rows >= self._policy.max_rows
            self._pace.left(batch.rows, now, self._expected_pace(), backlog=backlog)
        else:
            self._pace.interrupted()
        return batch, late

    def _release(self, now: float, *, drain: bool) -> tuple[Batch | None, list[Item]]:
        late: list[Item] = []
        if len(self._lanes) == 1 and not self._policy.max_delay and not self._policy.preferred_rows:
            # By far the most common: all that waits may leave, and fits.
            ((key, lane),) = self._lanes.items()
            if self._fits(lane, self._policy.max_rows - 1, now):
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

    def _per_row(self, now: float) -> float:
        """Seconds per row at which what waits will leave."""
        return self._pace.per_row(now, self._expected_pace())

    def _expected_pace(self) -> float:
        most = self.whole
        return self._run_time.estimate(most) / (most * max(1, self._slots))

    def _rows_in_time(self, pace: float) -> float:
        """How many rows may wait so that none waits longer than it should: one batch in any case."""
        return max(self.whole, self._policy.max_queue / pace if pace > 0 else inf)

    def _refusal(self, item: Item, now: float, floor: float, pace: float) -> HeadraceError | None:
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
                return _full(self._ahead(rank) * pace)
        ahead = self._ahead(rank)
        wait = ahead * pace
        next_run = item.rows if policy.apart else policy.max_rows  # rows that may leave with it
        # What comes to an empty queue is taken however long it runs: to come again later would not help.
        if ahead and ahead + item.rows > max(next_run, self._rows_in_time(pace)):
            return _full(wait)
        if ahead + item.rows > next_run and item.deadline <= now + wait + floor:
            # Better now than when its time is over: by then it would have kept a place from another.
            return _full(wait, "too much waits for the model to answer before the deadline")
        return None

    def _ahead(self, rank: Rank) -> float:
        """Rows that leave before a request of the class that comes now: those of its class and meanwhile the
        others by their shares, or all that there are."""
        held = self.rows_of
        others = [other for other in RANKS if held[other] or other == rank]
        by_share = held[rank] * sum([WEIGHTS[other] for other in others]) / WEIGHTS[rank]
        return min(self.rows, by_share)

    def _leaves_at(self, lane: _Lane) -> float:
        if not self.policy.max_delay:
            return lane.oldest()
        run = self._run_time.estimate(min(lane.rows, self.policy.max_rows))
        return min(lane.oldest() + self.policy.max_delay, lane.deadline - run * _SAFETY - _TICK_S)

    def _ripe(self, lane: _Lane, now: float, *, drain: bool) -> Release | None:
        policy = self.policy
        if lane.rows >= policy.max_rows and not policy.apart:
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
        run_time, apart = self._run_time, self.policy.apart
        if self._fits(lane, limit, now):
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
            if items and (grown > limit or apart):
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

    def _fits(self, lane: _Lane, limit: int, now: float) -> bool:
        """Whether all of `lane` may leave together, in at most `limit` rows."""
        if self._policy.apart or lane.rows > limit:
            return False
        return lane.deadline > now + self._run_time.estimate(lane.rows)

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
            nbytes = 0
            for item in of_rank:
                nbytes += item.nbytes
            self._left(rank, rows, nbytes)
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


def _full(wait: float, why: str = "the queue of the model is full") -> ResourceExhausted:
    """To come back once those have left who wait now: in `wait` seconds."""
    return ResourceExhausted(why, retry_after_ms=max(1, ceil(wait * 1e3)))


def too_late() -> DeadlineExceeded:
    """What a request is told that cannot be answered in time."""
    return DeadlineExceeded("the deadline passed before the model could run")


def _with_normal(total: int, beside: list[int]) -> list[int]:
    held = list(beside)
    held[_NORMAL] = total - sum(beside)
    return held
