"""Quantile sketches that merge: the same answer whether one process saw everything or eight saw a part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from datasketches import kll_floats_sketch
from numpy.typing import ArrayLike, NDArray

from services.drift.detectors.binning import finite

#: k = 200 keeps the rank error of one query below 1.33% with 99% confidence, at about 2 KB.
DEFAULT_K = 200

_LARGEST = float(np.finfo(np.float32).max)


def rising(points: NDArray[np.float64]) -> list[float]:
    """The points in rising order, each once, in single precision, as sketches are asked about them."""
    ordered: list[float] = np.unique(points.astype(np.float32)).tolist()
    return ordered


class QuantileSketch:
    """KLL sketch (Karnin, Lang & Liberty 2016): quantiles of any floats within a known error of *rank*."""

    def __init__(self, k: int = DEFAULT_K, *, sketch: kll_floats_sketch | None = None) -> None:
        self._sketch = kll_floats_sketch(k) if sketch is None else sketch

    @classmethod
    def of(cls, values: ArrayLike, k: int = DEFAULT_K) -> QuantileSketch:
        """A sketch that has seen `values`."""
        sketch = cls(k)
        sketch.update(values)
        return sketch

    @classmethod
    def from_bytes(cls, data: bytes) -> QuantileSketch:
        """The sketch that `to_bytes` wrote, byte-compatible with every Apache DataSketches library."""
        return cls(sketch=kll_floats_sketch.deserialize(data))

    def update(self, values: ArrayLike) -> None:
        """Add values; NaN is left out."""
        if isinstance(values, np.ndarray) and values.dtype == np.float32 and np.isfinite(values).all():
            self._sketch.update(values)
            return
        # The sketch holds single precision; what lies beyond, such as a sentinel, becomes the largest value.
        self._sketch.update(np.clip(finite(values), -_LARGEST, _LARGEST).astype(np.float32))

    def merge(self, other: QuantileSketch) -> None:
        """Add everything that `other` has seen."""
        self._sketch.merge(other._sketch)

    @property
    def count(self) -> int:
        """How many values went in."""
        return int(self._sketch.n)

    @property
    def rank_error(self) -> float:
        """Bound of the rank error of one quantile at 99% confidence, as a share of all values."""
        return float(self._sketch.normalized_rank_error(False))

    def quantiles(self, shares: ArrayLike) -> NDArray[np.float64]:
        """Values below which about `shares` (0 … 1) of all values lie. Raises ValueError while empty."""
        if self._sketch.is_empty():
            raise ValueError("the sketch is empty")
        return np.asarray(self._sketch.get_quantiles(np.atleast_1d(shares).astype(float)), dtype=np.float64)

    def cumulative(self, points: ArrayLike, *, inclusive: bool = True) -> NDArray[np.float64]:
        """Share of values at or below each point, or below it. Raises ValueError while empty."""
        flat = np.atleast_1d(np.asarray(points, dtype=np.float64))
        # To the side on which no value of single precision lies between: a point just above a value stays so.
        with np.errstate(over="ignore"):  # above the largest value lies infinity
            single = flat.astype(np.float32)
            wrong = single > flat if inclusive else single < flat
            single[wrong] = np.nextafter(single[wrong], np.float32(-np.inf if inclusive else np.inf))
        ordered, places = np.unique(single, return_inverse=True)
        return self.cumulative_at(ordered.tolist(), inclusive=inclusive)[places]

    def cumulative_at(self, points: Sequence[float], *, inclusive: bool = True) -> NDArray[np.float64]:
        """The same for points as `rising` gives them."""
        if self._sketch.is_empty():
            raise ValueError("the sketch is empty")
        # The library appends the 1 of infinity.
        return np.array(self._sketch.get_cdf(points, inclusive)[:-1])

    def to_bytes(self) -> bytes:
        """For storage and for merging elsewhere."""
        return bytes(self._sketch.serialize())


@dataclass(slots=True)
class RelativeSketch:
    """DDSketch (Masson, Rim & Lee, VLDB 2019): quantiles within `accuracy` of their *value*.

    The right one for latencies, where p99 must be right in milliseconds, not in rank. Takes values >= 0;
    anything below `smallest` counts as zero. Memory grows with the logarithm of the range only.
    """

    accuracy: float = 0.01
    smallest: float = 1e-9
    zeros: int = 0
    counts: dict[int, int] = field(default_factory=dict)

    @property
    def _log_gamma(self) -> float:
        return math.log((1 + self.accuracy) / (1 - self.accuracy))

    @property
    def count(self) -> int:
        """How many values went in."""
        return self.zeros + sum(self.counts.values())

    def update(self, values: ArrayLike) -> None:
        """Add values; NaN is left out. Raises ValueError for a negative one."""
        sample = finite(values)
        if sample.size and float(sample.min()) < 0:
            raise ValueError("a relative sketch takes no negative values")
        positive = sample[sample >= self.smallest]
        self.zeros += int(sample.size - positive.size)
        places, numbers = np.unique(
            np.ceil(np.log(positive) / self._log_gamma).astype(np.int64), return_counts=True
        )
        for place, number in zip(places.tolist(), numbers.tolist(), strict=True):
            self.counts[place] = self.counts.get(place, 0) + number

    def merge(self, other: RelativeSketch) -> None:
        """Add everything that `other` has seen. Both need the same accuracy."""
        if other.accuracy != self.accuracy:
            raise ValueError("sketches of different accuracy do not merge")
        self.zeros += other.zeros
        for place, number in other.counts.items():
            self.counts[place] = self.counts.get(place, 0) + number

    def quantiles(self, shares: ArrayLike) -> NDArray[np.float64]:
        """Values below which about `shares` (0 … 1) of all values lie. Raises ValueError while empty."""
        total = self.count
        if total == 0:
            raise ValueError("the sketch is empty")
        places = np.array(sorted(self.counts), dtype=np.int64)
        upto = self.zeros + np.cumsum([self.counts[int(place)] for place in places])
        gamma = math.exp(self._log_gamma)
        answers = []
        for share in np.atleast_1d(np.asarray(shares, dtype=np.float64)):
            rank = share * (total - 1)
            if rank < self.zeros or not places.size:
                answers.append(0.0)
                continue
            place = int(places[min(int(np.searchsorted(upto, rank, side="right")), places.size - 1)])
            answers.append(2 * gamma**place / (gamma + 1))
        return np.array(answers)
