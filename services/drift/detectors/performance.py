"""How well a classifier does, estimated before its labels arrive."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import roc_auc_score


@dataclass(frozen=True, slots=True)
class PerformanceEstimate:
    """Expected accuracy, AUROC and F1 of binary predictions on `n` rows."""

    accuracy: float
    roc_auc: float
    f1: float
    n: int


def confidence_based_estimate(
    reference_probabilities: ArrayLike,
    reference_labels: ArrayLike,
    current_probabilities: ArrayLike,
    *,
    threshold: float = 0.5,
    bins: int = 10,
) -> PerformanceEstimate:
    """Confidence-based performance estimation (CBPE; Bialek et al. 2024, arXiv:2407.08649).

    Where the reference's probabilities are not calibrated already they are calibrated on its labels
    (isotonic). Each current row then is correct with its calibrated probability, so that the confusion
    matrix is known in expectation. Holds while P(label | score) stays as it was in the reference; it cannot
    see concept drift.
    """
    scores = np.asarray(reference_probabilities, dtype=np.float64)
    labels = np.asarray(reference_labels, dtype=np.float64)
    current = np.asarray(current_probabilities, dtype=np.float64)
    calibrated = current
    if calibration_error(scores, labels, bins=bins) > 0.01:
        model = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip").fit(scores, labels)
        calibrated = np.asarray(model.predict(current), dtype=np.float64)
    positive = current >= threshold
    true_positive, false_positive = calibrated[positive].sum(), (1 - calibrated[positive]).sum()
    false_negative, true_negative = calibrated[~positive].sum(), (1 - calibrated[~positive]).sum()
    denominator = 2 * true_positive + false_positive + false_negative
    return PerformanceEstimate(
        accuracy=float((true_positive + true_negative) / current.size),
        roc_auc=_expected_auc(current, calibrated),
        f1=float(2 * true_positive / denominator) if denominator > 0 else 0.0,
        n=int(current.size),
    )


def calibration_error(probabilities: ArrayLike, labels: ArrayLike, *, bins: int = 10) -> float:
    """Expected calibration error over equal-width bins of the probability (Naeini et al. 2015)."""
    p, y = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    place = np.minimum((p * bins).astype(int), bins - 1)
    gaps = np.abs(np.bincount(place, p, bins) - np.bincount(place, y, bins))
    return float(gaps.sum() / p.size)


def _expected_auc(scores: NDArray[np.float64], calibrated: NDArray[np.float64]) -> float:
    """AUROC where each row is a positive with weight p and a negative with weight 1 - p at once."""
    labels = np.concatenate((np.ones(scores.size), np.zeros(scores.size)))
    weights = np.concatenate((calibrated, 1 - calibrated))
    if calibrated.sum() <= 0 or calibrated.sum() >= scores.size:
        return float("nan")
    return float(roc_auc_score(labels, np.concatenate((scores, scores)), sample_weight=weights))
