"""Distances between distributions: over shares in bins, and between the samples themselves."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats
from scipy.spatial import distance

from services.drift.detectors.binning import finite


def jensen_shannon(reference_shares: ArrayLike, current_shares: ArrayLike, *, base: float = 2.0) -> float:
    """Root of the Jensen-Shannon divergence (Endres & Schindelin 2003): 0 equal, 1 disjoint to base 2."""
    return float(distance.jensenshannon(reference_shares, current_shares, base=base))


def hellinger(reference_shares: ArrayLike, current_shares: ArrayLike) -> float:
    """sqrt(sum (sqrt r - sqrt c)^2 / 2): 0 equal, 1 disjoint (Hellinger 1909)."""
    roots = np.sqrt(np.asarray(reference_shares, float)) - np.sqrt(np.asarray(current_shares, float))
    return float(np.sqrt(np.sum(roots * roots) / 2))


def kullback_leibler(reference_shares: ArrayLike, current_shares: ArrayLike) -> float:
    """KL(reference | current) in nats; infinite where `current` lacks a bin that the reference has."""
    return float(stats.entropy(reference_shares, current_shares))


def wasserstein(reference: ArrayLike, current: ArrayLike) -> float:
    """First Wasserstein (earth mover's) distance of the samples, in the unit of the feature."""
    return float(stats.wasserstein_distance(finite(reference), finite(current)))


def normalised_wasserstein(reference: ArrayLike, current: ArrayLike, *, smallest_sd: float = 0.001) -> float:
    """The same in standard deviations of the reference (population sd, at least `smallest_sd`)."""
    return wasserstein(reference, current) / max(float(np.std(finite(reference))), smallest_sd)
