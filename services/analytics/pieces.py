"""What a statement of a trial rests on: pieces of evidence, and the numbers shown beside them. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.analytics.statistics.bets import Side

#: Log wealth against "the difference is at most (`below`: at least) the bound", which may be relative.
Wealth = Callable[[float, Side, bool], float]
#: Lower and upper limit at that error rate a side.
Limits = Callable[[float], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Piece:
    """One way of looking at a difference, with its weight in the statement's share of the budget."""

    name: str
    weight: float
    wealth: Wealth
    limits: Limits | None = None


@dataclass(frozen=True, slots=True)
class Numbers:
    """What is shown beside the pieces."""

    control_units: int = 0
    units: int = 0
    control_mean: float = 0.0
    mean: float = 0.0
    estimate: float = 0.0
