"""The promises of verdicts, by simulation of everything between logged requests and findings. Seeds are
fixed, so a failure is a change of the code, not bad luck; `python -m benchmarks.trial_errors` runs the same
by the thousand."""

import math

import numpy as np
import pytest
from headrace.v1.trials_pb2 import Evidence

from services.analytics.statistics.bets import RandomisedCounts, Side, randomised_share
from services.analytics.statistics.stratified import Cells, log_evidence, stratified_effect
from tests.fixtures.trial_units import Requests, World, findings, guardrails, revenue, trial

HARMFUL = Evidence.FINDING_HARMFUL
SIDES: tuple[Side, Side] = ("above", "below")


def test_a_drifting_world_and_growing_weights_prove_nothing_about_equal_versions() -> None:
    """Without margins every finding is false: 2,000 runs of 20 looks at first requests, whose error rate
    grows from 1% to 5% while the canary grows from 1% to 50%."""
    rng = np.random.default_rng(21)
    runs, looks, units = 2_000, 20, 300
    shares = np.repeat([0.01, 0.05, 0.10, 0.25, 0.50], 4)
    rates = np.linspace(0.01, 0.05, looks)
    treated = rng.binomial(units, shares, (runs, looks))
    failed = rng.binomial(treated, rates)
    control_failed = rng.binomial(units - treated, rates)
    naive = np.zeros(runs, dtype=bool)
    false = np.zeros(runs, dtype=bool)
    for look in range(1, looks + 1):
        counts = RandomisedCounts(
            shares[:look],
            *(
                side[:, :look].astype(np.float64)
                for side in (units - treated, control_failed, treated, failed)
            ),
        )
        for side in SIDES:
            false |= randomised_share(counts, 0.0, side) >= math.log(2 / 0.05)
        totals = [side[:, :look].sum(axis=1) for side in (units - treated, control_failed, treated, failed)]
        pooled = (totals[1] + totals[3]) / (totals[0] + totals[2])
        spread = np.sqrt(
            np.maximum(1e-12, pooled * (1 - pooled)) * (1 / totals[0] + 1 / np.maximum(1, totals[2]))
        )
        gap = totals[3] / np.maximum(1, totals[2]) - totals[1] / totals[0]
        naive |= np.abs(gap) > 1.96 * spread
    assert false.mean() <= 0.05
    assert naive.mean() > 0.3  # pooling and peeking, as is usual, would have believed


def test_no_finding_comes_from_skewed_clustered_drifting_equals() -> None:
    made = trial([*guardrails(), revenue()])
    false = 0
    for run in range(20):
        requests = World(requests=4_000, users=800).simulate(np.random.default_rng([22, run]))
        false += bool(findings(made, requests, [1_000, 2_500, 4_000])[1])
    assert false / 20 <= 0.05


def test_means_of_clustered_skewed_units_hold_at_twenty_looks() -> None:
    """The piece that is asymptotic, at its earliest: from 100 units in the smaller arm."""
    rng = np.random.default_rng(23)
    false = 0
    runs = 100
    for _ in range(runs):
        world = World(requests=4_000, users=1_000, weights=(0.1, 0.5), drift=2.0)
        requests = world.simulate(rng)
        false += _crossed(requests)
    assert false / runs <= 0.05


def _crossed(requests: Requests) -> bool:
    key = (requests.units * 64 + requests.strata) * 2 + requests.arms
    for look in range(400, 4_001, 400):
        found, place = np.unique(key[:look], return_inverse=True)
        cells = Cells(
            (found // 128).astype(np.uint64),
            found % 2,
            found // 2 % 64,
            np.bincount(place, requests.latency_ms[:look]).astype(np.float64),
            np.bincount(place).astype(np.float64),
        )
        effect = stratified_effect(cells)
        if effect is not None and max(
            log_evidence(effect, 0.0, above=side) for side in (True, False)
        ) >= math.log(2 / 0.05):
            return True
    return False


@pytest.mark.parametrize("users", [0, 3_000])
def test_five_percent_against_one_is_found_before_two_thousand_requests(users: int) -> None:
    made = trial(guardrails(0.01)[:1], alpha=0.05 / 2)  # as with a second guardrail beside it
    found = []
    for run in range(20):
        world = World(
            requests=22_000,
            users=users,
            weights=(0.1,),
            errors=0.01,
            treated_errors=0.05,
            unlike=0.25,
            drift=1.0,
        )
        requests = world.simulate(np.random.default_rng([24, run]))
        answered = np.cumsum(requests.arms)
        looks = [int(np.searchsorted(answered, count)) + 1 for count in (500, 1_000, 1_500, 1_950)]
        _, made_at = findings(made, requests, looks, until={HARMFUL})
        found.append(any(one.finding == HARMFUL for _, one in made_at))
    assert np.mean(found) >= 0.95


def test_a_broken_version_is_found_within_sixty_requests() -> None:
    made = trial(guardrails(0.01)[:1], alpha=0.05 / 2)
    for run in range(20):
        world = World(requests=1_000, users=0, weights=(0.1,), errors=0.01, treated_errors=1.0, drift=1.0)
        requests = world.simulate(np.random.default_rng([25, run]))
        look = int(np.searchsorted(np.cumsum(requests.arms), 60)) + 1
        settled, _ = findings(made, requests, [look])
        assert settled[0].finding == HARMFUL
