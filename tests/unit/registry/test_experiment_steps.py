"""What an experiment does by itself, decided from its standing, the last verdict and the time alone."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from headrace.v1.trials_pb2 import Evidence, TrialMetric, Verdict

from services.registry.experiment_steps import Action, BanditBounds, Standing, next_step, proven

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)

RUNNING = Standing(
    status="running",
    revision=7,
    variants=("old", "new"),
    weights=(5000, 5000),
    start_at=None,
    stop_at=None,
    started_at=NOW - HOUR,
    weighted_at=NOW - HOUR,
    stopped_at=None,
    closed_at=None,
    auto_stop=True,
    bandit=None,
)
SCHEDULED = replace(RUNNING, status="scheduled", started_at=None, weighted_at=None)
STOPPED = replace(RUNNING, status="stopped", stopped_at=NOW - HOUR)
BANDIT = BanditBounds(min_weight=1000, max_change=1500, update_every=timedelta(seconds=60))


def evidence(finding: Evidence.Finding, metric: str = "sold", arm: str = "new", **fields: Any) -> Evidence:
    role = TrialMetric.ROLE_GUARDRAIL if metric == "error_rate" else TrialMetric.ROLE_SUCCESS
    return Evidence(metric=metric, role=role, arm=arm, finding=finding, reason="numbers", **fields)


HARM = evidence(Evidence.FINDING_HARMFUL, "error_rate")
BETTER = evidence(Evidence.FINDING_BETTER)
WORSE = evidence(Evidence.FINDING_HARMFUL)
UNDECIDED = evidence(Evidence.FINDING_UNDECIDED)
SAFE = evidence(Evidence.FINDING_SAFE, "error_rate")
SLOW = Evidence(
    metric="latency_ms",
    role=TrialMetric.ROLE_GUARDRAIL,
    arm="new",
    finding=Evidence.FINDING_HARMFUL,
    reason="numbers",
)


def action(standing: Standing, verdict: Verdict | None = None) -> Action | None:
    step = next_step(standing, verdict, NOW)
    return None if step is None else step.action


@pytest.mark.parametrize(
    ("standing", "expected"),
    [
        (SCHEDULED, Action.START),
        (replace(SCHEDULED, start_at=NOW), Action.START),
        (replace(SCHEDULED, start_at=NOW + HOUR), None),
        (replace(SCHEDULED, stop_at=NOW), Action.STOP),
        (replace(SCHEDULED, stop_at=NOW + HOUR), Action.START),
        (RUNNING, None),
        (replace(RUNNING, stop_at=NOW + HOUR), None),
        (replace(RUNNING, stop_at=NOW), Action.STOP),
        (STOPPED, None),
        (replace(STOPPED, stopped_at=NOW - timedelta(days=1)), Action.CLOSE),
        (replace(STOPPED, stopped_at=NOW - timedelta(days=1), closed_at=NOW), None),
        (replace(RUNNING, status="draft"), None),
    ],
)
def test_time_starts_stops_and_closes(standing: Standing, expected: Action | None) -> None:
    assert action(standing) == expected


@pytest.mark.parametrize(
    ("found", "mismatch", "stops"),
    [
        ([], False, False),
        ([UNDECIDED, SAFE], False, False),
        ([HARM], False, True),
        ([SLOW], False, True),
        ([BETTER], False, True),
        ([WORSE], False, True),
        # A split that is not what was configured proves nothing but a rise of errors.
        ([BETTER], True, False),
        ([WORSE], True, False),
        ([SLOW], True, False),
        ([HARM], True, True),
        # What is said of another arm than the variants is not about this experiment.
        ([evidence(Evidence.FINDING_BETTER, arm="gone")], False, False),
        # A guardrail proven better is no success.
        ([evidence(Evidence.FINDING_BETTER, "error_rate")], False, False),
    ],
)
def test_only_what_is_proven_stops(found: list[Evidence], mismatch: bool, stops: bool) -> None:
    verdict = Verdict(evidence=found, sample_ratio_mismatch=mismatch)
    assert bool(proven(verdict, RUNNING.variants)) == stops
    assert action(RUNNING, verdict) == (Action.STOP if stops else None)
    assert action(replace(RUNNING, auto_stop=False), verdict) is None


def test_one_variant_of_several_that_is_worse_does_not_stop_the_others() -> None:
    variants = ("old", "new", "newer")
    one = Verdict(evidence=[WORSE, evidence(Evidence.FINDING_UNDECIDED, arm="newer")])
    assert proven(one, variants) == ""
    elsewhere = Verdict(evidence=[WORSE, evidence(Evidence.FINDING_HARMFUL, "kept", arm="newer")])
    assert proven(elsewhere, variants) == ""
    both = Verdict(evidence=[WORSE, evidence(Evidence.FINDING_HARMFUL, arm="newer")])
    assert proven(both, variants) == "every variant is proven worse in sold: numbers"


def test_a_bandit_moves_within_its_bounds_and_once_per_verdict_on_the_present_weights() -> None:
    bandit = replace(RUNNING, bandit=BANDIT, auto_stop=False)
    verdict = Verdict(trial_revision=7, weights=[500, 9500])
    step = next_step(bandit, verdict, NOW)
    assert step is not None
    assert (step.action, step.weights) == (Action.REWEIGHT, (3500, 6500))
    assert step.reason == "the bandit follows the evidence: old 50% to 35%, new 50% to 65%"
    assert action(replace(bandit, revision=8), verdict) is None
    assert action(replace(bandit, weighted_at=NOW - timedelta(seconds=59)), verdict) is None
    assert action(replace(bandit, weighted_at=NOW - timedelta(seconds=60)), verdict) == Action.REWEIGHT
    first = replace(bandit, weighted_at=None)
    assert action(first, verdict) == Action.REWEIGHT
    assert action(replace(first, started_at=NOW - timedelta(seconds=59)), verdict) is None
    for apart_s in (3, 5):  # as clocks of two registries may be
        assert action(replace(bandit, weighted_at=NOW + timedelta(seconds=apart_s)), verdict) is None
    ahead = replace(bandit, weighted_at=NOW + timedelta(hours=1))
    assert action(ahead, verdict) == action(bandit, verdict) is not None, "the clock was set back since"
    for refused in (
        Verdict(trial_revision=7, weights=[5000, 5000]),
        Verdict(trial_revision=7, weights=[500, 9000]),
        Verdict(trial_revision=7, weights=[10_000]),
        Verdict(trial_revision=7),
        Verdict(trial_revision=7, weights=[500, 9500], sample_ratio_mismatch=True),
    ):
        assert action(bandit, refused) is None
