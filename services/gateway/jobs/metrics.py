"""Metrics of jobs, in the gateway's own registry."""

from __future__ import annotations

from collections.abc import Mapping

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.gateway.jobs.changes import JobChanges
from services.gateway.jobs.repository import Backlog

log = structlog.get_logger(__name__)

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)


class JobMetrics:
    """Counts what this gateway did; gauges hold what the database said last."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._pools: set[str] = set()
        self._jobs = Gauge("headrace_batch_jobs", "Jobs that have not ended.", ["state"], registry=registry)
        self._chunks = Gauge(
            "headrace_batch_chunks", "Chunks that are not done: open or flying.", ["state"], registry=registry
        )
        self._rate = Gauge(
            "headrace_batch_rows_per_second", "Rows per second of all jobs.", registry=registry
        )
        self._lag = Gauge(
            "headrace_batch_pool_lag_chunks",
            "Chunks of jobs under way that the pool's workers have not finished.",
            ["pool"],
            registry=registry,
        )
        self._lag_rows = Gauge(
            "headrace_batch_pool_lag_rows",
            "Rows of jobs under way that are not done, by pool.",
            ["pool"],
            registry=registry,
        )
        self._rows = Counter("headrace_batch_rows", "Rows of results taken.", ["outcome"], registry=registry)
        self._results = Histogram(
            "headrace_batch_chunk_seconds",
            "From a chunk's publication to its result.",
            buckets=_SECONDS,
            registry=registry,
        )
        self._repeated = Counter(
            "headrace_batch_results_repeated", "Results that were not the first.", registry=registry
        )
        self._again = Counter(
            "headrace_batch_chunks_republished", "Chunks published once more.", registry=registry
        )
        self.lag = Gauge("headrace_gateway_lag", "Records not yet read.", ["topic"], registry=registry)
        self.dead_letters = Gauge(
            "headrace_gateway_dead_letters",
            "Malformed records set aside and not replayed, those of the pools' workers among them.",
            ["topic"],
            registry=registry,
        )
        self._ended = Counter("headrace_batch_jobs_ended", "Jobs that ended.", ["state"], registry=registry)
        self._callbacks = Counter(
            "headrace_batch_callbacks", "Callbacks tried.", ["outcome"], registry=registry
        )
        # From 0: of a series that begins with 1, nobody sees that it grew.
        for counter, values in (
            (self._rows, ("completed", "failed")),
            (self._ended, ("completed", "failed", "cancelled", "expired")),
            (self._callbacks, ("delivered", "failed", "given_up")),
        ):
            for value in values:
                counter.labels(value)

    def states(self, known: Mapping[str, tuple[int, int, int, float]]) -> None:
        """What is under way: by state jobs, open and flying chunks, rows per second."""
        for state in ("validating", "in_progress", "cancelling"):
            self._jobs.labels(state).set(known.get(state, (0, 0, 0, 0.0))[0])
        self._chunks.labels("open").set(sum(one[1] for one in known.values()))
        self._chunks.labels("flying").set(sum(one[2] for one in known.values()))
        self._rate.set(sum(one[3] for one in known.values()))

    def backlog(self, known: Mapping[str, Backlog]) -> None:
        """What is not done, by pool; a pool that is not named any more has nothing."""
        for pool in self._pools | known.keys():
            one = known.get(pool, Backlog(0, 0, 0))
            self._lag.labels(pool).set(one.open + one.flying)
            self._lag_rows.labels(pool).set(one.rows)
        self._pools |= known.keys()

    def committed(self, changes: JobChanges) -> None:
        """What came of `changes`, which are committed: whoever ends a job, it is counted once."""
        self._rows.labels("completed").inc(changes.rows_done)
        self._rows.labels("failed").inc(changes.rows_failed)
        for job in changes.ended:
            self._ended.labels(job.state).inc()
            log.info("job_ended", job=job.job_id, state=job.state, rows=job.completed, failed=job.failed)

    def result(self, seconds: float | None) -> None:
        """The result of a chunk came, so long after it was published."""
        if seconds is not None:
            self._results.observe(max(0.0, seconds))

    def repeated(self, count: int) -> None:
        """Results came again."""
        self._repeated.inc(count)

    def republished(self, chunks: int) -> None:
        """Chunks were lost."""
        self._again.inc(chunks)

    def callbacks(self, outcome: str) -> None:
        """A callback was tried."""
        self._callbacks.labels(outcome).inc()
