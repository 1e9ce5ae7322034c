"""Whatever a rollout meets: it skips no gate, goes back where harm is proven, and comes to one end."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

from headrace.v1.control_pb2 import BucketRange, ServedVersion, ServingConfig, Shadow
from headrace.v1.trials_pb2 import Evidence, TrialMetric, Verdict
from hypothesis import given, settings
from hypothesis import strategies as st

from services.registry.buckets import allocate
from services.registry.rollout_config import enter_step, restore
from services.registry.rollout_plan import (
    Action,
    Alert,
    Cause,
    Facts,
    Gate,
    Inconclusive,
    PlannedStep,
    Readiness,
    Rollout,
    Status,
)
from services.registry.rollout_schemas import StepIn
from services.registry.rollout_steps import next_step
from tests.fixtures.rollouts import START, a_rollout, a_verdict, carried_out, evidence, facts

FINDINGS = [
    Evidence.FINDING_UNDECIDED,
    Evidence.FINDING_SAFE,
    Evidence.FINDING_BETTER,
    Evidence.FINDING_HARMFUL,
]
LATE = {Cause.PERSON, Cause.INCONCLUSIVE}


@st.composite
def plans(draw: st.DrawFn) -> tuple[PlannedStep, ...]:
    weights = sorted(draw(st.sets(st.integers(0, 9999), min_size=1, max_size=4)))
    steps = [
        PlannedStep(
            weight,
            min_duration_s=draw(st.sampled_from([0.0, 30.0])),
            min_requests=draw(st.sampled_from([0, 100])),
            max_duration_s=draw(st.sampled_from([None, 60.0])),
            gate=draw(st.sampled_from(Gate)),
        )
        for weight in weights
    ]
    shadow = PlannedStep(0, shadow=1000, min_requests=draw(st.sampled_from([0, 100])), match_rate=0.99)
    return (*([shadow] if draw(st.booleans()) else []), *steps, PlannedStep(10_000))


@st.composite
def verdicts(draw: st.DrawFn, rollout: Rollout) -> Verdict:
    names = (*rollout.guardrails, *rollout.successes, "shadow_disagreement", "shadow_error_rate")
    found = [
        evidence(
            name, draw(st.sampled_from([*FINDINGS[:3], *FINDINGS])), units=draw(st.sampled_from([50, 500]))
        )
        for name in names
        if draw(st.integers(0, 9))
    ]
    return a_verdict(
        *found,
        requests=draw(st.sampled_from([0, 99, 100, 5000])),
        revision=draw(st.sampled_from([rollout.trial_revision - 1] + [rollout.trial_revision] * 3)),
        sample_ratio_mismatch=draw(st.integers(0, 9)) == 0,
    )


@st.composite
def known(draw: st.DrawFn, rollout: Rollout, now_s: float) -> Facts:
    now = START + timedelta(seconds=now_s)
    well = facts(rollout)
    served = draw(st.sampled_from([well.served] * 30 + [None, {"1": 10_000}, {"1": 0, "2": 10_000}]))
    readiness = draw(
        st.sampled_from(
            [Readiness(2, 2)] * 12 + [Readiness(0, 0), Readiness(2, 1), Readiness(1, 0, "no", failed=1)]
        )
    )
    alerts = [Alert("age", draw(st.booleans()), now, "PSI")] if draw(st.integers(0, 14)) == 0 else []
    verdict = draw(verdicts(rollout)) if draw(st.integers(0, 9)) else None
    age = timedelta(seconds=draw(st.sampled_from([0, 1, 89, 200])))
    return Facts(served, readiness, verdict, None if verdict is None else now - age, alerts)


def harmful(rollout: Rollout, verdict: Verdict | None) -> bool:
    """A guardrail that counts in this step is proven harmful by units split as configured."""
    if verdict is None or verdict.sample_ratio_mismatch:
        return False
    shadows = {"shadow_disagreement", "shadow_error_rate"}
    counting = shadows if rollout.entered_at and rollout.planned.shadow else set()
    return any(
        item.finding == Evidence.FINDING_HARMFUL
        and item.role == TrialMetric.ROLE_GUARDRAIL
        and (item.metric not in shadows or item.metric in counting)
        for item in verdict.evidence
    )


def gate_is_open(rollout: Rollout, verdict: Verdict | None) -> bool:
    """Said anew, and otherwise than rollout_steps.py says it."""
    planned = rollout.planned
    if planned.weight == planned.shadow == 0:
        return True
    if verdict is None or verdict.trial_revision != rollout.trial_revision:
        return False
    finding = {item.metric: item.finding for item in verdict.evidence}
    safe = {Evidence.FINDING_SAFE, Evidence.FINDING_BETTER}
    if planned.shadow:
        seen = next((e.units for e in verdict.evidence if e.metric == "shadow_disagreement"), 0)
        shadows = ("shadow_disagreement", "shadow_error_rate")
        return seen >= planned.min_requests and all(finding.get(name) in safe for name in shadows)
    if verdict.arms[1].requests_since < planned.min_requests:
        return False
    if planned.gate is Gate.SAFE:
        return all(finding.get(name) in safe for name in rollout.guardrails)
    if planned.gate is Gate.BETTER:
        return any(finding.get(name) == Evidence.FINDING_BETTER for name in rollout.successes)
    return True


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_gate_is_skipped_and_harm_always_takes_it_back(data: st.DataObject) -> None:
    rollout = a_rollout(
        plan=data.draw(plans()),
        entered_at=None,
        clock_at=None,
        successes=("clicks",),
        bake_s=30.0,
        on_inconclusive=data.draw(st.sampled_from(Inconclusive)),
    )
    now_s = 0.0
    for _ in range(data.draw(st.integers(1, 25))):
        # Forward as a rule; now and then the clock is set, either way.
        now_s += data.draw(st.sampled_from([0.5, 10.0, 45.0, 100.0, 7200.0, -3600.0]))
        now = START + timedelta(seconds=now_s)
        person = data.draw(st.integers(0, 11))
        rollout = replace(
            rollout, paused=person == 0, promoted=person == 1 and rollout.entered_at is not None
        )
        situation = data.draw(known(rollout, now_s))
        step = next_step(rollout, situation, now)
        after = carried_out(rollout, step, now)
        ended = rollout.status.final
        assert after.step >= rollout.step
        assert step.reason
        if ended:
            assert after == rollout
            return
        if step.action in {Action.ENTER, Action.COMPLETE}:
            assert situation.readiness.complete
            assert not rollout.paused
            assert not harmful(rollout, situation.verdict)
            assert situation.served is not None
            first = rollout.entered_at is None
            assert after.step == (0 if first else rollout.step + (step.action is Action.ENTER))
            assert after.weight >= rollout.weight
            if not first and step.cause not in LATE:
                assert gate_is_open(rollout, situation.verdict)
            if step.cause is Cause.INCONCLUSIVE:
                assert rollout.on_inconclusive is Inconclusive.PROMOTE
        if harmful(rollout, situation.verdict) and step.action is not Action.ABORT:
            assert step.action is Action.ROLL_BACK
        if step.action is Action.COMPLETE:
            assert rollout.status is Status.BAKING
        # One action a tick: what was just done is not done again for the same reasons.
        if step.action in {Action.ENTER, Action.RESTART_CLOCK} and after.planned.weight:
            again = next_step(after, replace(situation, served=facts(after).served), now)
            assert again.action is not step.action
        rollout = after


@settings(max_examples=100, deadline=None)
@given(
    before=st.lists(st.integers(0, 10_000), min_size=0, max_size=3),
    steps=st.lists(st.integers(1, 9999), min_size=1, max_size=5, unique=True),
    shadow=st.booleans(),
    shadow_before=st.booleans(),
)
def test_going_back_gives_back_the_very_buckets(
    before: list[int], steps: list[int], shadow: bool, shadow_before: bool
) -> None:
    ranges = allocate([], {"1": 10_000})
    for weight in [*before, 10_000]:  # a past of other splits leaves the ranges in pieces
        ranges = allocate(ranges, {"1": weight, "0": 10_000 - weight})
    config = ServingConfig(
        model="m",
        versions=[
            ServedVersion(version="1", weight=10_000),
            ServedVersion(version="0"),
            ServedVersion(version="2", held=True),
        ],
        buckets=[BucketRange(first=r.first, last=r.last, version=r.version) for r in ranges],
        shadow=Shadow(version="0", share=50) if shadow_before else None,
    )
    start = ServingConfig.FromString(config.SerializeToString())
    plan = (
        *([PlannedStep(0, shadow=100)] if shadow else []),
        *map(PlannedStep, sorted(steps)),
        PlannedStep(10_000),
    )
    for index, planned in enumerate(plan):
        rollout = a_rollout(plan=plan, step=index)
        asked = StepIn.model_validate(
            {"shadow": "0.01"} if planned.shadow else {"weight": planned.weight / 10_000}
        )
        enter_step(config, start, rollout, asked)
        weights = {version.version: version.weight for version in config.versions}
        assert weights == {"0": 0, "1": 10_000 - planned.weight, "2": planned.weight}
        assert (config.shadow.version == "2") == bool(planned.shadow)
        back = ServingConfig.FromString(config.SerializeToString())
        restore(back, start, "2")
        assert back == start


@given(st.lists(st.integers(1, 9999), min_size=1, max_size=6, unique=True))
def test_a_unit_that_has_the_new_version_keeps_it_while_the_share_grows(steps: list[int]) -> None:
    ranges = allocate([], {"1": 10_000})
    had: set[int] = set()
    for weight in sorted(steps):
        ranges = allocate(ranges, {"1": 10_000 - weight, "2": weight})
        has = {b for r in ranges if r.version == "2" for b in range(r.first, r.last + 1)}
        assert had <= has
        had = has
