"""Exact evidence about shares, at every sample size and every look: wealth made by betting against them.

A bet whose value is 1 on average under the null hypothesis (or less) makes a nonnegative supermartingale;
the chance that it ever reaches 1 / alpha is at most alpha (Ville 1939). Each function here returns the
logarithm of a mixture over a fixed grid of bets, which is such a supermartingale, too. The grids cost at most
the logarithm of their size and need no tuning by the data, so results depend on counts only, not on the
order in which or the looks at which they came (Ramdas, Grünwald, Vovk & Shafer, "Game-theoretic statistics
and safe anytime-valid inference", Statistical Science 38(4), 2023).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

Floats = NDArray[np.float64]

#: `above`: evidence that the difference is above the bound; the null hypothesis is that it is not.
Side = Literal["above", "below"]

#: Stakes of `randomised_share`, from what finds a lift of some percent to what finds a broken version.
_STAKES = np.geomspace(0.02, 120.0, 20)
#: No bet may lose everything.
_MOST_LOST = 0.95

#: Factors on the odds, and the part of the wealth that bets on each; 1 is to keep it.
_MORE = np.array([1.0, 1.3, 1.8, 3.0, 8.0, 40.0])
_FEWER = np.array([1.0, 0.75, 0.5, 0.25, 0.1, 0.02])
_PARTS = np.log(np.array([0.4, 0.12, 0.12, 0.12, 0.12, 0.12]))

_GRID = np.concatenate(([0.0], np.geomspace(1e-5, 1.0, 400)))


@dataclass(frozen=True, slots=True)
class RandomisedCounts:
    """Units of two arms that chance divided, one entry per stratum: how many there were and how many of them
    had the event. `shares` is the chance, 0 < r < 1, that a unit of the stratum was given the treatment
    rather than the control. Counts with a leading axis hold several divisions of the same strata."""

    shares: Floats
    control_units: Floats
    control_events: Floats
    units: Floats
    events: Floats


def randomised_share(counts: RandomisedCounts, bound: float, side: Side, *, relative: bool = False) -> Floats:
    """Log wealth against the null hypothesis that the share of events in the treatment exceeds the control's
    by no more than `bound` (`below`: by no less): a difference, or with `relative` a share of the control's.

    For a unit given the treatment with chance r (A = 1) and event x, the bet is on
    (1 - r) A x - (1 + relative bound) r (1 - A) x - bound r (1 - r), whose mean is r (1 - r) times what the
    difference exceeds the bound by: inverse propensity weights of a betting martingale (Waudby-Smith, Wu,
    Ramdas, Karampatziakis & Mineiro, "Anytime-valid off-policy inference for contextual bandits", ACM/IMS J.
    Data Science 1(3), 2024, section 2), with the factor r (1 - r) that makes one stake fit every r. Only the
    chance r enters, which is known: shares may drift in any way that both arms share, and r may change with
    them. Units are independent. Shape: that of the leading axis of the counts, or ().
    """
    r = counts.shares
    spread = r * (1 - r)
    ratio, gap = (1 + bound, 0.0) if relative else (1.0, bound)
    sign = 1.0 if side == "above" else -1.0
    event = sign * ((1 - r) - gap * spread)
    control_event = sign * (-ratio * r - gap * spread)
    nothing = np.full_like(r, sign * -gap) * spread
    worst = np.maximum(1e-12, -np.minimum(np.minimum(event, control_event), nothing))
    stakes = np.minimum(_STAKES[:, None], _MOST_LOST / worst)
    quiet = counts.control_units + counts.units - counts.control_events - counts.events
    logs = (
        counts.events @ np.log1p(stakes * event).T
        + counts.control_events @ np.log1p(stakes * control_event).T
        + quiet @ np.log1p(stakes * nothing).T
    )
    return _log_sum(logs) - math.log(_STAKES.size)


def share(events: float, units: float, bound: float, side: Side) -> float:
    """Log wealth against the null hypothesis that a share is at most (`below`: at least) `bound`.

    A bet multiplies the odds by k: k^x / (1 + (k - 1) bound) is at most 1 on average for every x in [0, 1]
    whose mean is on the null's side, so `events` may be a sum of such values.
    """
    return float(_odds(events, units, bound, _MORE if side == "above" else _FEWER))


def two_shares(
    control: tuple[float, float], treatment: tuple[float, float], bound: float, side: Side, *, relative: bool
) -> float:
    """Log wealth against the null hypothesis that the treatment's share exceeds the control's by no more than
    `bound` (`below`: by no less), from (events, units) of two independent samples that nothing randomised.

    Whatever the control's share p is, one bets that the control's is on one side of p and the treatment's on
    the other side of p plus the bound; the smallest wealth over all p is what is known. The grid of p is
    rounded against the claim, so it adds no error.
    """
    moved = np.clip(_GRID * (1 + bound) if relative else _GRID + bound, 0.0, 1.0)
    # `above` bets on the treatment's share above `moved`: wealth falls with p; the control's rises with p.
    ours, theirs = (_MORE, _FEWER) if side == "above" else (_FEWER, _MORE)
    at, control_at = (moved[1:], _GRID[:-1]) if side == "above" else (moved[:-1], _GRID[1:])
    return float(np.min(_odds(*treatment, at, ours) + _odds(*control, control_at, theirs)))


def two_quantiles(
    above: list[tuple[Floats, float]],
    control_above: list[tuple[Floats, float]],
    exceeding: float,
    side: Side,
) -> float:
    """Log wealth against the null hypothesis that a quantile of the treatment lies at or below (`below`: at
    or above) the control's, of which the share `exceeding` lies above.

    Each stratum gives, per candidate place of the quantile, the sum over units of the share of the unit's
    values above it, and the number of units: of the treatment in `above`, of the control in `control_above`.
    As Howard & Ramdas (Bernoulli 28(3), 2022, Theorem 5), one-sided, with one wealth per stratum, since the
    quantile may drift between strata; strata in the order in which they came. The wealth is divided between
    bets that begin with each of them, the t-th with 1 / (t (t + 1)), so that early strata with little in them
    cost little. Round places against the claim.
    """
    ours, theirs = (_MORE, _FEWER) if side == "above" else (_FEWER, _MORE)
    logs = [
        float(np.min(_odds(treated, units, exceeding, ours) + _odds(held, control_units, exceeding, theirs)))
        for (treated, units), (held, control_units) in zip(above, control_above, strict=True)
    ]
    order = np.arange(1, len(logs) + 1)
    begun = np.cumsum(logs[::-1])[::-1] - np.log(order * (order + 1.0))
    # What is kept for strata that may still come.
    return float(_log_sum(np.append(begun, -math.log(len(logs) + 1))))


def confidence_limit(
    log_wealth: Callable[[float], float], side: Side, alpha: float, low: float, high: float
) -> float:
    """The bound in [low, high] up to which (`below`: from which) `log_wealth` has refuted at `alpha` that the
    difference is no larger (no smaller); the outer end where it has refuted nothing."""
    threshold = math.log(1 / alpha)

    def excess(bound: float) -> float:
        return log_wealth(bound) - threshold

    nothing, everything = (low, high) if side == "above" else (high, low)
    if excess(nothing) < 0:
        return nothing
    if excess(everything) >= 0:
        return everything
    return float(optimize.brentq(excess, low, high, xtol=1e-7))


def _odds(events: Floats | float, units: float, bound: Floats | float, factors: Floats) -> Floats:
    """Log wealth of the bets on odds multiplied by `factors`, where the null hypothesis says `bound`."""
    change = np.log1p((factors - 1) * np.asarray(bound, dtype=np.float64)[..., None])
    gained = np.asarray(events, dtype=np.float64)[..., None] * np.log(factors)
    return _log_sum(gained - units * change + _PARTS)


def _log_sum(logs: Floats) -> Floats:
    """Log of the sum of exponentials over the last axis; SciPy's takes ten times as long for few numbers."""
    largest = np.max(logs, axis=-1, keepdims=True)
    return np.asarray(np.log(np.sum(np.exp(logs - largest), axis=-1)) + largest[..., 0])
