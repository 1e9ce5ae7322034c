"""What a model version counts while it serves: plain numbers on the hot path, read when somebody scrapes."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

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

    def batch(self, rows: int, reason: str, *, inline: bool) -> None:
        """One batch of `rows` rows ran because of `reason`."""
        self.runs += 1
        self.inline_runs += inline
        self.released[reason] += 1
        self.batch_rows[_BUCKETS[rows] if rows < len(_BUCKETS) else len(BATCH_ROWS)] += 1
        self.batch_rows_sum += rows
