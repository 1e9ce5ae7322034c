"""What callers get of experiments."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from headrace.v1.trials_pb2 import Verdict
from pydantic import BaseModel

from services.common.assignment import BUCKETS
from services.registry.experiment_schemas import Value
from services.registry.experiment_state import spec_of
from services.registry.explanation import Explained
from services.registry.layers import weights_of
from services.registry.rollout_state import evidence_of
from services.registry.tables import ExperimentEventRow, ExperimentRow, VerdictRow
from services.registry.trial_schemas import MetricView
from services.registry.views import moment


class VariantView(BaseModel):
    name: str
    version: str
    #: Share of the experiment's units, 0 … 1, as it is now.
    weight: float


class ConditionView(BaseModel):
    attribute: str
    operator: str
    values: list[Value]


class OverrideView(BaseModel):
    unit: str
    variant: str


class BanditView(BaseModel):
    min_weight: float
    max_change: float
    update_every_s: int


class ArmView(BaseModel):
    name: str
    requests: int
    units: int
    errors: int


class VerdictView(BaseModel):
    """The last verdict in short; /results has all of it."""

    computed_at: datetime
    until: datetime
    summary: str
    warnings: list[str]
    sample_ratio_mismatch: bool
    arms: list[ArmView]
    #: Always-valid; findings are undecided, harmful, safe and better. A bound that is infinite is null.
    evidence: list[dict[str, Any]]

    @classmethod
    def of(cls, row: VerdictRow) -> VerdictView:
        verdict = Verdict.FromString(row.verdict)
        return cls(
            computed_at=row.computed_at,
            until=moment(verdict.until_us),
            summary=verdict.summary,
            warnings=list(verdict.warnings),
            sample_ratio_mismatch=verdict.sample_ratio_mismatch,
            arms=[
                ArmView(name=arm.name, requests=arm.requests, units=arm.units, errors=arm.errors)
                for arm in verdict.arms
            ],
            evidence=evidence_of(verdict),
        )


class ExperimentView(BaseModel):
    """Shares are 0 … 1. `layer`: the buckets of the model's layer that are its own, [first, last]."""

    experiment_id: str
    model: str
    name: str
    description: str
    #: draft, scheduled, running or stopped.
    status: str
    #: What one that is due waits for; null: nothing.
    waiting_for: str | None
    unit: str
    salt: str
    traffic: float
    layer: list[list[int]]
    variants: list[VariantView]
    targeting: list[ConditionView]
    overrides: list[OverrideView]
    metrics: list[MetricView]
    minimal_effect: float | None
    alpha: float
    power: float
    planned_units: int | None
    start_at: datetime | None
    stop_at: datetime | None
    auto_stop: bool
    bandit: BanditView | None
    created_at: datetime
    started_at: datetime | None
    stopped_at: datetime | None
    stopped_because: str | None
    #: Outcomes that come later count no more.
    closed_at: datetime | None
    revision: int
    verdict: VerdictView | None

    @classmethod
    def of(cls, row: ExperimentRow, verdict: VerdictRow | None = None) -> ExperimentView:
        spec = spec_of(row)
        weights = weights_of(row.buckets, len(spec.variants))
        same = {"name", "description", "unit", "minimal_effect", "alpha", "power", "planned_units"}
        same |= {"start_at", "stop_at", "auto_stop"}
        return cls(
            **spec.model_dump(include=same),
            experiment_id=row.experiment_id,
            model=row.model,
            status=row.status,
            waiting_for=row.waiting_for or None,
            salt=spec.salt or row.experiment_id,
            traffic=float(spec.traffic),
            layer=row.layer,
            variants=[
                VariantView(name=variant.name, version=variant.version, weight=weight / BUCKETS)
                for variant, weight in zip(spec.variants, weights, strict=True)
            ],
            targeting=[
                ConditionView(attribute=one.attribute, operator=one.operator, values=list(one.values))
                for one in spec.targeting
            ],
            overrides=[OverrideView(unit=one.unit, variant=one.variant) for one in spec.overrides],
            metrics=[MetricView.of(metric, spec.minimal_effect or 0.0) for metric in spec.metrics],
            bandit=None if spec.bandit is None else BanditView.model_validate(spec.bandit.model_dump()),
            created_at=row.created_at,
            started_at=row.started_at,
            stopped_at=row.stopped_at,
            stopped_because=row.stopped_because or None,
            closed_at=row.closed_at,
            revision=row.revision,
            verdict=None if verdict is None else VerdictView.of(verdict),
        )


class ExperimentPage(BaseModel):
    experiments: list[ExperimentView]
    #: `after` of the next page; null: this was the last.
    next: str | None


class AssignmentView(BaseModel):
    """What an experiment makes of one request; for one that does not run, what it would make of it."""

    experiment_id: str
    in_experiment: bool
    #: Null: another experiment or the deployment decides.
    variant: str | None
    version: str | None
    #: Of the unit under the experiment's salt, and under the layer's, 0 … 9999.
    bucket: int
    layer_bucket: int
    #: Chance of a unit of the experiment to get this variant, 0 … 1.
    propensity: float | None
    because: str
    steps: list[str]

    @classmethod
    def of(cls, experiment_id: str, explained: Explained) -> AssignmentView:
        return cls(
            experiment_id=experiment_id,
            in_experiment=explained.in_experiment,
            variant=explained.variant,
            version=explained.version,
            bucket=explained.bucket,
            layer_bucket=explained.layer_bucket,
            propensity=explained.propensity,
            because=explained.because,
            steps=list(explained.steps),
        )


class ExperimentEventView(BaseModel):
    id: int
    at: datetime
    #: created, changed, scheduled, waiting, started, reweighted, stopped or closed.
    kind: str
    reason: str
    detail: dict[str, Any]

    @classmethod
    def of(cls, row: ExperimentEventRow) -> ExperimentEventView:
        return cls(id=row.id, at=row.at, kind=row.kind, reason=row.reason, detail=row.detail)


class ExperimentHistory(BaseModel):
    """Newest first."""

    events: list[ExperimentEventView]
    #: `before` of the next page; null: this was the last.
    next: int | None

    @classmethod
    def of(cls, rows: Sequence[ExperimentEventRow], following: int | None) -> ExperimentHistory:
        return cls(events=[ExperimentEventView.of(row) for row in rows], next=following)


class HoldoutView(BaseModel):
    model: str
    share: float
