"""Which batch gives the most rows per second, measured when a version is loaded: what requests take says
little of batches far larger than they are, and a slope from single rows is noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

#: Where rows cost the same, larger batches than the one that comes this near to the most gain nothing.
_NEAR = 0.95
#: Longer runs would keep online requests waiting, unless a few rows alone take longer.
_LONGEST_S, _FEW = 0.01, 4
_MOST_ROWS = 4096
#: The same where rows may be of any size, and what was measured was a small one.
_MOST_ROWS_OPEN = 32
#: A size is run so many times, of which the fastest counts: others may have had the processor meanwhile.
#: Long runs say enough the first time.
_RUNS = 4
#: No further size once the measurement has taken this long.
_MEASURE_S = 0.5
#: What a run may keep requests waiting that it could have been spared.
_QUICK_S = 0.001
#: What a batch takes beside its run, whatever is in it.
_BATCH_S = 20e-6
#: Joining that takes less than this share of a run decides nothing: runs vary by as much.
_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class BestBatch:
    """Rows of the batch, and rows per second with it; zeros where nothing was measured.

    `quick_rows` is the largest batch that ran within a millisecond: who waits for it anyway loses nothing by
    the company. 0 where there was none, or where rows may be larger than those that were measured.

    `apart`: rows are so large and runs so short that to copy the rows of several requests together takes
    longer than what running them together saves."""

    rows: int = 0
    rows_per_s: float = 0.0
    quick_rows: int = 0
    apart: bool = False

    def rows_within(self, seconds: float) -> int:
        """The largest power of two that is no more than the batch and takes no longer than that, at least 1;
        0 where nothing was measured."""
        if not self.rows:
            return 0
        most = max(1, int(min(self.rows, self.rows_per_s * seconds)))
        return 1 << most.bit_length() - 1


#: Nothing was measured.
UNMEASURED = BestBatch()


def measured(run: Callable[[int], float | None], *, fixed: bool, joining: float = 0.0) -> BestBatch:
    """The best of the powers of two, which the groups of files are too: otherwise each group would leave a
    rest that is a chunk of its own. `run` runs so many rows and says how many seconds that took, None where
    so many cannot be run; `fixed`: every row is of one size; `joining`: seconds that it takes to copy a row
    to where others are, which is no part of `run`. Blocking."""
    fastest: dict[int, float] = {}
    rows, spent = 1, 0.0
    while rows <= (_MOST_ROWS if fixed else _MOST_ROWS_OPEN) and spent < _MEASURE_S:
        if fastest and fastest[rows // 2] > _LONGEST_S and rows > _FEW:
            break
        took: list[float] = []
        while len(took) < _RUNS and spent < _MEASURE_S and min(took, default=0.0) <= _LONGEST_S:
            seconds = run(rows)
            if seconds is None:
                return best_of(fastest, fixed=fixed, joining=joining)
            took.append(seconds)
            spent += seconds
        fastest[rows] = min(took)
        rows *= 2
    return best_of(fastest, fixed=fixed, joining=joining)


def best_of(fastest: Mapping[int, float], *, fixed: bool, joining: float = 0.0) -> BestBatch:
    """From the seconds that runs of so many rows took."""
    rates = {
        rows: rows / seconds
        for rows, seconds in fastest.items()
        if seconds > 0 and (seconds <= _LONGEST_S or rows <= _FEW)
    }
    if not rates:
        return UNMEASURED
    wanted = _NEAR * max(rates.values())
    rows = min(rows for rows, rate in rates.items() if rate >= wanted)
    quick = max((rows for rows, seconds in fastest.items() if seconds <= _QUICK_S), default=0)
    if not fixed:
        return BestBatch(rows, rates[rows])
    saved = max(fastest[1] - seconds / rows for rows, seconds in fastest.items())
    apart = joining > max(saved + _BATCH_S, _SHARE * fastest[1])
    return BestBatch(rows, rates[rows], quick, apart)
