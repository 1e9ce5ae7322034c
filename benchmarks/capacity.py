"""How much a server can do, found by an open loop: the offered rate grows until goodput stops growing.

A closed loop tells less: its connections wait for their answers, so they offer no more than the server takes
at that latency.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Summary = dict[str, Any]

GROWTH = 1.3
#: Goodput has stopped growing where it lies this far behind what was offered, or before the best so far.
KEPT_UP = 0.95
GREW = 1.02
MOST_STEPS = 12


@dataclass(frozen=True, slots=True)
class Found:
    """The best goodput of the search, and what every step showed."""

    per_s: float
    steps: list[tuple[float, Summary]]


def search(offer: Callable[[float], Summary], first: float) -> Found:
    """`offer(rate)` gives the generator's summary; `first` should be well within the capacity."""
    steps: list[tuple[float, Summary]] = []
    best, rate = 0.0, max(1.0, first)
    for _ in range(MOST_STEPS):
        summary = offer(round(rate))
        goodput = float(summary["goodput_per_s"])
        steps.append((round(rate), summary))
        grew = goodput > best * GREW
        best = max(best, goodput)
        if goodput < rate * KEPT_UP or not grew:
            break
        rate *= GROWTH
    return Found(best, steps)
