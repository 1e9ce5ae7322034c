"""What a rollout does next. Pure: its state, what is known now and the time in, one step with its reason out.

A rollout goes through the steps of its plan in order. It leaves one when the step's time is over, enough
requests were answered and the gate is open; it goes back to the buckets it came from as soon as a guardrail
is proven harmful. What it does not know it takes for a reason to stay where it is.

Evidence is always-valid and of the whole rollout, so harm counts whichever revision of the trial a verdict
was computed for. What opens a gate must be of this revision: the requests of a step are counted by it, not by
any clock, since clocks are set back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

from headrace.v1.trials_pb2 import Evidence, TrialMetric, Verdict

from services.registry.buckets import BUCKETS
from services.registry.rollout_plan import (
    ERROR_RATE,
    SHADOW_DISAGREEMENT,
    SHADOW_ERRORS,
    SHADOW_METRICS,
    Action,
    Alert,
    Cause,
    Facts,
    Gate,
    Inconclusive,
    Rollout,
    Status,
    Step,
)
from services.registry.rollout_words import (
    aim,
    back,
    clock_text,
    counts,
    describe,
    grounds,
    loaded,
    loading,
    percent,
    seen,
)

#: Verdicts come every 30 s where nothing changes; an older one says that analytics is away.
VERDICT_AGE: Final = timedelta(seconds=90)
#: Clocks of two machines differ by less; a step that began later than this in the future began before its
#: clock was set back.
CLOCK_SLACK: Final = timedelta(seconds=5)

_PROVEN_SAFE: Final = frozenset({Evidence.FINDING_SAFE, Evidence.FINDING_BETTER})


def next_step(rollout: Rollout, facts: Facts, now: datetime) -> Step:
    """The one thing to do now. A rollout that has ended waits for ever."""
    if rollout.status.final:
        ended = f"the rollout is {rollout.status.replace('_', ' ')}"
        return _stay(rollout, Action.WAIT, Cause.FINISHED, ended)
    urgent = _lost(rollout, facts.served) or _must_go_back(rollout, facts)
    if urgent is not None:
        return urgent
    if rollout.entered_at is None or rollout.clock_at is None:
        return _first(rollout, facts, now)
    if rollout.clock_at > now + CLOCK_SLACK:
        ahead = (rollout.clock_at - now).total_seconds()
        reason = f"the clock went back by {ahead:,.0f} s: the time of the step is counted anew"
        return _stay(rollout, Action.RESTART_CLOCK, Cause.CLOCK, reason)
    if rollout.paused:
        return _stay(
            rollout, Action.HOLD, Cause.PAUSED, "paused by a person; guardrails are watched all the same"
        )
    doubt = None if rollout.promoted else _doubt(rollout, facts, rollout.clock_at, now)
    if doubt is not None:
        return _inconclusive(rollout, facts, doubt, now - rollout.clock_at) or doubt
    return _onward(rollout, facts, now)


def _lost(rollout: Rollout, served: Mapping[str, int] | None) -> Step | None:
    """Where the deployment is not the one this rollout made."""
    if served is None:
        return _stay(rollout, Action.ABORT, Cause.GONE, f"{rollout.model} is not deployed any more")
    for version in (rollout.version, rollout.previous_version):
        if version not in served:
            reason = f"version {version} of {rollout.model} is not served any more"
            return _stay(rollout, Action.ABORT, Cause.GONE, reason, version)
    weight = served[rollout.version]
    if weight != rollout.weight:
        reason = (
            f"version {rollout.version} has {percent(weight)} of the requests, not the "
            f"{percent(rollout.weight)} of this rollout: somebody else changed the deployment"
        )
        return _stay(rollout, Action.ABORT, Cause.GONE, reason, rollout.version)
    return None


def _must_go_back(rollout: Rollout, facts: Facts) -> Step | None:
    """Where staying would do harm."""
    if facts.readiness.hopeless:
        reason = f"no worker can load version {rollout.version}: {facts.readiness.error}; {back(rollout)}"
        return _stay(rollout, Action.ROLL_BACK, Cause.LOAD_FAILED, reason)
    harm = _harm(rollout, facts.verdict)
    if harm is not None:
        return _stay(rollout, Action.ROLL_BACK, Cause.HARM, f"{describe(harm)}; {back(rollout)}", harm.metric)
    for alert in _alerts(rollout, facts):
        if alert.critical:
            reason = f"critical drift of {alert.feature}: {alert.message}; {back(rollout)}"
            return _stay(rollout, Action.ROLL_BACK, Cause.DRIFT, reason, alert.feature)
    return None


def _first(rollout: Rollout, facts: Facts, now: datetime) -> Step:
    """Before any request reaches the new version."""
    if rollout.paused:
        return _stay(rollout, Action.HOLD, Cause.PAUSED, "paused by a person before its first step")
    missing = _missing(rollout, facts, now, Action.WAIT, Cause.LOADING)
    if missing is not None:
        return missing
    reason = f"{loaded(rollout, facts.readiness)}: {aim(rollout, 0)}"
    return Step(Action.ENTER, Cause.STARTED, reason, 0)


def _missing(rollout: Rollout, facts: Facts, now: datetime, action: Action, cause: Cause) -> Step | None:
    """Where workers that cannot answer for the new version are still waited for, or have been for too long;
    None: enough of them can."""
    readiness = facts.readiness
    if readiness.complete:
        return None
    how_far = loading(rollout, readiness)
    about = "failed" if readiness.failed else ""
    since = facts.waiting_since
    if since is None or readiness.settling or (now - since).total_seconds() < rollout.load_timeout_s:
        return _stay(rollout, action, cause, how_far, about)
    if readiness.workers > 0 and readiness.ready >= rollout.load_quorum * readiness.workers:
        return None
    late = f"after {rollout.load_timeout_s:,.0f} s: {how_far}"
    if not readiness.workers and rollout.entered_at is not None:
        # Nobody is heard of: that says nothing of the version, and there is nobody to go back to.
        return _stay(rollout, Action.HOLD, cause, late, "nobody")
    enough = f"{rollout.load_quorum:.0%} would be enough"
    return _stay(rollout, Action.ROLL_BACK, Cause.LOAD_FAILED, f"{late}, and {enough}; {back(rollout)}")


def _doubt(rollout: Rollout, facts: Facts, clock_at: datetime, now: datetime) -> Step | None:
    """Why the step is not left yet; None: nothing speaks against it."""
    planned = rollout.planned
    warning = next((alert for alert in _alerts(rollout, facts) if not alert.critical), None)
    if warning is not None:
        reason = f"drift of {warning.feature}: {warning.message}"
        return _stay(rollout, Action.HOLD, Cause.DRIFT, reason, warning.feature)
    verdict = facts.verdict
    if verdict is not None and verdict.sample_ratio_mismatch and 0 < planned.weight < BUCKETS:
        reason = (
            f"units are not split as configured ({counts(verdict)}; log e-value "
            f"{verdict.sample_ratio_log_e:.1f}), and a split that is not what it should be proves nothing"
        )
        return _stay(rollout, Action.HOLD, Cause.SAMPLE_RATIO, reason)
    kind, lasts = ("bake", rollout.bake_s) if rollout.at_full else ("step", planned.min_duration_s)
    elapsed = (now - clock_at).total_seconds()
    if elapsed < lasts:
        reason = f"{max(elapsed, 0):,.0f} of {lasts:,.0f} s of the {kind} are over"
        return _stay(rollout, Action.WAIT, Cause.DURATION, reason)
    if planned.weight == planned.shadow == 0:
        return None  # the time in which the previous version is watched: nothing of the new one to judge
    unseen = _unseen(rollout, facts, clock_at, now)
    if unseen is not None or verdict is None:
        return unseen
    return _shut(rollout, verdict)


def _unseen(rollout: Rollout, facts: Facts, clock_at: datetime, now: datetime) -> Step | None:
    """Where no verdict speaks of this step as it is now."""
    late = now - clock_at > VERDICT_AGE
    if facts.verdict is None or facts.verdict_at is None:
        since = f"no verdict since the rollout began at {clock_text(rollout.started_at)}"
    elif abs(now - facts.verdict_at) > VERDICT_AGE:
        since, late = f"no verdict since {clock_text(facts.verdict_at)}", True
    elif facts.verdict.trial_revision != rollout.trial_revision:
        since = f"no verdict since this step began at {clock_text(clock_at)}"
    else:
        return None
    return _stay(rollout, Action.HOLD if late else Action.WAIT, Cause.VERDICT, since)


def _shut(rollout: Rollout, verdict: Verdict) -> Step | None:
    """Where requests or evidence are still missing for the gate."""
    planned = rollout.planned
    count, what = seen(rollout, verdict)
    if count < planned.min_requests:
        reason = f"{count:,} of {planned.min_requests:,} {what}"
        return _stay(rollout, Action.WAIT, Cause.REQUESTS, reason)
    if planned.shadow:
        return _unsafe(rollout, verdict, (SHADOW_DISAGREEMENT, SHADOW_ERRORS))
    match planned.gate:
        case Gate.SAFE:
            return _unsafe(rollout, verdict, rollout.guardrails)
        case Gate.BETTER:
            return _not_better(rollout, verdict)
        case Gate.NO_HARM:
            return None


def _unsafe(rollout: Rollout, verdict: Verdict, metrics: Sequence[str]) -> Step | None:
    """Unless everything said of every one of `metrics` is that it is safe."""
    for name in metrics:
        found = _evidence(rollout, verdict, name)
        open_ = next((evidence for evidence in found if evidence.finding not in _PROVEN_SAFE), None)
        if open_ is not None:
            reason = f"not proven safe yet: {describe(open_)}"
        elif not found:
            reason = f"nothing is known of {name} yet"
        else:
            continue
        return _stay(rollout, Action.WAIT, Cause.GATE, reason, name)
    return None


def _not_better(rollout: Rollout, verdict: Verdict) -> Step | None:
    """Unless one of the success metrics is proven better."""
    found = [evidence for name in rollout.successes for evidence in _evidence(rollout, verdict, name)]
    if any(evidence.finding == Evidence.FINDING_BETTER for evidence in found):
        return None
    known = "; ".join(describe(evidence) for evidence in found) or "nothing is known of it yet"
    return _stay(rollout, Action.WAIT, Cause.GATE, f"not proven better yet: {known}", rollout.successes[0])


def _inconclusive(rollout: Rollout, facts: Facts, doubt: Step, elapsed: timedelta) -> Step | None:
    """What the plan says for a step that has lasted too long; None: go on waiting.

    It moves on in spite of `doubt` only for want of proof: never blind, and never against what was seen.
    """
    limit = rollout.planned.max_duration_s
    if limit is None or elapsed.total_seconds() < limit:
        return None
    late = f"after {limit:,.0f} s: {doubt.reason}"
    match rollout.on_inconclusive:
        case Inconclusive.ROLLBACK:
            reason = f"{late}; {back(rollout)}"
            return _stay(rollout, Action.ROLL_BACK, Cause.INCONCLUSIVE, reason, doubt.about)
        case Inconclusive.PROMOTE if doubt.cause in {Cause.GATE, Cause.REQUESTS} and facts.readiness.complete:
            step = rollout.step + 1
            reason = f"{late}; the plan moves on where nothing is proven: {aim(rollout, step)}"
            return Step(Action.ENTER, Cause.INCONCLUSIVE, reason, step, doubt.about)
        case _:
            return _stay(rollout, Action.HOLD, Cause.INCONCLUSIVE, late, str(doubt.cause))


def _onward(rollout: Rollout, facts: Facts, now: datetime) -> Step:
    """The step is over: the next one, or the end. Needs workers that can answer."""
    missing = _missing(rollout, facts, now, Action.HOLD, Cause.WORKERS)
    if missing is not None:
        return missing
    cause = Cause.PERSON if rollout.promoted else Cause.GATE
    because = "a person moved it on" if rollout.promoted else grounds(rollout, facts.verdict)
    if rollout.status is Status.BAKING:
        reason = f"{because}: version {rollout.version} has taken over from {rollout.previous_version}"
        return _stay(rollout, Action.COMPLETE, cause, reason)
    step = rollout.step + 1
    return Step(Action.ENTER, cause, f"{because}: {aim(rollout, step)}", step)


def _harm(rollout: Rollout, verdict: Verdict | None) -> Evidence | None:
    """The first guardrail that is proven harmful. Of a split that is not what was configured only errors
    count: no choice of units makes a version fail that works."""
    if verdict is None:
        return None
    shadowing = rollout.entered_at is not None and rollout.planned.shadow > 0
    for evidence in verdict.evidence:
        if evidence.arm != rollout.version or evidence.finding != Evidence.FINDING_HARMFUL:
            continue
        of_copies = evidence.metric in SHADOW_METRICS
        if evidence.role != TrialMetric.ROLE_GUARDRAIL or (of_copies and not shadowing):
            continue
        if not verdict.sample_ratio_mismatch or of_copies or evidence.metric == ERROR_RATE:
            return evidence
    return None


def _alerts(rollout: Rollout, facts: Facts) -> list[Alert]:
    """Open alerts that count: warnings raised since this step began, critical ones since the rollout did,
    since one may have been a mere warning in an earlier step. A step whose time is counted from before that
    saw the clock set back: then what came since counts, though it seems older."""
    if not rollout.drift_guardrail or rollout.entered_at is None:
        return []
    clock_at = rollout.clock_at or rollout.entered_at
    since = {True: min(rollout.started_at, clock_at), False: min(rollout.entered_at, clock_at)}
    return [alert for alert in facts.alerts if alert.raised_at >= since[alert.critical]]


def _evidence(rollout: Rollout, verdict: Verdict, metric: str) -> list[Evidence]:
    """What is said of `metric`: of its mean, or of a quantile, which analytics calls "latency_ms:p99"."""
    return [
        item
        for item in verdict.evidence
        if item.arm == rollout.version and item.metric.partition(":")[0] == metric
    ]


def _stay(rollout: Rollout, action: Action, cause: Cause, reason: str, about: str = "") -> Step:
    return Step(action, cause, reason, rollout.step, about)
