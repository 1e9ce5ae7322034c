"""What batch work counts, and its metrics."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from headrace.v1.batch_pb2 import BatchChunkResult
from headrace.v1.tensor_pb2 import Code
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(slots=True)
class BatchStats:
    """Totals since the start."""

    # Chunks by the name of their result's code.
    chunks: Counter[str] = field(default_factory=Counter)
    rows_done: int = 0
    rows_failed: int = 0
    malformed: int = 0
    retries: int = 0
    #: Seconds in which a chunk waited for the version's slot, and in which it had it.
    waited_s: float = 0.0
    ran_s: float = 0.0
    #: Chunks being read, run or written now.
    in_work: int = 0

    def chunk(self, result: BatchChunkResult) -> None:
        """A chunk came to `result`."""
        self.chunks[Code.Name(result.code).removeprefix("CODE_").lower()] += 1
        self.rows_done += result.rows_done
        self.rows_failed += result.rows_failed


class Counted(Protocol):
    """Batch work that counts."""

    stats: BatchStats

    @property
    def partitions(self) -> int:
        """How many partitions of the pool's chunks are ours."""
        ...


class BatchMetrics(Collector):
    """Reads the totals when somebody scrapes."""

    def __init__(self, batch: Counted) -> None:
        self._batch = batch

    def collect(self) -> Iterator[Metric]:
        """The metrics now."""
        stats = self._batch.stats
        chunks = CounterMetricFamily(
            "headrace_worker_batch_chunks",
            "Chunks done, by the code of their result",
            labels=("code",),
        )
        for code, count in stats.chunks.items():
            chunks.add_metric((code,), count)
        yield chunks
        for name, text, value in (
            ("rows", "Rows of batch jobs answered", stats.rows_done),
            ("rows_failed", "Rows of batch jobs that failed", stats.rows_failed),
            ("malformed", "Chunk records that went to the dead-letter queue", stats.malformed),
            ("retries", "Times that batch work was tried again", stats.retries),
            ("wait_seconds", "Waiting of batch work for a version's slot", stats.waited_s),
            ("run_seconds", "Time that batch work had a version's slot", stats.ran_s),
        ):
            yield CounterMetricFamily(f"headrace_worker_batch_{name}", text, value=value)
        yield GaugeMetricFamily("headrace_worker_batch_in_work", "Chunks in work", value=stats.in_work)
        yield GaugeMetricFamily(
            "headrace_worker_batch_partitions",
            "Partitions of chunks held",
            value=self._batch.partitions,
        )
