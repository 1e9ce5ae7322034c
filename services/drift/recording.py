"""What a window changes: its report, the memory of every signal, alerts, and who is told."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from headrace.v1.events_pb2 import DriftAlert
from sqlalchemy.ext.asyncio import AsyncSession

from services.common.bus.port import Record
from services.common.db import enqueue
from services.common.ids import id_text, new_id
from services.common.topics import ALERTS
from services.drift import repository
from services.drift.alerting import Change, Decision, Finding, Persistence, Signal, decide, findings, sentence
from services.drift.detectors.ks import KsResult
from services.drift.detectors.psi import PsiResult
from services.drift.evaluation import FeatureReport, Severity, Thresholds
from services.drift.signatures import VersionKey
from services.drift.stream import Window
from services.drift.tables import AlertRow, DeliveryRow, Outbox, SignalRow


async def record_windows(
    session: AsyncSession,
    closed: Sequence[tuple[VersionKey, Window]],
    limits: Thresholds,
    persistence: Persistence,
    now: datetime,
) -> list[AlertRow]:
    """Store all windows, those of one version in their order, and act on them; gives the alerts that were
    opened, escalated or resolved. Asks the database as often for a hundred of them as for one."""
    if not closed:
        return []
    await repository.add_windows(session, [_to_row(*key, window, now) for key, window in closed])
    rows = await repository.signals(session, {key for key, _ in closed})
    changed = []
    for key, window in closed:
        changed += await _act(session, key, rows[key], window, limits, persistence, now)
    return changed


async def _act(
    session: AsyncSession,
    key: VersionKey,
    rows: dict[tuple[str, str], SignalRow],
    window: Window,
    limits: Thresholds,
    persistence: Persistence,
    now: datetime,
) -> list[AlertRow]:
    """Change what is remembered of one version. What was always calm needs no row."""
    remembered = {name: Signal(row.streak, row.calm, Severity(row.alerted)) for name, row in rows.items()}
    changed = []
    for decision in decide(remembered, findings(window, limits), persistence):
        name = (decision.finding.feature, decision.finding.detector)
        row = rows.get(name)
        if row is None:
            if decision.signal == Signal():
                continue
            row = SignalRow(model=key[0], version=key[1], feature=name[0], detector=name[1], alert_id=None)
            session.add(row)
            rows[name] = row
        row.streak, row.calm = decision.signal.streak, decision.signal.calm
        row.alerted = int(decision.signal.alerted)
        if decision.change is not None:
            alert = await _apply(session, row, decision, window, now)
            if alert is not None:
                changed.append(alert)
    return changed


def _to_row(model: str, version: str, window: Window, now: datetime) -> dict[str, Any]:
    severity = max((max(r.psi_severity, r.ks_severity) for r in window.reports), default=Severity.NONE)
    return {
        "model": model,
        "version": version,
        "start_us": window.start_us,
        "end_us": window.end_us,
        "rows": window.rows,
        "sampled_rows": window.sampled_rows,
        "reference_rows": window.reference_rows,
        "severity": int(severity),
        "features": [feature_json(report) for report in window.reports],
        "created_at": now,
    }


async def _apply(
    session: AsyncSession, signal: SignalRow, decision: Decision, window: Window, now: datetime
) -> AlertRow | None:
    if decision.change is Change.RESOLVE:
        alert = await session.get(AlertRow, signal.alert_id) if signal.alert_id else None
        signal.alert_id = None
        if alert is not None:
            alert.resolved_at = alert.updated_at = now
        return alert
    alert = await session.get(AlertRow, signal.alert_id) if signal.alert_id else None
    if alert is None:
        alert = AlertRow(alert_id=new_id(), model=signal.model, version=signal.version, opened_at=now)
        session.add(alert)
        signal.alert_id = alert.alert_id
    _fill(alert, decision.finding, window, now)
    return alert


def _fill(alert: AlertRow, finding: Finding, window: Window, now: datetime) -> None:
    alert.feature, alert.detector = finding.feature, finding.detector
    alert.severity = int(finding.severity)
    alert.value, alert.threshold = finding.value, finding.threshold
    alert.critical_value, alert.p_value = finding.critical_value, finding.p_value
    alert.window_start_us, alert.window_end_us = window.start_us, window.end_us
    alert.window_rows, alert.window_sampled_rows = window.rows, window.sampled_rows
    alert.reference_rows = window.reference_rows
    alert.message = sentence(finding, alert.model, alert.version, window)
    alert.updated_at = now


async def tell(session: AsyncSession, alerts: list[AlertRow], now: datetime) -> None:
    """Every change of an alert goes to the webhooks that want it and to the topic, when the transaction
    commits. Call it last (`enqueue`)."""
    for alert in alerts:
        for hook in await repository.webhooks(session, alert.model):
            body = alert_json(alert)
            session.add(DeliveryRow(webhook_id=hook.webhook_id, body=body, attempts=0, next_at=now))
    await enqueue(session, Outbox, [_to_record(alert) for alert in alerts])


def _to_record(alert: AlertRow) -> Record:
    """The alert as it stands on drift.alerts.v1."""
    event = DriftAlert(
        alert_id=alert.alert_id,
        model=alert.model,
        version=alert.version,
        feature=alert.feature,
        detector=alert.detector,
        value=alert.value,
        threshold=alert.threshold,
        severity=_severity(alert),
        critical_value=alert.critical_value,
        p_value=alert.p_value,
        window_start_us=alert.window_start_us,
        window_end_us=alert.window_end_us,
        reference_rows=alert.reference_rows,
        window_rows=alert.window_rows,
        window_sampled_rows=alert.rows_seen,
        message=alert.message,
        resolved_at_us=round(alert.resolved_at.timestamp() * 1e6) if alert.resolved_at else 0,
    )
    return Record(ALERTS.name, alert.model.encode(), event.SerializeToString())


def _severity(alert: AlertRow) -> DriftAlert.Severity:
    critical = alert.severity == Severity.CRITICAL
    return DriftAlert.SEVERITY_CRITICAL if critical else DriftAlert.SEVERITY_WARNING


def state(alert: AlertRow) -> str:
    """ "open", "acknowledged" or "resolved"."""
    if alert.resolved_at is not None:
        return "resolved"
    return "acknowledged" if alert.acknowledged_at is not None else "open"


def alert_json(alert: AlertRow) -> dict[str, Any]:
    """The alert as the API lists it and webhooks receive it."""
    return {
        "alert_id": id_text(alert.alert_id),
        "model": alert.model,
        "version": alert.version,
        "feature": alert.feature,
        "detector": alert.detector,
        "severity": Severity(alert.severity).name.lower(),
        "state": state(alert),
        "value": alert.value,
        "threshold": alert.threshold,
        "critical_value": alert.critical_value or None,
        "p_value": alert.p_value,
        "window": {
            "start_us": alert.window_start_us,
            "end_us": alert.window_end_us,
            "rows": alert.window_rows,
            "sampled_rows": alert.rows_seen,
        },
        "reference_rows": alert.reference_rows,
        "message": alert.message,
        "opened_at": alert.opened_at.isoformat(),
        "updated_at": alert.updated_at.isoformat(),
        "acknowledged_at": alert.acknowledged_at.isoformat() if alert.acknowledged_at else None,
        "resolved_at": alert.resolved_at.isoformat() if alert.resolved_at else None,
    }


def feature_json(report: FeatureReport) -> dict[str, Any]:
    """Both detectors' numbers on one feature."""
    severity = max(report.psi_severity, report.ks_severity)
    psi = _fields(report.psi) | {"q_value": report.psi_q, "severity": report.psi_severity.name.lower()}
    ks = None
    if report.ks is not None:
        ks = _fields(report.ks) | {"q_value": report.ks_q, "severity": report.ks_severity.name.lower()}
    return {"feature": report.feature, "severity": severity.name.lower(), "psi": psi, "ks": ks}


def _fields(result: PsiResult | KsResult) -> dict[str, Any]:
    """As `dataclasses.asdict`, which copies every number."""
    return {name: getattr(result, name) for name in result.__slots__}
