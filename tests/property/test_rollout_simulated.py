"""Rollouts of simulated users, from their requests through analytics' evidence to the registry's decisions:
how often an equal version is condemned or praised, and how soon a worse one goes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from headrace.v1.trials_pb2 import ArmCount, Evidence, Trial, TrialMetric, Verdict
from numpy.typing import NDArray

from services.analytics.evidence import weigh
from services.analytics.verdicts import Maxima, settle
from services.registry.rollout_plan import Action, Gate, PlannedStep, Rollout, Status
from services.registry.rollout_steps import next_step
from tests.fixtures.rollouts import a_rollout, after, carried_out, facts
from tests.fixtures.trial_units import DECREASE, GUARDRAIL, Requests, observe, revenue, trial

PLAN = (
    PlannedStep(500, min_requests=50),
    PlannedStep(1000, min_requests=100),
    PlannedStep(5000, min_requests=500, gate=Gate.SAFE),
    PlannedStep(10_000),
)
MOST_REQUESTS = 8_000
USERS = 4_000


@dataclass(frozen=True, slots=True)
class Ended:
    """A simulated rollout: how it ended, what was found of it, and the requests that the new version had
    answered."""

    status: Status
    findings: frozenset[tuple[str, Evidence.Finding]]
    answered: int


def errors(margin: float) -> TrialMetric:
    return TrialMetric(name="error_rate", role=GUARDRAIL, direction=DECREASE, margin=margin)


def simulated(seed: int, asked: Trial, rates: tuple[float, float], look_every: int) -> Ended:
    """One rollout in a world whose error rate doubles meanwhile; `rates` are those of the two versions at
    first, and there is a look after every `look_every` requests."""
    rng = np.random.default_rng(seed)
    activity = rng.lognormal(0.0, 1.0, USERS)
    activity /= activity.sum()
    place = rng.random(USERS)  # a user's bucket: who has the new version keeps it while its share grows
    own = rng.gamma(0.5, 2.0, USERS)
    rollout = a_rollout(
        plan=PLAN, guardrails=("error_rate",), successes=("revenue",), bake_s=0.0, trial_revision=0
    )
    requests, shares = nothing(), np.zeros(0)
    largest: dict[tuple[str, str], Maxima] = {}
    found: set[tuple[str, Evidence.Finding]] = set()
    while requests.units.size < MOST_REQUESTS and not rollout.at_full:
        if rollout.trial_revision == shares.size:
            shares = np.append(shares, rollout.weight / 10_000)
        units = rng.choice(USERS, look_every, p=activity)
        arms = (place[units] < shares[-1]).astype(np.int64)
        growth = 1 + requests.units.size / MOST_REQUESTS
        rate = np.where(arms == 1, rates[1], rates[0]) * growth * own[units]
        bought = rng.random(look_every) < 0.05 * growth
        came = Requests(
            units=units.astype(np.int64),
            arms=arms,
            strata=np.full(look_every, shares.size - 1),
            periods=np.full(look_every, requests.units.size * 20 // MOST_REQUESTS),
            failed=rng.random(look_every) < np.minimum(1.0, rate),
            latency_ms=np.ones(look_every),
            revenue=np.where(bought, rng.lognormal(0.0, 1.2, look_every), 0.0),
            shares=shares,
        )
        requests = joined(requests, came)
        verdict = judged(asked, requests, largest, rollout)
        found |= {(e.metric, e.finding) for e in verdict.evidence}
        now = after(requests.units.size / 100)
        step = next_step(rollout, facts(rollout, verdict=verdict, verdict_at=now), now)
        rollout = carried_out(rollout, step, now)
        if step.action is Action.ROLL_BACK:
            break
    return Ended(rollout.status, frozenset(found), int(requests.arms.sum()))


def nothing() -> Requests:
    none: NDArray[np.int64] = np.zeros(0, dtype=np.int64)
    values = np.zeros(0)
    return Requests(none, none, none, none, values > 0, values, values, values)


def joined(before: Requests, came: Requests) -> Requests:
    names = ("units", "arms", "strata", "periods", "failed", "latency_ms", "revenue")
    both = {name: np.concatenate([getattr(before, name), getattr(came, name)]) for name in names}
    return replace(came, **both)


def judged(
    asked: Trial, requests: Requests, largest: dict[tuple[str, str], Maxima], rollout: Rollout
) -> Verdict:
    """As analytics would, with what it remembers in `largest`."""
    evidence = weigh(asked, observe(asked, requests, requests.units.size))
    for one in evidence:
        ever = largest.get((one.metric, one.arm), Maxima())
        largest[one.metric, one.arm] = Maxima(
            max(ever.harm, one.log_e_harm), max(ever.safe, one.log_e_safe), max(ever.better, one.log_e_better)
        )
    here = requests.strata == requests.strata[-1]
    arms = [
        ArmCount(name=name, requests_since=int(np.sum(here & (requests.arms == arm))))
        for arm, name in enumerate(("1", "2"))
    ]
    revision = rollout.trial_revision
    return Verdict(trial_revision=revision, arms=arms, evidence=settle(asked, evidence, largest))


@pytest.mark.parametrize("margin", [0.0, 0.04])
def test_an_equal_version_is_condemned_or_praised_no_more_often_than_the_budget_says(margin: float) -> None:
    """With a margin of 0 every difference would be harm, so the whole budget can be spent."""
    runs = 100
    asked = trial([errors(margin), revenue()], alpha=0.05)
    ended = [simulated(seed, asked, (0.02, 0.02), 800) for seed in range(runs)]
    wrong = [
        run
        for run in ended
        if run.status is Status.ROLLED_BACK
        or run.findings & {("error_rate", Evidence.FINDING_BETTER), ("revenue", Evidence.FINDING_BETTER)}
    ]
    assert len(wrong) <= asked.alpha * runs, [run.findings for run in wrong]
    if margin:
        assert Counter(run.status for run in ended)[Status.BAKING] >= 0.9 * runs


def test_a_worse_version_goes_before_it_has_answered_2000_requests() -> None:
    asked = trial([errors(0.01)], alpha=0.05)
    ended = [simulated(seed, asked, (0.01, 0.06), 400) for seed in range(20)]
    assert {run.status for run in ended} == {Status.ROLLED_BACK}
    assert max(run.answered for run in ended) < 2000
    broken = [simulated(seed, asked, (0.0, 1.0), 400) for seed in range(10)]
    assert {run.status for run in broken} == {Status.ROLLED_BACK}
    assert max(run.answered for run in broken) < 100


def test_a_better_version_takes_over() -> None:
    asked = trial([errors(0.01)], alpha=0.05)
    ended = [simulated(seed, asked, (0.06, 0.01), 800) for seed in range(20)]
    assert {run.status for run in ended} == {Status.BAKING}
    assert sum(("error_rate", Evidence.FINDING_BETTER) in run.findings for run in ended) >= 18
