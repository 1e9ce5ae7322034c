"""How large a chunk is."""

from __future__ import annotations

from dataclasses import dataclass

#: Rows of a chunk at most, whatever the model's speed: a chunk done twice costs its time twice.
MAX_ROWS = 65_536
MAX_BYTES = 16 << 20
#: A longer line is an error: whoever reads a chunk holds its lines.
MAX_LINE_BYTES = 8 << 20

_WORK_S = 1.0
#: An online request waits for one run at most.
_RUN_S = 0.003
#: Cutting, publishing and telling of the end; reading, writing and logging a tabular row.
_ROUND_TRIPS_S, _AROUND_A_ROW_S = 0.2, 1e-6
_UNKNOWN_BEST_ROWS = 64
_UNKNOWN_ROWS = 4096


@dataclass(frozen=True, slots=True)
class ChunkLimits:
    """At most so many rows and bytes of input, and bytes of one line."""

    rows: int = _UNKNOWN_ROWS
    bytes: int = MAX_BYTES
    line_bytes: int = MAX_LINE_BYTES


def chunk_limits(best_rows: int, rows_per_s: float) -> ChunkLimits:
    """About a second of one worker's work in whole batches of `best_rows`; 0: not measured yet."""
    batch = min(best_rows or _UNKNOWN_BEST_ROWS, MAX_ROWS)
    wanted = rows_per_s * _WORK_S if rows_per_s > 0 else _UNKNOWN_ROWS
    rows = max(1, int(min(wanted, MAX_ROWS)) // batch) * batch
    return ChunkLimits(rows=rows)


def run_rows(best_rows: int, rows_per_s: float) -> int:
    """Rows that a worker runs at once: the largest power of two that is neither more than `best_rows` nor
    takes longer than 3 ms; 0 where nothing was measured."""
    if not best_rows or rows_per_s <= 0:
        return 0
    most = max(1, int(min(best_rows, rows_per_s * _RUN_S)))
    return 1 << (most.bit_length() - 1)


def seconds_for(rows: float, workers: int, rows_per_s: float) -> float:
    """About how long a job of so many rows takes `workers` of that speed, which have nothing else to do."""
    return round(_ROUND_TRIPS_S + rows / workers * (1 / rows_per_s + _AROUND_A_ROW_S), 2)
