"""What a model version counts while it serves: plain numbers on the hot path, read when somebody scrapes."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from headrace.v1.control_pb2 import ServingTotals

from services.common.clock import Clock

#: Upper bounds of the batch size histogram, rows; one more bucket holds what is larger.
BATCH_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_BUCKETS: Final = [bisect_left(BATCH_ROWS, rows) for rows in range(BATCH_ROWS[-1] + 1)]


@dataclass(slots=True)
class ModelStats:
    """Totals since the version was loaded. Durations are seconds summed over requests, as Triton sums
    them."""

    succeeded: int = 0
    # Requests by the name of the code they failed with.
    failed: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    # Requests that were in a batch: those whose durations are summed; and when the last of them was done.
    ran: int = 0
    last_ran_at: float = 0.0  # monotonic
    runs: int = 0
    inline_runs: int = 0
    reruns: int = 0
    released: Counter[str] = field(default_factory=Counter)
    batch_rows: list[int] = field(default_factory=lambda: [0] * (len(BATCH_ROWS) + 1))
    batch_rows_sum: int = 0
    request_s: float = 0.0
    queue_s: float = 0.0
    compute_input_s: float = 0.0
    compute_infer_s: float = 0.0
    compute_output_s: float = 0.0
    payloads_omitted: int = 0

    def totals(self, clock: Clock, refused: int = 0) -> ServingTotals | None:
        """What of it goes around; None where there is nothing. `refused` requests came to no batch."""
        failed = self.failed.total() + refused
        if not self.ran and not failed:
            return None
        since_s = clock.monotonic() - self.last_ran_at
        return ServingTotals(
            succeeded=self.succeeded,
            rows=self.rows,
            failed=failed,
            batches=self.runs,
            ran=self.ran,
            request_ns=round(self.request_s * 1e9),
            queue_ns=round(self.queue_s * 1e9),
            compute_input_ns=round(self.compute_input_s * 1e9),
            compute_infer_ns=round(self.compute_infer_s * 1e9),
            compute_output_ns=round(self.compute_output_s * 1e9),
            last_ran_at_us=clock.unix_us() - round(since_s * 1e6) if self.ran else 0,
        )

    def batch(self, rows: int, reason: str, *, inline: bool) -> None:
        """One batch of `rows` rows ran because of `reason`."""
        self.runs += 1
        self.inline_runs += inline
        self.released[reason] += 1
        self.batch_rows[_BUCKETS[rows] if rows < len(_BUCKETS) else len(BATCH_ROWS)] += 1
        self.batch_rows_sum += rows
