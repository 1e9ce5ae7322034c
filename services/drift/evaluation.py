"""Whether a window of the live stream still looks like the reference: PSI and KS per feature, one decision
for all features with the false discovery rate held."""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from services.drift.detectors.binning import quantile_cuts
from services.drift.detectors.features import decide
from services.drift.detectors.ks import EFFECT_FLOOR, KsResult, ks_from_cumulative
from services.drift.detectors.psi import PsiResult, psi_from_counts
from services.drift.detectors.sketches import QuantileSketch, rising
from services.drift.sample import OTHER, Sample

#: Points at which two sketches are compared: every half percent of either.
_SHARES = np.linspace(0, 1, 201)


class Severity(IntEnum):
    """How loud a finding is. Numbers are those of the event."""

    NONE = 0
    WARNING = 1
    CRITICAL = 2


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What counts as a finding: an effect of at least this size *and* a q-value below `level`."""

    psi_warning: float = 0.1
    psi_critical: float = 0.2
    ks_distance: float = EFFECT_FLOOR * 2
    level: float = 0.01
    bins: int = 10


@dataclass(frozen=True, slots=True)
class FeatureReport:
    """One feature in one window. `psi_q` and `ks_q` are p-values adjusted over the features (Benjamini &
    Hochberg); KS is None for a categorical feature."""

    feature: str
    psi: PsiResult
    psi_q: float
    psi_severity: Severity
    ks: KsResult | None
    ks_q: float | None
    ks_severity: Severity


@dataclass(frozen=True, slots=True)
class Quantiles:
    """One numeric feature of a reference: where it is cut into bins, how many of its values fall into each,
    and the points at which its distribution function is compared."""

    sketch: QuantileSketch
    cuts: NDArray[np.float64]
    counts: NDArray[np.float64]
    points: NDArray[np.float64]

    @classmethod
    def of(cls, sketch: QuantileSketch, bins: int) -> Quantiles:
        points = sketch.quantiles(_SHARES)
        cuts = quantile_cuts(points, bins)
        return cls(sketch, cuts, _counts(sketch, cuts), points)


@dataclass(frozen=True, slots=True)
class Profile:
    """A reference as windows are compared with it: what depends on it alone is worked out once."""

    rows: int
    numeric: dict[str, Quantiles]
    categorical: dict[str, Counter[str]]

    @classmethod
    def of(cls, reference: Sample, bins: int = 10) -> Profile:
        numeric = {name: Quantiles.of(s, bins) for name, s in reference.numeric.items() if s.count}
        return cls(reference.rows, numeric, {name: c for name, c in reference.categorical.items() if c})


def evaluate(reference: Profile, window: Sample, thresholds: Thresholds) -> list[FeatureReport]:
    """One report per feature that both sides hold, in the reference's order. An empty side gives none."""
    compared: list[tuple[str, PsiResult, KsResult | None]] = []
    for name, feature in reference.numeric.items():
        live = window.numeric.get(name)
        if live is not None and live.count:
            psi = psi_from_counts(feature.counts, _counts(live, feature.cuts))
            compared.append((name, psi, _ks(feature, live)))
    for name, counts in reference.categorical.items():
        seen = window.categorical.get(name)
        if seen:
            compared.append((name, _categorical_psi(counts, seen), None))
    if not compared:
        return []
    psi_q = _q_values([psi.p_value for _, psi, _ in compared])
    ks_q = iter(_q_values([ks.p_value for _, _, ks in compared if ks is not None]))
    return [
        _report(name, psi, q, ks, next(ks_q) if ks is not None else None, thresholds)
        for (name, psi, ks), q in zip(compared, psi_q, strict=True)
    ]


def _report(
    name: str, psi: PsiResult, psi_q: float, ks: KsResult | None, ks_q: float | None, limits: Thresholds
) -> FeatureReport:
    psi_severity = Severity.NONE
    if psi_q < limits.level and psi.value >= limits.psi_warning:
        psi_severity = Severity.CRITICAL if psi.value >= limits.psi_critical else Severity.WARNING
    material = ks is not None and ks.is_material(q_value=ks_q, level=limits.level, floor=limits.ks_distance)
    ks_severity = Severity.WARNING if material else Severity.NONE
    return FeatureReport(name, psi, psi_q, psi_severity, ks, ks_q, ks_severity)


def _q_values(p_values: list[float]) -> list[float]:
    return [float(q) for q in decide(p_values, 0.05, "fdr")[2]] if p_values else []


def _counts(sketch: QuantileSketch, cuts: NDArray[np.float64]) -> NDArray[np.float64]:
    below = sketch.cumulative(cuts, inclusive=False)
    return np.round(np.diff(below, prepend=0.0, append=1.0) * sketch.count)


def _categorical_psi(reference: Counter[str], live: Counter[str]) -> PsiResult:
    if OTHER in reference or OTHER in live:
        # Each side kept the values it saw first; only those that both kept can be told apart on both.
        kept = (reference.keys() & live.keys()) - {OTHER}
        reference, live = _folded(reference, kept), _folded(live, kept)
    values = sorted(reference.keys() | live.keys())
    return psi_from_counts([reference[value] for value in values], [live[value] for value in values])


def _folded(counts: Counter[str], kept: Set[str]) -> Counter[str]:
    folded = Counter({value: counts[value] for value in kept})
    folded[OTHER] = counts.total() - folded.total()
    return folded


def _ks(reference: Quantiles, live: QuantileSketch) -> KsResult:
    points = rising(np.concatenate((reference.points, live.quantiles(_SHARES))))
    return ks_from_cumulative(
        reference.sketch.cumulative_at(points), live.cumulative_at(points), reference.sketch.count, live.count
    )
