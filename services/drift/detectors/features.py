"""Many features at once: one test each, one decision for all with the error rate held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from services.drift.detectors.ks import EFFECT_FLOOR, Method, ks_two_sample

Correction = Literal["fdr", "bonferroni"]


@dataclass(frozen=True, slots=True)
class FeatureDrift:
    """One entry per feature in `distances`, `p_values`, `q_values` and `drifted`.

    `threshold` is what a raw p-value is compared with; `drifted` names the features below it.
    """

    distances: NDArray[np.float64]
    p_values: NDArray[np.float64]
    q_values: NDArray[np.float64]
    threshold: float
    drifted: NDArray[np.bool_]

    @property
    def is_drift(self) -> bool:
        """Whether any feature drifted."""
        return bool(self.drifted.any())

    def material(self, floor: float = EFFECT_FLOOR) -> NDArray[np.bool_]:
        """Features that drifted by at least `floor` in D."""
        return self.drifted & (self.distances >= floor)


def ks_features(
    reference: ArrayLike,
    current: ArrayLike,
    *,
    level: float = 0.05,
    correction: Correction = "fdr",
    method: Method = "auto",
) -> FeatureDrift:
    """KS per column of two matrices (rows, features), corrected over the columns.

    "fdr" is Benjamini & Hochberg (1995), "bonferroni" holds the family-wise error.
    `method` is that of `ks_two_sample`.
    """
    left, right = np.atleast_2d(np.asarray(reference)), np.atleast_2d(np.asarray(current))
    if left.shape[1] != right.shape[1]:
        raise ValueError("reference and current need the same features")
    tests = [
        ks_two_sample(left[:, column], right[:, column], method=method) for column in range(left.shape[1])
    ]
    p_values = np.array([test.p_value for test in tests])
    threshold, drifted, q_values = decide(p_values, level, correction)
    return FeatureDrift(np.array([t.statistic for t in tests]), p_values, q_values, threshold, drifted)


def decide(
    p_values: ArrayLike, level: float, correction: Correction
) -> tuple[float, NDArray[np.bool_], NDArray[np.float64]]:
    """Threshold for the raw p-values, the rejections, and the adjusted p-values (q)."""
    p = np.asarray(p_values, dtype=np.float64)
    if correction == "bonferroni":
        threshold = level / p.size
        return threshold, p <= threshold, np.minimum(1.0, p * p.size)
    order = np.argsort(p)
    steps = level * np.arange(1, p.size + 1) / p.size
    below = np.flatnonzero(p[order] <= steps)
    threshold = float(steps[below[-1]] if below.size else steps[0])
    adjusted = np.minimum.accumulate((p[order] * p.size / np.arange(1, p.size + 1))[::-1])[::-1]
    q_values = np.empty_like(p)
    q_values[order] = np.minimum(1.0, adjusted)
    return threshold, p <= threshold if below.size else np.zeros(p.size, dtype=bool), q_values
