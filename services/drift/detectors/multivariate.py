"""Drift of all features together, which no single feature need show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.spatial.distance import cdist
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from threadpoolctl import threadpool_limits

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PcaReconstruction:
    """What is needed to reconstruct a row from the reference's main directions; small and storable.

    `components` is (k, features), orthonormal rows, in standardised units.
    """

    mean: Floats
    scale: Floats
    components: Floats

    @classmethod
    def fit(cls, reference: ArrayLike, *, explained: float = 0.65) -> PcaReconstruction:
        """Standardise, then keep the fewest components whose variances add up to `explained` of all."""
        rows = np.asarray(reference, dtype=np.float64)
        mean, scale = rows.mean(axis=0), rows.std(axis=0)
        scale = np.where(scale > 0, scale, 1.0)
        standard = (rows - mean) / scale
        _, singular, directions = np.linalg.svd(standard - standard.mean(axis=0), full_matrices=False)
        shares = np.cumsum(singular**2) / np.sum(singular**2)
        kept = min(int(np.searchsorted(shares, explained, side="right")) + 1, shares.size)
        return cls(mean, scale, directions[:kept])

    def error(self, current: ArrayLike) -> float:
        """Mean Euclidean distance (standardised units) between rows and their reconstruction.

        Rises where the correlation that the reference had is gone, even if every marginal stayed.
        """
        standard = (np.asarray(current, dtype=np.float64) - self.mean) / self.scale
        left_over = standard - standard @ self.components.T @ self.components
        return float(np.mean(np.linalg.norm(left_over, axis=1)))


def domain_classifier_auc(
    reference: ArrayLike, current: ArrayLike, *, folds: int = 5, seed: int = 0
) -> float:
    """Cross-validated AUROC of gradient boosting that tells current rows from reference rows.

    0.5: cannot be told apart; 1: entirely different. Takes seconds above some 10,000 rows; callers sample.
    """
    left, right = np.asarray(reference, dtype=np.float64), np.asarray(current, dtype=np.float64)
    rows = np.vstack((left, right))
    labels = np.concatenate((np.zeros(len(left), dtype=int), np.ones(len(right), dtype=int)))
    classifier = HistGradientBoostingClassifier(max_iter=60, learning_rate=0.1, random_state=seed)
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed)
    # One thread: on data this small more of them wait for each other, spinning, for longer than they work.
    with threadpool_limits(1):
        scores = cross_val_predict(classifier, rows, labels, cv=splits, method="predict_proba")[:, 1]
    return float(roc_auc_score(labels, scores))


def mmd2(reference: ArrayLike, current: ArrayLike, *, sigma: float) -> float:
    """Unbiased squared maximum mean discrepancy with kernel exp(-|x-y|^2 / (2 sigma^2)) (Gretton et al. 2012,
    eq. 3). Around 0, and possibly below it, where both samples come from one distribution. O(n^2) memory.
    """
    left, right = np.atleast_2d(np.asarray(reference, float)), np.atleast_2d(np.asarray(current, float))
    n, m = len(left), len(right)

    def kernel(a: Floats, b: Floats) -> Floats:
        return np.asarray(np.exp(-cdist(a, b, "sqeuclidean") / (2 * sigma * sigma)))

    within_left = (kernel(left, left).sum() - n) / (n * (n - 1))
    within_right = (kernel(right, right).sum() - m) / (m * (m - 1))
    return float(within_left + within_right - 2 * kernel(left, right).mean())
