"""What a rollout does next, case by case."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from headrace.v1.trials_pb2 import Evidence

from services.registry.rollout_plan import (
    Action,
    Alert,
    Cause,
    Gate,
    Inconclusive,
    PlannedStep,
    Readiness,
    Status,
)
from services.registry.rollout_steps import VERDICT_AGE, next_step
from tests.fixtures.rollouts import (
    BETTER,
    CANARY,
    HARMFUL,
    SAFE,
    START,
    UNDECIDED,
    a_rollout,
    a_verdict,
    after,
    evidence,
    facts,
)

LOADING = {"entered_at": None, "clock_at": None}


def test_it_waits_for_every_worker_and_then_gives_the_first_share() -> None:
    rollout = a_rollout(**LOADING)
    for readiness, words in (
        (Readiness(0, 0), "no live worker"),
        (Readiness(2, 0), "0 of 2"),
        (Readiness(2, 1), "1 of 2"),
    ):
        step = next_step(rollout, facts(rollout, readiness=readiness), START)
        assert (step.action, step.cause) == (Action.WAIT, Cause.LOADING)
        assert words in step.reason
    step = next_step(rollout, facts(rollout), START)
    assert (step.action, step.step) == (Action.ENTER, 0)
    assert "1% of the requests go to version 2" in step.reason


def test_a_version_that_no_worker_can_load_goes_back_with_what_a_worker_said() -> None:
    for changes in (LOADING, {}, {"step": 3, "status": Status.BAKING}):
        rollout = a_rollout(**changes)
        known = facts(rollout, readiness=Readiness(2, 0, "w1: no such operator", failed=2))
        step = next_step(rollout, known, START)
        assert (step.action, step.cause) == (Action.ROLL_BACK, Cause.LOAD_FAILED)
        assert "no such operator" in step.reason


def test_one_worker_that_cannot_load_it_tries_again_for_a_while() -> None:
    """Then a quorum is enough, and with less it goes back; the others answer meanwhile."""
    some, few = (Readiness(n, 3, "w4: disk full", failed=n - 3) for n in (4, 5))
    for changes, action, cause, now in (
        (LOADING, Action.WAIT, Cause.LOADING, after(1000)),
        ({"promoted": True}, Action.HOLD, Cause.WORKERS, after(1000)),
    ):
        rollout = a_rollout(**changes)
        soon = facts(rollout, readiness=some, waiting_since=after(101))
        for known in (replace(soon, waiting_since=None), soon):
            step = next_step(rollout, known, now)
            assert (step.action, step.cause, step.about) == (action, cause, "failed")
            assert "3 of 4 workers" in step.reason
            assert "1 could not and try again (w4: disk full)" in step.reason
        late = replace(soon, waiting_since=after(100))
        step = next_step(rollout, late, now)
        assert step.action is Action.ENTER
        step = next_step(rollout, replace(late, readiness=few), now)
        assert (step.action, step.cause) == (Action.ROLL_BACK, Cause.LOAD_FAILED)
        assert step.reason.startswith("after 900 s: 3 of 5 workers have loaded version 2, 2 could not")
        assert "75% would be enough" in step.reason
    patient = a_rollout(**LOADING, load_timeout_s=60.0, load_quorum=0.5)
    known = facts(patient, readiness=few, waiting_since=after(0))
    assert next_step(patient, known, after(59)).action is Action.WAIT
    step = next_step(patient, known, after(60))
    assert step.action is Action.ENTER
    assert "3 of 5 workers have loaded version 2" in step.reason
    assert "enough after 60 s" in step.reason


def test_workers_that_load_for_ever_are_not_waited_for_for_ever() -> None:
    rollout = a_rollout(**LOADING)
    for readiness in (Readiness(2, 1), Readiness(0, 0)):
        known = facts(rollout, readiness=readiness, waiting_since=START)
        step = next_step(rollout, known, after(900))
        assert (step.action, step.cause) == (Action.ROLL_BACK, Cause.LOAD_FAILED)
        assert "version 1 goes on answering everything" in step.reason
    # Later on, that nobody is heard of is no fault of the version.
    rollout = a_rollout(promoted=True)
    step = next_step(rollout, facts(rollout, readiness=Readiness(0, 0), waiting_since=START), after(900))
    assert (step.action, step.cause) == (Action.HOLD, Cause.WORKERS)
    assert step.reason == "after 900 s: no live worker serves m"


def test_a_step_is_left_after_its_time_a_verdict_and_its_requests_in_this_order() -> None:
    rollout = a_rollout()
    step = next_step(rollout, facts(rollout), after(59))
    assert (step.action, step.cause) == (Action.WAIT, Cause.DURATION)
    assert step.reason == "59 of 60 s of the step are over"
    step = next_step(rollout, facts(rollout), after(60))
    assert (step.action, step.cause) == (Action.WAIT, Cause.VERDICT)
    few = facts(rollout, verdict=a_verdict(requests=99), verdict_at=after(60))
    step = next_step(rollout, few, after(60))
    assert (step.action, step.cause) == (Action.WAIT, Cause.REQUESTS)
    assert step.reason == "99 of 100 requests answered by version 2 in this step"
    enough = facts(rollout, verdict=a_verdict(requests=100), verdict_at=after(60))
    step = next_step(rollout, enough, after(60))
    assert (step.action, step.step) == (Action.ENTER, 1)
    assert "10% of the requests go to version 2" in step.reason
    assert "100 requests answered by version 2" in step.reason


def test_a_verdict_of_what_was_before_the_step_opens_no_gate_but_proves_harm() -> None:
    rollout = a_rollout(trial_revision=8)
    old = facts(rollout, verdict=a_verdict(), verdict_at=after(60))
    assert next_step(rollout, old, after(60)).cause is Cause.VERDICT
    harm = a_verdict(evidence("error_rate", HARMFUL))
    step = next_step(rollout, replace(old, verdict=harm), after(1))
    assert (step.action, step.cause, step.about) == (Action.ROLL_BACK, Cause.HARM, "error_rate")


def test_a_verdict_that_is_long_overdue_holds_and_says_since_when() -> None:
    rollout = a_rollout()
    step = next_step(rollout, facts(rollout), after(91))
    assert (step.action, step.cause) == (Action.HOLD, Cause.VERDICT)
    assert "no verdict since the rollout began at 12:00:00 UTC" in step.reason
    stale = facts(rollout, verdict=a_verdict(), verdict_at=after(65))
    step = next_step(rollout, stale, after(66) + VERDICT_AGE)
    assert (step.action, step.cause) == (Action.HOLD, Cause.VERDICT)
    assert step.reason == "no verdict since 12:01:05 UTC"
    assert next_step(rollout, stale, after(64) + VERDICT_AGE).action is Action.ENTER
    older = facts(rollout, verdict=a_verdict(revision=6), verdict_at=after(200))
    assert next_step(rollout, older, after(200)).action is Action.HOLD


def test_a_harmful_guardrail_takes_it_back_from_every_step_with_numbers() -> None:
    for changes in (
        {},
        {"step": 2},
        {"step": 3, "status": Status.BAKING},
        {"paused": True},
        {"promoted": True},
    ):
        rollout = a_rollout(**changes)
        harm = evidence("error_rate", HARMFUL, mean=0.05, control_mean=0.01, low=0.02, high=0.06)
        step = next_step(rollout, facts(rollout, verdict=a_verdict(harm), verdict_at=START), START)
        assert step.action is Action.ROLL_BACK
        assert "0.05 over 400 units against 0.01 over 4,000" in step.reason
        assert "97.50% confidence" in step.reason
        assert "back to version 1" in step.reason


def test_harm_to_something_that_is_no_guardrail_or_of_another_arm_is_no_reason() -> None:
    rollout = a_rollout()
    other = evidence("error_rate", HARMFUL)
    other.arm = "3"
    found = a_verdict(evidence("clicks", HARMFUL), other, evidence("latency_ms", UNDECIDED))
    assert (
        next_step(rollout, facts(rollout, verdict=found, verdict_at=after(60)), after(60)).action
        is Action.ENTER
    )


def test_the_gate_safe_needs_every_guardrail_proven() -> None:
    rollout = a_rollout(step=2)
    for found, about in (
        ([evidence("error_rate", SAFE), evidence("latency_ms", UNDECIDED)], "latency_ms"),
        ([evidence("error_rate", UNDECIDED), evidence("latency_ms", BETTER)], "error_rate"),
        ([evidence("error_rate", SAFE)], "latency_ms"),
    ):
        step = next_step(rollout, facts(rollout, verdict=a_verdict(*found), verdict_at=after(60)), after(60))
        assert (step.action, step.cause, step.about) == (Action.WAIT, Cause.GATE, about)
    quantile = evidence("latency_ms", BETTER)
    quantile.metric = "latency_ms:p99"
    found = [evidence("error_rate", SAFE), quantile]
    step = next_step(rollout, facts(rollout, verdict=a_verdict(*found), verdict_at=after(60)), after(60))
    assert (step.action, step.step) == (Action.ENTER, 3)


def test_the_gate_better_needs_one_success_metric_proven() -> None:
    plan = (PlannedStep(1000, gate=Gate.BETTER), PlannedStep(10_000))
    rollout = a_rollout(plan=plan, successes=("clicks", "sales"))
    undecided = a_verdict(evidence("clicks", UNDECIDED), evidence("sales", SAFE))
    step = next_step(rollout, facts(rollout, verdict=undecided, verdict_at=START), START)
    assert (step.action, step.cause, step.about) == (Action.WAIT, Cause.GATE, "clicks")
    better = a_verdict(evidence("clicks", UNDECIDED), evidence("sales", BETTER))
    assert next_step(rollout, facts(rollout, verdict=better, verdict_at=START), START).action is Action.ENTER


def test_a_split_that_is_not_what_was_configured_holds_but_errors_still_go_back() -> None:
    rollout = a_rollout()
    skewed = a_verdict(evidence("latency_ms", HARMFUL), sample_ratio_mismatch=True, sample_ratio_log_e=9.5)
    step = next_step(rollout, facts(rollout, verdict=skewed, verdict_at=after(60)), after(60))
    assert (step.action, step.cause) == (Action.HOLD, Cause.SAMPLE_RATIO)
    assert "900 units of 1, 500 units of 2" in step.reason
    failing = a_verdict(evidence("error_rate", HARMFUL), sample_ratio_mismatch=True)
    step = next_step(rollout, facts(rollout, verdict=failing, verdict_at=after(60)), after(60))
    assert step.action is Action.ROLL_BACK


def test_drift_holds_or_takes_it_back() -> None:
    rollout = a_rollout(step=1, started_at=after(-600))
    well = {"verdict": a_verdict(), "verdict_at": after(60)}
    for critical, raised, action in (
        (False, after(1), Action.HOLD),
        (True, after(1), Action.ROLL_BACK),
        (False, after(-1), Action.ENTER),  # of an earlier step, which was left in spite of it
        (True, after(-1), Action.ROLL_BACK),  # a warning then
        (True, after(-601), Action.ENTER),  # of the time before the rollout
    ):
        alert = Alert("age", critical, raised, "PSI 0.31")
        step = next_step(rollout, facts(rollout, alerts=[alert], **well), after(60))
        assert step.action is action, (critical, raised)
        if action is not Action.ENTER:
            assert (step.cause, step.about) == (Cause.DRIFT, "age")
            assert "PSI 0.31" in step.reason
    unwatched = replace(rollout, drift_guardrail=False)
    alert = Alert("age", True, after(1), "PSI 0.31")
    assert next_step(unwatched, facts(unwatched, alerts=[alert], **well), after(60)).action is Action.ENTER


@pytest.mark.parametrize(
    ("policy", "action"),
    [
        (Inconclusive.HOLD, Action.HOLD),
        (Inconclusive.PROMOTE, Action.ENTER),
        (Inconclusive.ROLLBACK, Action.ROLL_BACK),
    ],
)
def test_a_gate_that_stays_shut_too_long_does_what_the_plan_says(
    policy: Inconclusive, action: Action
) -> None:
    plan = (PlannedStep(1000, min_requests=2000, max_duration_s=600), PlannedStep(10_000))
    rollout = a_rollout(plan=plan, on_inconclusive=policy)
    known = facts(rollout, verdict=a_verdict(), verdict_at=after(600))
    assert next_step(rollout, known, after(599)).cause is Cause.REQUESTS
    step = next_step(rollout, known, after(600))
    assert (step.action, step.cause) == (action, Cause.INCONCLUSIVE)
    assert "after 600 s: 1,000 of 2,000 requests" in step.reason


def test_it_never_moves_on_blindly_or_against_what_was_seen() -> None:
    plan = (PlannedStep(1000, max_duration_s=60), PlannedStep(10_000))
    rollout = a_rollout(plan=plan, on_inconclusive=Inconclusive.PROMOTE)
    warned = Alert("age", False, after(1), "PSI 0.11")
    for known in (
        facts(rollout),
        facts(rollout, verdict=a_verdict(sample_ratio_mismatch=True), verdict_at=after(3600)),
        facts(rollout, verdict=a_verdict(), verdict_at=after(3600), alerts=[warned]),
    ):
        step = next_step(rollout, known, after(3600))
        assert (step.action, step.cause) == (Action.HOLD, Cause.INCONCLUSIVE)


def test_a_person_may_skip_the_wait_but_not_the_workers() -> None:
    rollout = a_rollout(promoted=True)
    step = next_step(rollout, facts(rollout), START)
    assert (step.action, step.cause, step.step) == (Action.ENTER, Cause.PERSON, 1)
    step = next_step(rollout, facts(rollout, readiness=Readiness(2, 1)), START)
    assert (step.action, step.cause) == (Action.HOLD, Cause.WORKERS)


def test_a_pause_holds_every_step_forward() -> None:
    for changes in (LOADING, {}, {"step": 3, "status": Status.BAKING}):
        rollout = a_rollout(paused=True, **changes)
        known = facts(rollout, verdict=a_verdict(), verdict_at=after(1000))
        step = next_step(rollout, known, after(1000))
        assert (step.action, step.cause) == (Action.HOLD, Cause.PAUSED)


def test_the_bake_ends_after_its_time_with_a_verdict_and_ready_workers() -> None:
    rollout = a_rollout(step=3, status=Status.BAKING)
    known = facts(rollout, verdict=a_verdict(requests=0, sample_ratio_mismatch=True), verdict_at=after(300))
    step = next_step(rollout, known, after(299))
    assert (step.action, step.reason) == (Action.WAIT, "299 of 300 s of the bake are over")
    step = next_step(rollout, known, after(300))
    assert (step.action, step.cause) == (Action.COMPLETE, Cause.GATE)
    assert "version 2 has taken over from 1" in step.reason
    assert next_step(rollout, facts(rollout), after(300)).cause is Cause.VERDICT
    unready = replace(known, readiness=Readiness(1, 0))
    assert next_step(rollout, unready, after(300)).cause is Cause.WORKERS


def test_a_shadow_step_asks_for_comparisons_and_a_proven_match_rate() -> None:
    plan = (PlannedStep(0, shadow=1000, min_requests=500, match_rate=0.99), *CANARY)
    rollout = a_rollout(plan=plan)
    few = a_verdict(evidence("shadow_disagreement", SAFE), evidence("shadow_error_rate", SAFE), requests=0)
    step = next_step(rollout, facts(rollout, verdict=few, verdict_at=START), START)
    assert (step.action, step.cause) == (Action.WAIT, Cause.REQUESTS)
    assert step.reason == "400 of 500 requests compared with what version 1 answered"
    many = {"units": 600}
    for disagreement, errors, cause in (
        (UNDECIDED, SAFE, Cause.GATE),
        (SAFE, UNDECIDED, Cause.GATE),
        (HARMFUL, SAFE, Cause.HARM),
        (SAFE, HARMFUL, Cause.HARM),
        (SAFE, SAFE, Cause.GATE),
    ):
        found = a_verdict(
            evidence("shadow_disagreement", disagreement, **many),
            evidence("shadow_error_rate", errors, **many),
        )
        step = next_step(rollout, facts(rollout, verdict=found, verdict_at=START), START)
        assert step.cause is cause, (disagreement, errors)
        assert (step.action is Action.ENTER) == (disagreement == errors == SAFE)
    # What a shadow once was counts no more in the steps after it.
    later = a_rollout(plan=plan, step=1)
    old = a_verdict(evidence("shadow_disagreement", HARMFUL), evidence("error_rate", UNDECIDED))
    assert next_step(later, facts(later, verdict=old, verdict_at=after(60)), after(60)).action is Action.ENTER


def test_a_baseline_step_needs_time_only() -> None:
    rollout = a_rollout(plan=(PlannedStep(0, min_duration_s=60), PlannedStep(10_000)))
    assert next_step(rollout, facts(rollout), after(59)).cause is Cause.DURATION
    step = next_step(rollout, facts(rollout), after(60))
    assert (step.action, step.step) == (Action.ENTER, 1)


def test_a_deployment_that_somebody_else_changed_is_left_alone() -> None:
    rollout = a_rollout(step=1)
    for served in (None, {"1": 10_000}, {"2": 1000}, {"1": 5000, "2": 5000}):
        step = next_step(rollout, facts(rollout, served=served), START)
        assert (step.action, step.cause) == (Action.ABORT, Cause.GONE), served


def test_a_clock_that_goes_back_restarts_the_step() -> None:
    rollout = a_rollout()
    assert next_step(rollout, facts(rollout), after(-4)).cause is Cause.DURATION
    step = next_step(rollout, facts(rollout), after(-3600))
    assert (step.action, step.cause) == (Action.RESTART_CLOCK, Cause.CLOCK)
    # A verdict "from the future" is of the time before the jump, and proves nothing of now.
    ahead = facts(rollout, verdict=a_verdict(), verdict_at=after(60) + VERDICT_AGE + timedelta(seconds=1))
    assert next_step(rollout, ahead, after(60)).cause is Cause.VERDICT


def test_drift_counts_that_was_found_after_the_clock_went_back() -> None:
    rollout = a_rollout(entered_at=after(3600), started_at=after(3500), clock_at=after(10))
    for critical, action in ((True, Action.ROLL_BACK), (False, Action.HOLD)):
        alert = Alert("age", critical, after(20), "PSI 0.9")
        assert next_step(rollout, facts(rollout, alerts=[alert]), after(30)).action is action
        old = replace(alert, raised_at=after(5))
        assert next_step(rollout, facts(rollout, alerts=[old]), after(30)).action is Action.WAIT


@pytest.mark.parametrize("status", [Status.COMPLETED, Status.ROLLED_BACK, Status.ABORTED])
def test_what_has_ended_stays_as_it_is(status: Status) -> None:
    rollout = a_rollout(status=status)
    harm = a_verdict(evidence("error_rate", HARMFUL))
    for known in (facts(rollout, served=None), facts(rollout, verdict=harm, verdict_at=START)):
        assert next_step(rollout, known, after(1000)).cause is Cause.FINISHED


def test_the_words_of_analytics_are_passed_on() -> None:
    said = Evidence(metric="error_rate", reason="12 of 431 requests failed against 0.9%")
    rollout = a_rollout()
    found = evidence("error_rate", HARMFUL, reason=said.reason)
    step = next_step(rollout, facts(rollout, verdict=a_verdict(found), verdict_at=START), START)
    assert step.reason == "error_rate: 12 of 431 requests failed against 0.9%; back to version 1 from 1%"
