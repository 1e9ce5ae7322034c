"""What happens next to a job and its chunks. Pure: nothing here reads a clock, a database or a broker."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal, Protocol

from headrace.v1.batch_pb2 import BatchChunkResult
from headrace.v1.dataplane_pb2 import Priority
from headrace.v1.tensor_pb2 import Code

Ending = Literal["completed", "failed", "cancelled", "expired"]

#: How long a job that ends early waits for what its workers have finished.
GRACE = timedelta(seconds=30)
#: Of two gateways. What was done later than this from now was so before the clock was set back.
CLOCKS_APART: Final = timedelta(minutes=5)
#: How often a chunk is published before its rows are given up.
MAX_ATTEMPTS = 10
#: How often workers may say that they cannot do a chunk now; each of them has waited for minutes.
MAX_PATIENCE = 3

#: Shares of a pool between the jobs that want it.
WEIGHTS: Mapping[int, int] = {
    Priority.PRIORITY_HIGH: 8,
    Priority.PRIORITY_NORMAL: 4,
    Priority.PRIORITY_LOW: 1,
}

#: What is wrong with the input or the job: every other chunk would fail in the same way.
OF_THE_JOB = frozenset(
    (
        Code.CODE_INVALID_ARGUMENT,
        Code.CODE_NOT_FOUND,
        Code.CODE_PERMISSION_DENIED,
        Code.CODE_FAILED_PRECONDITION,
        Code.CODE_DATA_LOSS,
    )
)


class JobFacts(Protocol):
    """What decisions look at; JobRow has it."""

    @property
    def state(self) -> str: ...
    @property
    def ending(self) -> str | None: ...
    @property
    def is_split(self) -> bool: ...
    @property
    def open_chunks(self) -> int: ...
    @property
    def flying_chunks(self) -> int: ...
    @property
    def expires_at(self) -> datetime: ...
    @property
    def cancelling_at(self) -> datetime | None: ...
    @property
    def ended_at(self) -> datetime | None: ...


@dataclass(frozen=True, slots=True)
class Step:
    """What a job needs now. `stop`: begin to end it so; `end`: it is over. Otherwise it may be cut further
    and its open chunks published."""

    stop: Ending | None = None
    end: Ending | None = None
    cut: bool = False
    publish: bool = False


def next_step(job: JobFacts, now: datetime) -> Step:
    """Every job ends: what is cut and done completes it, and `expires_at` ends what is not."""
    if job.ended_at is not None:
        return Step()
    if job.cancelling_at is not None:
        if job.flying_chunks and -CLOCKS_APART <= now - job.cancelling_at < GRACE:
            return Step()
        return Step(end=job.ending)  # type: ignore[arg-type]  # set with cancelling_at
    if job.is_split and not job.open_chunks and not job.flying_chunks:
        return Step(end="completed")
    if now >= job.expires_at:
        return Step(stop="expired")
    return Step(cut=not job.is_split, publish=job.open_chunks > 0)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a result means. `done` and `failed` are rows of the chunk; `again`: the chunk is open once more;
    `stop`: the job begins to end so."""

    done: int
    failed: int
    again: bool = False
    stop: Ending | None = None


def is_stale(result: BatchChunkResult, attempt: int, *, cancelling: bool) -> bool:
    """Whether `result` is an earlier attempt's failure, which says nothing of `attempt`, the one that is
    waited for. What is true of the input or of the job counts whoever says it, as rows that are done do."""
    if result.attempt >= attempt or result.code in (Code.CODE_OK, Code.CODE_DEADLINE_EXCEEDED):
        return False
    return result.code not in OF_THE_JOB and not (cancelling and result.code == Code.CODE_CANCELLED)


