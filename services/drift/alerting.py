"""When a finding becomes an alert, grows louder, and ends: only what persists is worth waking somebody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from services.drift.evaluation import FeatureReport, Severity, Thresholds
from services.drift.stream import Window

PSI = "psi"
KS = "ks"


@dataclass(frozen=True, slots=True)
class Persistence:
    """Windows in a row that a finding must stand before it alerts, and must be gone before it ends."""

    alert_after: int = 3
    resolve_after: int = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """One detector's word on one feature. `critical_value` is PSI's 95% chi-square value, 0 for KS."""

    feature: str
    detector: str
    severity: Severity
    value: float
    threshold: float
    critical_value: float
    p_value: float


@dataclass(frozen=True, slots=True)
class Signal:
    """What is remembered of one detector on one feature: windows in a row with and without a finding, and
    the loudness of the alert that is open for it (NONE: no alert)."""

    streak: int = 0
    calm: int = 0
    alerted: Severity = Severity.NONE


class Change(StrEnum):
    """What happens to the alert of a signal."""

    OPEN = "open"
    ESCALATE = "escalate"
    RESOLVE = "resolve"


@dataclass(frozen=True, slots=True)
class Decision:
    """The next memory of a signal and what to do, None for nothing."""

    finding: Finding
    signal: Signal
    change: Change | None


def findings(window: Window, thresholds: Thresholds) -> Iterator[Finding]:
    """Both detectors' word on every feature, also where it is "nothing"."""
    for report in window.reports:
        yield _psi(report, thresholds)
        if report.ks is not None:
            yield Finding(
                report.feature,
                KS,
                report.ks_severity,
                report.ks.statistic,
                thresholds.ks_distance,
                0.0,
                report.ks.p_value,
            )


def _psi(report: FeatureReport, thresholds: Thresholds) -> Finding:
    critical = report.psi_severity is Severity.CRITICAL
    return Finding(
        report.feature,
        PSI,
        report.psi_severity,
        report.psi.value,
        thresholds.psi_critical if critical else thresholds.psi_warning,
        report.psi.critical_95,
        report.psi.p_value,
    )


def decide(
    remembered: Mapping[tuple[str, str], Signal], found: Iterator[Finding], persistence: Persistence
) -> list[Decision]:
    """One decision per finding; `remembered` is keyed by (feature, detector)."""
    return [_decide(remembered.get((f.feature, f.detector), Signal()), f, persistence) for f in found]


def _decide(signal: Signal, finding: Finding, persistence: Persistence) -> Decision:
    if finding.severity is Severity.NONE:
        if not signal.alerted:
            return Decision(finding, Signal(), None)  # no alert: nothing to count the calm for
        calm = signal.calm + 1
        if calm >= persistence.resolve_after:
            return Decision(finding, Signal(), Change.RESOLVE)
        return Decision(finding, Signal(0, calm, signal.alerted), None)
    streak = signal.streak + 1
    if streak < persistence.alert_after or finding.severity <= signal.alerted:
        return Decision(finding, Signal(streak, 0, signal.alerted), None)
    change = Change.ESCALATE if signal.alerted else Change.OPEN
    return Decision(finding, Signal(streak, 0, finding.severity), change)


def sentence(finding: Finding, model: str, version: str, window: Window) -> str:
    """The finding in words, with the numbers that a person needs to judge it."""
    subject = f"{finding.feature} of {model}/{version} has shifted"
    seen = f"{window.rows} rows"
    if window.sampled_rows < window.rows:
        seen = f"{window.sampled_rows} rows drawn from {window.rows}"
    rows = f"over {seen} against {window.reference_rows} reference rows"
    if finding.detector == PSI:
        return (
            f"{subject}: PSI {finding.value:.3f} {rows}, threshold {finding.threshold:g}; chance alone stays "
            f"below {finding.critical_value:.3f} in 95% of windows."
        )
    return (
        f"{subject}: the distribution functions lie {finding.value:.3f} apart {rows} (KS, threshold "
        f"{finding.threshold:g}, p {finding.p_value:.2g})."
    )
