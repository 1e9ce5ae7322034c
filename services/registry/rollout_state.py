"""A rollout's row as the decision sees it, and as analytics is asked about it. Pure."""

from __future__ import annotations

from typing import Any

from headrace.v1.control_pb2 import Unit
from headrace.v1.trials_pb2 import Evidence, Trial, TrialArm, TrialMetric, Verdict

from services.common.assignment import BUCKETS
from services.registry.rollout_plan import Rollout, Status
from services.registry.rollout_schemas import RolloutIn, plan_of
from services.registry.schemas import utc_us
from services.registry.tables import RolloutRow
from services.registry.trial_schemas import metric_message


def spec_of(row: RolloutRow) -> RolloutIn:
    """What was asked for."""
    return RolloutIn.model_validate(row.spec)


def rollout_of(row: RolloutRow) -> Rollout:
    """Where it stands."""
    spec = spec_of(row)
    metrics = spec.metrics_watched()
    return Rollout(
        model=row.model,
        version=row.version,
        previous_version=row.previous_version,
        plan=plan_of(spec),
        status=Status(row.status),
        step=row.step,
        entered_at=row.entered_at,
        clock_at=row.clock_at,
        started_at=row.started_at,
        trial_revision=row.revision,
        bake_s=spec.bake_s,
        on_inconclusive=spec.on_inconclusive,
        guardrails=tuple(metric.name for metric in metrics if metric.role == "guardrail"),
        successes=tuple(metric.name for metric in metrics if metric.role == "success"),
        drift_guardrail=spec.drift_guardrail,
        load_timeout_s=spec.load_timeout_s,
        load_quorum=spec.load_quorum,
        paused=row.paused_at is not None,
        promoted=row.promoted,
    )


def trial_of(row: RolloutRow) -> Trial:
    """What analytics shall judge of a rollout. Its metrics and its budget are the same all its life."""
    spec, rollout = spec_of(row), rollout_of(row)
    weight = 0 if row.status in {Status.ROLLED_BACK, Status.ABORTED} else rollout.weight
    shadowing = row.shadow_since is not None
    return Trial(
        trial_id=row.rollout_id,
        kind=Trial.KIND_ROLLOUT,
        model=row.model,
        revision=row.revision,
        arms=[
            TrialArm(name=row.previous_version, version=row.previous_version, weight=BUCKETS - weight),
            TrialArm(name=row.version, version=row.version, weight=weight),
        ],
        unit=Unit.UNIT_USER,
        metrics=[metric_message(metric) for metric in spec.all_metrics()],
        alpha=spec.alpha,
        started_at_us=utc_us(row.started_at),
        stopped_at_us=0 if row.finished_at is None else utc_us(row.finished_at),
        closed=row.closed_at is not None,
        shadow_version=row.version if shadowing else "",
        shadow_since_us=0 if row.shadow_since is None else utc_us(row.shadow_since),
        name=f"{row.model}: {row.previous_version} to {row.version}",
    )


def evidence_of(verdict: Verdict | None) -> list[dict[str, Any]]:
    """The evidence of a verdict as JSON; a bound that is infinite is null."""
    return [] if verdict is None else [_evidence(item) for item in verdict.evidence]


def _evidence(item: Evidence) -> dict[str, Any]:
    numbers = {
        name: getattr(item, name) for name in ("control_mean", "mean", "estimate", "low", "high", "alpha")
    }
    return {
        "metric": item.metric,
        "role": TrialMetric.Role.Name(item.role).removeprefix("ROLE_").lower(),
        "arm": item.arm,
        "control_units": item.control_units,
        "units": item.units,
        **{name: value if abs(value) < float("inf") else None for name, value in numbers.items()},
        "finding": Evidence.Finding.Name(item.finding).removeprefix("FINDING_").lower(),
        "method": item.method,
        "reason": item.reason,
    }