def judged(
    result: BatchChunkResult, rows: int, attempt: int, *, cancelling: bool, refusals: int = 0
) -> Verdict:
    """The verdict on the first result of a chunk of `rows` rows that was published `attempt` times and
    refused `refusals` times before. Counts never exceed the rows, whatever a worker says."""
    done = min(result.rows_done, rows)
    failed = min(result.rows_failed, rows - done)
    if result.code == Code.CODE_OK:
        return Verdict(done, rows - done)
    if result.code in (Code.CODE_CANCELLED, Code.CODE_DEADLINE_EXCEEDED):
        if cancelling:
            return Verdict(done, failed)
        if result.code == Code.CODE_DEADLINE_EXCEEDED:
            return Verdict(done, failed, stop="expired")
        if attempt < MAX_ATTEMPTS:  # a worker that goes away: nobody cancelled the job
            return Verdict(0, 0, again=True)
        return Verdict(done, rows - done)
    if result.code in OF_THE_JOB:
        return Verdict(done, failed, stop="failed")
    may_try = attempt < MAX_ATTEMPTS and refusals + 1 < MAX_PATIENCE
    if result.code == Code.CODE_UNAVAILABLE and may_try:
        return Verdict(0, 0, again=True)
    return Verdict(done, rows - done)


@dataclass(frozen=True, slots=True)
class Claim:
    """A job that wants a pool: chunks that it has with the workers, and more that could be."""

    job_id: str
    priority: int
    flying: int
    open: int


def allotted(claims: Sequence[Claim], window: int) -> dict[str, int]:
    """How many chunks of each job to publish now, so that at most `window` of the pool are with the workers,
    in proportion to the jobs' weights: each chunk goes to the job that has the fewest for its weight. The
    first in `claims` wins where they are equal. A job that has none gets one also where the window is full,
    so that a large one delays a small one, and never keeps it out."""
    given = dict.fromkeys((claim.job_id for claim in claims), 0)
    free = window - sum(claim.flying for claim in claims)
    for claim in claims:
        if not claim.flying and claim.open:
            given[claim.job_id] = 1
            free -= 1
    wanting = [claim for claim in claims if claim.open > given[claim.job_id]]
    while free > 0 and wanting:
        poorest = min(wanting, key=lambda claim: (claim.flying + given[claim.job_id] + 1) / _weight(claim))
        given[poorest.job_id] += 1
        free -= 1
        if given[poorest.job_id] >= poorest.open:
            wanting.remove(poorest)
    return {job_id: count for job_id, count in given.items() if count}


def window_of(partitions: int, workers: int) -> int:
    """Chunks of a pool that may be with its workers: enough that none idles while a result is on its way, few
    enough that a job of higher priority does not wait behind them."""
    return max(2 * partitions, 4 * workers)


@dataclass(frozen=True, slots=True)
class Flying:
    """A chunk that was published and has no result."""

    job_id: str
    index: int
    attempt: int
    published_at: datetime


@dataclass(frozen=True, slots=True)
class Lost:
    """Chunks to publish once more, and those that nobody is expected to finish."""

    again: list[Flying]
    given_up: list[Flying]


def lost_chunks(flying: Collection[Flying], idle_since: datetime | None, now: datetime) -> Lost:
    """What of `flying`, chunks of one pool, will not come back.

    `idle_since`: since then the group has committed everything that the topic holds, and every result was
    taken: since workers publish a result before they commit, what was published before that and has none is
    gone (the broker lost it). While the group has something to read nothing counts as lost, however old it
    is: partitions go on at different paces, so a chunk may wait behind others for as long as it takes. What
    is lost keeps its place in the pool's window, so the more is lost, the sooner the rest is read.
    """
    ahead = now + CLOCKS_APART
    gone = [
        chunk
        for chunk in flying
        if idle_since is not None and (chunk.published_at < idle_since or chunk.published_at > ahead)
    ]
    return Lost(
        [chunk for chunk in gone if chunk.attempt < MAX_ATTEMPTS],
        [chunk for chunk in gone if chunk.attempt >= MAX_ATTEMPTS],
    )


def _weight(claim: Claim) -> int:
    return WEIGHTS.get(claim.priority, WEIGHTS[Priority.PRIORITY_NORMAL])
