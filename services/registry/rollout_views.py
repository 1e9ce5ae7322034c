"""What callers get of rollouts."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from headrace.v1.trials_pb2 import Verdict
from pydantic import BaseModel

from services.common.assignment import BUCKETS
from services.registry.rollout_plan import Facts, PlannedStep
from services.registry.rollout_schemas import plan_of
from services.registry.rollout_state import evidence_of, rollout_of, spec_of
from services.registry.rollout_steps import next_step
from services.registry.tables import RolloutEventRow, RolloutRow


class StepView(BaseModel):
    """Shares of the requests are 0 … 1; the last step lasts `bake_s`."""

    weight: float
    shadow: float
    min_duration_s: float
    min_requests: int
    max_duration_s: float | None
    gate: str
    match_rate: float | None

    @classmethod
    def of(cls, planned: PlannedStep) -> StepView:
        return cls(
            weight=planned.weight / BUCKETS,
            shadow=planned.shadow / BUCKETS,
            min_duration_s=planned.min_duration_s,
            min_requests=planned.min_requests,
            max_duration_s=planned.max_duration_s,
            gate=planned.gate,
            match_rate=planned.match_rate or None,
        )


class RolloutView(BaseModel):
    rollout_id: str
    model: str
    version: str
    previous_version: str
    strategy: str
    #: running, paused, baking, completed, rolled_back or aborted.
    status: str
    #: Index in `steps`; null `entered_at`: it waits for workers.
    step: int
    steps: list[StepView]
    #: Of the new version now, 0 … 1.
    weight: float
    #: Why the last decision was made.
    reason: str
    #: What it waits for now; null: nothing any more.
    waiting_for: str | None
    metrics: list[dict[str, Any]]
    alpha: float
    bake_s: float
    on_inconclusive: str
    drift_guardrail: bool
    load_timeout_s: float
    load_quorum: float
    keep_previous: bool
    revision: int
    #: Of the last verdict, and when it came.
    evidence: list[dict[str, Any]]
    summary: str
    warnings: list[str]
    verdict_at: datetime | None
    started_at: datetime
    entered_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of(cls, row: RolloutRow, facts: Facts | None, now: datetime) -> RolloutView:
        """`facts`: None in lists, which say nothing of evidence and of what is waited for."""
        spec, rollout = spec_of(row), rollout_of(row)
        verdict = Verdict() if facts is None or facts.verdict is None else facts.verdict
        ended = rollout.status.final
        back = ended and row.status != "completed"
        return cls(
            rollout_id=row.rollout_id,
            model=row.model,
            version=row.version,
            previous_version=row.previous_version,
            strategy=spec.strategy,
            status="paused" if row.paused_at is not None else row.status,
            step=row.step,
            steps=[StepView.of(planned) for planned in plan_of(spec)],
            weight=0.0 if back else rollout.weight / BUCKETS,
            reason=row.reason,
            waiting_for=None if ended or facts is None else next_step(rollout, facts, now).reason,
            metrics=[metric.model_dump(mode="json", exclude_none=True) for metric in spec.all_metrics()],
            alpha=spec.alpha,
            bake_s=spec.bake_s,
            on_inconclusive=spec.on_inconclusive,
            drift_guardrail=spec.drift_guardrail,
            load_timeout_s=spec.load_timeout_s,
            load_quorum=spec.load_quorum,
            keep_previous=spec.keep_previous,
            revision=row.revision,
            evidence=evidence_of(verdict),
            summary=verdict.summary,
            warnings=list(verdict.warnings),
            verdict_at=None if facts is None else facts.verdict_at,
            started_at=row.started_at,
            entered_at=row.entered_at,
            finished_at=row.finished_at,
        )


class RolloutPage(BaseModel):
    rollouts: list[RolloutView]
    #: `after` of the next page; null: this was the last.
    next: str | None


class RolloutEventView(BaseModel):
    """One decision, with what it rests on."""

    number: int
    at: datetime
    #: wait, hold, enter, complete, roll_back, abort or restart_clock.
    action: str
    cause: str
    status: str
    step: int
    weight: float
    reason: str
    evidence: list[dict[str, Any]]

    @classmethod
    def of(cls, row: RolloutEventRow) -> RolloutEventView:
        return cls(
            number=row.id,
            at=row.at,
            action=row.action,
            cause=row.cause,
            status=row.status,
            step=row.step,
            weight=row.weight / BUCKETS,
            reason=row.reason,
            evidence=row.evidence,
        )


class RolloutEventPage(BaseModel):
    #: Newest first.
    events: list[RolloutEventView]
    #: `before` of the next page; null: this was the last.
    next: int | None
