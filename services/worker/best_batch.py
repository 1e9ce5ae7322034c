"""Which batch gives the most rows per second, from what runs took so far. Pure."""

from __future__ import annotations

from math import ceil

from services.worker.run_time import RunTime

#: Share of a run that its fixed cost may have.
_FIXED_SHARE = 0.05
#: Longer runs would keep online requests waiting, unless a few rows alone take longer.
_LONGEST_S, _FEW = 0.01, 4
_MOST_ROWS = 4096
_ROUNDING = 1e-6


def best_batch(run_time: RunTime) -> tuple[int, float]:
    """Rows of the batch, and rows per second with it; zeros before the first measurement. A power of two, as
    the groups of files are: otherwise each group would leave a rest that is a chunk of its own."""
    if run_time.estimate(1) <= 0:
        return 0, 0.0
    fixed, per_row = run_time.fixed, run_time.per_row
    rows = _MOST_ROWS
    if per_row > 0:
        wanted = ceil(fixed / per_row * (1 - _FIXED_SHARE) / _FIXED_SHARE)
        longest = max(_LONGEST_S, run_time.estimate(_FEW))
        rows = max(1, min(wanted, int((longest - fixed) / per_row + _ROUNDING), _MOST_ROWS))
    rows = 1 << rows.bit_length() - 1
    return rows, rows / run_time.estimate(rows)
