"""What the statistics of experiments promise, measured: false positives under peeking, power at the planned
size, coverage of every interval.

    python -m benchmarks.trial_statistics [RUNS]        writes benchmarks/STATISTICS.md

`trial_simulations` measures; here it becomes tables. (Not called statistics.py: a script of that name beside
others would hide the standard library's.)
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from benchmarks.trial_simulations import (
    ALPHA,
    LOOKS,
    World,
    adjusted,
    coverage,
    false_positives,
    fixed_power,
    means,
    planned_looks,
    quantile_coverage,
    ratios,
    sequential_power,
    shares,
)
from services.analytics.planning import Bounds, planned_looks_cost, sequential_cost

_SEED = 2_026
_COVERAGE_LOOKS = 4


def report(runs: int, workers: int = 2) -> str:
    """Everything as tables; sections are computed side by side."""
    near = [1.96 * math.sqrt(share * (1 - share) / runs) for share in (0.05, 0.8)]
    idle = [(shares(0.2, 0.2), 2_000), (means(), 2_000), (ratios(), 2_000)]
    worlds = [
        (shares(0.1, 0.12), 200),
        (shares(0.1, 0.12), 1_000),
        (shares(0.02, 0.02), 1_000),
        (means(0.1), 200),
        (means(0.1), 1_000),
        (ratios(0.1), 200),
        (ratios(0.1), 1_000),
        (adjusted(0.05), 1_000),
    ]
    few = max(200, runs // 10)
    work: list[Callable[[], str]] = [
        *(partial(_false_positive_row, *one, runs, _SEED + place) for place, one in enumerate(idle)),
        partial(_power_rows, runs),
        *(partial(_coverage_row, *one, runs, _SEED + 100 + place) for place, one in enumerate(worlds)),
        *(partial(_quantile_row, share, few, _SEED + 200) for share in (0.5, 0.95)),
    ]
    rows = _side_by_side(work, workers)
    cost = sequential_cost(ALPHA, 0.8)
    lines = [
        "# What the statistics promise, measured",
        "",
        f"By `python -m benchmarks.trial_statistics {runs}`, seeds from {_SEED} on. With {runs:,} runs a",
        f"share of 5% (or 95%) is known to {near[0]:.1%}, one of 80% to {near[1]:.1%}.",
        "",
        f"## False positives of A/A experiments looked at {LOOKS} times (alpha 5%)",
        "",
        "| metric | units an arm | deciding method | fixed-horizon test at every look | at the last only |",
        "|---|---|---|---|---|",
        *rows[:3],
        "",
        "## Power at the planned size (80% wanted)",
        "",
        "| method | units an arm | found |",
        "|---|---|---|",
        rows[3],
        "",
        f"Looking whenever one wants costs {cost.at_most:.2f} times the fixed-horizon size at most and",
        f"{cost.on_average:.2f} times on average where the effect is there.",
        "",
        "| planned looks (5) | false positives | power at the fixed-horizon size | at its own planned size |",
        "|---|---|---|---|",
    ]
    lines += _planned_rows()
    lines += [
        "",
        "## Coverage of 95% intervals",
        "",
        f"Fixed-horizon at one look; sequences at {_COVERAGE_LOOKS} looks at once: at least 95% by design.",
        "",
        "| metric | units an arm | difference | lift | sequence of the difference | of the lift |",
        "|---|---|---|---|---|---|",
        *rows[4:12],
        "",
        "| quantile | units an arm | difference | exact sequence |",
        "|---|---|---|---|",
        *rows[12:],
        "",
        f"Quantiles: {few:,} runs, 5 looks. Latencies are kept to 1%, so intervals are a little wide.",
    ]
    return "\n".join(lines) + "\n"


def _planned_rows() -> list[str]:
    rows = []
    names: tuple[tuple[str, Bounds], ...] = (("O'Brien-Fleming", "obrien_fleming"), ("Pocock", "pocock"))
    for name, bounds in names:
        factor = planned_looks_cost(bounds, 5, ALPHA, 0.8)
        wrong, right = planned_looks(name, runs=50_000, seed=_SEED)
        _, own = planned_looks(name, runs=50_000, seed=_SEED + 1, factor=factor)
        rows.append(f"| {name} | {wrong:.1%} | {right:.1%} | {own:.1%} ({factor:.2f} times) |")
    return rows


def _false_positive_row(world: World, units: int, runs: int, seed: int) -> str:
    one = false_positives(world, runs=runs, units=units, seed=seed)
    return f"| {world.name} | {units:,} | {one.deciding:.1%} | {one.naive:.1%} | {one.fixed:.1%} |"


def _power_rows(runs: int) -> str:
    n, found = sequential_power(runs=runs, seed=_SEED)
    rows = [*fixed_power(runs=5 * runs, seed=_SEED)]
    rows.append(("confidence sequence, 20% to 25%, looked at 50 times", n, found))
    return "\n".join(f"| {name} | {size:,} | {share:.1%} |" for name, size, share in rows)


def _coverage_row(world: World, units: int, runs: int, seed: int) -> str:
    seen = coverage(world, runs=runs, units=units, seed=seed, looks=_COVERAGE_LOOKS)
    found = (seen.fixed, seen.relative, seen.sequence, seen.relative_sequence)
    return f"| {world.name} | {units:,} | " + " | ".join(f"{share:.1%}" for share in found) + " |"


def _quantile_row(share: float, runs: int, seed: int) -> str:
    fixed, always = quantile_coverage(share, runs=runs, units=2_000, seed=seed, looks=5)
    return f"| p{share * 100:g} | 2,000 | {fixed:.1%} | {always:.1%} |"


def _side_by_side(work: Sequence[Callable[[], str]], workers: int) -> list[str]:
    """Worlds hold functions, which no queue carries, so workers are forked and told only which."""
    _WORK[:] = work
    with get_context("fork").Pool(workers) as pool:
        return pool.map(_worked, range(len(work)), chunksize=1)


_WORK: list[Callable[[], str]] = []


def _worked(place: int) -> str:
    return _WORK[place]()


if __name__ == "__main__":
    wanted = int(sys.argv[1]) if len(sys.argv) > 1 else 2_000
    (Path(__file__).parent / "STATISTICS.md").write_text(report(wanted))
