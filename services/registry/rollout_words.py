"""How a rollout's decisions read. Pure; every sentence carries the numbers it rests on."""

from __future__ import annotations

from datetime import UTC, datetime

from headrace.v1.trials_pb2 import Evidence, TrialMetric, Verdict

from services.registry.rollout_plan import SHADOW_DISAGREEMENT, SHADOW_METRICS, Readiness, Rollout


def describe(evidence: Evidence) -> str:
    """One finding with its numbers."""
    if evidence.reason:
        return f"{evidence.metric}: {evidence.reason}"
    return (
        f"{evidence.metric}: {evidence.mean:.4g} over {evidence.units:,} units against "
        f"{evidence.control_mean:.4g} over {evidence.control_units:,}; the difference is between "
        f"{evidence.low:+.4g} and {evidence.high:+.4g} at every moment with {1 - evidence.alpha:.2%} "
        "confidence"
    )


def seen(rollout: Rollout, verdict: Verdict) -> tuple[int, str]:
    """Requests of the present step, and what they are."""
    if rollout.planned.shadow:
        compared = (
            evidence.units
            for evidence in verdict.evidence
            if evidence.metric == SHADOW_DISAGREEMENT and evidence.arm == rollout.version
        )
        return next(compared, 0), f"requests compared with what version {rollout.previous_version} answered"
    counts = (arm.requests_since for arm in verdict.arms if arm.name == rollout.version)
    return next(counts, 0), f"requests answered by version {rollout.version} in this step"


def grounds(rollout: Rollout, verdict: Verdict | None) -> str:
    """Why the present step may be left."""
    if verdict is None or rollout.weight == rollout.planned.shadow == 0:
        return "its time is over"
    count, what = seen(rollout, verdict)
    watched = [
        evidence
        for evidence in verdict.evidence
        if evidence.arm == rollout.version
        and evidence.role == TrialMetric.ROLE_GUARDRAIL
        and (evidence.metric in SHADOW_METRICS) == (rollout.planned.shadow > 0)
    ]
    found = "; ".join(describe(evidence) for evidence in watched) or "nothing is known of any yet"
    return f"{count:,} {what}, and no guardrail is proven harmful ({found})"


def aim(rollout: Rollout, step: int) -> str:
    """What entering `step` does."""
    planned = rollout.plan[step]
    if planned.shadow:
        return f"it gets a copy of {percent(planned.shadow)} of the requests"
    if planned.weight == 0:
        return f"version {rollout.previous_version} is watched for a while before the change"
    return f"{percent(planned.weight)} of the requests go to version {rollout.version}"


def back(rollout: Rollout) -> str:
    """What going back does."""
    if rollout.weight == 0:
        return f"version {rollout.previous_version} goes on answering everything"
    return f"back to version {rollout.previous_version} from {percent(rollout.weight)}"


def loading(rollout: Rollout, readiness: Readiness) -> str:
    """How far the workers are."""
    if readiness.workers == 0:
        return f"no live worker serves {rollout.model}"
    so_far = f"{readiness.ready} of {readiness.workers} workers have loaded version {rollout.version}"
    if readiness.failed:
        so_far = f"{so_far}, {readiness.failed} could not and try again ({readiness.error})"
    return f"{so_far} ({readiness.no_room})" if readiness.no_room else so_far


def loaded(rollout: Rollout, readiness: Readiness) -> str:
    """That enough workers are ready."""
    if not readiness.complete:
        return f"{loading(rollout, readiness)}, which is enough after {rollout.load_timeout_s:,.0f} s"
    who = "the only worker has" if readiness.workers == 1 else f"all {readiness.workers} workers have"
    return f"{who} loaded version {rollout.version}"


def counts(verdict: Verdict) -> str:
    """How the units are split."""
    return ", ".join(f"{arm.units:,} units of {arm.name}" for arm in verdict.arms)


def percent(weight: int) -> str:
    """A share in 1/10,000."""
    return f"{weight / 100:g}%"


def clock_text(at: datetime) -> str:
    """A time of day."""
    return at.astimezone(UTC).strftime("%H:%M:%S UTC")
