"""Sufficient statistics that merge in any order: what partitions, windows and services send each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations from the mean of one quantity.

    `a + b` is what one pass over both would give (Chan, Golub & LeVeque, "Algorithms for computing the sample
    variance", 1983): associative and commutative up to rounding, and free of the cancellation that sums of
    squares suffer.
    """

    n: int = 0
    mean: float = 0.0
    m2: float = 0.0

    @classmethod
    def of(cls, values: ArrayLike) -> Moments:
        """Moments of an array."""
        sample = np.asarray(values, dtype=np.float64).ravel()
        if sample.size == 0:
            return cls()
        mean = float(sample.mean())
        return cls(int(sample.size), mean, float(np.sum((sample - mean) ** 2)))

    @classmethod
    def from_sums(cls, n: int, total: float, sum_squares: float) -> Moments:
        """Moments from a sum and a sum of squares."""
        if n == 0:
            return cls()
        return cls(n, total / n, max(0.0, sum_squares - total * total / n))

    @classmethod
    def from_successes(cls, successes: float, n: int) -> Moments:
        """Moments of `n` zeros and ones of which `successes` are ones."""
        return cls.from_sums(n, successes, successes)

    @property
    def total(self) -> float:
        """Sum of the values."""
        return self.mean * self.n

    @property
    def variance(self) -> float:
        """Sample variance, dividing by n - 1; 0 below two values."""
        return self.m2 / (self.n - 1) if self.n > 1 else 0.0

    @property
    def population_variance(self) -> float:
        """Variance dividing by n; 0 where there is none."""
        return self.m2 / self.n if self.n else 0.0

    def __add__(self, other: Moments) -> Moments:
        if self.n == 0:
            return other
        if other.n == 0:
            return self
        n = self.n + other.n
        gap = other.mean - self.mean
        return Moments(
            n, self.mean + gap * other.n / n, self.m2 + other.m2 + gap * gap * self.n * other.n / n
        )


@dataclass(frozen=True, slots=True)
class PairedMoments:
    """Moments of two quantities of the same units and their cross product, merging like `Moments`.

    x is the quantity of interest, y the denominator of a ratio or the covariate of CUPED.
    `cross` is the sum of (x - mean x)(y - mean y).
    """

    x: Moments = Moments()
    y: Moments = Moments()
    cross: float = 0.0

    @classmethod
    def of(cls, x: ArrayLike, y: ArrayLike) -> PairedMoments:
        """Moments of two arrays of the same length."""
        left = np.asarray(x, dtype=np.float64).ravel()
        right = np.asarray(y, dtype=np.float64).ravel()
        if left.size != right.size:
            raise ValueError("x and y need the same units")
        first, second = Moments.of(left), Moments.of(right)
        return cls(first, second, float(np.dot(left - first.mean, right - second.mean)))

    @property
    def n(self) -> int:
        """How many units."""
        return self.x.n

    @property
    def covariance(self) -> float:
        """Sample covariance, dividing by n - 1; 0 below two units."""
        return self.cross / (self.n - 1) if self.n > 1 else 0.0

    def __add__(self, other: PairedMoments) -> PairedMoments:
        if self.n == 0:
            return other
        if other.n == 0:
            return self
        gaps = (other.x.mean - self.x.mean) * (other.y.mean - self.y.mean)
        shared = gaps * self.n * other.n / (self.n + other.n)
        return PairedMoments(self.x + other.x, self.y + other.y, self.cross + other.cross + shared)
