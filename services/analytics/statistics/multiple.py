"""Many p-values, one error rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from statsmodels.stats.multitest import multipletests

Correction = Literal["bonferroni", "holm", "hochberg", "hommel", "bh", "by", "sidak", "holm-sidak", "none"]

_STATSMODELS = {
    "bonferroni": "bonferroni",
    "holm": "holm",
    "hochberg": "simes-hochberg",
    "hommel": "hommel",
    "bh": "fdr_bh",
    "by": "fdr_by",
    "sidak": "sidak",
    "holm-sidak": "holm-sidak",
}


@dataclass(frozen=True, slots=True)
class Adjusted:
    """Adjusted p-values in the order given, and which hypotheses fall at `alpha`."""

    p_values: NDArray[np.float64]
    rejected: NDArray[np.bool_]
    method: Correction


def adjust(p_values: ArrayLike, method: Correction = "holm", *, alpha: float = 0.05) -> Adjusted:
    """Adjust p-values so that comparing each with alpha holds the family-wise error (bonferroni; holm 1979;
    hochberg 1988; hommel 1988; sidak and holm-sidak for independent tests) or the false discovery rate (bh:
    Benjamini & Hochberg 1995; by: Benjamini & Yekutieli 2001, under any dependence).
    """
    raw = np.asarray(p_values, dtype=np.float64)
    if raw.size == 0 or method == "none":
        return Adjusted(raw, raw <= alpha, method)
    rejected, adjusted, _, _ = multipletests(raw, alpha=alpha, method=_STATSMODELS[method])
    return Adjusted(np.asarray(adjusted), np.asarray(rejected), method)
