"""How values become counts: bin edges from a reference, counts per bin, shares without zeros.

Edges are the inner cuts only: k cuts make k + 1 bins, the first open to -inf and the last to +inf, so that
nothing the live stream brings falls outside. Bin i holds cuts[i-1] <= x < cuts[i].
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
HistogramRule = Literal["sturges", "doane", "fd", "auto"]

SHARE_FLOOR = 1e-4


def quantile_cuts(reference: ArrayLike, bins: int = 10) -> Floats:
    """Cuts that give each bin about the same share of `reference` (deciles by default).

    A reference with no more than `bins` distinct values gets one bin a value, and one bin on either side
    for values never seen. NaN is left out. Raises ValueError for an empty reference.
    """
    values = finite(reference)
    if values.size == 0:
        raise ValueError("the reference holds no finite value")
    distinct = np.unique(values)
    if distinct.size <= bins:
        middles = (distinct[:-1] + distinct[1:]) / 2
        return np.concatenate(([distinct[0]], middles, [np.nextafter(distinct[-1], np.inf)]))
    return np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))


def count_bins(values: ArrayLike, cuts: ArrayLike) -> NDArray[np.int64]:
    """How many of `values` fall into each of the len(cuts) + 1 bins. NaN counts in none."""
    sample = np.asarray(values, dtype=np.float64).ravel()
    inner = np.asarray(cuts, dtype=np.float64)
    places = np.searchsorted(inner, sample[~np.isnan(sample)], side="right")
    return np.bincount(places, minlength=inner.size + 1).astype(np.int64)


def joint_edges(reference: ArrayLike, current: ArrayLike, rule: HistogramRule | int = "sturges") -> Floats:
    """Equal-width edges over the range of both samples together, outer edges included."""
    return np.histogram_bin_edges(np.concatenate((finite(reference), finite(current))), bins=rule)


def joint_shares(
    reference: ArrayLike, current: ArrayLike, rule: HistogramRule | int = "sturges"
) -> tuple[Floats, Floats]:
    """Shares of both samples in the bins of `joint_edges`."""
    left, right = finite(reference), finite(current)
    edges = joint_edges(left, right, rule)
    return np.histogram(left, edges)[0] / left.size, np.histogram(right, edges)[0] / right.size


def reference_shares(
    reference: ArrayLike, current: ArrayLike, rule: HistogramRule | int = "doane"
) -> tuple[Floats, Floats]:
    """Shares in equal-width bins fixed on the reference; mass of `current` outside them is one more bin."""
    left, right = finite(reference), finite(current)
    edges = np.histogram_bin_edges(left, bins=rule)
    left_shares = np.histogram(left, edges)[0] / left.size
    right_shares = np.histogram(right, edges)[0] / right.size
    outside = 1.0 - float(right_shares.sum())
    if outside > 0.5 / right.size:  # more than rounding
        left_shares, right_shares = np.append(left_shares, 0.0), np.append(right_shares, outside)
    return left_shares, right_shares


def category_shares(reference: ArrayLike, current: ArrayLike) -> tuple[Floats, Floats]:
    """Shares of every category that either sample holds, in the categories' sort order."""
    left, right = category_counts(reference, current)
    return left / left.sum(), right / right.sum()


def category_counts(reference: ArrayLike, current: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Counts of every category that either sample holds, in the categories' sort order."""
    left, right = np.asarray(reference).ravel(), np.asarray(current).ravel()
    categories, codes = np.unique(np.concatenate((left, right)), return_inverse=True)
    codes = codes.ravel()
    return (
        np.bincount(codes[: left.size], minlength=categories.size).astype(np.int64),
        np.bincount(codes[left.size :], minlength=categories.size).astype(np.int64),
    )


def fill_zero_shares(shares: ArrayLike, floor: float = SHARE_FLOOR) -> Floats:
    """Zero shares replaced by `floor`, or by a millionth of the smallest share where that is not above it.

    The others stay as they are, so the sum exceeds 1 by what was filled in.
    """
    filled = np.array(shares, dtype=np.float64)
    smallest = float(filled[filled > 0].min())
    filled[filled == 0] = smallest / 1e6 if smallest <= floor else floor
    return filled


def finite(values: ArrayLike) -> Floats:
    """The values as one flat float64 array, NaN and infinities left out."""
    flat = np.asarray(values, dtype=np.float64).ravel()
    return flat[np.isfinite(flat)]
