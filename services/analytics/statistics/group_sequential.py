"""Group-sequential bounds: a few looks planned ahead, the error spent between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import optimize, stats

Spending = Callable[[float, float], float]

_REACH = 8.0
_POINTS = 2001


def power_spending(rho: float) -> Spending:
    """alpha t^rho (Kim & DeMets 1987)."""
    return lambda t, alpha: alpha * t**rho


def obrien_fleming_spending(t: float, alpha: float) -> float:
    """2 - 2 Phi(z_{alpha/2} / sqrt(t)) (Lan & DeMets 1983)."""
    return 2 * float(stats.norm.sf(stats.norm.isf(alpha / 2) / math.sqrt(t)))


def pocock_spending(t: float, alpha: float) -> float:
    """alpha ln(1 + (e - 1) t) (Lan & DeMets 1983)."""
    return alpha * math.log(1 + (math.e - 1) * t)


def bounds(
    information: Sequence[float], *, alpha: float = 0.05, spending: Spending, sides: int = 2
) -> list[float]:
    """Upper z bounds at growing shares of the final information (the last is usually 1).

    Each bound is such that the chance, without an effect, of crossing it there first is what the spending
    function adds there. Two-sided: alpha / 2 above, and the lower bounds are the negatives. By the recursive
    integration of Armitage, McPherson & Rowe (1969) on a grid of the score process.
    """
    times = np.asarray(information, dtype=np.float64)
    if times.size == 0 or times[0] <= 0 or np.any(np.diff(times) <= 0) or times[-1] > 1 + 1e-12:
        raise ValueError("information fractions must grow from above 0 to at most 1")
    level = alpha / sides
    spent, answers = 0.0, []
    grid = density = np.zeros(0)
    for place, time in enumerate(times):
        target = min(spending(float(time), level), level) - spent
        spent += target
        step = math.sqrt(time - (times[place - 1] if place else 0.0))
        bound = _solve(grid, density, step, math.sqrt(time), target)
        answers.append(bound)
        fresh = np.linspace(-_REACH * math.sqrt(time), bound * math.sqrt(time), _POINTS)
        density = _advance(grid, density, step, fresh)
        grid = fresh
    return answers


def _advance(grid: np.ndarray, density: np.ndarray, step: float, points: np.ndarray) -> np.ndarray:
    """Density at `points` of the score after one more increment, among the paths not yet stopped."""
    if grid.size == 0:
        return np.asarray(stats.norm.pdf(points, scale=step))
    kernel = np.exp(-0.5 * ((points[:, None] - grid[None, :]) / step) ** 2) / (step * math.sqrt(2 * math.pi))
    return np.asarray(np.trapezoid(kernel * density[None, :], grid, axis=1))


def _solve(grid: np.ndarray, density: np.ndarray, step: float, scale: float, target: float) -> float:
    if target <= 0:
        return _REACH
    if grid.size == 0:
        return min(_REACH, float(stats.norm.isf(target)))

    def excess(z: float) -> float:
        return float(np.trapezoid(density * stats.norm.sf((z * scale - grid) / step), grid)) - target

    return _REACH if excess(_REACH) > 0 else float(optimize.brentq(excess, -_REACH, _REACH, xtol=1e-9))
